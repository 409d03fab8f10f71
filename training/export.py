"""From a run folder to a model folder."""

from __future__ import annotations

from pathlib import Path

from clipsys.models.open_clip_models import load_model, save_model
from clipsys.training.checkpoints import latest_model, read_provenance


def export_model(
    run: str | Path, out: str | Path, *, step: int | None = None, overwrite: bool = False
) -> str:
    """Writes the model of a run as a model folder of its own.

    Args:
        run: what `clipsys train` wrote.
        out: the folder to write; complete, or not there at all.
        step: the checkpoint to take; None takes the newest.
        overwrite: replaces ``out`` where it exists.

    Returns:
        The model's fingerprint.

    Raises:
        TrainingError: the run has no such checkpoint.
        ModelError: ``out`` exists, or the checkpoint's model is damaged.
    """
    source = latest_model(Path(run), step)
    parts = load_model(source)  # checks the fingerprint
    return save_model(parts, out, provenance=read_provenance(source), overwrite=overwrite)
