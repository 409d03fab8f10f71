"""People's own data as records: folders, tables and shards.

real_paths          the one real path of each file
records             one image of a corpus, with its captions and metadata
columns             what the columns of a table mean
delimited           rows of CSV, TSV and JSON Lines, in whatever encoding
parquet_cells       rows and images of Parquet, found by the schema
tables              any of these as records
folders             a folder's images, and what is left out of it
sources             whatever a user names: an image, a folder, a table or shards
packing             any of them into shards
"""
