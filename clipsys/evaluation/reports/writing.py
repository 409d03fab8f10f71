"""A report: one self-contained HTML page, the same as Markdown with its plots, and the figures.

    FOLDER/report.html      everything in one file; needs no network and no script
    FOLDER/report.md        beside plots/*.png and sheets/*.jpg
    FOLDER/results.json     what `clipsys evaluate --json` prints
    FOLDER/made-by          by which a later report knows that it may replace the folder

The folder appears whole or not at all, and an earlier report stays until the new one is there.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from clipsys import __version__
from clipsys.errors import DataError
from clipsys.evaluation.comparison import Comparison
from clipsys.evaluation.reports.canvas import Plot
from clipsys.evaluation.reports.contents import Part, Report
from clipsys.evaluation.reports.markdown_page import document
from clipsys.evaluation.reports.plots import comparison_plot, overview_plots, plots_of
from clipsys.evaluation.reports.sheets import Sheet
from clipsys.evaluation.reports.web_page import page
from clipsys.evaluation.results import Result
from clipsys.files.expansion import expand_path
from clipsys.printing import json_text
from clipsys.probe import machine

RESULTS_NAME, PAGE_NAME, TEXT_NAME = "results.json", "report.html", "report.md"
PLOTS, SHEETS = "plots", "sheets"
#: By this file a folder is known as a report, which a later one may replace.
MARK_NAME, _MARK = "made-by", "clipsys evaluate, format 1\n"
_OWN = {RESULTS_NAME, PAGE_NAME, TEXT_NAME, PLOTS, SHEETS, MARK_NAME}


def write_report(
    folder: str | Path,
    results: Sequence[Result],
    *,
    comparisons: Sequence[Comparison] = (),
    sheets: Sequence[Sheet] = (),
) -> Path:
    """Writes a report, and returns the path of its page.

    Args:
        folder: made if it is missing; an earlier report there is replaced.
        results: in the order in which they are shown.
        comparisons: of two models; shown before the results.
        sheets: contact sheets; their images are read now.

    Raises:
        DataError: the folder holds something else, or cannot be written.
    """
    target = check_replaceable(folder)
    workspace: Path | None = None
    try:
        report = _make(results, comparisons, sheets)
        target.parent.mkdir(parents=True, exist_ok=True)
        name = f".{target.name}."
        workspace = Path(tempfile.mkdtemp(prefix=name, suffix=".partial", dir=target.parent))
        made, old = workspace / "new", workspace / "old"
        made.mkdir()
        _fill(made, report, [*results, *comparisons])
        _put_in_place(made, target, old)
    except OSError as error:
        raise DataError(f"{target}: the report cannot be written ({_reason(error)})") from error
    finally:
        if workspace is not None and (target.exists() or not (workspace / "old").exists()):
            shutil.rmtree(workspace, ignore_errors=True)
    return target / PAGE_NAME


def check_replaceable(folder: str | Path) -> Path:
    """The absolute path of a folder that a report may be written to.

    Raises:
        DataError: it holds something else, or cannot be looked into.
    """
    target = Path(expand_path(str(folder))).resolve()
    try:
        if not target.exists():
            return target
        names = {path.name for path in target.iterdir()} if target.is_dir() else {target.name}
        mark = target / MARK_NAME
        marked = mark.is_file() and mark.read_text(encoding="utf-8", errors="replace") == _MARK
    except OSError as error:
        raise DataError(f"{target}: no report can be written there ({_reason(error)})") from error
    if names and not marked:
        raise DataError(
            f"{target}: exists and is no report; name another folder with --report, or remove it"
        )
    others = sorted(names - _OWN)
    if others:
        raise DataError(
            f"{target}: is a report with other files in it ({', '.join(others[:3])}); move them "
            "away, or name another folder with --report"
        )
    return target


def _put_in_place(made: Path, target: Path, old: Path) -> None:
    """Moves a complete report to its place; an earlier one returns if that fails."""
    if target.exists():
        target.rename(old)
    try:
        made.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _make(
    results: Sequence[Result], comparisons: Sequence[Comparison], sheets: Sequence[Sheet]
) -> Report:
    parts = [Part(one, [comparison_plot(one)]) for one in comparisons]
    parts += [Part(one, plots_of(one)) for one in results]
    pictures: dict[str, bytes] = {}
    for sheet in sheets:
        pictures |= sheet.thumbnails()
    return Report(parts, overview_plots(results), sheets, pictures, _facts())


def _facts() -> dict[str, str]:
    name = Path(sys.argv[0]).name
    command = shlex.join(["clipsys" if name == "__main__.py" else name, *sys.argv[1:]])
    versions = [f"clipsys {__version__}"]
    for name in ("torch", "open_clip_torch", "scikit-learn"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    command = re.sub(r"(://)[^/@\s]*@", r"\1", command)  # no password of an address
    return {
        "made": made,
        "command": command,
        "machine": machine.processor() or platform.machine(),
        "versions": ", ".join(versions),
    }


def _fill(folder: Path, report: Report, found: Sequence[Result | Comparison]) -> None:
    (folder / PLOTS).mkdir()
    (folder / SHEETS).mkdir()
    (folder / MARK_NAME).write_text(_MARK, encoding="utf-8")
    plots = [plot for part in report.parts for plot in part.plots]
    names = _plot_names([*report.overviews, *plots])
    for plot, name in names:
        (folder / PLOTS / name).write_bytes(plot.png)
    files = {uri: f"{SHEETS}/{_file_of(uri)}" for uri in report.pictures}
    for uri, content in report.pictures.items():
        (folder / files[uri]).write_bytes(content)
    own: dict[int, str] = {}
    for sheet in report.sheets:
        for tile in (tile for row in sheet.rows for tile in row if tile.image is not None):
            assert tile.image is not None
            own[id(tile)] = f"{SHEETS}/picture-{len(own) + 1}.png"
            tile.image.save(folder / own[id(tile)])
    plot_files = {id(plot): f"{PLOTS}/{name}" for plot, name in names}
    (folder / TEXT_NAME).write_text(document(report, plot_files, files, own), encoding="utf-8")
    (folder / PAGE_NAME).write_text(page(report), encoding="utf-8")
    (folder / RESULTS_NAME).write_text(
        json_text([one.document() for one in found]) + "\n", encoding="utf-8"
    )


def _plot_names(plots: Sequence[Plot]) -> list[tuple[Plot, str]]:
    return [(plot, f"{number:02}-{plot.name}.png") for number, plot in enumerate(plots, 1)]


def _file_of(uri: str) -> str:
    return f"{hashlib.sha256(uri.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}.jpg"
