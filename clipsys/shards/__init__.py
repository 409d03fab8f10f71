"""The WebDataset format: tar files of images with their captions, labels and metadata.

remote              local copies of shards behind https, s3 and the like
manifest            shards.json: what each shard holds
sample_texts        captions, labels and metadata, read and checked
samples             what a sample is, and what makes one unusable
reading             from tar members to `Sample`s, in order
tar_headers         where the members of a tar lie
stored_index        the index of a shard, stored with the cache
counting            samples of many shards
random_access       where each sample lies in its tar, and reading any of them
writing             samples into shards
checking            whether shards are sound
"""
