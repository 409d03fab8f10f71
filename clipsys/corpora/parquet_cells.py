"""Single cells of a Parquet table, read when they are asked for."""

from __future__ import annotations

import functools
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

from clipsys.errors import DataError


def read_cell(path: Path, column: str, row: int) -> bytes:
    """The bytes in one cell. Rows that follow one another are read together.

    Raises:
        DataError: the table cannot be read, or has no such row any more.
    """
    import pyarrow

    try:
        ends = _row_group_ends(path, path.stat().st_mtime_ns)
        group = bisect_right(ends, row)
        if group == len(ends):
            raise DataError(f"{path}#{row}: the table has no such row any more")
        first = ends[group - 1] if group else 0
        return _row_group(path, path.stat().st_mtime_ns, column, group)[row - first] or b""
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}#{row}: cannot be read ({error})") from error


@functools.lru_cache(maxsize=16)
def _row_group_ends(path: Path, mtime_ns: int) -> list[int]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        sizes = (file.metadata.row_group(at).num_rows for at in range(file.num_row_groups))
        return list(accumulate(sizes))


@functools.lru_cache(maxsize=2)
def _row_group(path: Path, mtime_ns: int, column: str, group: int) -> list[bytes | None]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        cells = file.read_row_group(group, [column])[column].to_pylist()
        return [cell["bytes"] if isinstance(cell, dict) else cell for cell in cells]
