"""The classes of the training data: what their labels are, and the numbers of these."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipsys.errors import ConfigError, DataError, SampleError
from clipsys.progress import progress
from clipsys.shards.random_access import ShardReader
from clipsys.shards.samples import parse_sample, place_of, require_captions
from clipsys.training.data.config import DataConfig
from clipsys.training.data.samples import label_of
from clipsys.training.data.shard_set import ShardSet

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleLabels:
    """The labels of all samples.

    Attributes:
        of_shards: for each shard the label of each sample; None where it has none.
        first_fault: why the first of those has none; empty where all have one.
    """

    of_shards: tuple[tuple[str | None, ...], ...]
    first_fault: str = ""

    def among(self, classes: Sequence[str]) -> tuple[tuple[str | None, ...], ...]:
        """The same, without labels that are none of some classes."""
        known = set(classes)
        return tuple(
            tuple(label if label in known else None for label in labels)
            for labels in self.of_shards
        )


def read_labels(
    config: DataConfig, shard_set: ShardSet, *, needs_caption: bool = False
) -> SampleLabels:
    """Reads every sample once for its label.

    Args:
        config: the recipe's section.
        shard_set: the training data.
        needs_caption: whether a sample without a text counts as one without a label: it cannot be
            trained on either.
    """
    found: list[tuple[str | None, ...]] = []
    first_fault = ""
    reader = ShardReader(shard_set.shards, shard_set.counts, cache=config.shard_cache)
    with progress("Reading labels", shard_set.num_samples, unit="samples") as advance:
        for shard, count in enumerate(shard_set.counts):
            labels: list[str | None] = []
            for number in range(count):
                advance(1)
                try:
                    raw = reader.read(shard, number)
                    # Whether its image can be used shows when it is trained on.
                    sample = parse_sample(raw, caption_key=config.caption_key, needs_image=False)
                    if needs_caption:
                        require_captions(sample, raw)
                    labels.append(label_of(sample, config.label_key, place_of(raw)))
                except SampleError as error:  # counted and skipped in training
                    labels.append(None)
                    first_fault = first_fault or str(error)
            found.append(tuple(labels))
    return SampleLabels(tuple(found), first_fault)


def class_names(
    config: DataConfig, shard_set: ShardSet, labels: SampleLabels | None = None
) -> tuple[str, ...]:
    """The labels of the classes in the order of their numbers.

    Those of ``data.classes``, else those that the samples have: numbers in the order of their
    values, other labels in the order of their letters.

    Args:
        config: the recipe's section.
        shard_set: the training data.
        labels: labels of the samples, where they have been read already.

    Raises:
        ConfigError: ``data.classes`` names a label twice, or cannot be read.
        DataError: there are fewer than two classes.
    """
    if config.classes is not None:
        return _listed(config.classes)
    labels = labels or read_labels(config, shard_set)
    found = {label for of_shard in labels.of_shards for label in of_shard if label is not None}
    if len(found) < 2:
        why = labels.first_fault or f"every label is {next(iter(found), None)!r}"
        raise DataError(
            f"data.train: a classifier needs two classes or more, and the samples have "
            f"{len(found)}: {why}"
        )
    names = _sorted(found)
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    _logger.info("%d classes: %s", len(names), shown)
    return names


def _sorted(labels: set[str]) -> tuple[str, ...]:
    if all(label.isdecimal() for label in labels):
        return tuple(sorted(labels, key=int))
    return tuple(sorted(labels))


def _listed(classes: list[str] | str) -> tuple[str, ...]:
    if isinstance(classes, str):
        try:
            text = Path(classes).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"data.classes: {classes} cannot be read ({error})") from error
        classes = [line.strip() for line in text.splitlines() if line.strip()]
    repeated = next((name for name in classes if classes.count(name) > 1), None)
    if repeated is not None:
        raise ConfigError(f"data.classes: {repeated!r} is listed twice; name each class once")
    if len(classes) < 2:
        raise ConfigError(f"data.classes lists {len(classes)} class; expected two or more")
    return tuple(classes)
