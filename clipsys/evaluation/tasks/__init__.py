"""Tasks: what is measured of a model, from vectors to a `clipsys.evaluation.results.Result`.

zeroshot            images are classified by the names of their classes
retrieval           texts find their images, and images their texts
probes              classifiers on frozen features
"""
