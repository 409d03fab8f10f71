"""Accuracy of a classification."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def accuracy(
    scores_NC: Floats, targets_N: npt.ArrayLike, ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """``accuracy@k`` and the mean accuracy per class, from scores and integer targets.

    As in `first_hit_ranks`, a class that ties with the right one counts as better.
    """
    targets = np.asarray(targets_N)
    if len(targets) == 0:
        return {f"accuracy@{k}": 0.0 for k in ks} | {"mean_class_accuracy": 0.0}
    right = scores_NC[np.arange(len(targets)), targets][:, None]
    ranks = (scores_NC >= right).sum(axis=1) - 1
    figures = {
        f"accuracy@{k}": float((ranks < k).mean()) for k in ks if k < scores_NC.shape[1] or k == 1
    }
    classes = [float((ranks[targets == label] < 1).mean()) for label in np.unique(targets)]
    return figures | {"mean_class_accuracy": float(np.mean(classes))}
