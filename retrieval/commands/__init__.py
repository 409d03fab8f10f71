"""The verbs of the command line that work on collections.

index            ``clipsys index``
search           ``clipsys search``
hits             what it prints
sources          ``clipsys sources``
evaluate         ``clipsys evaluate``, on sources and on collections
keeping          ``clipsys info``, ``verify``, ``repair`` and so on
"""
