"""A temperature that makes probabilities honest, fitted on labelled images.

Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2: one number, which changes
no ranking, by the likelihood of the labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clipsys.zeroshot.deciding import Floats, Temperature, probabilities

Integers = npt.NDArray[np.int64]

#: Bins of equal width in which probability and accuracy are compared.
_BINS = 15
#: Images below which a fitted temperature says little.
FEW_IMAGES = 100
#: Bounds of the scale: from equal probabilities to certainty.
_SCALES = (0.01, 10_000.0)


@dataclass(frozen=True)
class Calibration:
    """What a calibration changed.

    Attributes:
        temperature: 1 / the fitted scale.
        bias: the fitted bias of a sigmoid model; None of a softmax model.
        loss_before, loss_after: negative log-likelihood of an image's label.
        error_before, error_after: expected calibration error of the best class's probability.
        images: how many it was fitted on.
    """

    temperature: float
    bias: float | None
    loss_before: float
    loss_after: float
    error_before: float
    error_after: float
    images: int


def fit(scores_NC: Floats, targets_N: Integers, start: Temperature) -> Temperature:
    """The temperature, and the bias of a sigmoid model, under which the labels are likeliest.

    Args:
        scores_NC: cosine similarities.
        targets_N: the class of each image.
        start: the model's own.
    """
    from scipy import optimize

    low, high = np.log(_SCALES)
    if start.bias is None:
        found = optimize.minimize_scalar(
            lambda log_scale: loss(scores_NC, targets_N, Temperature(np.exp(log_scale), None)),
            bounds=(low, high),
            method="bounded",
            options={"xatol": 1e-6},
        )
        return Temperature(float(np.exp(found.x)), None)
    # In units in which both are of order 1.
    found = optimize.minimize(
        lambda x: loss(scores_NC, targets_N, Temperature(np.exp(x[0]), x[1] * 10)),
        (np.log(start.scale), start.bias / 10),
        method="L-BFGS-B",
        bounds=((low, high), (-100, 100)),
    )
    return Temperature(float(np.exp(found.x[0])), float(found.x[1] * 10))


def loss(scores_NC: Floats, targets_N: Integers, temperature: Temperature) -> float:
    """Mean negative log-likelihood: of the label's softmax, or of each class's sigmoid, summed."""
    logits_NC = scores_NC.astype(np.float64) * temperature.scale + (temperature.bias or 0.0)
    rows = np.arange(len(targets_N))
    if temperature.bias is None:
        highest_N = logits_NC.max(axis=1, keepdims=True)
        log_sum_N = np.log(np.exp(logits_NC - highest_N).sum(axis=1)) + highest_N[:, 0]
        return float((log_sum_N - logits_NC[rows, targets_N]).mean())
    signs_NC = np.full(logits_NC.shape, -1.0)
    signs_NC[rows, targets_N] = 1.0
    return float(np.logaddexp(0.0, -signs_NC * logits_NC).sum(axis=1).mean())


def calibration_error(scores_NC: Floats, targets_N: Integers, temperature: Temperature) -> float:
    """Expected calibration error: mean |accuracy - probability| of bins, weighted by images."""
    probability_NC, _ = probabilities(scores_NC, None, temperature)
    best_N = probability_NC.argmax(axis=1)
    confidence_N = probability_NC[np.arange(len(best_N)), best_N]
    bin_N = np.minimum((confidence_N * _BINS).astype(np.int64), _BINS - 1)
    gaps = np.bincount(bin_N, (best_N == targets_N) - confidence_N, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(best_N))
