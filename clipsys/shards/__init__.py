"""The WebDataset format: tar files of images with their captions, labels and metadata.

remote              local copies of shards behind https, s3 and the like
manifest            shards.json: what each shard holds
reading             from tar members to `Sample`s, in order
random_access       where each sample lies in its tar, and reading any of them
writing             samples into shards
checking            whether shards are sound
"""
