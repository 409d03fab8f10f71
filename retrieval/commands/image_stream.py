"""The images of sources as vectors, streamed: read and decoded ahead of the encoder, in threads.

    sources --> records --workers: read, decode, resize--> encoder --> (records, vectors) in order

What cannot be used is reported and left out; memory depends on the batch size alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clipsys.commands import options
from clipsys.corpora.columns import Columns
from clipsys.corpora.folders import count_images
from clipsys.corpora.records import Record, read_file
from clipsys.corpora.sources import iterate_source, source_kind
from clipsys.errors import DataError
from clipsys.images.decoding import EXTENSIONS
from clipsys.printing import printable
from clipsys.retrieval.commands.records import is_collection
from clipsys.shards.reading import shard_failure

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from clipsys.models.encoder import Encoder
    from clipsys.zeroshot.images import Input


class Images:
    """The images of some sources.

    Attributes:
        num_bad: how many could not be used until now; each is named on stderr.
    """

    def __init__(self, sources: Sequence[tuple[str, str]], columns: Columns) -> None:
        """``sources``: each with its kind; see `of`."""
        self._sources = sources
        self._columns = columns
        self.num_bad = 0

    @classmethod
    def of(
        cls,
        sources: Sequence[str],
        path_column: str = "",
        caption_column: Sequence[str] | None = None,
        label_column: str = "",
        encoding: str = "",
    ) -> Images:
        """Looks at sources as a user names them, and at the options of tables.

        Raises:
            ConfigError: an option is for tables, and none is one.
            DataError: a source does not exist, or is a collection.
        """
        kinds = [(source, _kind_of(source)) for source in sources]
        others = [source for source, kind in kinds if kind != "image"]
        columns = options.columns_of(
            others or list(sources), path_column, caption_column, label_column, encoding
        )
        return cls(kinds, columns)

    def count(self) -> int | None:
        """How many images there are; None where only reading them would tell."""
        total = 0
        for source, kind in self._sources:
            if kind not in ("image", "folder"):
                return None
            total += 1 if kind == "image" else count_images(source)
        return total

    def encoded(self, encoder: Encoder) -> Iterator[tuple[list[Record], npt.NDArray[np.float32]]]:
        """Usable images in their order with their unit vectors (B, D), batch by batch."""
        from clipsys.zeroshot.images import Input, encoded

        found = (Input(record.uri, record.read, record) for record in self._records())
        for kept, vectors_BD in encoded(encoder, found, on_error=self._unusable):
            yield [one.given for one in kept], vectors_BD

    def _unusable(self, _: Input, error: DataError) -> None:
        self._report(str(error))

    def _records(self) -> Iterator[Record]:
        """The records of all sources; an image that is named is called as it was named."""
        for source, kind in self._sources:
            if kind == "image":
                yield Record(source, partial(read_file, Path(source).expanduser()))
                continue
            try:
                yield from iterate_source(source, columns=self._columns, on_error=self._broken)
            except DataError as error:
                self._report(str(error))

    def _broken(self, shard: str, error: Exception) -> None:
        self._report(shard_failure(shard, error))

    def _report(self, problem: str) -> None:
        self.num_bad += 1
        print(f"error: {printable(problem)}", file=sys.stderr)


def _kind_of(source: str) -> str:
    """``image``, ``folder``, ``table`` or ``shards``.

    Any file that is none of the others counts as an image; decoding says whether it is one. So does
    a name that ends like an image's and is not there: one missing image does not keep the others.
    """
    path = Path(source).expanduser()
    if is_collection(path):
        raise DataError(f"{source}: is a collection; name it with --collection")
    if path.suffix.lower() in EXTENSIONS and not path.is_dir():
        return "image"
    try:
        return source_kind(source)
    except DataError:
        if path.exists() and not path.is_dir():
            return "image"
        raise
