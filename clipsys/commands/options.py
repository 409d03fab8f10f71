"""Arguments and options of the command line that several verbs share, each declared once.

A verb names the type, and gives the default: ``def search(collection: Collection, *, k: Count =
10)``. This module imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from clipsys.corpora.columns import Columns

DEFAULT_MODEL = "ViT-B-32/laion2b_s34b_b79k"

CollectionFolder = Annotated[Path, typer.Argument(help="Folder of the collection.")]

Model = Annotated[
    str,
    typer.Option(
        help="Model, run or adapter folder, open_clip NAME/TAG or hf-hub:ORG/REPO; BASE::FOLDER "
        "puts an adapter on a base."
    ),
]
MovedModel = Annotated[
    str | None, typer.Option(help="Where the collection's model lies, if not where it was.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Paths = Annotated[
    bool, typer.Option("--paths", help="Print only the paths of the images, one a line.")
]
Paths0 = Annotated[
    bool,
    typer.Option("--paths0", help="Print only the paths, each ended by NUL, for xargs -0."),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        help="Only items whose metadata match: K=V, K!=V, K<V, K<=V, K>V, K>=V, 'K in A,B', "
        "'K contains V', 'K is missing', 'K is present'. Quotation marks go around values with "
        "commas: 'K in \"A, B\",C'. May be repeated; all must hold."
    ),
]
Template = Annotated[
    list[str] | None,
    typer.Option(
        help="Prompt with {} for the class, or a set: simple, clip, siglip, plain; may be repeated."
    ),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Decoding threads; one a processor by default.")
]

PathColumn = Annotated[
    str,
    typer.Option(help="Table column with the image's path, or the image itself (Parquet)."),
]
CaptionColumn = Annotated[
    list[str] | None, typer.Option(help="Table column with captions; may be repeated.")
]
LabelColumn = Annotated[str, typer.Option(help="Table column with the class label.")]
Encoding = Annotated[
    str,
    typer.Option(help="Encoding of a text table, such as cp1252; UTF-8 or its BOM by default."),
]


def columns_of(
    sources: Sequence[str],
    path_column: str,
    caption_column: Sequence[str] | None,
    label_column: str,
    encoding: str,
    *,
    without_images: bool = False,
) -> Columns:
    """What the options of tables say, for sources of which one has to be a table, if any.

    Raises:
        ConfigError: an option is given, and no source is a table.
        DataError: a source does not exist.
    """
    from clipsys.corpora.columns import Columns
    from clipsys.corpora.sources import source_kind

    columns = Columns(
        path_column, tuple(caption_column or ()), label_column, encoding, without_images
    )
    if columns.options and sources:  # without any, those that a collection knows
        columns.check_used([source_kind(source) for source in sources])
    return columns


def one_of(**given: bool) -> None:
    """Refuses several formats of output at once.

    Raises:
        typer.BadParameter: more than one is given.
    """
    chosen = [f"--{name}" for name, value in given.items() if value]
    if len(chosen) > 1:
        raise typer.BadParameter(f"give one of {' and '.join(chosen)}")
