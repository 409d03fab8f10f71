"""Zero-shot classification: class names become text vectors, and images take the nearest one.

classes             names, synonyms and descriptions of classes, checked
templates           sentences for the names, and named sets of them
class_vectors       one vector a class, and their cache on disk
deciding            from vectors to probabilities, one or several labels, and none
calibration         a temperature that makes probabilities honest
images              images of any form as vectors, streamed
classifier          `ZeroShotClassifier` and its `Prediction`
attention           attention of a vision transformer, with gradients
explain             which parts of an image speak for a label
"""
