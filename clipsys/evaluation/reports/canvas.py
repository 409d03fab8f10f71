"""What every plot is drawn on: the canvas, its colours, and names that the font can show.

Colours are those of Okabe & Ito, which colour-blind readers tell apart; rates start at 0.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from clipsys.printing import printable

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#777777",
)  # fmt: skip
#: Of a plot, in inches.
WIDTH = 7.2
_FONT = "DejaVu Sans"
_LONGEST_NAME = 24
_MISSING = "□"


@dataclass(frozen=True)
class Plot:
    """One picture of a report.

    Attributes:
        name: of its file, without an ending.
        title: what it shows, and what readers who do not see it are told.
        png: the picture.
    """

    name: str
    title: str
    png: bytes = field(repr=False)


def drawn(name: str, title: str, draw: Callable[[Any, Any], None], what: Any) -> Plot:
    """A plot that ``draw`` draws of ``what`` on an empty figure."""
    with _figure() as figure:
        draw(figure, what)
        buffer = io.BytesIO()
        figure.savefig(
            buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None}
        )
    return Plot(name, printable(title), buffer.getvalue())


@contextmanager
def _figure() -> Iterator[Any]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    settings = {
        "font.size": 10,
        "font.family": [_FONT],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "axes.axisbelow": True,
        "figure.facecolor": "white",
        "text.parse_math": False,
    }
    with matplotlib.rc_context(settings):
        figure = Canvas(figsize=(WIDTH, 4.4))
        FigureCanvasAgg(figure)
        yield figure


def short_name(text: str, fallback: str = "") -> str:
    """A name for an axis: no control characters, nothing that the font lacks, not too long.

    Args:
        text: the name.
        fallback: stands for a name of which the font has no letter.
    """
    known = _known()
    shown = "".join(one if ord(one) in known else _MISSING for one in printable(text))
    if fallback and shown.strip(f"{_MISSING} ") == "":
        return fallback
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[: _LONGEST_NAME - 1]}…"


@cache
def _known() -> frozenset[int]:
    """The code points that the font has."""
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont(_FONT)).get_charmap())
