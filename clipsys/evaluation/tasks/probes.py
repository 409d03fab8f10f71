"""Probes: classifiers on frozen image features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from clipsys.errors import DataError

Floats = npt.NDArray[np.float32]

#: Neighbours that vote, and the temperature of their votes (Wu et al. 2018, section 3.4).
KNN_NEIGHBOURS, KNN_TEMPERATURE = 20, 0.07


def knn_figures(
    image_ND: Floats, labels: Sequence[str], same: Sequence[object] | None = None
) -> dict[str, float]:
    """Each image is classified by its nearest neighbours among all others.

    The `KNN_NEIGHBOURS` nearest vote for their own label, weighted by exp(cosine / temperature)
    (Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination").

    Args:
        image_ND: unit norm.
        labels: N.
        same: N values; images of equal value show the same thing and do not vote for each other.
            None: only the image itself does not vote.

    Returns:
        ``accuracy@1``, and the share of the largest class as ``chance_accuracy@1``.
    """
    classes, target_N = np.unique(np.asarray(labels), return_inverse=True)
    _, same_N = np.unique([repr(one) for one in same or range(len(labels))], return_inverse=True)
    right = 0
    for start in range(0, len(labels), 1024):
        rows = slice(start, start + 1024)
        cosine_BN = image_ND[rows] @ image_ND.T
        cosine_BN[same_N[rows, None] == same_N[None, :]] = -np.inf
        nearest_BK = np.argsort(-cosine_BN, axis=1, kind="stable")[:, :KNN_NEIGHBOURS]
        vote_BK = np.exp(np.take_along_axis(cosine_BN, nearest_BK, axis=1) / KNN_TEMPERATURE)
        votes_BC = np.zeros((len(cosine_BN), len(classes)))
        np.add.at(votes_BC, (np.arange(len(votes_BC))[:, None], target_N[nearest_BK]), vote_BK)
        right += int((votes_BC.argmax(axis=1) == target_N[rows]).sum())
    return {
        "accuracy@1": right / len(labels),
        "chance_accuracy@1": float(np.bincount(target_N).max()) / len(labels),
        "classes": len(classes),
        "images": len(labels),
    }


def probe_figures(
    train_ND: Floats,
    train_labels: Sequence[str],
    test_ND: Floats,
    test_labels: Sequence[str],
    *,
    seed: int = 0,
) -> dict[str, float]:
    """A linear probe: logistic regression on frozen features (Radford et al. 2021, section 3.2).

    The regularisation is chosen by cross-validation on the training part.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    smallest = min(np.unique(np.asarray(train_labels), return_counts=True)[1])
    if smallest < 2:
        raise DataError("a linear probe needs two images or more of each class to train on")
    folds = StratifiedKFold(min(5, int(smallest)), shuffle=True, random_state=seed)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    grid = {"logisticregression__C": np.logspace(-4, 2, 7)}
    search = GridSearchCV(probe, grid, cv=folds).fit(train_ND, np.asarray(train_labels))
    return {
        "accuracy@1": float(search.score(test_ND, np.asarray(test_labels))),
        "chance_accuracy@1": 1 / len(set(train_labels)),
        "train_images": len(train_labels),
        "test_images": len(test_labels),
        "C": float(search.best_params_["logisticregression__C"]),
    }
