"""The whole way over the sample corpus, with the commands that a user would type.

    OUT/corpus/        shards and a gallery of image files, drawn from the seed
    OUT/run/           `clipsys train demo`
    OUT/model/         `clipsys export`
    OUT/collection/    `clipsys index`
    OUT/report.json    everything that was measured
    OUT/loss.png, OUT/searches.png

Each step is skipped where its result is there already, so that an interrupted demo goes on.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipsys.demo.corpus import CorpusSize, write_corpus
from clipsys.errors import ClipsysError, DataError

_logger = logging.getLogger(__name__)


@dataclass
class Demo:
    """One demo folder.

    Attributes:
        out: where everything is written.
        seed: seed of corpus and training.
        size: size of the corpus.
        overrides: settings of the recipe that differ, as ``section.key=value``.
        nproc: training processes; None takes one per GPU, or two on a CPU.
    """

    out: Path
    seed: int = 0
    size: CorpusSize = field(default_factory=CorpusSize)
    overrides: tuple[str, ...] = ()
    nproc: int | None = None

    def run(self) -> dict[str, Any]:
        """Goes the whole way and returns what was measured."""
        started = time.monotonic()
        self.out.mkdir(parents=True, exist_ok=True)
        times = self._read("times.json")
        steps: list[tuple[str, Path, Callable[[], None]]] = [
            ("draw", self.out / "corpus", self._draw),
            ("train", self.out / "run" / "model", self._train),
            ("export", self.out / "model", self._export),
            ("index", self.out / "collection", self._index),
        ]
        for name, result, step in steps:
            if result.exists():
                _logger.info("%s: already there, kept (--fresh starts over)", result)
                if name == "draw":
                    self._check_corpus()
                continue
            begun = time.monotonic()
            step()
            times[name] = time.monotonic() - begun
            self._write("times.json", times)
        report = self._measure(times)
        report["seconds_this_time"] = time.monotonic() - started
        self._write("report.json", report)
        return report

    def _draw(self) -> None:
        write_corpus(self.out / "corpus", seed=self.seed, size=self.size)

    def _check_corpus(self) -> None:
        there = json.loads((self.out / "corpus" / "corpus.json").read_text(encoding="utf-8"))
        asked = {"seed": self.seed, **vars(self.size)}
        if there != asked:
            raise DataError(
                f"{self.out}: holds a demo with other settings ({there}); "
                "choose another --out, or start over with --fresh"
            )

    def _train(self) -> None:
        shards = self.out / "corpus" / "shards"
        run = self.out / "run"
        resume = (run / "config.yaml").is_file()
        nproc = self.nproc or _default_nproc()
        self._clipsys(
            "train",
            "demo",
            f"output={run}",
            f"seed={self.seed}",
            f"data.train={shards}/train-*.tar",
            f"data.validation={shards}/val-*.tar",
            f"evaluation.zeroshot=[{shards}/seen-*.tar, {shards}/held-out-*.tar]",
            *self.overrides,
            f"--nproc={nproc}",
            *(["--resume"] if resume else []),
        )
        shutil.copyfile(run / "curves.png", self.out / "loss.png")

    def _export(self) -> None:
        self._clipsys("export", str(self.out / "run"), str(self.out / "model"))

    def _index(self) -> None:
        gallery = self.out / "corpus" / "gallery"
        model = f"--model={self.out / 'model'}"
        self._clipsys("index", str(self.out / "collection"), str(gallery), model)

    def _measure(self, times: dict[str, float]) -> dict[str, Any]:
        # Imported late: figures need torch, the steps above run in processes of their own.
        from clipsys.demo.figures import measure

        return measure(self.out, times)

    def _clipsys(self, *arguments: str) -> None:
        shown = " ".join(shlex.quote(word) for word in arguments)
        _logger.info("\n$ clipsys %s", shown)
        sys.stderr.flush()
        done = subprocess.run([sys.executable, "-m", "clipsys", *arguments], check=False)
        if done.returncode in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        if done.returncode != 0:
            raise ClipsysError(
                f"`clipsys {arguments[0]}` failed (status {done.returncode}); the message above "
                "says why, and running the demo again goes on from here"
            )

    def _read(self, name: str) -> dict[str, float]:
        path = self.out / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _write(self, name: str, document: dict[str, Any]) -> None:
        partial = self.out / f"{name}.partial"
        partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.out / name)


def _default_nproc() -> int:
    """One process per GPU, or two on a CPU."""
    import torch

    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)
