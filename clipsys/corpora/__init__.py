"""People's own data as records: folders, tables and shards.

records             one image of a corpus, with its captions and metadata
columns             what the columns of a table mean
delimited           rows of CSV, TSV and JSON Lines, in whatever encoding
parquet_cells       rows and images of Parquet, told by the schema
tables              any of these as records
sources             whatever a user names: a folder, a table or shards
packing             any of them into shards
"""
