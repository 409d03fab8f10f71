"""Evaluation: what a model's embeddings are worth, in figures that can be believed.

results             `Figure` and `Result`: what every task returns
embedded            `EmbeddedImages`: the images of a data set with their vectors
data                data sets: published layouts and people's own files as records
splits              train, validation and test: folders, or beginnings of files' names
clip_benchmark      the shards that CLIP benchmark writes
sampling            a part of a data set that is spread over the whole of it
cache               vectors that were computed once, by encoder and content
block_encoding      blocks of images through the encoder, by one process or several
encoding            a data set's vectors, each content encoded once
class_names         names of numbered classes
resampling          bootstrap intervals and paired tests
metrics/            figures from vectors, scores and labels
tasks/              zero-shot classification, retrieval and probes
comparison          two models on one task, paired
class_comparison    the same for figures over classes
interpolation       which weights between two models to take
reports/            results as plots, Markdown and HTML
measuring           from a model and a data set to results
"""
