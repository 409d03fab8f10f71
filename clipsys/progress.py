"""Progress bars for long work: on stderr, with rate and time left, quiet when piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from clipsys.printing import printable

#: Seconds between two lines where there is no terminal to draw a bar on.
LINE_INTERVAL_S = 15.0


class Advance(Protocol):
    """Moves a bar forward; ``note`` replaces the text at its end."""

    def __call__(self, n: int = 1, *, note: str | None = None) -> None:
        """Counts ``n`` more items as done."""


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g} {self._unit}/s" if speed else "", style="cyan")


@contextmanager
def progress(
    description: str, total: int | None = None, *, unit: str = "images"
) -> Iterator[Advance]:
    """Shows how far a long job is. Yields a function to call with the number of items done.

    On a terminal it draws a bar; elsewhere (a log file, CI) it writes a line now and then, so that
    a job of hours is never silent. ``total=None`` shows a count without an end.
    """
    console = Console(stderr=True)
    description = printable(description)  # it may hold the name of a folder
    if not console.is_terminal:
        yield _line_writer(description, total, unit)
        return
    counter = MofNCompleteColumn() if total else TextColumn("{task.completed:,.0f}")
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=None),
        counter,
        _RateColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(n: int = 1, *, note: str | None = None) -> None:
            if note is None:
                bar.update(task, advance=n)
            else:
                bar.update(task, advance=n, note=printable(note))

        yield advance


def _line_writer(description: str, total: int | None, unit: str) -> Callable[..., None]:
    last = time.monotonic()
    done = 0
    first: tuple[float, int] | None = None  # the rate leaves out what comes before: start-up

    def advance(n: int = 1, *, note: str | None = None) -> None:
        nonlocal done, last, first
        done += n
        now = time.monotonic()
        if first is None and done:
            first = now, done
        if now - last < LINE_INTERVAL_S and done != total:
            return
        last = now
        share = f"{done:,}/{total:,}" if total else f"{done:,}"
        speed = ""
        if first and done > first[1] and now > first[0]:
            rate = (done - first[1]) / (now - first[0])
            left = f", {(total - done) / rate:,.0f} s left" if total and done < total else ""
            speed = f", {rate:.3g}/s{left}"
        print(
            f"{description}: {share} {unit}{speed} {printable(note or '')}".rstrip(),
            file=sys.stderr,
            flush=True,
        )

    return advance


@contextmanager
def progress_if(
    shown: bool, description: str, total: int | None = None, *, unit: str = "items"
) -> Iterator[Callable[[int], object]]:
    """`progress` where it is to be shown; otherwise a function that does nothing."""
    if not shown:
        yield lambda _: None
        return
    with progress(description, total, unit=unit) as advance:
        yield advance
