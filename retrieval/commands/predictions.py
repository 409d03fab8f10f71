"""What ``clipsys classify`` prints: a line or a JSON object an image, or a line a label."""

from __future__ import annotations

import sys
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clipsys.printing import json_text, printable

if TYPE_CHECKING:
    from clipsys.zeroshot.deciding import Decisions

_GAP = "  "


class Printer:
    """Prints predictions as they come; nothing of them is kept.

    Into a pipe or a file, cells are separated by tabs; on a terminal they are aligned, block by
    block.
    """

    def __init__(self, *, as_json: bool, top_k: int | None) -> None:
        # A progress bar replaces sys.stdout by what prints above the bar, on stderr.
        self._out = sys.stdout
        self._as_json = as_json
        self._top_k = top_k
        self._num_printed = 0

    @property
    def shows_progress(self) -> bool:
        """Whether a bar would not stand between what is printed."""
        return not self._out.isatty()

    def print_block(
        self,
        uris: Sequence[str],
        decisions: Decisions,
        classes: Sequence[str],
        ids: Sequence[int] | None = None,
    ) -> None:
        """Prints some images with their classes."""
        tops = self._tops(decisions, classes)
        if not self._as_json:
            self._print_lines(uris, decisions, tops)
            return
        for place, uri in enumerate(uris):
            row: dict[str, Any] = {} if ids is None else {"id": ids[place]}
            row |= {
                "uri": uri,
                "label": decisions.labels[place],
                "probability": float(decisions.probability_N[place]),
            }
            if decisions.chosen is not None:
                row["labels"] = decisions.chosen[place]
            if tops is not None:
                row["top"] = [{"label": name, "probability": p} for name, p in tops[place]]
            row["scores"] = dict(zip(classes, map(float, decisions.scores_NC[place]), strict=True))
            self._out.write(",\n" if self._num_printed else "[\n")
            self._out.write(textwrap.indent(json_text(row), "  "))
            self._num_printed += 1

    def end(self) -> None:
        """Ends the JSON."""
        if self._as_json:
            self._out.write("\n]\n" if self._num_printed else "[]\n")

    def _tops(
        self, decisions: Decisions, classes: Sequence[str]
    ) -> list[list[tuple[str, float]]] | None:
        if self._top_k is None:
            return None
        order_NK = np.argsort(-decisions.probability_NC, axis=1, kind="stable")[:, : self._top_k]
        return [
            [(classes[place], float(row_C[place])) for place in order_K]
            for order_K, row_C in zip(order_NK, decisions.probability_NC, strict=True)
        ]

    def _print_lines(
        self,
        uris: Sequence[str],
        decisions: Decisions,
        tops: list[list[tuple[str, float]]] | None,
    ) -> None:
        rows = []
        for place, uri in enumerate(uris):
            cells = [uri]
            if tops is not None:
                for name, probability in tops[place]:
                    cells += [name, f"{probability:.3f}"]
            else:
                chosen = None if decisions.chosen is None else decisions.chosen[place]
                label = ", ".join(chosen) if chosen else decisions.labels[place]
                cells += [label, f"{decisions.probability_N[place]:.3f}"]
            rows.append([printable(cell) for cell in cells])
        self._out.write(_lines(rows, aligned=self._out.isatty()))


class Summary:
    """How many images there are of each label, and how sure the model is of them."""

    def __init__(self, classes: Sequence[str]) -> None:
        self._places = {name: place for place, name in enumerate(classes)}
        self._counts: dict[str, int] = defaultdict(int)
        self._sums: dict[str, float] = defaultdict(float)
        self.num_items = 0

    def add(self, decisions: Decisions) -> None:
        """Counts some images; one of several classes in each of them."""
        self.num_items += len(decisions.labels)
        if decisions.chosen is None:
            names, places = np.unique(np.array(decisions.labels, object), return_inverse=True)
            sums = np.bincount(places, decisions.probability_N)
            for name, count, total in zip(names, np.bincount(places), sums, strict=True):
                self._count(str(name), int(count), float(total))
            return
        for row, chosen in enumerate(decisions.chosen):
            for name in chosen:
                self._count(name, 1, float(decisions.probability_NC[row, self._places[name]]))
            if not chosen:
                self._count(decisions.labels[row], 1, float(decisions.probability_N[row]))

    def _count(self, name: str, number: int, total: float) -> None:
        self._counts[name] += number
        self._sums[name] += total

    def print(self) -> None:
        """Prints a line for each label, the most frequent first."""
        rows = [["label", "items", "share", "mean probability"]]
        for name, count in sorted(self._counts.items(), key=lambda one: (-one[1], one[0])):
            share, mean = count / self.num_items, self._sums[name] / count
            rows.append([printable(name), f"{count:,}", f"{share:.1%}", f"{mean:.3f}"])
        sys.stdout.write(_lines(rows, aligned=sys.stdout.isatty()))


def _lines(rows: Sequence[Sequence[str]], *, aligned: bool) -> str:
    if not aligned or not rows:
        return "".join("\t".join(row) + "\n" for row in rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(
        _GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        + "\n"
        for row in rows
    )
