"""One rank of a run that kills itself: ``mortal_rank.py STEP CLIPSYS-ARGUMENTS…``.

SIGKILL comes where it hurts: in the middle of step STEP, counted from this start, when gradients
have been reduced and weights are about to change.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def main() -> None:
    from clipsys.cli import main as clipsys_main
    from clipsys.training.engine import import_deepspeed

    last = int(sys.argv.pop(1))
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
    clipsys_main()


if __name__ == "__main__":
    main()
