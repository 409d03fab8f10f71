"""One rank of a run that kills itself.

SIGKILL comes where it hurts: in the middle of a step, when gradients have been reduced and weights
are about to change.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def main(last: int, words: list[str], environment: dict[str, str]) -> None:
    """Runs ``clipsys WORDS`` as the rank of ``environment``, up to step ``last`` of this start."""
    from clipsys.cli import main as clipsys_main
    from clipsys.training.engine.deepspeed_engine import import_deepspeed

    os.environ |= {**environment, "LOCAL_RANK": environment["RANK"], "GLOO_SOCKET_IFNAME": "lo"}
    engine_class = import_deepspeed().runtime.engine.DeepSpeedEngine
    step = engine_class.step
    started = 0

    def mortal_step(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal started
        started += 1
        if started == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *arguments, **options)

    engine_class.step = mortal_step
    sys.argv = ["clipsys", *words]
    clipsys_main()
