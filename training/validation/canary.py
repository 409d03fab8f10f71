"""Canaries: sets that a run is not trained on, measured from before the first step on.

A model that learns one thing forgets others, and the figures on ``data.validation`` do not show it.
What a canary had before the first step stands in every checkpoint, so that a resumed run compares
with the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from clipsys.errors import DataError, SampleError
from clipsys.images.preprocessing import Preprocessing
from clipsys.models.tokenization import Tokenizer
from clipsys.shards.reading import expand_shards, iterate_raw
from clipsys.shards.samples import parse_sample
from clipsys.training.engine.deepspeed_engine import Engine
from clipsys.training.features.trunks import Trunks
from clipsys.training.validation.config import CanaryConfig, EvaluationConfig
from clipsys.training.validation.measuring import Validation

_logger = logging.getLogger(__name__)

#: The figures that are watched, with their chance level and their number of trials.
_WATCHED = {
    "text_to_image/recall@10": ("text_to_image/chance_recall@10", "text_to_image/queries"),
    "image_to_text/recall@10": ("image_to_text/chance_recall@10", "image_to_text/queries"),
    "zeroshot/accuracy@1": ("zeroshot/chance_accuracy@1", "zeroshot/images"),
}
#: Samples of a set that are looked at for what it holds.
_LOOKED_AT = 100


@dataclass(frozen=True)
class Baseline:
    """What a canary showed when it was first measured.

    Attributes:
        step: steps that had been done by then.
        data: fingerprint of the canary's data.
        figures: by name.
    """

    step: int
    data: str
    figures: dict[str, float] = field(default_factory=dict)


class Canaries:
    """The canaries of a run, on this rank."""

    def __init__(
        self, config: EvaluationConfig, preprocessing: Preprocessing, tokenizer: Tokenizer
    ) -> None:
        """
        Args:
            config: section ``evaluation`` of a recipe.
            preprocessing: of the model.
            tokenizer: of its text tower.

        Raises:
            DataError: a set cannot be used, or has neither captions nor labels.
        """
        self._max_drop = config.canary_drop
        self._sets = {
            name: _open(name, canary, config, preprocessing, tokenizer)
            for name, canary in config.canary.items()
        }
        self._baselines: dict[str, Baseline] = {}
        self._low: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._sets)

    def use_trunks(self, trunks: Trunks) -> None:
        """Measures heads over features of locked towers, which are computed once."""
        for validations in self._sets.values():
            for one in validations:
                one.use_trunks(trunks)

    def fingerprints(self) -> dict[str, str]:
        """Of the data of each canary; ranks must hold the same."""
        return {
            name: "-".join(one.fingerprint() for one in parts) for name, parts in self._sets.items()
        }

    def is_known(self) -> bool:
        """Whether every canary has been measured already."""
        return self._baselines.keys() >= self._sets.keys()

    def state(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint keeps: what each canary showed at first."""
        return {name: asdict(one) for name, one in self._baselines.items()}

    def resume(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Goes on with what a checkpoint kept; other data of the same name begin anew."""
        known, self._baselines = self.fingerprints(), {}
        for name, saved in state.items():
            baseline = Baseline(**saved)
            if name in known and baseline.data == known[name]:
                self._baselines[name] = baseline
            elif name in known:
                _logger.warning(
                    "evaluation.canary.%s: its data have changed since step %d; it is compared "
                    "with what it shows now",
                    *(name, baseline.step),
                )

    def measure(self, engine: Engine, step: int) -> dict[str, float]:
        """The figures of all canaries, by ``NAME/FIGURE``. Every rank must call it.

        What a canary shows the first time is what it is compared with later.
        """
        figures: dict[str, float] = {}
        fingerprints = self.fingerprints()
        for name, parts in self._sets.items():
            found = {key: value for one in parts for key, value in one.measure(engine).items()}
            self._baselines.setdefault(name, Baseline(step, fingerprints[name], found))
            figures |= {f"{name}/{key}": value for key, value in found.items()}
        return figures

    def describe(self, figures: Mapping[str, float]) -> list[str]:
        """The watched figures for the log, each with how far it is from the first measurement."""
        texts = []
        for name, baseline in self._baselines.items():
            for figure in _WATCHED:
                if f"{name}/{figure}" in figures and figure in baseline.figures:
                    value = figures[f"{name}/{figure}"]
                    change = value - baseline.figures[figure]
                    texts.append(f"{name} {figure} {value:.3f} ({change:+.3f})")
        return texts

    def warn(self, figures: Mapping[str, float]) -> None:
        """Warns of each figure that has fallen too far, once until it has recovered.

        A fall that could be chance, less than two standard errors of the first measurement, gives
        no warning.
        """
        for name, baseline in self._baselines.items():
            for figure, (chance, trials) in _WATCHED.items():
                place = f"{name}/{figure}"
                if place not in figures or figure not in baseline.figures:
                    continue
                first, now = baseline.figures[figure], figures[place]
                allowed = max(
                    self._max_drop * (first - baseline.figures[chance]),
                    2 * math.sqrt(first * (1 - first) / baseline.figures[trials]),
                )
                if first - now <= allowed:
                    self._low.discard(place)
                elif place not in self._low:
                    self._low.add(place)
                    _logger.warning(
                        "canary %s: %s fell from %.3f at step %d to %.3f: the model forgets what "
                        "this set asks; see docs/fine-tuning.md (lower rates, LoRA, WiSE-FT)",
                        *(name, figure, first, baseline.step, now),
                    )


def _open(
    name: str,
    canary: CanaryConfig,
    config: EvaluationConfig,
    preprocessing: Preprocessing,
    tokenizer: Tokenizer,
) -> list[Validation]:
    """One validation for retrieval and one for zero-shot, of what the set holds."""
    place = f"evaluation.canary.{name}"
    has_captions, has_labels = _contents(place, canary)
    retrieval = EvaluationConfig(
        captions=config.captions, duplicates=config.duplicates, batch_size=config.batch_size
    )
    zeroshot = EvaluationConfig(
        zeroshot=canary.data,
        classnames=canary.classnames,
        templates=canary.templates,
        batch_size=config.batch_size,
    )
    asked: list[tuple[EvaluationConfig, str | list[str] | None]] = []
    if has_captions:
        asked.append((retrieval, canary.data))
    if has_labels:
        asked.append((zeroshot, None))
    return [
        Validation(
            own, shards, preprocessing, tokenizer, caption_key=canary.caption_key, place=place
        )
        for own, shards in asked
    ]


def _contents(place: str, canary: CanaryConfig) -> tuple[bool, bool]:
    """Whether a set has captions and whether it has labels, by its first samples.

    Raises:
        DataError: it has neither, or a setting is for what it does not have.
    """
    has_captions = has_labels = False
    # What is wrong with a shard is said when the set is read as a whole.
    raws = iterate_raw(expand_shards(canary.data), on_error=lambda *_: None)
    for raw in islice(raws, _LOOKED_AT):
        try:
            sample = parse_sample(raw, caption_key=canary.caption_key)
        except SampleError:
            continue
        has_captions = has_captions or bool(sample.captions)
        has_labels = has_labels or sample.label is not None
    if not (has_captions or has_labels):
        raise DataError(
            f"{place}: {canary.data}: none of the first {_LOOKED_AT} samples has a caption or a "
            "label (.cls member); give it shards that `clipsys shards` made"
        )
    for setting in ("templates", "classnames"):
        if getattr(canary, setting) is not None and not has_labels:
            raise DataError(
                f"{place}.{setting} does nothing: {canary.data} has no labels (.cls members); "
                "leave it out"
            )
    if canary.caption_key is not None and not has_captions:
        raise DataError(
            f"{place}.caption_key is {canary.caption_key!r}, where {canary.data} has no captions; "
            "name the key that has them, or leave it out"
        )
    return has_captions, has_labels
