"""Train on your own pairs: a table of images and captions becomes a model folder.

    python examples/train_on_pairs.py pairs.csv out
    python examples/train_on_pairs.py pairs.csv out model.architecture=ViT-B-16 schedule.epochs=30

``pairs.csv`` has the columns ``path`` and ``caption``. Training runs in processes of its own, one
for each GPU, so a program starts the commands that a person would type. The model folder
``out/model`` is loaded by clipsys and by stock open_clip.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main(pairs: str, out: str, *overrides: str) -> None:
    """Packs the pairs, trains, exports, and says how well texts find their images."""
    folder = Path(out)
    shards, run, model = folder / "shards", folder / "run", folder / "model"
    clipsys("shards", pairs, str(shards), "--shuffle", "0")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"output: {run}\n"
        "model: {architecture: ViT-B-32}\n"
        f"data: {{train: '{shards}/*.tar', batch_size: 256, micro_batch_size: 64}}\n"
        "schedule: {epochs: 10, warmup_steps: 100}\n",
        encoding="utf-8",
    )
    clipsys("train", str(recipe), *overrides)
    clipsys("export", str(run), str(model))
    # Of the training pairs, so an upper bound: keep pairs apart for a figure that means something.
    clipsys("evaluate", str(model), "--task", "retrieval", "--data", f"{shards}/*.tar")


def clipsys(*arguments: str) -> None:
    """Runs one command; its error ends this program."""
    subprocess.run([sys.executable, "-m", "clipsys", *arguments], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
