"""The one writer of a collection, for as long as it holds the lock.

compaction       dropping deleted vectors, joining small segments
relevance        what the relevance of text queries is measured by
writer           commits of items, and the index generations that follow them
"""
