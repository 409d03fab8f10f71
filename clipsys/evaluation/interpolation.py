"""Which weights between two models to take: each share is measured, on what counts and on canaries.

base, tuned --mixed, alpha by alpha--> Encoder --Evaluation--> one figure a set
                                                                    |
                             harmonic mean of what is left of each set's best = merit
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from clipsys.errors import ConfigError, DataError
from clipsys.evaluation.data import DataSet
from clipsys.evaluation.measuring import Evaluation
from clipsys.evaluation.options import EvaluationOptions
from clipsys.evaluation.reports.canvas import BLUE, GREEN, ORANGE, PURPLE, RED, drawn, short_name
from clipsys.models.encoder import Encoder
from clipsys.models.interpolation import check_interpolable, mixed
from clipsys.models.parts import ModelParts, fingerprint

#: Shares of the tuned model that are measured by default.
DEFAULT_ALPHAS = tuple(number / 10 for number in range(11))
#: The figure that stands for a set, by its task.
FIGURES = {"retrieval": "text_to_image/recall@10", "zeroshot": "accuracy@1"}
_LOOKED_AT = 100

SetTask = Literal["retrieval", "zeroshot"]


@dataclass(frozen=True)
class MeasuredSet:
    """A set that every share is measured on.

    Attributes:
        data: the set.
        task: how it is measured.
    """

    data: DataSet
    task: SetTask

    @property
    def figure(self) -> str:
        """Name of the figure that stands for it."""
        return FIGURES[self.task]


@dataclass(frozen=True)
class Share:
    """What one share of the tuned model gave.

    Attributes:
        alpha: the share.
        figures: one of each set, in their order.
        merit: harmonic mean over sets of the figure relative to the best of all shares.
    """

    alpha: float
    figures: tuple[float, ...]
    merit: float


def measured_set(data: DataSet, task: SetTask | None) -> MeasuredSet:
    """A set with its task: the one that is named, or retrieval for captions, else zero-shot.

    Raises:
        DataError: it has neither captions nor labels.
    """
    if task is not None:
        return MeasuredSet(data, task)
    first = list(islice(data.records(), _LOOKED_AT))
    if any(record.captions for record in first):
        return MeasuredSet(data, "retrieval")
    if any(record.label is not None for record in first):
        return MeasuredSet(data, "zeroshot")
    raise DataError(
        f"{data.name}: none of the first {_LOOKED_AT} images has a caption or a label; name the "
        "columns or another set"
    )


def measure_shares(
    base: ModelParts,
    tuned: ModelParts,
    alphas: Sequence[float],
    sets: Sequence[MeasuredSet],
    options: EvaluationOptions = EvaluationOptions(),
    *,
    precision: str = "auto",
    done: Callable[[], object] = lambda: None,
) -> list[Share]:
    """Measures the models between two, as `clipsys evaluate` measures a model.

    Args:
        base: the model that was fine-tuned.
        tuned: what became of it.
        alphas: shares of the tuned model.
        sets: the set that the model was tuned for, then those that it should not forget.
        options: how tasks measure.
        precision: of the encoder.
        done: called when a share is measured.

    Raises:
        ModelError: the two do not fit together.
        DataError: a set cannot be measured.
    """
    check_interpolable(base, tuned)
    ends = base.model.state_dict(), tuned.model.state_dict()
    model = deepcopy(tuned.model)
    rows, device = [], "auto"
    for alpha in alphas:
        model.load_state_dict(mixed(*ends, alpha))
        parts = ModelParts(
            model, tuned.tokenizer, tuned.config, tuned.preprocessing, f"alpha {alpha:g}"
        )
        encoder = Encoder(parts, device=device, precision=precision)
        rows.append(tuple(_figure(encoder, one, options) for one in sets))
        # What was chosen for the first share is used for all, and said once.
        device, precision = str(encoder.device), encoder.settled_precision or precision
        done()
    best = [max(column) for column in zip(*rows, strict=True)]
    return [Share(alpha, row, _merit(row, best)) for alpha, row in zip(alphas, rows, strict=True)]


def _figure(encoder: Encoder, measured: MeasuredSet, options: EvaluationOptions) -> float:
    (result,) = Evaluation(encoder, measured.data, options).run(measured.task)
    return result.metrics()[measured.figure]


def _merit(figures: Sequence[float], best: Sequence[float]) -> float:
    """The harmonic mean: what has lost one set is not saved by another."""
    relative = [value / top if top else 1.0 for value, top in zip(figures, best, strict=True)]
    return len(relative) / sum(1 / one for one in relative) if all(relative) else 0.0


def best_share(shares: Sequence[Share]) -> Share:
    """The share of the highest merit; of equal ones the smallest, which is nearest to the base."""
    return max(shares, key=lambda one: (one.merit, -one.alpha))


def parse_alphas(text: str) -> tuple[float, ...]:
    """Shares from ``0,0.25,1``, ascending, each once.

    Raises:
        ConfigError: one is no number from 0 to 1.
    """
    try:
        alphas = sorted({float(one) for one in text.split(",")})
    except ValueError:
        alphas = []
    if not alphas or not all(0 <= one <= 1 for one in alphas):
        raise ConfigError(f"--alphas {text!r}: expected numbers from 0 to 1 with commas: 0,0.5,1")
    return tuple(alphas)


def provenance(
    base: ModelParts,
    tuned: ModelParts,
    alpha: float,
    shares: Sequence[Share] = (),
    sets: Sequence[MeasuredSet] = (),
) -> dict[str, Any]:
    """What ``clipsys.json`` says of a model between two."""
    made: dict[str, Any] = {
        "alpha": alpha,
        "base": _described(base),
        "tuned": _described(tuned),
    }
    if shares:
        made["chosen_on"] = [
            {"data": one.data.name, "task": one.task, "figure": one.figure} for one in sets
        ]
        made["shares"] = [
            {"alpha": one.alpha, "figures": list(one.figures), "merit": one.merit} for one in shares
        ]
    return {"interpolated": made}


def _described(parts: ModelParts) -> dict[str, str]:
    return {
        "model": parts.spec or parts.name,
        "fingerprint": parts.loaded_fingerprint or fingerprint(parts),
    }


def write_plot(
    path: Path, shares: Sequence[Share], sets: Sequence[MeasuredSet], chosen: Share
) -> None:
    """Draws each canary's figure over that of the set that was tuned for, share by share, as a PNG.

    Without a canary, the figure over the share.

    Raises:
        DataError: the file cannot be written.
    """
    target, *canaries = sets
    colours = (BLUE, ORANGE, GREEN, PURPLE, RED)

    def draw(figure: Any, what: Sequence[Share]) -> None:
        axes = figure.add_subplot()
        if not canaries:
            _draw_line(axes, [(one.alpha, one.figures[0], one) for one in what], chosen, BLUE, None)
            axes.set(xlabel="share of the tuned model (alpha)", ylabel=_label(target))
            return
        for place, canary in enumerate(canaries, 1):
            points = [(one.figures[0], one.figures[place], one) for one in what]
            _draw_line(axes, points, chosen, colours[(place - 1) % len(colours)], _label(canary))
        axes.set(xlabel=f"tuned for: {_label(target)}", ylabel="not to be forgotten")
        axes.legend(frameon=False)

    png = drawn("interpolation", "Figures between two models", draw, shares).png
    try:
        path.write_bytes(png)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error


def _draw_line(
    axes: Any,
    points: Sequence[tuple[float, float, Share]],
    chosen: Share,
    colour: str,
    label: str | None,
) -> None:
    across, up, shares = zip(*points, strict=True)
    axes.plot(across, up, color=colour, marker="o", markersize=4, label=label)
    for x, y, share in zip(across, up, shares, strict=True):
        is_chosen = share.alpha == chosen.alpha
        if is_chosen:
            axes.plot([x], [y], marker="o", markersize=11, fillstyle="none", color=colour)
        if is_chosen or share.alpha in (0.0, 1.0):
            place = {"textcoords": "offset points", "xytext": (7, 5)}
            axes.annotate(f"alpha {share.alpha:g}", (x, y), **place)


def _label(measured: MeasuredSet) -> str:
    return f"{short_name('/'.join(Path(measured.data.name).parts[-2:]))}, {measured.figure}"
