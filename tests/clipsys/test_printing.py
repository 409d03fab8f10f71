from __future__ import annotations

import json
import logging
import sys

import pytest

from clipsys.cli import configure_logging
from clipsys.printing import json_text, print_paths, print_rows, printable
from clipsys.progress import progress

HOSTILE = "a\x1b]0;title\x07\x1b[31m\nb\r\x9bc\u202egnp\u2066\udcff\x7f.png"


def _is_harmless(text: str) -> bool:
    return text.isprintable() and not set(text) & set("\u202e\u2066")


def test_what_acts_on_a_terminal_is_written_out() -> None:
    shown = printable(HOSTILE)
    assert _is_harmless(shown)
    assert shown == r"a\x1b]0;title\x07\x1b[31m\nb\r\x9bc\u202egnp\u2066\xff\x7f.png"
    assert printable("été 狗 👩‍🚀 C:\\x") == "été 狗 👩‍🚀 C:\\x"
    assert printable("a\nb\tc\x1b", keep="\n\t") == "a\nb\tc\\x1b"


def test_json_is_escaped_by_its_own_rules() -> None:
    document = {"uri": HOSTILE, "caption": "été 狗"}
    text = json_text(document)
    assert json.loads(text) == document
    assert "été 狗" in text
    assert _is_harmless(text.replace("\n", ""))


def test_rows_in_a_pipe_are_one_line_each_with_whole_paths(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = "/very/long/" + "folder/" * 40 + "a\tb.png"
    print_rows(("rank", "image", "caption"), [(1, path, "two\nlines"), (2, "/b", "")], numeric=1)
    shown = path.replace("\t", "\\t")
    lines = ["rank\timage\tcaption", f"1\t{shown}\ttwo\\nlines", "2\t/b\t", ""]
    assert capsys.readouterr().out.split("\n") == lines


@pytest.mark.parametrize("columns", [40, 200])
def test_rows_on_a_terminal_are_aligned_and_never_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    path = "/a/path/of/more/than/forty/characters/in/all.png"
    print_rows(("rank", "image", "caption"), [(1, path, "a dog"), (22, "/b", "")], numeric=1)
    out = capsys.readouterr().out
    wide = f"   1  {path}  a dog\n"
    narrow = f"   1  {path}\n      a dog\n"
    assert (wide if columns == 200 else narrow) in out
    assert "  22  /b\n" in out
    assert "\x1b" not in out


def test_paths_alone_are_exact_for_xargs_and_printable_for_people(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    print_paths(["/a b", "/\x1b[5m\udcff"], separator="\0")
    assert capfdbinary.readouterr().out == b"/a b\0/\x1b[5m\xff\0"
    print_paths(["/a b", "/\x1b[5m\udcff"], separator="\n")
    assert capfdbinary.readouterr().out == b"/a b\n/\\x1b[5m\\xff\n"


def test_logs_and_progress_show_no_escape_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(logging.INFO)
    logging.getLogger("clipsys.test").info("%s is odd", HOSTILE)
    with progress(f"indexing into {HOSTILE}", 1) as advance:
        advance(1, note=HOSTILE)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # the log keeps line breaks, which tracebacks need
    assert all(map(_is_harmless, lines))
