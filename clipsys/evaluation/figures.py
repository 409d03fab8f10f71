"""Retrieval, zero-shot and probe figures, from records or from vectors.

Every figure comes with the number of candidates and with chance level, without which a recall says
little.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from clipsys.errors import DataError
from clipsys.evaluation import metrics

Floats = npt.NDArray[np.float32]
Captions = Literal["first", "all"]


@dataclass(frozen=True)
class RetrievalTargets:
    """Which texts belong to which images.

    Attributes:
        texts: M queries.
        text_groups: (M,) group of each text.
        image_groups: (N,) group of each image; equal groups are hits of each other.
    """

    texts: list[str]
    text_groups: npt.NDArray[np.int64]
    image_groups: npt.NDArray[np.int64]


def retrieval_targets(
    items: Iterable[tuple[Sequence[str], dict[str, Any]]],
    *,
    captions: Captions = "all",
    match: str | None = None,
) -> RetrievalTargets:
    """Builds queries and groups from (captions, metadata) of each image, in the images' order.

    Args:
        items: items of the images, in order.
        captions: whether the first caption or every one is a query.
        match: metadata key; images with the same value are hits of each other's captions.

    Raises:
        DataError: an item lacks the key, or no item has a caption.
    """
    texts: list[str] = []
    text_groups: list[int] = []
    image_groups: list[int] = []
    known: dict[Any, int] = {}
    for number, (item_captions, metadata) in enumerate(items):
        group = number
        if match is not None:
            if match not in metadata:
                raise DataError(
                    f"item {number} has no metadata key {match!r}; "
                    f"it has {', '.join(sorted(metadata)) or 'none'}"
                )
            group = known.setdefault(metadata[match], len(known))
        image_groups.append(group)
        chosen = item_captions[:1] if captions == "first" else item_captions
        texts.extend(chosen)
        text_groups.extend([group] * len(chosen))
    if not texts:
        raise DataError("no item has a caption, so there is nothing to search with")
    return RetrievalTargets(texts, np.array(text_groups), np.array(image_groups))


def retrieval_figures(
    image_ND: Floats, text_MD: Floats, targets: RetrievalTargets
) -> dict[str, float]:
    """Recall in both directions at 1, 5 and 10, with candidates and chance."""
    figures: dict[str, float] = {}
    directions = {
        "text_to_image": (text_MD, image_ND, targets.text_groups, targets.image_groups),
        "image_to_text": (image_ND, text_MD, targets.image_groups, targets.text_groups),
    }
    for name, (queries, candidates, query_groups, candidate_groups) in directions.items():
        ranks = metrics.first_hit_ranks(queries, candidates, query_groups, candidate_groups)
        chance = metrics.chance_recall(query_groups, candidate_groups)
        figures |= {f"{name}/{key}": value for key, value in metrics.recall_at(ranks).items()}
        figures[f"{name}/median_rank"] = float(np.median(ranks)) + 1
        figures |= {f"{name}/chance_{key}": value for key, value in chance.items()}
        figures[f"{name}/candidates"] = len(candidates)
        figures[f"{name}/queries"] = len(queries)
    return figures


def zeroshot_figures(
    image_ND: Floats, class_CD: Floats, classes: Sequence[str], labels: Sequence[str]
) -> dict[str, float]:
    """Accuracy of the nearest class vector.

    Raises:
        DataError: a label is not among the classes.
    """
    index = {name: number for number, name in enumerate(classes)}
    unknown = sorted(set(labels) - set(index))
    if unknown:
        raise DataError(
            f"label {unknown[0]!r} is not among the classes ({', '.join(list(classes)[:8])}, …)"
        )
    targets = np.array([index[label] for label in labels])
    return metrics.accuracy(image_ND @ class_CD.T, targets) | {
        "chance_accuracy@1": 1 / len(classes),
        "classes": len(classes),
        "images": len(labels),
    }


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
