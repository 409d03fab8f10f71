"""The FAISS index of a collection, derived from its vectors.

faiss_library    FAISS, imported when an index is first touched
id_set           sets of ids that FAISS tests while it searches
memory           what this process may still take
planning         which index, and when another one
fastscan         4-bit codes in FAISS's layout for fast scan
gpu              placing an index on GPUs, and searching there
generation       index files, opened and searched
tuning           measuring an index, and the effort that reaches a recall
clustering       k-means by matrix products
new_file         an index file that appears whole or not at all
inverted_file    an index larger than memory, written list by list
building         training, filling, extending and writing an index
"""
