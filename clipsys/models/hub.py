"""The Hugging Face hub: asked quietly, and not for longer than a few seconds where it is silent.

`huggingface_hub` tries each file six times with growing pauses and reports every try, which on a
machine without a network is a minute of messages for each model. Here the hub is asked once; where
it does not answer, files come from its cache alone, and what the cache lacks is an error of one
line.
"""

from __future__ import annotations

import logging
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

#: Longest wait for the hub's first answer.
ANSWER_TIMEOUT_S = 5.0
#: How long a hub that did not answer is not asked again.
_REST_S = 60.0

#: What to do about a hub that cannot be reached.
HINT = (
    "connect this machine, or copy the model's folder to it and name that folder "
    "(HF_HUB_OFFLINE=1 uses downloaded models without asking the hub)"
)

#: Endpoint -> until when it counts as unreachable (monotonic seconds), and why.
_silent: dict[str, tuple[float, str]] = {}

_logger = logging.getLogger(__name__)


@contextmanager
def quiet_hub() -> Iterator[str]:
    """While it holds, files come from the hub without messages, or from its cache alone.

    Yields:
        Why the hub cannot be reached, in words for a message; empty where it answers.
    """
    from huggingface_hub import constants

    reason = _why_unreachable(constants.ENDPOINT, offline=constants.HF_HUB_OFFLINE)
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "transformers")]
    levels = [logger.level for logger in loggers]
    was_offline = constants.HF_HUB_OFFLINE
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # Read at each request by huggingface_hub and transformers alike; the environment variable of
    # the same name is read at their import only.
    constants.HF_HUB_OFFLINE = was_offline or bool(reason)
    try:
        yield reason
        if reason and not was_offline:
            _logger.info("%s; what had been downloaded was used", reason)
    finally:
        constants.HF_HUB_OFFLINE = was_offline
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def without_hub() -> Iterator[None]:
    """While it holds, nothing is asked of the hub: for folders that hold all that they need."""
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _why_unreachable(endpoint: str, *, offline: bool) -> str:
    if offline:
        return "HF_HUB_OFFLINE is set, so that only downloaded files are used"
    until, reason = _silent.get(endpoint, (0.0, ""))
    if time.monotonic() < until:
        return reason
    problem = _ask(endpoint)
    if not problem:
        _silent.pop(endpoint, None)
        return ""
    reason = f"the hub {endpoint} cannot be reached ({problem})"
    _silent[endpoint] = (time.monotonic() + _REST_S, reason)
    return reason


def _ask(endpoint: str) -> str:
    """What is wrong with the way to the hub; empty where it answers, with whatever status."""
    request = urllib.request.Request(endpoint, method="HEAD")  # through the environment's proxies
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S):
            return ""
    except urllib.error.HTTPError:
        return ""
    except urllib.error.URLError as error:
        cause = error.reason
    except OSError as error:
        cause = error
    except ValueError as error:  # http.client's, for an answer that is not HTTP, and bad addresses
        return str(error)
    if isinstance(cause, TimeoutError):
        return f"no answer within {ANSWER_TIMEOUT_S:g} s"
    if isinstance(cause, OSError) and _is_of_the_network(cause):
        return cause.strerror or str(cause)
    # Certificates and proxies of kinds that urllib does not know: the hub's client may do better.
    return ""


def _is_of_the_network(error: OSError) -> bool:
    import socket
    import ssl

    if isinstance(error, ssl.SSLError):
        return False
    return isinstance(error, (socket.gaierror, ConnectionError)) or error.errno is not None
