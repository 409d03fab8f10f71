"""From weights to an encoder.

devices             which device, precision and number of threads
hub                 the Hugging Face hub, quietly and within seconds
tokenization        the tokenizer of a text tower
architectures       open_clip's model_cfg: found, checked, made to fit
construction        contexts in which open_clip makes a model
catalogue           open_clip's pretrained models and their sizes
open_clip_models    building, loading and saving models in open_clip's local format
encoder             `Encoder`: images and texts to unit vectors
zeroshot            `ZeroShotClassifier`
"""
