"""Metrics: figures from vectors, scores and labels, in blocks, so that no score matrix is whole.

relation            which candidates are correct for which queries
ranks               ranks of correct candidates, recall and average precision
chance              what a random order would reach
classification      accuracy, precision, recall, F1 and calibration, with intervals
"""
