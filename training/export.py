"""From a run folder to a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from clipsys.errors import ModelError, TrainingError
from clipsys.files.drive_faults import drive_errors_explained
from clipsys.models.open_clip_models import HEADS_NAME, load_model, save_model
from clipsys.training.checkpoints import latest_model, read_provenance

if TYPE_CHECKING:
    import torch


def export_model(
    run: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    with_heads: bool = False,
    overwrite: bool = False,
) -> str:
    """Writes the model of a run as a separate model folder.

    Args:
        run: what `clipsys train` wrote.
        out: the folder to write; complete, or not there at all.
        step: the checkpoint to take; None takes the newest.
        with_heads: writes the objective's heads (projections, prototypes) beside the model.
        overwrite: replaces ``out`` where it is a model folder.

    Returns:
        The model's fingerprint.

    Raises:
        TrainingError: the run has no such checkpoint, or its objective trained no heads.
        ModelError: ``out`` exists or cannot be written, or the checkpoint's model is damaged.
    """
    source = latest_model(Path(run), step)
    parts = load_model(source)  # checks the fingerprint
    heads, provenance = _read_heads(source) if with_heads else None, read_provenance(source)
    with drive_errors_explained(Path(out).absolute().parent, ModelError, "make room, then repeat"):
        return save_model(parts, out, heads=heads, provenance=provenance, overwrite=overwrite)


def _read_heads(source: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    path = source / HEADS_NAME
    if not path.is_file():
        raise TrainingError(
            f"{source}: the objective of the run trained no heads; export without --with-heads"
        )
    heads: dict[str, torch.Tensor] = load_file(path)
    return heads
