"""Zero-shot classification: classes are given by name, nothing is trained.

    python examples/zero_shot.py ViT-B-32/laion2b_s34b_b79k cat,dog,horse photo-1.jpg photo-2.jpg

The model is what `clipsys.load` takes: an open_clip name with its tag, ``hf-hub:ORG/REPO``, a model
folder or a run folder.
"""

from __future__ import annotations

import sys

import clipsys

#: The vectors of a class's prompts are averaged, which is steadier than any single prompt.
TEMPLATES = ["a photo of a {}.", "a close-up photo of a {}.", "a drawing of a {}."]


def main(model: str, labels: str, *images: str) -> None:
    """Prints the likeliest class of each image with its probability."""
    encoder = clipsys.load(model)
    classifier = clipsys.ZeroShotClassifier(encoder, classes=labels.split(","), templates=TEMPLATES)
    for image, found in zip(images, classifier.predict(images), strict=True):
        print(f"{image}: {found.label} ({found.probability:.0%})")


if __name__ == "__main__":
    main(*sys.argv[1:])
