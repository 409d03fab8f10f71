"""Labelled vectors for the tests of the tasks."""

from __future__ import annotations

import numpy as np

from clipsys.evaluation.tasks.splitting import LabelledVectors


def clusters(
    count: int, *, classes: int = 3, width: int = 8, noise: float = 0.6, seed: int = 0
) -> LabelledVectors:
    """Unit vectors around one centre per class, all images different."""
    random = np.random.default_rng(seed)
    targets = np.arange(count) % classes
    centres = np.random.default_rng(99).normal(size=(classes, width))
    vectors = (centres[targets] + noise * random.normal(size=(count, width))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"{seed}/{number}.png" for number in range(count)]
    labels = [f"class {target}" for target in targets]
    return LabelledVectors(vectors, labels, names, [(name,) for name in names])
