"""People's own data as records: folders, tables and shards.

records             one image of a corpus, with its captions and metadata
parquet_cells       cells of Parquet files as images, texts and metadata
tables              CSV, TSV, JSON Lines and Parquet
sources             whatever a user names: a folder, a table or shards
packing             any of them into shards
"""
