"""Tasks: what is measured of a model, from vectors to a `clipsys.evaluation.results.Result`.

zeroshot            images are classified by the names of their classes
retrieval           texts find their images, and images their texts
probes              classifiers on frozen features
few_shot            probes trained on a few images of each class
robustness          a task on corrupted images, a probe with wrong training labels
splitting           labelled vectors; training and test data without a leak
knn, trained_probes the classifiers
scoring             figures and intervals of a probe
"""
