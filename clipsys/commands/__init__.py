"""The verbs of the command line that need neither a collection nor a run.

options             arguments and options that several verbs share
shards              ``clipsys shards``
classify            ``clipsys classify``
models              ``clipsys models``
doctor              ``clipsys doctor``
"""
