"""The verbs of the command line that work on collections.

index            ``clipsys index``
search           ``clipsys search``
hits             the table and the lines that a search prints
sources          ``clipsys sources``
evaluate         ``clipsys evaluate``, on sources and on collections
reports          ``clipsys info``, ``failures``, ``duplicates``
maintenance      ``clipsys remove``, ``compact``, ``verify``, ``repair``
"""
