"""The input pipeline: from shards to the same micro-batches every time.

config              the section ``data`` of a recipe
order               which sample stands at which position of an epoch
sentences           sentences of a text
subset              a few samples of all, and labels that are wrong on purpose
classes             labels of the samples, and the numbers of the classes
samples             decoding one sample into a row of a batch
pixel_cache         decoded images kept for later epochs
shard_set           the shards of a run
frames              windows of ordered frames in the place of samples
ordering            the order that a recipe asks for
batches             positions into micro-batches
loader              worker processes that decode them ahead
skips               the ledger of samples that could not be used
augmentation        views of a batch, on the device
"""
