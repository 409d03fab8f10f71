"""Metrics, and the tasks that measure a model.

metrics             recall, ranks and accuracy from scores
figures             what one evaluation reports, from vectors
tasks               zero-shot classification, retrieval and probes of a model on a data set
"""
