"""Starting runs: launchers, ranks that fail or vanish, and what a run refuses before it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipsys.cli import main
from clipsys.training.distributed.launch import free_port
from tests.conftest import noise_image
from tests.training.runs import (
    Attempt,
    train,
    train_in_group,
    wait_until_nothing_is_left,
    write_recipe,
)


def test_one_process_trains_without_a_launcher_and_without_a_compiler(
    shards: str, tmp_path: Path
) -> None:
    # An empty PATH hides g++ and ninja, which DeepSpeed would otherwise start on a CPU.
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    environment |= {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    recipe = write_recipe(tmp_path, shards, schedule={"epochs": 1}, engine={"zero_stage": 0})
    command = [sys.executable, "-m", "clipsys", "train", str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "extensions").exists()


def test_ranks_started_by_the_deepspeed_launcher_train_together(
    shards: str, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, shards, schedule={"epochs": 1}, engine={"zero_stage": 2})
    scripts = Path(sys.executable).parent
    command = [
        str(scripts / "deepspeed"), "--num_gpus=2", "--master_port", str(free_port()),
        "--no_python", str(scripts / "clipsys"), "train", str(recipe),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stderr
    assert (tmp_path / "run" / "model").is_dir()


def test_ranks_started_by_torchrun_train_together(shards: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, schedule={"epochs": 1})
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0",
        "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--module", "clipsys", "train",
        str(recipe),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stderr
    assert (tmp_path / "run" / "model").is_dir()


def test_too_many_bad_samples_stop_the_run_and_are_listed(tmp_path: Path) -> None:
    from clipsys.shards.samples import Sample
    from clipsys.shards.writing import write_shards

    def samples() -> Any:
        for number in range(48):
            image = b"nothing" if number % 4 == 0 else _png(number)
            yield Sample(f"{number:03d}", image, "png", (f"text {number}",))

    write_shards(samples(), tmp_path / "bad")
    recipe = write_recipe(tmp_path, str(tmp_path / "bad"), data={"validation": None})
    more = ("data.max_bad_share=0.5", f"output={tmp_path / 'again'}")
    ((stopped, allowed),) = train_in_group([Attempt(recipe), Attempt(recipe, more)], 1)
    assert "data.max_bad_share = 1.0%" in stopped.error
    lines = (tmp_path / "run" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    listed = [json.loads(line) for line in lines]
    assert {entry["reason"] for entry in listed} == {"not an image"}
    assert all(int(entry["key"]) % 4 == 0 for entry in listed)
    assert not allowed.error
    assert "samples could not be used; see" in allowed.log


def _png(number: int) -> bytes:
    from tests.conftest import encode_png

    return encode_png(np.asarray(noise_image(number, (32, 32))))


def test_a_failing_rank_ends_all_with_its_error(shards: str, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, shards, optimizer={"lr": 1e30}, engine={"gradient_clipping": 0.0}
    )
    started = time.monotonic()
    done = train(recipe, "--nproc", 2)
    assert done.returncode == 1
    assert "the loss is not finite on rank" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 120
    assert not (tmp_path / "run" / "model").exists()


def test_the_loss_of_one_rank_ends_all_ranks(shards: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, shards, data={"workers": 1}, schedule={"epochs": 1000})
    mark = f"CLIPSYS_TEST_MARK={tmp_path}"
    with subprocess.Popen(
        [sys.executable, "-m", "clipsys", "train", str(recipe), "--nproc", "2"],
        env={**os.environ, "CLIPSYS_TEST_MARK": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        latest = tmp_path / "run" / "checkpoints" / "latest"
        deadline = time.monotonic() + 200
        while not latest.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        (victim,) = (
            int(process.name)
            for process in Path("/proc").glob("[0-9]*")
            if _has(process / "environ", mark, "\0RANK=1\0")
            and _has(process / "cmdline", "\0train\0")
        )
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        error = running.communicate(timeout=100)[1]
    assert time.monotonic() - killed < 60
    assert running.returncode == 1
    assert error.strip().splitlines()[-1].startswith("error: rank 1 was killed by SIGKILL")
    wait_until_nothing_is_left(mark)
    assert latest.exists()


def _has(path: Path, *parts: str) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return all(part.encode() in content for part in parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.batch_size=7",
         "data.batch_size is 7, which does not divide among 2 processes; try 6"),
        ("data.batchsize=7", "data.batchsize is not a setting; did you mean data.batch_size?"),
        ("engine.zero_stage=5", "engine.zero_stage is 5"),
        ("engine.zero_stage=3 engine.ema_decay=0.9", "engine.ema_decay needs whole parameters"),
        ("data.label_key=x", "does nothing for objective.name infonce unless"),
    ],
)  # fmt: skip
def test_a_recipe_that_contradicts_itself_is_one_line_and_starts_no_process(
    shards: str, tmp_path: Path, change: str, message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def no_launch(*_: object) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr("clipsys.training.distributed.launch.launch", no_launch)
    recipe = write_recipe(tmp_path, shards)
    with pytest.raises(SystemExit, match="1"):
        main(["train", str(recipe), *change.split(), "--nproc", "2"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "run").exists()


_UNUSABLE = {
    "data.train=/nowhere/*.tar": "no file matches this pattern",
    "model.architecture=ViT-X": "'ViT-X' is not a model that open_clip knows",
    "model.pretrained=/nowhere": "there is no such model folder",
    "data.batch_size=100": "batch_size is 100, but the shards hold only 50 samples",
}


def test_every_rank_refuses_what_is_not_there_before_anything_is_written(
    shards: str, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, shards)
    attempts = [Attempt(recipe, (change,)) for change in _UNUSABLE]
    attempts.append(Attempt(recipe, resume=True))
    messages = [*_UNUSABLE.values(), "there is no run to resume"]
    for outcomes in train_in_group(attempts, 2):
        for outcome, message in zip(outcomes, messages, strict=True):
            assert message in outcome.error
    assert not (tmp_path / "run").exists()


def test_what_all_ranks_refuse_is_one_line_of_the_command(shards: str, tmp_path: Path) -> None:
    (change, message), *_ = _UNUSABLE.items()
    done = train(write_recipe(tmp_path, shards), change, "--nproc", 2)
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert message in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
