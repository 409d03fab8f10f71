"""From weights to an encoder.

devices             which device, precision and number of threads
hub                 the Hugging Face hub, quietly and within seconds
tokenization        the tokenizer of a text tower
architectures       open_clip's model_cfg: found, checked, made to fit
construction        how open_clip is called to make a model
parts               `ModelParts` and its fingerprint
model_folders       what lies in a model folder, and writing one
building            a model with random weights
loading             a model with its weights
catalogue           open_clip's pretrained models and their sizes
open_clip_models    the names of the last four as one
encoder             `Encoder`: images and texts to unit vectors
"""
