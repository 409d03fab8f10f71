"""The verb ``clipsys calibrate``.

Heavy imports stand inside the functions: this module is loaded to print their help.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clipsys.commands import options
from clipsys.printing import printable

if TYPE_CHECKING:
    from clipsys.background.captions import TrainingCaptions


def calibrate(
    collection: options.CollectionFolder,
    captions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Captions such as the model was trained with, one a line. Without it: those in "
            "the model's folder, else the collection's own, else generic ones.",
        ),
    ] = None,
) -> None:
    """Measure what text queries have to reach to be relevant in a collection."""
    from clipsys.retrieval.collection import Collection

    given = _read(captions) if captions is not None else None
    with Collection.open(collection) as photos:
        cuts = photos.calibrate(given)
        typer.echo(
            f"{printable(photos.path)}: a hit is relevant from a score of {cuts.score:.3f}; "
            f"{cuts.captions_kept:.0%} of captions and {cuts.foreign_kept:.0%} of texts that "
            "describe no picture keep one"
        )
        if not cuts.can_tell:
            typer.echo(
                "the scores of this model do not tell these apart here: relevance is not shown, "
                "and --relevant-only leaves nothing out",
                err=True,
            )


def _read(path: Path) -> TrainingCaptions:
    """The captions of a text file.

    Raises:
        DataError: it cannot be read, or is no UTF-8 text.
    """
    from clipsys.background.captions import sample_captions
    from clipsys.errors import DataError
    from clipsys.files.regular import read_named

    try:
        text = read_named(path.expanduser()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: the captions cannot be read ({error}); expected UTF-8, one a line"
        ) from error
    return sample_captions([line] for line in text.splitlines())
