"""What the demo measures, and the pictures and the table that it shows."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from clipsys.corpora.records import Record
from clipsys.demo.scenes import COLOURS, SHAPES, class_names
from clipsys.evaluation.data import open_data
from clipsys.evaluation.encoding import encode_images
from clipsys.evaluation.tasks.retrieval import Floats, retrieval_figures, retrieval_targets
from clipsys.models.encoder import Encoder, load
from clipsys.zeroshot.classifier import ZeroShotClassifier

PROMPTS = ("{}", "a photo of {}", "a picture of {}")
_KS = (1, 5, 10)


def measure(out: Path, times: dict[str, float]) -> dict[str, Any]:
    """Measures a finished demo folder and draws its contact sheet."""
    encoder = load(out / "model")
    shards = out / "corpus" / "shards"
    report: dict[str, Any] = {"zeroshot": zeroshot(encoder, shards)}
    images = encode_images(encoder, open_data(f"{shards}/val-*.tar"), cache=None)
    image_ND, records = images.vectors_ND, images.records
    targets = retrieval_targets(
        ((record.captions, record.metadata) for record in records), match="content"
    )
    report["retrieval"] = retrieval_figures(image_ND, encoder.encode_text(targets.texts), targets)
    report["training"] = _training(out / "run")
    report["seconds"] = times
    examples = _examples(records)
    searches = [_search(out / "collection", query) for query, _ in examples]
    report["search"] = {
        "items": len(image_ND),
        "milliseconds_encoded_text": _search_time(encoder, image_ND),
        "milliseconds_cold_command": statistics.median(taken for _, taken in searches) * 1000,
    }
    draw_contact_sheet(
        [
            (query, expected, hits)
            for (query, expected), (hits, _) in zip(examples, searches, strict=True)
        ],
        out / "searches.png",
    )
    return report


def zeroshot(encoder: Encoder, shards: Path) -> dict[str, dict[str, float]]:
    """Accuracy of colour, shape and both, on seen and on held-out combinations.

    The classes are all combinations, seen and held out alike. The probability of a colour is the
    sum over its shapes, that of a shape the sum over its colours.
    """
    names = class_names()
    classifier = ZeroShotClassifier(encoder, [_with_article(name) for name in names], PROMPTS)
    figures: dict[str, dict[str, float]] = {
        "colour": {"chance": 1 / len(COLOURS)},
        "shape": {"chance": 1 / len(SHAPES)},
        "colour + shape": {"chance": 1 / len(names)},
    }
    for split in ("seen", "held-out"):
        images = encode_images(encoder, open_data(f"{shards}/{split}-*.tar"), cache=None)
        logits = encoder.logit_scale * classifier.scores(images.vectors_ND).astype(np.float64)
        weight = np.exp(logits - logits.max(axis=1, keepdims=True))
        table = weight.reshape(len(weight), len(COLOURS), len(SHAPES))
        guesses = {
            "colour": [tuple(COLOURS)[best] for best in table.sum(axis=2).argmax(axis=1)],
            "shape": [SHAPES[best] for best in table.sum(axis=1).argmax(axis=1)],
            "colour + shape": [names[best] for best in weight.argmax(axis=1)],
        }
        for name, guessed in guesses.items():
            key = "label" if name == "colour + shape" else name
            shown = [record.metadata["objects"][0][key] for record in images.records]
            right = [guess == truth for guess, truth in zip(guessed, shown, strict=True)]
            figures[name][split] = float(np.mean(right))
            figures[name][f"{split} images"] = len(right)
    return figures


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _training(run: Path) -> dict[str, float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [entry for entry in map(json.loads, lines) if "samples_per_s" in entry]
    return {
        "samples_per_s": statistics.median(entry["samples_per_s"] for entry in steps),
        "steps": steps[-1]["step"],
        "final_loss": steps[-1]["loss"],
        "data_wait_share": statistics.median(entry["data_wait_share"] for entry in steps),
    }


def _examples(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Captions of three images of the gallery, spread evenly, and those images' file names."""
    chosen = records[:: max(1, len(records) // 3)][:3]
    keys = [record.uri.rpartition("#")[2] for record in chosen]
    return [(record.captions[0], key) for record, key in zip(chosen, keys, strict=True)]


def _search(collection: Path, query: str) -> tuple[list[dict[str, Any]], float]:
    """What `clipsys search` answers from a cold process, and how long it takes in seconds."""
    command = [sys.executable, "-m", "clipsys", "--quiet", "search", str(collection), query]
    started = time.perf_counter()
    done = subprocess.run([*command, "-k6", "--json"], check=True, capture_output=True)
    taken = time.perf_counter() - started
    hits: list[dict[str, Any]] = json.loads(done.stdout)["hits"]
    return hits, taken


def _search_time(encoder: Encoder, image_ND: Floats) -> float:
    """Median milliseconds of a text query in a running process, encoding included."""
    taken = []
    for colour in COLOURS:
        started = time.perf_counter()
        scores = encoder.encode_text([f"a {colour} star"]) @ image_ND.T
        scores.argsort(axis=1)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken) * 1000


def draw_contact_sheet(searches: list[tuple[str, str, list[dict[str, Any]]]], path: Path) -> None:
    """Draws one row of hits per query, with their scores, as a PNG.

    Args:
        searches: query, file stem of the image that it describes, and the hits.
        path: path of the PNG. The described image has a green frame.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    columns = max(len(hits) for _, _, hits in searches)
    figure = Figure(figsize=(1.5 * columns, 1.95 * len(searches)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subfigures(len(searches), 1, squeeze=False)[:, 0]
    for row, (query, expected, hits) in zip(rows, searches, strict=True):
        row.suptitle(f"“{query}”", fontsize=10, x=0.01, ha="left")
        for axis, hit in zip(row.subplots(1, columns, squeeze=False)[0], hits, strict=False):
            with Image.open(hit["uri"]) as image:
                axis.imshow(image, interpolation="nearest")
            axis.set_xlabel(f"{hit['score']:.2f}", fontsize=8, labelpad=2)
            axis.set(xticks=[], yticks=[])
            right = Path(hit["uri"]).stem == expected
            for spine in axis.spines.values():
                spine.set(color="#2e9e4f" if right else "#cccccc", linewidth=3 if right else 0.8)
    figure.savefig(path)


def print_report(report: dict[str, Any], out: Path) -> None:
    """Prints what was measured, on stdout."""
    console = Console()
    table = Table(title="Zero-shot accuracy", title_justify="left", box=None, pad_edge=False)
    for heading in ("", "seen combinations", "held-out combinations", "chance"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, figures in report["zeroshot"].items():
        table.add_row(
            name,
            f"{figures['seen']:.3f}",
            f"{figures['held-out']:.3f}",
            f"{figures['chance']:.3f}",
        )
    console.print(table)
    console.print()
    retrieval = report["retrieval"]
    table = Table(title="Retrieval", title_justify="left", box=None, pad_edge=False)
    for heading in ("", *(f"recall@{k}" for k in _KS), "candidates", "chance@10"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, label in (("text_to_image", "text → image"), ("image_to_text", "image → text")):
        table.add_row(
            label,
            *(f"{retrieval[f'{name}/recall@{k}']:.3f}" for k in _KS),
            f"{retrieval[f'{name}/candidates']:,.0f}",
            f"{retrieval[f'{name}/chance_recall@10']:.3f}",
        )
    console.print(table)
    console.print()
    training, search, seconds = report["training"], report["search"], report["seconds"]
    table = Table(title="Speed", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_row("training", f"{training['samples_per_s']:,.0f} samples/s")
    for step, taken in seconds.items():
        table.add_row(step, f"{taken:.1f} s")
    table.add_row("text search, running process", f"{search['milliseconds_encoded_text']:.1f} ms")
    table.add_row("text search, cold command", f"{search['milliseconds_cold_command']:,.0f} ms")
    console.print(table)
    console.print()
    console.print(f"pictures: {out / 'loss.png'}, {out / 'searches.png'}", highlight=False)
    console.print(f"figures:  {out / 'report.json'}", highlight=False)
