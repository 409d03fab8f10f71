"""Evaluation during training: the tasks of `clipsys evaluate`, shared over the ranks.

config          section ``evaluation`` of a recipe
held_out        the samples that can be used, the same ones on every rank
classifier      what an objective's own classifier is worth
measuring       `Validation`: encodes each rank's share and measures
canary          sets that are not trained on: what is forgotten
"""
