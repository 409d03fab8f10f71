"""Small runs for tests: by the command, by ranks of a started group, and by ranks that die."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from clipsys.errors import ClipsysError
from clipsys.training.distributed.launch import free_port
from tests.conftest import TINY_MODEL
from tests.ranks import CONTEXT, run_ranks
from tests.training import mortal_rank

STEPS_PER_EPOCH = 6

#: Augmentation that draws nothing: then a run may depend on how it is split by rounding only.
PLAIN: dict[str, Any] = {
    "crop_scale": [1.0, 1.0],
    "crop_ratio": [1.0, 1.0],
    "flip": 0.0,
    "brightness": 0.0,
}


def write_recipe(folder: Path, shards: str, **sections: Any) -> Path:
    """A recipe of two epochs on 50 pairs, whose run folder is ``folder / "run"``."""
    recipe: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {"architecture": TINY_MODEL},
        "data": {"train": shards, "validation": shards, "batch_size": 8, "workers": 0},
        "optimizer": {"lr": 1e-3},
        "schedule": {"epochs": 2, "warmup_steps": 2},
        "checkpoint": {"every_epochs": 1, "keep": 3},
        "augmentation": {"crop_scale": [0.5, 1.0], "flip": 0.5, "brightness": 0.2},
    }
    for name, settings in sections.items():
        recipe[name] = {**recipe.get(name, {}), **settings}
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def train(*arguments: object, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """``clipsys train`` as a user starts it; each rank imports everything again, for seconds."""
    command = [sys.executable, "-m", "clipsys", "train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)


class Attempt(NamedTuple):
    """One call of the training loop."""

    recipe: Path
    overrides: tuple[str, ...] = ()
    resume: bool = False


class Outcome(NamedTuple):
    """What a rank met with."""

    error: str
    log: str


class Runs(NamedTuple):
    """Where several runs are, and what the first rank met with in each."""

    folder: Path
    outcomes: dict[str, Outcome]


def train_in_group(attempts: list[Attempt], world_size: int) -> list[list[Outcome]]:
    """Every attempt in turn, in one group of real ranks; the outcomes of each rank.

    A rank is forked from a process that has imported everything: it starts in a tenth of the time.
    """
    return run_ranks(_attempt_all, world_size, attempts)


def _attempt_all(rank: int, world_size: int, attempts: list[Attempt]) -> list[Outcome]:
    from clipsys.config import find_recipe, load_settings
    from clipsys.training.loop import train
    from clipsys.training.recipe import Recipe

    outcomes = []
    for attempt in attempts:
        error = ""
        with _logged() as lines:
            try:
                recipe = find_recipe(str(attempt.recipe))
                train(load_settings(Recipe, recipe, attempt.overrides), resume=attempt.resume)
            except ClipsysError as raised:
                error = str(raised)
        outcomes.append(Outcome(error, "\n".join(lines)))
    return outcomes


@contextmanager
def _logged() -> Iterator[list[str]]:
    lines: list[str] = []

    class Listing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("clipsys"), Listing()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)


def kill_ranks(last: int, *arguments: object) -> None:
    """Two ranks without a launcher that end themselves by SIGKILL in their step ``last``."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = ["train", *map(str, arguments)]
    ranks = [
        CONTEXT.Process(target=mortal_rank.main, args=(last, words, {**group, "RANK": str(rank)}))
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(240)
    assert [rank.exitcode for rank in ranks] == [-signal.SIGKILL] * 2


def weights_of(run: Path) -> dict[str, np.ndarray]:
    """The exported weights of a run that is complete."""
    from safetensors.numpy import load_file

    return load_file(run / "model" / "open_clip_model.safetensors")


def have_same_weights(first: Path, second: Path) -> bool:
    """Whether two runs ended bit for bit the same."""
    expected, actual = weights_of(first), weights_of(second)
    assert expected.keys() == actual.keys()
    return all(np.array_equal(expected[name], actual[name]) for name in expected)


def wait_until_nothing_is_left(mark: str) -> None:
    """Until no process has the mark in its environment: ranks, decoding workers, fork servers."""
    deadline = time.monotonic() + 60
    while left := _marked_processes(mark):
        assert time.monotonic() < deadline, f"processes outlived their launcher: {left}"
        time.sleep(0.2)


def _marked_processes(mark: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found
