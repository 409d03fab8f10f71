"""Evaluation: what a model's embeddings are worth, in figures that can be believed.

results             `Figure` and `Result`: what every task returns
embedded            `EmbeddedImages`: the images of a data set with their vectors
class_names         names of numbered classes
resampling          bootstrap intervals and paired tests
metrics/            figures from vectors, scores and labels
tasks/              zero-shot classification, retrieval and probes
comparison          two models on one task, paired
reports/            results as plots, Markdown and HTML
measuring           from a model and a data set to results
"""
