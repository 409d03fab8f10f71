"""The verbs of the command line that work on collections.

index            ``clipsys index``
search           ``clipsys search``
hits             the table and the lines that a search prints
sources          ``clipsys sources``
classify         ``clipsys classify``, on sources and on collections
image_stream     images of sources as vectors, decoded ahead of the encoder
class_options    the classes that options and files give
predictions      what is printed of labels
explanations     pictures of what speaks for a label
evaluate         ``clipsys evaluate``, on sources and on collections
records          a collection as a data set
reports          ``clipsys info``, ``failures``, ``duplicates``
maintenance      ``clipsys remove``, ``compact``, ``verify``, ``repair``
"""
