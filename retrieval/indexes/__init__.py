"""The FAISS index of a collection, derived from its vectors.

memory           what this process may still take
planning         which index, and when another one
fastscan         4-bit codes in FAISS's layout for fast scan
index            FAISS generations, opened and searched
gpu              the same on GPUs
tuning           measuring an index, and the effort that reaches a recall
clustering       k-means by matrix products
inverted_file    an index larger than memory, written list by list
building         training, filling, extending and writing an index
"""
