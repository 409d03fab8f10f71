"""From weights to an encoder.

devices             which device, precision and number of threads
hub                 the Hugging Face hub, quietly and within seconds
tokenization        the tokenizer of a text tower
architectures       open_clip's model_cfg: found, checked, made to fit
construction        how open_clip is called to make a model
parts               `ModelParts` and its fingerprint
model_folders       what lies in a model folder, and writing one
building            a model with random weights
adapters            what lies in an adapter folder, and merging it into its base
quantisation        weights in NF4
loading             a model with its weights
interpolation       weights between two models (WiSE-FT)
counting            what an architecture takes: parameters, GFLOP, activations
catalogue           open_clip's pretrained models: what they take and what they reach
catalogue_plot      the same as a picture
image_layers        the layers of an image tower, and how its tokens lie in the image
open_clip_models    the names of the last four as one
encoder             `Encoder`: images and texts to unit vectors
"""
