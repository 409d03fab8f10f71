"""What fills, changes and checks a collection.

corpora          several sources as one stream of records
report           what became of the records
embedding        records to committed batches, decoding ahead of the encoder
pruning          removing what no source gives any more
compaction       dropping deleted vectors, joining small segments
writing          a writer's turn: commits and index generations
info             what a collection holds, in numbers
duplicates       near-duplicate groups
verification     every invariant, checked against the files
repairing        what can be mended of them
migration        another model, built beside and swapped
keeping          all of it, for `Collection`
"""
