"""From weights to an encoder.

devices             which device, precision and number of threads
open_clip_models    building, loading and saving models in open_clip's local format
encoder             `Encoder`: images and texts to unit vectors
zeroshot            `ZeroShotClassifier`
"""
