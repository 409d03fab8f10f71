"""Figures of benchmarks/objectives.py: probes of stored features, tables, the picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from objective_data import CORRUPTIONS, ImageSet

from clipsys.evaluation.metrics.classification import flat_figures, predictions
from clipsys.evaluation.tasks.probes import Kind, ProbeSettings, fit_probe
from clipsys.evaluation.tasks.splitting import LabelledVectors, class_targets

KINDS: tuple[Kind, ...] = ("knn", "logistic", "mlp")
_KEPT = ("accuracy@1", "macro_precision", "macro_recall", "macro_f1")


def dev_accuracy(images: ImageSet, features: dict[str, np.ndarray]) -> float:
    """Share of ``dev`` that the nearest images of ``fit`` classify rightly."""
    found = _figures(images, features, "knn", ["dev"])
    return found["dev"]["accuracy@1"]


def measure_cell(images: ImageSet, features: dict[str, np.ndarray]) -> dict[str, Any]:
    """Figures by probe and by what the test images underwent; of subgroups by kNN and ``mlp``."""
    tests = ["test", *(corruption.key for corruption in CORRUPTIONS)]
    found: dict[str, Any] = {kind: _figures(images, features, kind, tests) for kind in KINDS}
    for kind in ("knn", "mlp"):
        fine = _figures(images, features, kind, ["test"], fine=True)
        found[f"{kind}_subgroup"] = fine
    return found


def _figures(
    images: ImageSet,
    features: dict[str, np.ndarray],
    kind: Kind,
    tests: list[str],
    *,
    fine: bool = False,
) -> dict[str, dict[str, float]]:
    """Figures of a classifier that is trained on ``fit`` once."""
    train = images.vectors("fit", features["fit"], fine=fine)
    known = set(train.labels)
    found, fitted = {}, None
    for name in tests:
        test = _of_known(images.vectors(name, features[name], fine=fine), known)
        classes, target_N, test_M = class_targets(train, test, name)
        if fitted is None:
            fitted = fit_probe(train, target_N, len(classes), ProbeSettings(kind))
        scores_MC = fitted.score(test.vectors_ND)
        flat = flat_figures(predictions(scores_MC, test_M, classes))
        found[name] = {key: flat[key] for key in flat if key in _KEPT}
    return found


def _of_known(test: LabelledVectors, known: set[str]) -> LabelledVectors:
    """Without images of classes that have no training image."""
    return test.take(np.flatnonzero([label in known for label in test.labels]))
