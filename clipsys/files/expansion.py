"""Paths as users write them: ``~`` and environment variables are expanded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from clipsys.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")


def expand_path(text: str) -> str:
    """``~`` and ``$NAME`` or ``${NAME}`` in a path, replaced; a path that exists stays as it is.

    Raises:
        ConfigError: a variable is not set, or there is no such user.
    """
    if os.path.lexists(text):
        return text
    for match in _VARIABLE.finditer(text):
        name = match[1] or match[2]
        if name not in os.environ:
            raise ConfigError(f"{text}: the environment variable {name} is not set")
    expanded = _VARIABLE.sub(lambda match: os.environ[match[1] or match[2]], text)
    if not expanded.startswith("~"):
        return expanded
    try:
        return str(Path(expanded).expanduser())
    except RuntimeError as error:
        raise ConfigError(f"{text}: the home folder of this user is unknown") from error
