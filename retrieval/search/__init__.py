"""From a query to its hits.

query            a query of weighted parts, and a hit
grammar          a query in one line
ranking          the candidates for the top k, from an index or a scan
rescoring        exact cosines of candidates, from the stored vectors
calibration      how many unrelated items would score as high
text_relevance   what a text query and its hits have to reach, by the model's captions
view             a reader's snapshot and index, following the writer
stored           all stored vectors in blocks, with their items
options          which hits come back, and in which order
encoding         queries are read and become vectors
searching        filter, rank, fuse, cut, fold, sort
"""
