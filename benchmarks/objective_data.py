"""The images of benchmarks/objectives.py: fit, dev and test, decoded once, and test corrupted.

    DATA/train-*.tar --by emoji--> fit (85 %), which everything is trained on
                                   dev (15 %), which learning rates are chosen on
    DATA/val-*.tar ------------->  test, of which all final figures are

No emoji is in two of them, in whatever drawing style. Samples without a group, and those of groups
that the test images do not have, are left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from clipsys.evaluation.corruptions import Corruption
from clipsys.evaluation.tasks.splitting import LabelledVectors, split_positions
from clipsys.images.preprocessing import Preprocessing
from clipsys.shards.samples import Sample
from clipsys.shards.writing import write_shards
from clipsys.training.distributed.process_group import start_processes
from clipsys.training.validation.held_out import require_key, usable_samples

IMAGE_SIDE = 32
LABEL, FINE_LABEL, SAME = "group", "subgroup", "hexcode"
DEV_SHARE = 0.15
CORRUPTIONS = tuple(
    Corruption(name, severity)
    for name in ("gaussian_noise", "gaussian_blur", "jpeg")
    for severity in (3, 5)
)
PARTS = ("fit", "dev", "test")


@dataclass(frozen=True)
class ImageSet:
    """The images, decoded and corrupted.

    Attributes:
        shards: pattern of the shards to train on, which hold the images of ``fit``.
        pixels: uint8 (N, 3, H, W) of fit, dev, test, and test under each corruption by its key.
        labels: groups of fit, dev and test.
        fine_labels: likewise, subgroups.
        same: likewise, the emoji that each image shows.
    """

    shards: str
    pixels: dict[str, torch.Tensor]
    labels: dict[str, list[str]]
    fine_labels: dict[str, list[str]]
    same: dict[str, list[str]]

    def vectors(self, part: str, features_ND: np.ndarray, *, fine: bool = False) -> LabelledVectors:
        """Features of a part, or of its corrupted images, with labels and what shows the same."""
        of = part if part in PARTS else "test"
        labels, same = (self.fine_labels if fine else self.labels)[of], self.same[of]
        uris = [f"{of}#{number}" for number in range(len(labels))]
        return LabelledVectors(features_ND, labels, uris, [((SAME, one),) for one in same])


def load_images(data: Path, folder: Path) -> ImageSet:
    """Reads both sets, splits the first, and writes the shards of ``fit`` unless they are there."""
    start_processes("cpu")
    size = (IMAGE_SIDE, IMAGE_SIDE)
    target = Preprocessing(
        size=size, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), resize_mode="squash"
    )
    train, test = (
        usable_samples("--data", f"{data}/{name}-*.tar", target, require_key)
        for name in ("train", "val")
    )
    tested = {sample.metadata[LABEL] for sample, _ in test} - {""}
    train = [one for one in train if one[0].metadata[LABEL] in tested]
    test = [one for one in test if one[0].metadata[LABEL] in tested]
    fit, dev = _split([sample for sample, _ in train])
    parts = {
        "fit": [train[number] for number in fit],
        "dev": [train[number] for number in dev],
        "test": test,
    }
    pixels = {
        name: torch.from_numpy(np.stack([pixels for _, pixels in part]))
        for name, part in parts.items()
    }
    for corruption in CORRUPTIONS:
        pixels[corruption.key] = _corrupted(pixels["test"], corruption)
    return ImageSet(
        shards=_shards([sample for sample, _ in parts["fit"]], folder),
        pixels=pixels,
        labels={name: _values(part, LABEL) for name, part in parts.items()},
        fine_labels={name: _values(part, FINE_LABEL) for name, part in parts.items()},
        same={name: _values(part, SAME) for name, part in parts.items()},
    )


def _values(part: Sequence[tuple[Sample, np.ndarray]], key: str) -> list[str]:
    return [str(sample.metadata[key]) for sample, _ in part]


def _split(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Positions of fit and dev, both with their share of each group."""
    labelled = LabelledVectors(
        np.zeros((len(samples), 1), np.float32),
        [str(sample.metadata[LABEL]) for sample in samples],
        [sample.key for sample in samples],
        [((SAME, sample.metadata[SAME]),) for sample in samples],
    )
    return split_positions(labelled, DEV_SHARE, seed=0)


def _corrupted(pixels_NCHW: torch.Tensor, corruption: Corruption) -> torch.Tensor:
    images = pixels_NCHW.permute(0, 2, 3, 1).numpy()
    changed = [corruption(image, seed) for seed, image in enumerate(images)]
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).contiguous()


def _shards(samples: Sequence[Sample], folder: Path) -> str:
    """Pattern of shards with these samples, named by them."""
    named = hashlib.sha256(repr([sample.key for sample in samples]).encode()).hexdigest()[:8]
    place = folder / f"fit-{named}"
    if not place.is_dir():
        write_shards(iter(samples), place, prefix="fit")
    return f"{place}/fit-*.tar"
