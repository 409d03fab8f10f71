"""The embedded sample corpus, and the whole way over it."""
