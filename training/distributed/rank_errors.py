"""Errors of ranks: a rank leaves word of its error, in the file that its launcher names.

The file and its form are those of torch.distributed.elastic, so torchrun shows the message too.
What elastic's own `record` does not do is done here: it keeps whole seconds only, which do not
tell which of two ranks failed first; it does not tell an error that clipsys raises on purpose from
one that a rank meets because it lost its peer; and a rank that `record` decorates goes on into the
interpreter's clean-up, which waits for peers that wait in a collective.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipsys import errors
from clipsys.errors import ClipsysError, TrainingError

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
PARENT = "CLIPSYS_LAUNCHER_PID"
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_TIMED_OUT = ("Timed out waiting", "timed out after", "Watchdog caught collective")


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Inside a rank: leaves word of an error, and under our launcher ends with it, and at once."""
    ours = PARENT in os.environ
    if ours:
        _watch_parent(int(os.environ[PARENT]))
    try:
        yield
    except Exception as error:
        deliberate = isinstance(error, ClipsysError)
        _record(error, deliberate=deliberate)
        if not ours:
            raise
        if not deliberate and ("--debug" in sys.argv or not _is_of_a_peer(error)):
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # peers wait in a collective: no time for the interpreter's own clean-up


def _is_of_a_peer(error: Exception) -> bool:
    return any(sign in str(error) for sign in (*_LOST_PEER, *_TIMED_OUT))


def _record(error: Exception, *, deliberate: bool) -> None:
    name = os.environ.get(ERROR_FILE)
    if name is None:
        return
    text = str(error) if deliberate else f"{type(error).__name__}: {error}".splitlines()[0]
    if not deliberate and any(sign in text for sign in _TIMED_OUT):
        text = f"waited in vain for another rank, which is stuck or gone ({text})"
    now = time.time()
    report = {
        # The short form of elastic's file: torchrun shows the line, without a traceback.
        "message": f"{type(error).__name__}: {error}",
        "timestamp": str(int(now)),
        # What elastic has no field for.
        "clipsys": {
            "kind": type(error).__name__,
            "message": text,
            "rank": int(os.environ.get("RANK", "0")),
            "deliberate": deliberate,
            "time": now,
        },
    }
    partial = Path(f"{name}.partial")
    partial.write_text(json.dumps(report), encoding="utf-8")
    partial.replace(name)


def read_reports(folder: Path) -> list[dict[str, Any]]:
    """What the ranks have left in a folder of error files, the cause first.

    A rank that lost its peer fails too, a moment later.
    """
    reports = []
    for path in folder.glob("*.json"):
        document = json.loads(path.read_text(encoding="utf-8"))
        reports.append(document["clipsys"])
    return sorted(reports, key=lambda report: (not report["deliberate"], report["time"]))


def as_error(report: dict[str, Any]) -> ClipsysError:
    """The error of a rank, of the class that it had where clipsys raised it on purpose."""
    kind = getattr(errors, report["kind"], TrainingError)
    prefix = "" if report["deliberate"] else f"rank {report['rank']}: "
    if isinstance(kind, type) and issubclass(kind, ClipsysError):
        with contextlib.suppress(TypeError):  # ImageDecodeError wants more than a message
            return kind(prefix + str(report["message"]))
    return TrainingError(prefix + str(report["message"]))


def _watch_parent(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
