"""What a resumed run goes on from, and which of its settings may differ from before.

What was set before is read from the checkpoint, not from RUN/config.yaml: it is what ran up to that
step. Settings of the first table must stay; all others take effect from the step on that the run is
resumed at, and RUN/config.yaml says so in its first lines.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from clipsys.config import dump_settings
from clipsys.errors import ConfigError, TrainingError
from clipsys.training.checkpoints import Checkpoints, read_provenance
from clipsys.training.distributed.collectives import on_first_rank
from clipsys.training.engine.repartition import SavedBy
from clipsys.training.model.initial import DEFAULT_ARCHITECTURE
from clipsys.training.objectives import with_current_names
from clipsys.training.recipe import Recipe

_logger = logging.getLogger(__name__)

#: Settings, or whole sections, that a resumed run must keep, with the reason.
FIXED: dict[str, str] = {
    "seed": "the order of samples, augmentation and dropout are drawn from it",
    "model": "the weights come from the checkpoint",
    "model.lora": "the checkpoint holds adapters of this form, and the weights beside them",
    "data.batch_size": "it decides which samples each step has seen",
    "data.shuffle_shards": "it decides which samples each step has seen",
    "data.resampled": "it decides which samples each step has seen",
    "data.samples_per_epoch": "it decides which samples each step has seen",
    "data.num_samples": "it decides which samples each step has seen",
    "data.label_noise": "it decides what the samples' labels are",
    "data.subset_seed": "it decides which samples each step has seen, and their labels",
    "data.frames": "it decides which windows each step has seen",
    "data.classes": "it decides what the numbers of the classes mean",
    "features": "it decides which views each step has seen",
    "unlock": "it decides what the second phase trains",
    "objective": "it decides which parameters and states there are",
    "optimizer.name": "the checkpoint holds the state of another optimizer",
    "optimizer.layer_decay": "it decides the groups that the optimizer's state is kept in",
    "engine.zero_stage": "the checkpoint is divided by it",
    "engine.precision": "it decides the type of weights and masters",
}
#: Settings that may differ: they take effect from the next step on.
CHANGEABLE: tuple[str, ...] = (
    "output",
    "nproc",
    "model.patch_dropout",
    "model.freeze_batch_norm",
    "data.train",  # its order of samples is compared by `SampleOrder.fingerprint`
    "data.validation",
    "data.micro_batch_size",
    "data.workers",
    "data.timeout_s",
    "data.cache_dir",
    "data.cache_gb",
    "data.pixel_cache_gb",
    "data.captions",
    "data.caption_key",
    "data.label_key",
    "data.decode",
    "data.load_size",
    "data.max_bad_share",
    "data.max_image_pixels",
    "augmentation",
    "features.folder",
    "features.batch_size",
    "objective.positives",
    "objective.duplicates",
    "objective.tile_size",
    "optimizer.lr",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.momentum",
    "optimizer.trust_coefficient",
    "optimizer.weight_decay",
    "optimizer.logit_scale_lr_factor",
    "schedule",
    "engine.gradient_clipping",
    "engine.channels_last",
    "engine.grad_checkpointing",
    "engine.compile",
    "engine.cache_on_host",
    "engine.ema_decay",
    "engine.threads",
    "engine.bucket_mb",
    "engine.overlap_comm",
    "engine.offload_optimizer",
    "engine.offload_parameters",
    "engine.device",
    "evaluation",
    "checkpoint",
)
#: Changes that say nothing about how a run goes on.
_UNREMARKABLE = (
    "output",
    "nproc",
    "data.workers",
    "data.timeout_s",
    "data.cache_dir",
    "engine.device",
)
#: Values that are no change: the run goes on with what it was started with (`Resumption.settle`,
#: `clipsys.training.precision`).
_AS_BEFORE: dict[str, Any] = {"engine.precision": "auto", "engine.threads": None}


@dataclass(frozen=True)
class Change:
    """A setting that differs from the one that a checkpoint was trained with."""

    name: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} {self.now!r} instead of {self.was!r}"


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on: a checkpoint that is whole, and what has changed since.

    Attributes:
        name: name of the checkpoint.
        saved: number of ranks, ZeRO stage and precision that saved it.
        step: steps done.
        changes: settings that take effect now.
    """

    name: str
    saved: SavedBy
    step: int
    changes: tuple[Change, ...]

    def settle(self, recipe: Recipe) -> Recipe:
        """The recipe with the precision that ran in the place of ``auto``.

        A choice made again could be another one, and the run would not go on as if it had not
        stopped.
        """
        if recipe.engine.precision != "auto" or not self.saved.precision:
            return recipe
        engine = recipe.engine.model_copy(update={"precision": self.saved.precision})
        return recipe.model_copy(update={"engine": engine})


def find_resumption(run: Path, recipe: Recipe) -> Resumption | None:
    """Finds and checks what a run goes on from. Every rank calls it and gets rank 0's decision.

    Returns:
        None where the run has no checkpoint yet.

    Raises:
        TrainingError: the checkpoint is not whole.
        ConfigError: a setting differs that must stay; each is named, with both its values.
    """
    checkpoints = Checkpoints(run, keep=recipe.checkpoint.keep)
    name = on_first_rank(checkpoints.latest)
    if name is None:
        return None
    saved = checkpoints.check(name)
    return on_first_rank(lambda: _compare(run, checkpoints.folder / name, saved, recipe))


def _compare(run: Path, checkpoint: Path, saved: SavedBy, recipe: Recipe) -> Resumption:
    step = int(checkpoint.name.rpartition("-")[2])
    try:
        was = read_provenance(checkpoint / "model")["recipe"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        place = checkpoint / "model" / "clipsys.json"
        raise TrainingError(f"{place}: does not say what was trained ({error!r})") from error
    changes = list(changed_settings(was, recipe))
    refused = [change for change in changes if not _may_change(change, saved, recipe)]
    if refused:
        model = checkpoint / "model"
        raise ConfigError(
            "\n".join(
                f"{run}: {change.name} was {change.was!r} at step {step}, now it is "
                f"{change.now!r}, which a resumed run cannot change: {_reason(change.name)}; "
                f"resume it with {change.name}={_yaml(change.was)}, or start a new run from its "
                f"model (model.pretrained={model})"
                for change in refused
            )
        )
    for change in changes:
        if change.name not in _UNREMARKABLE:
            _logger.info("from step %d on: %s", step, change)
    return Resumption(checkpoint.name, saved, step, tuple(changes))


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value)


def changed_settings(was: Mapping[str, Any], recipe: Recipe) -> Iterator[Change]:
    """The settings that differ between a recorded recipe and one of today.

    Settings that the record lacks, since they were added later, are left out.
    """
    if isinstance(was.get("objective"), Mapping):
        was = {**was, "objective": with_current_names(was["objective"])}
    return _changes(was, recipe, recipe.model_dump(mode="json"), "")


def _changes(
    was: Mapping[str, Any], settings: BaseModel, now: Mapping[str, Any], prefix: str
) -> Iterator[Change]:
    for name in type(settings).model_fields:
        if name not in was:
            continue
        inner = getattr(settings, name)
        if isinstance(inner, BaseModel) and isinstance(was[name], Mapping):
            yield from _changes(was[name], inner, now[name], f"{prefix}{name}.")
        elif was[name] != now[name] and now[name] != _AS_BEFORE.get(prefix + name, ...):
            yield Change(prefix + name, was[name], now[name])


def is_fixed(name: str) -> bool:
    """Whether a setting must stay; one that no table names must."""
    rules = {**dict.fromkeys(FIXED, True), **dict.fromkeys(CHANGEABLE, False)}
    return rules.get(_rule_of(name) or "", True)


def _rule_of(name: str) -> str | None:
    """The longest entry of the two tables that covers a setting."""
    covering = [rule for rule in (*FIXED, *CHANGEABLE) if f"{name}.".startswith(f"{rule}.")]
    return max(covering, key=len, default=None)


def _reason(name: str) -> str:
    return FIXED.get(_rule_of(name) or "", "its effect on the state of a run is not known")


def _may_change(change: Change, saved: SavedBy, recipe: Recipe) -> bool:
    if change.name == "optimizer.layer_decay":
        # Another factor for the same groups; a factor of 1 is one group, as none is.
        return (change.was or 1) != 1 and (change.now or 1) != 1
    if change.name == "engine.zero_stage":
        return {change.was, change.now} == {1, 2}  # their files are the same
    if change.name == "model.architecture":
        # 0.1.0 recorded its default, which now is None, also beside pretrained weights.
        return change.now is None and change.was == DEFAULT_ARCHITECTURE
    if change.name == "engine.precision":
        sixteen_bits = ("bf16_params", "fp16")
        return change.now == saved.precision or (
            change.now not in sixteen_bits and saved.precision not in sixteen_bits
        )
    return not is_fixed(change.name)


_CHANGE_LINE = re.compile(r"# after step (\d+): ")


def write_recipe(run: Path, recipe: Recipe, resumption: Resumption | None) -> None:
    """Writes RUN/config.yaml: the settings that run now, below what differed before, by step."""
    path, lines = run / "config.yaml", []
    if resumption is not None:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            known = _CHANGE_LINE.match(line)
            # Changes made at this step or later are of a course that was abandoned.
            if known and int(known[1]) < resumption.step:
                lines.append(line)
        lines += [
            f"# after step {resumption.step}: {change}"
            for change in resumption.changes
            if change.name not in _UNREMARKABLE
        ]
    run.mkdir(parents=True, exist_ok=True)
    partial = run / "config.yaml.partial"
    text = "".join(f"{line}\n" for line in lines) + dump_settings(recipe)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
