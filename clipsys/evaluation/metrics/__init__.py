"""Metrics: figures from vectors, scores and labels, in blocks, so that no score matrix is whole.

relation            which candidates are correct for which queries
distinct            which vectors are equal, so that each is scored once and copies tie
ranks               ranks of correct candidates, recall and average precision
two_way             the same in both directions, from one product in tiles
nearest             nearest vectors, and whose they are
chance              what a random order would reach
classification      accuracy, precision, recall, F1 and calibration, with intervals
"""
