"""Classifiers that are trained on frozen features: logistic regression and a perceptron.

Both choose on a validation part of the training data. Features are taken as they are: unit vectors
(in the perceptron times the root of their width, so that a component is about 1).

Legend of shapes: N training images, M test images, D width, C classes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

#: Vectors (M, D) -> probabilities (M, C).
Scorer = Callable[[Floats], Doubles]

_logger = logging.getLogger(__name__)

#: Share of the training data that settings are chosen on.
VALIDATION_SHARE = 0.2
#: L-BFGS stops here, as in the CLIP paper.
MAX_ITERATIONS = 1000
#: C of a logistic regression where no image is left to choose it on.
DEFAULT_C = 1.0
_COARSE_STEP, _FINE_STEP, _LARGEST = 16, 1, 48
#: Images of a step of the perceptron.
_BATCH = 256


@dataclass(frozen=True)
class TrainingPart:
    """What a probe is trained on.

    Attributes:
        vectors_ND: (N, D) unit norm.
        targets_N: (N,) classes.
        fit, validation: positions of the two parts; the second may be empty.
    """

    vectors_ND: Floats
    targets_N: Integers
    fit: Integers
    validation: Integers


def sweep(score: Callable[[float], tuple[float, float]]) -> float:
    """The best strength by the search of Radford et al. 2021, appendix A.3.

    96 steps, evenly spaced in the logarithm, lead from 1e-6 to 1e6. The search starts at 1e-6,
    1e-4, … 1e6 and halves the step around the best value until there are 8 steps a decade. Of
    equal scores, the smaller C (the stronger regularisation) is best.
    """
    scores: dict[int, tuple[float, float]] = {}

    def measure(step: int) -> None:
        if -_LARGEST <= step <= _LARGEST and step not in scores:
            scores[step] = score(strength(step))

    for step in range(-_LARGEST, _LARGEST + 1, _COARSE_STEP):
        measure(step)
    width = _COARSE_STEP
    while width > _FINE_STEP:
        width //= 2
        best = max(sorted(scores), key=scores.__getitem__)
        measure(best - width)
        measure(best + width)
    return strength(max(sorted(scores), key=scores.__getitem__))


def strength(step: int) -> float:
    """C at a step of the grid: 8 steps a decade, 0 is 1."""
    return float(10.0 ** (step / 8))


def logistic_regression(part: TrainingPart, num_classes: int) -> tuple[Scorer, float]:
    """A trained logistic regression, and the C that was chosen.

    C is chosen by accuracy on the validation part (of equal ones, by cross-entropy), and the
    classifier is trained again on all.
    """
    stopped = 0

    def trained(rows: Integers, c: float) -> Scorer:
        nonlocal stopped
        scorer, finished = _fit_logistic(
            part.vectors_ND[rows], part.targets_N[rows], c, num_classes
        )
        stopped += not finished
        return scorer

    def score(c: float) -> tuple[float, float]:
        probability_MC = trained(part.fit, c)(part.vectors_ND[part.validation])
        target_M = part.targets_N[part.validation]
        right_M = probability_MC[np.arange(len(target_M)), target_M]
        accuracy = float((probability_MC.argmax(axis=1) == target_M).mean())
        return accuracy, float(np.log(np.maximum(right_M, 1e-12)).mean())

    chosen = sweep(score) if len(part.validation) else DEFAULT_C
    scorer = trained(np.arange(len(part.targets_N)), chosen)
    if stopped:
        _logger.info(
            "logistic regression: %d fits stopped at %d iterations", stopped, MAX_ITERATIONS
        )
    return scorer, chosen


def _fit_logistic(
    vectors_ND: Floats,
    targets_N: Integers,
    c: float,
    num_classes: int,
) -> tuple[Scorer, bool]:
    """The trained classifier, and whether L-BFGS finished.

    Every fit starts at zero: a start at the solution of another C would already meet scikit-learn's
    tolerance, and be taken for the solution.
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(C=c, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        # Reported by the caller, once for all fits.
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(vectors_ND, targets_N)

    def scorer(query_MD: Floats) -> Doubles:
        probability_MC = np.zeros((len(query_MD), num_classes))
        probability_MC[:, probe.classes_] = probe.predict_proba(query_MD)
        return probability_MC

    return scorer, int(np.max(probe.n_iter_)) < MAX_ITERATIONS


def perceptron(
    part: TrainingPart,
    num_classes: int,
    *,
    hidden: int = 512,
    epochs: int = 100,
    patience: int = 10,
    seed: int = 0,
) -> tuple[Scorer, int]:
    """A trained perceptron of one hidden layer, and the epoch of its weights.

    The weights of the epoch of the least validation loss are used, and training ends when
    ``patience`` epochs brought nothing better; without validation images, a quarter of ``epochs``
    is trained. AdamW, 1e-3, batches of 256. In torch, because scikit-learn's MLPClassifier draws
    its validation images itself, and so tears apart images that show the same thing.
    """
    import torch
    from torch.nn import functional

    scale = part.vectors_ND.shape[1] ** 0.5
    features_ND = torch.from_numpy(np.ascontiguousarray(part.vectors_ND, np.float32)) * scale
    targets_N = torch.from_numpy(part.targets_N)
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Linear(features_ND.shape[1], hidden),
            torch.nn.ReLU(),
            torch.nn.Linear(hidden, num_classes),
        )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
    fit, validation = torch.from_numpy(part.fit), torch.from_numpy(part.validation)
    least, best_epoch, best = float("inf"), 0, network.state_dict()
    for epoch in range(1, (epochs if len(validation) else epochs // 4) + 1):
        order = fit[torch.randperm(len(fit), generator=random)]
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            optimizer.zero_grad()
            torch.autograd.backward(
                functional.cross_entropy(network(features_ND[rows]), targets_N[rows])
            )
            optimizer.step()
        loss = 0.0
        if len(validation):
            with torch.no_grad():
                logits = network(features_ND[validation])
                loss = float(functional.cross_entropy(logits, targets_N[validation]))
        if not len(validation) or loss < least:
            least, best_epoch, best = loss, epoch, copy.deepcopy(network.state_dict())
        elif epoch - best_epoch >= patience:
            break
    network.load_state_dict(best)

    def scorer(query_MD: Floats) -> Doubles:
        with torch.no_grad():
            queries = torch.from_numpy(np.ascontiguousarray(query_MD, np.float32)) * scale
            probability_MC: Doubles = network(queries).double().softmax(dim=1).numpy()
        return probability_MC

    return scorer, best_epoch
