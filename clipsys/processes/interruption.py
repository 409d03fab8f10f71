"""Ending long work early, by Ctrl-C or by SIGTERM: in order, and saying how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption(KeyboardInterrupt):
    """Somebody ended the work. The command line shows the message and exits with the status.

    Attributes:
        status: 128 and the number of the signal, as shells have it.
    """

    def __init__(self, message: str, status: int = 128 + signal.SIGINT) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def ending_in_order(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Lets SIGTERM end what is inside as Ctrl-C does: by an exception, so that it can tidy up.

    Without this SIGTERM ends the process at once. What is kept in a collection is safe then too,
    but the batch in flight is lost, and nobody is told.

    Args:
        how_to_go_on: asked after the work has tidied up; what was kept, and the next command.

    Raises:
        Interruption: in place of the KeyboardInterrupt, with that message.
    """

    def terminate(number: int, _: FrameType | None) -> None:
        raise Interruption("terminated", 128 + number)

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if in_main_thread else None
    try:
        yield
    except KeyboardInterrupt as interrupt:
        status = interrupt.status if isinstance(interrupt, Interruption) else 128 + signal.SIGINT
        word = "terminated" if status == 128 + signal.SIGTERM else "interrupted"
        raise Interruption(f"{word}: {how_to_go_on()}", status) from interrupt
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
