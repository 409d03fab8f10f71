"""From a query to its hits.

query            what is searched for, and what comes back
grammar          a query in one line
ranking          the top k by exact cosine
calibration      how many unrelated items would score as high
view             a reader's snapshot and index, following the writer
options          which hits come back, and in which order
searching        filter, rank, fuse, cut, fold, sort
"""
