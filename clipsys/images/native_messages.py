"""What C libraries print while they decode: named with the image, instead of loose on stderr.

libtiff writes ``tempfile.tif: Using code not yet in table.`` to file descriptor 2, which tells
nobody what it is about. While one image is decoded, that descriptor leads to a file; lines that are
not libtiff's, from another thread, are passed on.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2
#: Its module, a function's or the file's name that Pillow made up, and a sentence.
_OF_LIBTIFF = re.compile(
    rb"(?:tempfile\.tif|(?:TIFF|OJPEG|JPEG|LZW|Zip|LogLuv|Fax\w*|_?TIF)\w*): .*"
)
_lock = threading.Lock()


@contextmanager
def captured_messages() -> Iterator[list[str]]:
    """Yields a list that holds libtiff's messages once the context is left."""
    messages: list[str] = []
    with _lock, contextlib.ExitStack() as stack:
        try:
            saved = os.dup(_STDERR)
        except OSError:  # stderr is closed: nothing can be printed there
            yield messages
            return
        stack.callback(os.close, saved)
        file = stack.enter_context(tempfile.TemporaryFile())
        os.dup2(file.fileno(), _STDERR)
        try:
            yield messages
        finally:
            os.dup2(saved, _STDERR)
            file.seek(0)
            for line in file.read().splitlines(keepends=True):
                if _OF_LIBTIFF.match(line):
                    text = line.decode("utf-8", "replace").strip()
                    messages.append(text.removeprefix("tempfile.tif: ").rstrip("."))
                else:
                    with contextlib.suppress(OSError):
                        os.write(_STDERR, line)
