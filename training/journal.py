"""What a run writes down: metrics.jsonl, TensorBoard and the loss curve."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from clipsys.training.json_lines import format_line, read_lines, rewrite

METRICS_NAME = "metrics.jsonl"

#: What a line of the log says of the held-out data.
_LOGGED = (
    "val/text_to_image/recall@10",
    "val/image_to_text/recall@10",
    "val/zeroshot/accuracy@1",
    "val/knn/accuracy@1",
    "val/classifier/accuracy@1",
    "val/classifier/macro_f1",
)


class Journal:
    """Writes a run's figures; rank 0 only."""

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        run.mkdir(parents=True, exist_ok=True)
        self._metrics = _open_to_append(run / METRICS_NAME)
        self._board = SummaryWriter(str(run / "tensorboard"))

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl, and its numbers to TensorBoard."""
        self._metrics.write(format_line({"step": step, **figures}))
        self._metrics.flush()
        for name, value in figures.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes."""
        self._metrics.close()
        self._board.close()


def described(figures: Mapping[str, float]) -> list[str]:
    """The figures on the held-out data that the log shows."""
    shown = (name for name in _LOGGED if name in figures)
    return [f"{name.removeprefix('val/')} {figures[name]:.3f}" for name in shown]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; steps that a resumed run did again count once, the last time.

    What was measured at one step beside the loss is one entry.
    """
    latest: dict[tuple[int, bool], dict[str, Any]] = {}
    for entry in read_lines(run / METRICS_NAME):
        latest.setdefault((entry["step"], "loss" in entry), {}).update(entry)
    return [latest[key] for key in sorted(latest)]


def _open_to_append(path: Path) -> TextIO:
    """Opens a file of lines; the next one must not be joined to one that a crash has cut."""
    if path.is_file() and not path.read_bytes().endswith(b"\n"):
        rewrite(path, read_lines(path))
    return path.open("a", encoding="utf-8")


def plot_curves(run: Path, out: Path) -> None:
    """Draws loss and recall over the steps of a run as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = read_metrics(run)
    losses = _points(entries, "loss")
    shown = {
        "val/text_to_image/recall@1": "text → image, recall@1",
        "val/text_to_image/recall@10": "text → image, recall@10",
        "val/zeroshot/accuracy@1": "zero-shot accuracy",
        "val/knn/accuracy@1": "nearest neighbours, accuracy",
    }
    figure = Figure(figsize=(9, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    if losses:
        left.plot(*zip(*losses, strict=True), color="#3565a9", linewidth=1.4)
    left.set(title="Training loss", xlabel="step", ylabel="loss")
    for name, label in shown.items():
        if points := _points(entries, name):
            right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    for name, label in _canary_figures(entries).items():
        points = _points(entries, name)
        right.plot(*zip(*points, strict=True), "--", marker="o", markersize=3, label=label)
    right.set(title="Held-out data", xlabel="step", ylim=(0, 1))
    if right.lines:
        right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(out)


def _canary_figures(entries: list[dict[str, Any]]) -> dict[str, str]:
    """The figures of canaries that are drawn, with their labels."""
    shown = {
        "/text_to_image/recall@10": "text → image, recall@10",
        "/zeroshot/accuracy@1": "zero-shot accuracy",
    }
    names = dict.fromkeys(name for entry in entries for name in entry)
    return {
        name: f"{name.removeprefix('canary/').removesuffix(ending)}: {label}"
        for name in names
        for ending, label in shown.items()
        if name.startswith("canary/") and name.endswith(ending)
    }


def _points(entries: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[name]) for entry in entries if entry.get(name) is not None]
