"""Metrics: figures from vectors, scores and labels, in blocks, so that no score matrix is whole.

ranks               ranks of correct candidates, and recall
classification      accuracy
"""
