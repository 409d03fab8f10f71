"""From a run folder to a model folder."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from clipsys.background.captions import copy_captions
from clipsys.errors import ModelError, TrainingError
from clipsys.files.drive_faults import drive_errors_explained
from clipsys.models.adapters import is_adapter_folder, read_adapter, read_base
from clipsys.models.open_clip_models import HEADS_NAME, load_model, save_model
from clipsys.training.checkpoints import ADAPTER_FOLDER, latest_model, read_provenance

if TYPE_CHECKING:
    import torch


def export_model(
    run: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    with_heads: bool = False,
    adapter: bool = False,
    overwrite: bool = False,
) -> str:
    """Writes the model of a run as a separate model folder.

    Args:
        run: what `clipsys train` wrote, or an adapter folder, which is merged into its base.
        out: the folder to write; complete, or not there at all.
        step: the checkpoint to take; None takes the newest.
        with_heads: writes the objective's heads (projections, prototypes) beside the model.
        adapter: writes the adapters alone, as an adapter folder, and not the model that they are
            merged into.
        overwrite: replaces ``out`` where it is a model folder, or with ``adapter`` an adapter
            folder.

    Returns:
        The model's fingerprint.

    Raises:
        TrainingError: the run has no such checkpoint, its objective trained no heads, or it trained
            no adapters.
        ModelError: ``out`` exists or cannot be written, or the checkpoint's model is damaged.
    """
    if is_adapter_folder(Path(run)):
        return _merge(str(run), Path(out), overwrite=overwrite)
    source = latest_model(Path(run), step)
    if adapter:
        return _copy_adapter(source, Path(out), overwrite=overwrite)
    parts = load_model(source)  # checks the fingerprint
    heads, provenance = _read_heads(source) if with_heads else None, read_provenance(source)
    with drive_errors_explained(Path(out).absolute().parent, ModelError, "make room, then repeat"):
        mark = save_model(parts, out, heads=heads, provenance=provenance, overwrite=overwrite)
        copy_captions(Path(out), source, run)
    return mark


def _merge(spec: str, out: Path, *, overwrite: bool) -> str:
    parts = load_model(spec)
    base, card = read_base(Path(spec))
    with drive_errors_explained(out.absolute().parent, ModelError, "make room, then repeat"):
        mark = save_model(parts, out, provenance=card.get("provenance"), overwrite=overwrite)
        copy_captions(out, spec, base.model)
    return mark


def _copy_adapter(source: Path, out: Path, *, overwrite: bool) -> str:
    folder = source / ADAPTER_FOLDER
    if not is_adapter_folder(folder):
        raise TrainingError(
            f"{source}: the run trained no adapters (model.lora); export without --adapter"
        )
    adapter = read_adapter(folder)  # checks its digest
    if not adapter.base.model:
        raise TrainingError(
            f"{source}: the run began with towers of several models (model.image_tower), and no "
            "model folder is their base; export without --adapter"
        )
    if adapter.base.changed_by:
        raise TrainingError(
            f"{source}: the run began elsewhere than at {adapter.base.model or 'a model folder'} "
            f"({', '.join(adapter.base.changed_by)}), so that the adapter alone would not give its "
            "model; export without --adapter"
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not is_adapter_folder(out):
            raise ModelError(
                f"{out}: already exists and is no adapter folder, which alone is replaced; choose "
                "another folder"
            )
        if not overwrite:
            raise ModelError(f"{out}: already exists; choose another folder or pass --overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}-{secrets.token_hex(4)}")
    with drive_errors_explained(out.absolute().parent, ModelError, "make room, then repeat"):
        try:
            shutil.copytree(folder, partial)
            copy_captions(partial, source)
            if out.exists():
                shutil.rmtree(out)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return adapter.merged_fingerprint


def _read_heads(source: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    path = source / HEADS_NAME
    if not path.is_file():
        raise TrainingError(
            f"{source}: the objective of the run trained no heads; export without --with-heads"
        )
    heads: dict[str, torch.Tensor] = load_file(path)
    return heads
