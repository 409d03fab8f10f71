"""Checkpoints: complete or absent, the newest few kept, found again for `--resume`.

RUN/checkpoints/step-00001200/     DeepSpeed's state of all ranks, the averaged weights,
                                   model/, a model folder that open_clip loads, with adapters merged
                                   into it and by themselves in model/adapter/, mined/, the hard
                                   negatives of an objective that mines them, and
                                   checkpoint.json, the manifest of all these files
RUN/checkpoints/latest             the name of the newest complete one
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field, NonNegativeInt, PositiveInt

from clipsys.config import Settings
from clipsys.errors import TrainingError
from clipsys.files.drive_faults import drive_errors_explained
from clipsys.files.links import link_or_copy
from clipsys.models.adapters import write_adapter
from clipsys.models.open_clip_models import ModelParts, save_model
from clipsys.training.distributed.collectives import (
    gather_objects,
    on_first_rank,
    rank,
    world_size,
)
from clipsys.training.engine.deepspeed_engine import Engine
from clipsys.training.engine.repartition import SavedBy, read_saved_by
from clipsys.training.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    altered,
    describe_files,
    list_files,
    missing_or_resized,
    read_manifest,
)
from clipsys.training.model.trained import TrainedModel

_logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
#: Where the adapters of a run stand in its model folder.
ADAPTER_FOLDER = "adapter"
_LATEST = "latest"
_NAME = "step-????????"
#: DeepSpeed names the files that a rank has written by its number.
_OF_RANK = re.compile(r"zero_pp_rank_(\d+)_")


class CheckpointConfig(Settings):
    """What is kept of a run."""

    every_epochs: NonNegativeInt = Field(1, description="0: only at the end")
    every_steps: NonNegativeInt = Field(0, description="besides; 0: not inside an epoch")
    keep: PositiveInt = Field(2, description="newest checkpoints that stay")


@dataclass(frozen=True)
class TrainState:
    """Everything a run needs to go on, beside weights and optimizer.

    The order of samples, their augmentation and dropout are functions of the seed and the step, so
    the step is all there is to remember of them.

    Attributes:
        order: fingerprint of the order of samples; empty in checkpoints of older versions.
        skipped: samples that could not be used so far, by reason.
        shards: fingerprint of the names of the shards, in their order; empty in older ones.
        shard_sizes: fingerprint of their sizes; empty too where one is remote.
        canaries: what each canary showed when it was first measured, by name.
    """

    step: int
    steps_per_epoch: int
    batch_size: int
    world_size: int
    seed: int
    order: str = ""
    skipped: dict[str, int] = field(default_factory=dict)
    shards: str = ""
    shard_sizes: str = ""
    canaries: dict[str, dict[str, Any]] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run folder.

    Attributes:
        folder: the folder that they are in.
    """

    def __init__(self, run: Path, *, keep: int) -> None:
        self.folder = run / FOLDER
        self._keep = keep

    def save(
        self,
        engine: Engine,
        state: TrainState,
        parts: ModelParts,
        provenance: dict[str, Any],
        attachments: Mapping[str, Path] | None = None,
    ) -> Path:
        """Writes a checkpoint, from every rank together. It counts only when it is complete.

        Args:
            engine: what is saved.
            state: the rest of what a run goes on from.
            parts: the model that the engine trains.
            provenance: what the model folder says of its origin.
            attachments: files that belong to it, by their path in it; never written into again.
        """
        name = _name_of(state.step)
        partial = f"{name}.partial"
        on_first_rank(lambda: shutil.rmtree(self.folder / partial, ignore_errors=True))
        with drive_errors_explained(
            self.folder,
            TrainingError,
            "make room, then go on with --resume; the checkpoints before this one are kept",
            unfinished=self.folder / partial,
        ):
            engine.save(self.folder, partial, asdict(state))
            weights, heads = engine.state_dict(), engine.heads_state_dict()
            adapted = engine.adapted_state_dict()
            # Locked towers whose features are stored are not in the engine.
            locked = parts.model.state_dict()
            if engine.module.adapters is None and not locked.keys() <= weights.keys():
                weights = {**locked, **weights}
            files = self._describe_own(self.folder / partial)

            def publish() -> None:
                written = self.folder / partial
                target = written / "model"
                mark = save_model(
                    parts,
                    target,
                    weights=weights,
                    heads=heads,
                    provenance=provenance,
                    place=self.folder / name / "model",
                )
                if engine.module.adapters is not None:
                    _write_adapter(
                        engine.module, adapted, target / ADAPTER_FOLDER, mark, provenance
                    )
                for place, path in (attachments or {}).items():
                    (written / place).parent.mkdir(exist_ok=True)
                    link_or_copy(path, written / place)
                rest = set(list_files(written)) - files.keys()
                Manifest(
                    step=state.step,
                    world_size=state.world_size,
                    zero_stage=engine.config.zero_stage,
                    precision=engine.module.precision,
                    files=dict(sorted({**files, **describe_files(written, rest)}.items())),
                ).write(written)
                final = self.folder / name
                shutil.rmtree(final, ignore_errors=True)
                written.rename(final)
                self._point_to(name)
                self._forget_old(name)
                for script in self.folder.glob("zero_to_*.py"):
                    script.unlink()  # DeepSpeed's recovery scripts; model/ makes them needless

            on_first_rank(publish)
        return self.folder / name

    def _describe_own(self, written: Path) -> dict[str, FileRecord]:
        """Size and checksum of what all ranks have written; each looks at its own files."""
        _wait_for_all()
        own = [name for name in list_files(written) if _writer(name) == rank()]
        gathered = gather_objects(describe_files(written, own))
        return {name: record for records in gathered for name, record in records.items()}

    def _point_to(self, name: str) -> None:
        pointer = self.folder / f"{_LATEST}.partial"
        pointer.write_text(name + "\n", encoding="utf-8")
        pointer.replace(self.folder / _LATEST)

    def _forget_old(self, newest: str) -> None:
        # Later ones may be there, if the run was resumed from an earlier one: they are left alone.
        complete = [name for name in self._names() if name <= newest]
        for old in complete[: -self._keep]:
            shutil.rmtree(self.folder / old)

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob(_NAME))

    def latest(self) -> str | None:
        """The name of the newest complete checkpoint.

        Raises:
            TrainingError: the file that names it is damaged, or names none that is there.
        """
        pointer, names = self.folder / _LATEST, self._names()
        if not pointer.exists():
            # A run that was killed after its first checkpoint, or a copy that left it out. Each
            # folder of that name is complete: it gets the name when all of it is written.
            if names:
                _logger.warning("%s is missing; %s is the newest there is", pointer, names[-1])
            return names[-1] if names else None
        try:
            name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            raise TrainingError(
                f"{pointer}: cannot be read ({error.strerror}); make it a file with the name of a "
                f"checkpoint (there are: {', '.join(names) or 'none'})"
            ) from error
        if name not in names:
            there = ", ".join(names) or "none"
            raise TrainingError(
                f"{pointer}: names {name!r}, which is no checkpoint of {self.folder} (there are: "
                f"{there}); write the name of one into it, or remove {self.folder} to begin again"
            )
        return name

    def check(self, name: str) -> SavedBy:
        """Compares a checkpoint with its manifest, on every rank together; says who saved it.

        Every rank reads a part of the files. Checkpoints of versions without a manifest are
        checked for the files of all the ranks that saved them.

        Raises:
            TrainingError: a file is missing, short, altered or one too many; the message names it
                and the checkpoint before, if that is whole.
        """
        saved, files, faults = on_first_rank(lambda: self._look(name))
        if not faults:
            own = {file: record for file, record in files.items() if _reader(file) == rank()}
            faults = [fault for found in gather_objects(altered(self.folder / name, own))
                      for fault in found]  # fmt: skip
        if faults or saved is None:
            raise on_first_rank(lambda: self._refusal(name, faults))
        return saved

    def _look(self, name: str) -> tuple[SavedBy | None, dict[str, FileRecord], list[str]]:
        folder = self.folder / name
        try:
            manifest = read_manifest(folder)
            if manifest is None:
                return read_saved_by(folder), {}, []
        except TrainingError as error:
            return None, {}, [str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder}/")]
        faults = missing_or_resized(folder, manifest.files)
        if name != _name_of(manifest.step):
            faults.insert(0, f"{MANIFEST_NAME} says that it is {_name_of(manifest.step)}")
        saved = SavedBy(manifest.world_size, manifest.zero_stage, manifest.precision)
        return saved, manifest.files, faults

    def _refusal(self, name: str, faults: list[str]) -> TrainingError:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        text = f"{self.folder / name}: the checkpoint is not whole: {', '.join(faults[:3])}{more}"
        before = next((one for one in reversed(self._names()) if self._is_whole(one, name)), None)
        if before is None:
            return TrainingError(f"{text}; no checkpoint before it is whole, start a new run")
        return TrainingError(
            f"{text}; the one before it, {before}, is whole: to go on from there, write its name "
            f"into {self.folder / _LATEST} (echo {before} > {self.folder / _LATEST}) and "
            "resume again"
        )

    def _is_whole(self, name: str, before: str) -> bool:
        if name >= before:
            return False
        _, files, faults = self._look(name)
        return not faults and not altered(self.folder / name, files)

    def load(self, engine: Engine, name: str, saved: SavedBy) -> TrainState:
        """Puts a checkpoint into the engine, on every rank together.

        Args:
            engine: as it was made; its weights are replaced.
            name: name of the checkpoint.
            saved: what `check` returned.

        Raises:
            ConfigError: it does not fit the model, the ZeRO stage or the number of ranks.
        """
        state = engine.load(self.folder, name, saved)
        known = TrainState.__dataclass_fields__.keys() & state.keys()
        return TrainState(**{name: state[name] for name in known})


def _write_adapter(
    module: TrainedModel,
    state: dict[str, torch.Tensor],
    folder: Path,
    fingerprint: str,
    provenance: dict[str, Any],
) -> None:
    """The adapters of a model by themselves, beside the model that they are merged into."""
    adapters = module.adapters
    assert adapters is not None
    adapter = adapters.adapter(
        module.clip,
        state,
        with_statistics=not module.freezes_batch_norm,
        fingerprint=fingerprint,
    )
    write_adapter(
        folder,
        adapter,
        config=adapters.config,
        names=adapters.names,
        provenance=provenance,
    )


def _name_of(step: int) -> str:
    return f"step-{step:08d}"


def _writer(name: str) -> int:
    """The rank that has written a file of DeepSpeed's."""
    found = _OF_RANK.search(name)
    return int(found[1]) if found else 0


def _reader(name: str) -> int:
    """The rank that checks a file: where possible the one that will load it."""
    return _writer(name) % world_size()


def latest_model(run: Path, step: int | None = None) -> Path:
    """The model folder of a run's newest checkpoint, or of the one at a step.

    Raises:
        TrainingError: this is not a run folder, or it has no such checkpoint.
    """
    folder = run / FOLDER
    if not folder.is_dir():
        raise TrainingError(
            f"{run}: not a run folder (no {FOLDER}/); name what `clipsys train` wrote"
        )
    if step is not None:
        found = folder / f"step-{step:08d}" / "model"
        if not found.is_dir():
            there = ", ".join(str(int(path.name[5:])) for path in sorted(folder.glob(_NAME)))
            raise TrainingError(f"{run}: no checkpoint at step {step}; there are {there or 'none'}")
        return found
    if (run / "model").is_dir():
        return run / "model"
    name = Checkpoints(run, keep=1).latest()
    if name is None:
        raise TrainingError(f"{run}: the run has no checkpoint yet")
    return folder / name / "model"


def read_provenance(model_folder: Path) -> dict[str, Any]:
    """What a checkpoint's model folder says of its origin."""
    card = json.loads((model_folder / "clipsys.json").read_text(encoding="utf-8"))
    return dict(card["provenance"])


def _wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()
