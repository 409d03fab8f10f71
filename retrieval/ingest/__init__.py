"""From sources to committed items.

sources          several sources as one stream of records
report           what became of the records
texts            an item's captions and metadata, following its sources
loading          reading and decoding records in threads
moving           files that were moved
embedding        records to items, failures and updates, decoding ahead of the encoder
pending          what is read and not yet committed
pruning          removing what no source gives any more
healing          one item a file, whatever paths led to it
relocation       sources that were renamed or are gone for good
annotating       metadata that is written to items afterwards
adding           all of it, as one run of the writer
"""
