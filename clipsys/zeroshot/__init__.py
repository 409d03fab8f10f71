"""Zero-shot classification: class names become text vectors, and images take the nearest one.

classifier          `ZeroShotClassifier` and its `Prediction`
"""
