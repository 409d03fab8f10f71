"""The verb `classify`; heavy imports wait until it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipsys.commands import options
from clipsys.printing import json_text, printable

if TYPE_CHECKING:
    from clipsys.zeroshot.classifier import Prediction, ZeroShotClassifier

#: Images that are decoded, and then classified, together.
_AT_ONCE = 64


def classify(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    labels: Annotated[
        str, typer.Option(help='Classes, separated by commas: "cat,dog".', show_default=False)
    ] = "",
    label: Annotated[
        list[str] | None,
        typer.Option(help="One class, which may hold commas; may be repeated."),
    ] = None,
    labels_file: Annotated[
        Path | None, typer.Option(help="A file with a class a line, which may hold commas.")
    ] = None,
    model: options.Model = options.DEFAULT_MODEL,
    template: options.Template = None,
    as_json: options.Json = False,
) -> None:
    """Classify images among classes that are given by name (zero-shot).

    An image that cannot be used is named on stderr and the others are classified; the exit status
    is then 1.
    """
    from clipsys.zeroshot.classifier import DEFAULT_TEMPLATES, ZeroShotClassifier, check_prompts

    if not labels and not label and labels_file is None:
        raise typer.BadParameter("name the classes with --labels, --label or --labels-file")
    templates = template or DEFAULT_TEMPLATES
    names = [*labels.split(","), *(label or ()), *_lines(labels_file)]
    classes = check_prompts(names, templates)  # before minutes of loading a model
    given = [name.strip() for name in names if name.strip()]
    for name in sorted({name for name in given if given.count(name) > 1}):
        print(f"warning: class {printable(name)!r} is named twice; it counts once", file=sys.stderr)
    from clipsys.models.encoder import load

    classifier = ZeroShotClassifier(load(model), classes, templates)
    width = max(len(printable(path)) for path in images)
    rows, num_found = [], 0
    for path, found in _predictions(classifier, images):
        num_found += 1
        if as_json:
            row = {"uri": str(path), "label": found.label, "probability": found.probability}
            rows.append({**row, "scores": found.scores})
        else:
            said = printable(found.label)
            print(f"{printable(path):{width}}  {said}  {found.probability:.3f}")
    if as_json:
        print(json_text(rows))
    if num_found < len(images):
        raise typer.Exit(1)


def _predictions(
    classifier: ZeroShotClassifier, paths: Sequence[Path]
) -> Iterator[tuple[Path, Prediction]]:
    """Images with their classes; those that cannot be used are named on stderr and left out."""
    from clipsys.errors import ImageDecodeError
    from clipsys.images.decoding import decode_image

    for start in range(0, len(paths), _AT_ONCE):
        decoded = []
        for path in paths[start : start + _AT_ONCE]:
            try:
                decoded.append((path, decode_image(path)))
            except ImageDecodeError as error:
                print(f"error: {printable(error)}", file=sys.stderr)
        predictions = classifier.predict([image for _, image in decoded])
        yield from zip((path for path, _ in decoded), predictions, strict=True)


def _lines(path: Path | None) -> list[str]:
    """The classes of a file.

    Raises:
        DataError: it cannot be read, or is no UTF-8 text.
    """
    if path is None:
        return []
    from clipsys.errors import DataError
    from clipsys.files.regular import read_named

    try:
        return read_named(path.expanduser()).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"{path}: the classes cannot be read ({reason})") from error
