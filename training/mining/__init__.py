"""Hard negatives from the model's own embeddings, mined once in a while.

config      how often, how deep, and what is left out
search      from vectors to a list of candidates, with FAISS
encoding    vectors of all samples, by all ranks
miner       keeps the list of a run: when it is refreshed, where it lies
"""
