"""People's own data as records: folders, tables and shards.

paths               the one real path of each file
records             one image of a corpus, with its captions and metadata
parquet_cells       cells of Parquet files as images, texts and metadata
tables              CSV, TSV, JSON Lines and Parquet
folders             a folder's images, and what is left out of it
sources             whatever a user names: an image, a folder, a table or shards
packing             any of them into shards
"""
