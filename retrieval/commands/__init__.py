"""The verbs of the command line that work on collections.

index            ``clipsys index``
search           ``clipsys search``
sources          ``clipsys sources``
keeping          ``clipsys info``, ``verify``, ``repair`` and so on
"""
