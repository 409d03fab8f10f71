"""Results, comparisons and images for the tests of reports."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from clipsys.errors import DataError
from clipsys.evaluation.results import (
    ClassificationDetails,
    CurveDetails,
    Figure,
    Miss,
    Outcomes,
    Reliability,
    Result,
    RetrievalDetails,
)

#: Names that are anybody's text: markup, Markdown, terminals' commands, other scripts.
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "a|b`c`*d*_e_[f](http://evil.example/g)",
    "line\nbreak\r\ttab",
    "esc\x1b[31mred\x07",
    "left\u202eright\u2066",
    "日本語の名前",
    "नमस्ते",
    "🎉🇩🇪",
    "byte\udce9 and \ud800",
    "$x^2$ & &lt;b&gt; ~~s~~ # h",
    "www.evil.example someone@evil.example http://evil.example",
)


def classification(
    classes: Sequence[str] = ("cat", "dog"),
    *,
    wrong: bool = True,
    images: int | None = None,
    reliability: bool = True,
    model: str = "A",
    uris: Sequence[str] | None = None,
) -> Result:
    """One image of each class; every second one wrong, where there are two classes."""
    size = len(classes)
    count = images or size
    targets = np.arange(count) % size
    predicted = np.where(np.arange(count) % 2 == 1, (targets + 1) % size, targets)
    predicted = predicted if wrong else targets
    confusion = np.zeros((size, size), np.int64)
    np.add.at(confusion, (targets, predicted), 1)
    support = confusion.sum(axis=1)
    recall = np.diag(confusion) / np.maximum(support, 1)
    hits = (targets == predicted).astype(np.float64)
    keys = list(uris) if uris is not None else [f"{number}.png" for number in range(count)]
    found = None
    if reliability:
        bins = np.full(15, np.nan)
        bins[14] = 0.95
        counts = np.zeros(15, np.int64)
        counts[14] = count
        found = Reliability(bins, np.where(counts > 0, hits.mean(), np.nan), counts, 0.25)
    share = float(hits.mean())
    interval = max(share - 0.3, 0.0), min(share + 0.3, 1.0)
    return Result(
        "zeroshot",
        model,
        "data",
        "the nearest class is predicted",
        {"accuracy@1": Figure(share, count, interval, 1 / size)},
        {"classes": size, "images": count},
        {"": Outcomes(keys, np.arange(count), {"accuracy@1": hits})},
        ClassificationDetails(
            list(classes), keys, targets, predicted, np.full(count, 0.95), confusion,
            recall, recall, recall, support, found,
        ),
    )  # fmt: skip


def retrieval(text: str = "a cat", *, misses: bool = True, uri: str = "0.png") -> Result:
    """Both directions, with one miss each or none."""
    curve = {1: 0.5, 5: 0.75, 10: 1.0}
    directions = ("text_to_image", "image_to_text")
    found = {
        directions[0]: [Miss(text, uri, "1.png", 7)] if misses else [],
        directions[1]: [Miss(uri, text, "a dog", 9)] if misses else [],
    }
    figures = {
        f"{one}/{name}": Figure(value, 5_000, (value / 2, value), value / 10)
        for one in directions
        for name, value in (("recall@1", 0.5), ("recall@10", 1.0), ("median_rank", 120.5))
    }
    curves = dict.fromkeys(directions, curve)
    chance = {one: {k: value / 10 for k, value in curve.items()} for one in directions}
    details = RetrievalDetails(curves, chance, found)
    return Result("retrieval", "A", "data", "captions are queries", figures, details=details)


def curves(lines: int, *, axis: str = "severity", interval: bool = True) -> Result:
    """Lines along an axis with their single figures, as robustness has them."""
    clean = Figure(0.8, 100, (0.7, 0.9) if interval else None, 0.1)
    figures = {"clean/accuracy@1": clean}
    drawn = {}
    for line in range(lines):
        points = [(0.0, clean)] if axis == "severity" else []
        for position in (1, 2, 4):
            value = 0.8 - 0.02 * position * (line + 1) / max(lines, 1)
            one = replace(clean, value=value)
            figures[f"line {line}/{position}/accuracy@1"] = one
            points.append((float(position), one))
        drawn[f"line {line}"] = points
    details = CurveDetails(axis, "accuracy@1", drawn)
    return Result("robustness", "A", "data", "corrupted images", figures, details=details)


def read(uri: str) -> bytes:
    """A picture for any uri but those that cannot be read."""
    if uri.startswith("gone"):
        raise DataError(f"{uri}: no such file")
    if uri.startswith("torn"):
        return b"\x89PNG\r\n\x1a\n and no more"
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (20, 160, 90)).save(buffer, "PNG")
    return buffer.getvalue()
