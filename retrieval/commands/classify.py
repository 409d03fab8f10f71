"""The verb ``clipsys classify``, on images of any source and on the vectors of a collection.

Heavy imports stand inside the functions: this module is loaded to print its help.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from clipsys.commands import options
from clipsys.printing import counted, printable

if TYPE_CHECKING:
    from clipsys.models.encoder import Encoder
    from clipsys.retrieval.collection import Collection
    from clipsys.retrieval.commands.class_options import Classes
    from clipsys.retrieval.commands.image_stream import Images
    from clipsys.retrieval.commands.predictions import Printer
    from clipsys.zeroshot.classifier import ZeroShotClassifier
    from clipsys.zeroshot.deciding import Choice, Decisions

#: Decimals of a written probability: 10,001 values are quick to filter by, a million are not.
_DECIMALS = 4


def classify(
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="Images, folders, tables or shards.", show_default=False),
    ] = None,
    *,
    collection: Annotated[
        Path | None,
        typer.Option(help="Classify the items of a collection, by the vectors that it has stored."),
    ] = None,
    labels: Annotated[
        str, typer.Option(help='Classes, separated by commas: "cat,dog".', show_default=False)
    ] = "",
    label: Annotated[
        list[str] | None,
        typer.Option(help="One class, which may hold commas; may be repeated."),
    ] = None,
    labels_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with a class a line; or JSON: a list of classes, or an object with a list "
            "of synonyms for each class, or with one text, which then stands without a template."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model folder, run folder, open_clip NAME/TAG or hf-hub:ORG/REPO; default "
            f"{options.DEFAULT_MODEL}, with --collection the collection's."
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompt with {} for the class, or a set: simple, clip, siglip, plain; may be "
            "repeated."
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Give the N most probable classes.")
    ] = None,
    multi_label: Annotated[
        bool,
        typer.Option(
            "--multi-label",
            help="Decide on each class by itself: an image has any number. Models that were "
            "trained with a softmax compare it with --background, by default 'a photo.'",
        ),
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="--multi-label: probability of a class; default 0.5."),
    ] = None,
    unknown_below: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, metavar="P", help="Label 'unknown' where the best probability is lower."
        ),
    ] = None,
    background: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="What images of no class look like; their label is 'unknown'."
        ),
    ] = None,
    where: options.Where = None,
    write: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="--collection: write the label into the metadata, under KEY, and its probability "
            "under KEY_probability.",
        ),
    ] = None,
    forget: Annotated[
        str | None,
        typer.Option(
            metavar="KEY", help="--collection: remove what --write KEY wrote, from all items."
        ),
    ] = None,
    items: Annotated[
        bool,
        typer.Option("--items", help="--collection: print every item, not a line for each label."),
    ] = False,
    explain: Annotated[
        Path | None,
        typer.Option(
            metavar="PNG|FOLDER", help="Draw which parts of each image speak for its label."
        ),
    ] = None,
    path_column: options.PathColumn = "",
    caption_column: options.CaptionColumn = None,
    label_column: options.LabelColumn = "",
    encoding: options.Encoding = "",
    as_json: options.Json = False,
) -> None:
    """Classify images among classes that are given by name (zero-shot).

    Probabilities are over the given classes only. An image that cannot be used is named on stderr
    and the others are classified; the exit status is then 1.
    """
    _check_use(
        sources or [],
        collection,
        {"--where": where, "--write": write, "--forget": forget, "--items": items},
        explain,
    )
    if collection is not None and forget is not None:
        _forget(collection, forget)
        return
    if threshold is not None and not multi_label:
        raise typer.BadParameter("--threshold is for --multi-label; see also --unknown-below")
    if not labels and not label and labels_file is None:
        raise typer.BadParameter("name the classes with --labels, --label or --labels-file")
    from clipsys.retrieval.commands.class_options import read_classes
    from clipsys.retrieval.commands.predictions import Printer
    from clipsys.zeroshot.classifier import check_question
    from clipsys.zeroshot.deciding import Choice
    from clipsys.zeroshot.templates import DEFAULT_TEMPLATES

    choice = Choice(
        multi_label,
        0.5 if threshold is None else threshold,
        unknown_below,
        tuple(background or ()),
    )
    wanted = _Wanted(
        read_classes(labels, label or (), labels_file), template or DEFAULT_TEMPLATES, choice
    )
    check_question(wanted.classes, wanted.templates, choice)  # before a model is loaded
    printer = Printer(as_json=as_json, top_k=top_k)
    if collection is not None:
        _classify_stored(collection, model, where, write, wanted, printer, lists=items or as_json)
        return
    from clipsys.retrieval.commands.image_stream import Images

    columns = (path_column, caption_column, label_column, encoding)
    images = Images.of(sources or [], *columns)
    if explain is not None and explain.suffix.lower() == ".png" and images.count() != 1:
        raise typer.BadParameter("--explain with a .png is for one image; name a folder")
    _classify_images(images, model or options.DEFAULT_MODEL, wanted, printer, explain)
    if images.num_bad:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Wanted:
    """What is decided on."""

    classes: Classes
    templates: Sequence[str]
    choice: Choice

    def classifier(self, encoder: Encoder) -> ZeroShotClassifier:
        from clipsys.zeroshot.classifier import ZeroShotClassifier

        return ZeroShotClassifier(
            encoder,
            self.classes,
            self.templates,
            multi_label=self.choice.multi_label,
            threshold=self.choice.threshold,
            unknown_below=self.choice.unknown_below,
            background=self.choice.background,
        )


def _check_use(
    sources: list[str], collection: Path | None, stored: dict[str, Any], explain: Path | None
) -> None:
    if (collection is None) == (not sources):
        raise typer.BadParameter("name images, folders, tables or shards, or else a --collection")
    wrong = [name for name, value in stored.items() if value]
    if collection is None and wrong:
        raise typer.BadParameter(f"{wrong[0]} is for --collection")
    if collection is not None and explain is not None:
        raise typer.BadParameter("--explain is for images; name those of interest by their paths")


def _classify_images(
    images: Images, model: str, wanted: _Wanted, printer: Printer, explain: Path | None
) -> None:
    from clipsys.models.encoder import load
    from clipsys.progress import progress_if
    from clipsys.retrieval.commands.explanations import Drawings

    encoder = load(model)
    classifier = wanted.classifier(encoder)
    drawings = Drawings(explain, encoder, classifier) if explain is not None else None
    with progress_if(printer.shows_progress, "classifying", images.count()) as advance:
        for records, image_ND in images.encoded(encoder):
            decisions = classifier.decide(image_ND)
            printer.print_block([one.uri for one in records], decisions, classifier.classes)
            if drawings is not None:
                drawings.draw(records, decisions.labels)
            advance(len(records))
    printer.end()


def _classify_stored(
    path: Path,
    model: str | None,
    where: list[str] | None,
    write: str | None,
    wanted: _Wanted,
    printer: Printer,
    *,
    lists: bool,
) -> None:
    from clipsys.progress import progress_if
    from clipsys.retrieval.collection import Collection
    from clipsys.retrieval.commands.predictions import Summary

    keys = (write, f"{write}_probability") if write is not None else ()
    with Collection.open(path, few_searches=True, model=model) as photos:
        photos.check_annotations(*keys)  # before the model is loaded
        total = len(photos) if not where else None
        classifier = wanted.classifier(cast("Encoder", photos.encoder))
        summary = Summary(classifier.classes)
        with progress_if(printer.shows_progress, f"classifying {path.name}", total) as advance:

            def decided() -> Iterator[tuple[Sequence[int], Decisions]]:
                for ids, uris, vectors_BD in _blocks(photos, where, with_items=lists):
                    decisions = classifier.decide(vectors_BD, dtype="float32")
                    summary.add(decisions)
                    if lists:
                        printer.print_block(uris, decisions, classifier.classes, ids)
                    yield ids, decisions
                    advance(len(ids))

            if keys:
                written = photos.annotate(_values(decided(), *keys), of_image=True)
            else:
                for _ in decided():
                    pass
    if lists:
        printer.end()
    else:
        summary.print()
    if keys:
        said = f"{keys[0]} and {keys[1]} are written for {counted(written, 'item')}"
        print(printable(f"{said}; filter with --where {keys[0]}=LABEL"), file=sys.stderr)


def _blocks(
    photos: Collection, where: list[str] | None, *, with_items: bool
) -> Iterator[tuple[Sequence[int], Sequence[str], Any]]:
    """Ids, paths where they are printed, and vectors (B, D)."""
    if not with_items:
        for ids_B, vectors_BD in photos.vector_blocks(where):
            yield ids_B.tolist(), (), vectors_BD
        return
    for items, vectors_BD in photos.stored_vectors(where):
        yield [item.id for item in items], [item.uri for item in items], vectors_BD


def _values(
    decided: Iterator[tuple[Sequence[int], Decisions]], key: str, key_of_probability: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """What is written, item by item."""
    for ids, decisions in decided:
        labels = decisions.labels if decisions.chosen is None else decisions.chosen
        probabilities = decisions.probability_N.astype(float).round(_DECIMALS).tolist()
        for item_id, label, probability in zip(ids, labels, probabilities, strict=True):
            yield item_id, {key: label, key_of_probability: probability}


def _forget(path: Path, key: str) -> None:
    from clipsys.retrieval.collection import Collection

    with Collection.open(path) as photos:
        removed = photos.forget_annotation(key)
        if f"{key}_probability" in photos.annotations():
            photos.forget_annotation(f"{key}_probability")
    print(printable(f"{key} is removed from {counted(removed, 'item')}"), file=sys.stderr)
