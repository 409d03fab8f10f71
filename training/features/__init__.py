"""Features of locked towers: computed once, stored, and what is trained over them.

config      the sections ``features`` and ``unlock`` of a recipe
trunks      what stands before the heads of two towers, and the heads alone as a model
faults      what contradicts locked towers, or does nothing without them
store       blocks of features on disk, each complete or absent
extraction  from shards to stored features: decoded, augmented, encoded
taught      a teacher's vectors, looked up by what a row shows
batches     micro-batches of stored features, in the order that training asks for
"""
