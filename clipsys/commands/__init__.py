"""The verbs of the command line that need neither a collection nor a run.

options             arguments and options that several verbs share
shards              ``clipsys shards``
models              ``clipsys models``
interpolate         ``clipsys interpolate``
doctor              ``clipsys doctor``
"""
