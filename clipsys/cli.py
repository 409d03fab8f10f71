"""The command line: one table of verbs, each loaded when it is looked at.

Verbs are plain functions in the ``commands`` module of the package that they belong to. Those
modules import nothing heavy at their top, so that ``clipsys --help`` answers without torch.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from clipsys import __version__
from clipsys.errors import ClipsysError
from clipsys.printing import printable
from clipsys.processes.interruption import Interruption, leave_if_abandoned

#: verb -> (module, function). This table is the only place where `clipsys` names its siblings.
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("clipsys.demo.commands", "demo"),
    "shards": ("clipsys.commands.shards", "shards"),
    "train": ("clipsys.training.commands", "train"),
    "export": ("clipsys.training.commands", "export"),
    "interpolate": ("clipsys.commands.interpolate", "interpolate"),
    "index": ("clipsys.retrieval.commands.index", "index"),
    "search": ("clipsys.retrieval.commands.search", "search"),
    "info": ("clipsys.retrieval.commands.reports", "info"),
    "sources": ("clipsys.retrieval.commands.sources", "sources"),
    "duplicates": ("clipsys.retrieval.commands.reports", "duplicates"),
    "failures": ("clipsys.retrieval.commands.reports", "failures"),
    "remove": ("clipsys.retrieval.commands.maintenance", "remove"),
    "compact": ("clipsys.retrieval.commands.maintenance", "compact"),
    "verify": ("clipsys.retrieval.commands.maintenance", "verify"),
    "repair": ("clipsys.retrieval.commands.maintenance", "repair"),
    "calibrate": ("clipsys.retrieval.commands.calibrate", "calibrate"),
    "classify": ("clipsys.retrieval.commands.classify", "classify"),
    "evaluate": ("clipsys.retrieval.commands.evaluate", "evaluate"),
    "ui": ("clipsys.ui.commands", "ui"),
    "models": ("clipsys.commands.models", "models"),
    "doctor": ("clipsys.commands.doctor", "doctor"),
}


def load_verb(name: str) -> Callable[..., Any]:
    """The function behind a verb."""
    module, function = VERBS[name]
    verb: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return verb


class _Verbs(TyperGroup):
    """Loads a verb when it is first used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name)(load_verb(cmd_name))
        command = typer.main.get_command(single)
        command.name = cmd_name
        return command

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:  # Typer by itself would end without a word
            message = str(interrupt) or "interrupted"
            if "RANK" not in os.environ:  # one of several processes: their launcher says so
                print(message, file=sys.stderr)
            status = interrupt.status if isinstance(interrupt, Interruption) else 130
            leave_if_abandoned(status)
            raise typer.Exit(status) from interrupt


app = typer.Typer(
    cls=_Verbs,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"clipsys {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only warnings and errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True)
    ] = False,
    # The deepspeed launcher puts it before a program's own words; LOCAL_RANK says the same.
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Train CLIP-style encoders, and search any corpus with them."""
    level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    configure_logging(level)


def configure_logging(level: int) -> None:
    """Sends clipsys's log to stderr; keeps the libraries' to warnings and errors."""
    # Damaged images are counted and listed; Pillow's remarks on each would drown that.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    first_rank = os.environ.get("RANK", "0") == "0"  # choices are the same on every rank
    logging.getLogger("clipsys").setLevel(level if first_rank else max(level, logging.WARNING))
    for chatty in ("huggingface_hub", "httpx", "matplotlib", "DeepSpeed"):
        logging.getLogger(chatty).setLevel(
            logging.DEBUG if level == logging.DEBUG else logging.ERROR
        )


class _Formatter(logging.Formatter):
    """Plain sentences for information, the level before anything graver."""

    def format(self, record: logging.LogRecord) -> str:
        text = printable(super().format(record), keep="\n\t")  # it may hold names of files
        rank = os.environ.get("RANK", "0")
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"[rank {rank}] {prefix}{text}" if rank != "0" else f"{prefix}{text}"


#: Errors of writing that are the disk's: full, over quota, too large a file, damaged.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _abandon_stdout() -> None:
    """Lets Python, which flushes once more at its end, write to the null device."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
    """Gives a stream that the caller closed (``>&-``) somewhere to go, which is never read."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits.

    0 success, 1 a `ClipsysError`, 2 wrong usage, 130 interrupted, 143 terminated. Where the
    output is no longer read (``| head``), it ends without a message.
    """
    _open_closed_streams()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # `--debug` is for any error, so it may stand anywhere, also behind the verb.
    debug = "--debug" in arguments
    if debug:
        arguments = ["--debug", *(word for word in arguments if word != "--debug")]
    try:
        try:
            app(args=arguments, prog_name="clipsys", standalone_mode=True)
        finally:
            sys.stdout.flush()  # what is still buffered may find the pipe closed
    except BrokenPipeError:
        _abandon_stdout()
        sys.exit(1)
    except OSError as error:  # `> file` on a full disk
        if debug or error.errno not in _NO_ROOM:
            raise
        _abandon_stdout()
        place = printable(error.filename) if error.filename else "the output"
        print(f"error: {place}: cannot be written ({error.strerror})", file=sys.stderr)
        sys.exit(1)
    except ClipsysError as error:
        if debug:
            raise
        for line in printable(error, keep="\n\t").split("\n"):
            print(f"error: {line}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
