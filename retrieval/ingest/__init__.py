"""From sources to committed items.

sources          several sources as one stream of records
report           what became of the records
embedding        records to committed batches, decoding ahead of the encoder
pruning          removing what no source gives any more
adding           all of it, as one run of the writer
"""
