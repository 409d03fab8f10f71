"""Files and tables, the truth of a collection.

Each builds on those above it:

    durable          files that are whole or absent, the writer's lock
    segments         immutable vector files
    items            items and failures as values
    words            captions and file names searched by their words
    metadata_index   the metadata of the items, value by value
    open_databases   reading a database's bytes beside this process's connections
    schema           the database's tables
    upgrading        a database of the version before, brought up to date
    conditions       conditions on metadata, and how they are written
    filters          the SQL that decides them
    filter_hints     why a filter selects nothing
    sorting          what results are sorted by
    connecting       connections, also where nothing can be written
    database         a connection to the SQLite file, taken in turns
    row_writing      the statements of which commits are made
    store            items, failures and segments in the database
    sources          which source gave what
    annotations      metadata that no source gave
    snapshot         live items and their vectors, as of one commit
    manifest         which model, which index generation
    creation         a collection's folder, whole or not at all
"""
