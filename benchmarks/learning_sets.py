"""The sets of benchmarks/learning.py and the recipe of each program on them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: The model that open_clip_train trains: the one that our recipes had when this was measured first.
PEER_MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 1},
}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "resize_mode": "squash"}


@dataclass(frozen=True)
class PeerRecipe:
    """Options of open_clip_train.

    Attributes:
        lr, weight_decay, batch, precision: as its options are named.
        crop: smallest and largest share of the area of its random crops.
        warmup_share: of the steps.
    """

    lr: float = 2e-3
    weight_decay: float = 0.2
    batch: int = 128
    precision: str = "amp_bf16"
    crop: tuple[float, float] = (0.4, 1.0)
    warmup_share: float = 0.15

    def options(self, steps: int) -> list[str]:
        """For the command line."""
        return [
            "--lr", str(self.lr), "--wd", str(self.weight_decay), "--batch-size", str(self.batch),
            "--warmup", str(round(steps * self.warmup_share)), "--precision", self.precision,
            "--aug-cfg", f"scale=({self.crop[0]},{self.crop[1]})",
        ]  # fmt: skip


@dataclass(frozen=True)
class TrainingSet:
    """A set with the recipes for it.

    Attributes:
        title: for tables and the picture.
        minutes: of one core that a run takes.
        recipe: the shipped recipe of clipsys.
        peer: what open_clip_train was found to learn most with (``peer_sweep``).
        options: of `clipsys.evaluation.measuring.evaluate`.
        peer_sweep: what was tried for open_clip_train.
    """

    title: str
    minutes: float
    recipe: str
    peer: PeerRecipe
    options: Mapping[str, Any]
    peer_sweep: Mapping[str, PeerRecipe] = field(default_factory=dict)


_SWEEP = {
    "batch 128, rate 2e-3": PeerRecipe(),
    "batch 64": PeerRecipe(batch=64),
    "rate 4e-3": PeerRecipe(lr=4e-3),
    "crops of 0.7 to 1": PeerRecipe(crop=(0.7, 1.0)),
}
SETS = {
    "emoji": TrainingSet(
        "emoji", 2.1, "emoji_cpu", PeerRecipe(), {"match": "hexcode", "captions": "first"}, _SWEEP
    ),
    "flickr8k": TrainingSet(
        "Flickr8k", 2.7, "flickr8k_cpu", PeerRecipe(), {"captions": "all"}, _SWEEP
    ),
}


def shards_of(folder: Path, part: str) -> list[Path]:
    """The shards of a part, in order.

    Raises:
        SystemExit: there are none.
    """
    found = sorted(folder.glob(f"{part}-*.tar"))
    if not found:
        raise SystemExit(f"{folder}: no {part}-*.tar")
    return found


def count_samples(shards: list[Path]) -> int:
    """Texts in the shards, one for each sample."""
    count = 0
    for shard in shards:
        with tarfile.open(shard) as archive:
            count += sum(name.endswith(".txt") for name in archive.getnames())
    return count


def write_peer_model(folder: Path) -> Path:
    """A folder for ``open_clip.add_model_config`` that has the model ``small``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.json").write_text(json.dumps(PEER_MODEL), encoding="utf-8")
    return folder
