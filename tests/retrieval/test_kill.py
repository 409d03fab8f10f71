"""A real writer is killed with SIGKILL at random moments; what it acknowledged must be there."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from clipsys.retrieval import Collection
from tests.retrieval.colours import ColourEncoder

ROOT = Path(__file__).parents[2]


@dataclass
class Acknowledged:
    """What the writer said. ``unsure``: touched by the operation that the kill fell into."""

    live: set[str] = field(default_factory=set)
    unsure: set[str] = field(default_factory=set)

    def hear(self, lines: list[str]) -> None:
        self.unsure.clear()
        for line in lines:
            words = json.loads(line)
            for name, uris in words.get("begin", {}).items():
                # A changed item is there all the time, under its old or its new id.
                self.unsure = set(uris) if name in ("add", "remove") else set()
            for name, uris in words.get("done", {}).items():
                self.unsure = set()
                if name == "add":
                    self.live |= set(uris)
                elif name == "remove":
                    self.live -= set(uris)


def run_and_kill(collection: Path, pictures: Path, seed: int, after_s: float) -> list[str]:
    command = [sys.executable, "-m", "tests.retrieval.crasher", collection, pictures, seed]
    with subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]  # it works from here on
        time.sleep(after_s)
        process.kill()
        lines += process.stdout.readlines()
    assert process.returncode == -9, "the writer ended by itself"
    return [line for line in lines if line.endswith("\n")]


def check(collection: Path, said: Acknowledged) -> None:
    encoder = ColourEncoder()
    with Collection.open(collection, encoder) as photos:
        assert photos.verify() == []
        items = list(photos.items())
        uris = {item.uri for item in items}
        assert len(uris) == len(items), "a uri twice"
        assert said.live - said.unsure <= uris, "acknowledged and missing"
        assert uris <= said.live | said.unsure, "there and never added, or removed and back"
        hits = photos.search_vector(np.ones(encoder.dim, np.float32), k=10_000)
        assert {hit.id for hit in hits} == {item.id for item in items}
        said.live = uris


@pytest.mark.parametrize(
    "num_kills", [6, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def test_killed_writer_loses_nothing_that_it_acknowledged(tmp_path: Path, num_kills: int) -> None:
    generator = random.Random(num_kills)
    collection, pictures = tmp_path / "collection", tmp_path / "pictures"
    pictures.mkdir()
    said = Acknowledged()
    for seed in range(num_kills):
        said.hear(run_and_kill(collection, pictures, seed, generator.uniform(0.0, 0.7)))
        check(collection, said)
    assert said.live, "nothing was ever added: the test tested nothing"
