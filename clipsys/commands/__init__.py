"""The verbs of the command line that belong to no other package.

core                `shards`, `classify`, `evaluate` and `doctor`
doctor              what this machine has, and what would go wrong
"""
