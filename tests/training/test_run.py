"""Whole runs: real processes, a real DeepSpeed engine, real kills."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import clipsys
from clipsys.errors import ConfigError, TrainingError
from clipsys.training.export import export_model
from clipsys.training.journal import plot_curves, read_metrics
from clipsys.training.launch import free_port
from tests.conftest import TINY_MODEL, noise_image, write_training_shards

_STEPS_PER_EPOCH = 6


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_training_shards(tmp_path_factory.mktemp("shards"), 50)


def _recipe(folder: Path, shards: str, **sections: Any) -> Path:
    recipe: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {"architecture": TINY_MODEL},
        "data": {"train": shards, "validation": shards, "batch_size": 8, "workers": 1},
        "optimizer": {"lr": 1e-3},
        "schedule": {"epochs": 2, "warmup_steps": 2},
        "checkpoint": {"every_epochs": 1, "keep": 3},
        "augmentation": {"crop_scale": [0.5, 1.0], "flip": 0.5, "brightness": 0.2},
    }
    for name, settings in sections.items():
        recipe[name] = {**recipe.get(name, {}), **settings}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def _train(*arguments: object, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clipsys", "train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)


def _weights(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "model" / "open_clip_model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shards: str) -> Path:
    """A run of two processes that went through to the end."""
    folder = tmp_path_factory.mktemp("finished")
    done = _train(_recipe(folder, shards), "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder / "run" / "model")]
    return folder / "run"


def test_a_run_leaves_everything_that_was_promised(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "model",
        "curves.png",
    } <= names
    assert not list(finished.rglob("*.partial"))
    figures = read_metrics(finished)
    losses = [entry["loss"] for entry in figures if "loss" in entry]
    assert all(np.isfinite(losses))
    last = [entry for entry in figures if "val/text_to_image/recall@10" in entry][-1]
    assert last["step"] == 2 * _STEPS_PER_EPOCH
    assert last["val/text_to_image/candidates"] == 50


def test_the_exported_model_measures_as_it_did_in_training(
    finished: Path, shards: str, tmp_path: Path
) -> None:
    from clipsys.benchmarking import measure

    export_model(finished, tmp_path / "m")
    metrics = measure(tmp_path / "m", "retrieval", shards)["metrics"]
    last = [entry for entry in read_metrics(finished) if "val/text_to_image/recall@10" in entry][-1]
    for name in ("text_to_image/recall@10", "image_to_text/recall@5", "text_to_image/median_rank"):
        assert metrics[name] == pytest.approx(last[f"val/{name}"], abs=0.02)


def test_a_checkpoint_of_an_earlier_step_can_be_exported(finished: Path, tmp_path: Path) -> None:
    first = export_model(finished, tmp_path / "a", step=_STEPS_PER_EPOCH)
    last = export_model(finished, tmp_path / "b")
    assert first != last
    with pytest.raises(TrainingError, match="no checkpoint at step 5; there are 6, 12"):
        export_model(finished, tmp_path / "c", step=5)
    with pytest.raises(TrainingError, match="not a run folder"):
        export_model(tmp_path, tmp_path / "c")
    assert clipsys.load(finished).encode_image([noise_image(0)]).shape == (1, 32)


def test_a_used_run_folder_is_not_overwritten(finished: Path, shards: str) -> None:
    done = _train(finished.parent / "recipe.yaml")
    assert done.returncode == 1
    assert "the run folder is not empty; go on with --resume" in done.stderr


def test_a_run_whose_launcher_was_killed_ends_bit_for_bit_the_same(
    finished: Path, shards: str, tmp_path: Path
) -> None:
    recipe = _recipe(tmp_path, shards)
    command = [sys.executable, "-m", "clipsys", "train", str(recipe), "--nproc", "2"]
    mark = f"CLIPSYS_TEST_MARK={tmp_path}"
    running = subprocess.Popen(
        command,
        env={**os.environ, "CLIPSYS_TEST_MARK": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    latest = tmp_path / "run" / "checkpoints" / "latest"
    deadline = time.monotonic() + 200
    while not latest.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)  # the launcher; its ranks notice and end by themselves
    running.wait()
    _wait_until_nothing_is_left(mark)
    assert latest.exists()
    done = _train(recipe, "--nproc", 2, "--resume")
    assert done.returncode == 0, done.stderr
    # How far the ranks came before they noticed is the machine's business.
    assert re.search("resuming after step (6|12) of 12", done.stderr)
    assert _same_weights(finished, tmp_path / "run")


@pytest.mark.parametrize("zero_stage", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_step_ends_bit_for_bit_the_same(
    finished: Path, shards: str, tmp_path: Path, zero_stage: int
) -> None:
    settings: dict[str, Any] = {"engine": {"zero_stage": zero_stage}}
    expected = finished
    if zero_stage != 1:  # what `finished` has
        (tmp_path / "whole").mkdir()
        done = _train(_recipe(tmp_path / "whole", shards, **settings), "--nproc", 2)
        assert done.returncode == 0, done.stderr
        expected = tmp_path / "whole" / "run"
    # Resumed with other numbers of workers each time: they change nothing either.
    recipe = _recipe(tmp_path, shards, **settings, checkpoint={"every_epochs": 0, "every_steps": 2})
    kills = sorted(random.Random(4).sample(range(3, 2 * _STEPS_PER_EPOCH + 1), 3))
    sys.stderr.write(f"killed in steps {kills}\n")
    saved = 0
    for workers, step in enumerate(kills):
        resume = ["--resume"] if saved else []
        _kill_ranks(step - saved, recipe, f"data.workers={workers}", *resume)
        saved = (step - 1) // 2 * 2
        latest = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
        assert latest == f"step-{saved:08d}"
    done = _train(recipe, "--nproc", 2, "--resume", "data.workers=2")
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {saved} of 12" in done.stderr
    assert _same_weights(expected, tmp_path / "run")


def _same_weights(first: Path, second: Path) -> bool:
    expected, actual = _weights(first), _weights(second)
    assert expected.keys() == actual.keys()
    return all(np.array_equal(expected[name], actual[name]) for name in expected)


def _kill_ranks(last: int, *arguments: object) -> None:
    """Two ranks without a launcher that end themselves in their step ``last``."""
    script = Path(__file__).with_name("mortal_rank.py")
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        # The number of threads is inherited, as it is by the other runs: it decides the order of
        # sums, and so their last bits.
    }
    command = [sys.executable, str(script), str(last), "train", *map(str, arguments)]
    ranks = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, said = rank.communicate(timeout=240)
        assert rank.returncode == -signal.SIGKILL, said


@pytest.mark.parametrize("zero_stage", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(
    shards: str, tmp_path: Path, zero_stage: int
) -> None:
    # No augmentation and no dropout: then the number of processes may change nothing but rounding.
    sections = {"engine": {"zero_stage": zero_stage}, "augmentation": {"flip": 0.0,
                "brightness": 0.0, "crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0]},
                "evaluation": {"every_epochs": 0}}  # fmt: skip
    recipes = []
    for name in ("whole", "parted"):
        (tmp_path / name).mkdir()
        recipes.append(_recipe(tmp_path / name, shards, **sections))
    done = _train(recipes[0])
    assert done.returncode == 0, done.stderr
    _kill_ranks(9, recipes[1], "checkpoint.every_steps=4")
    done = _train(recipes[1], "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming after step 8 of 12" in done.stderr
    assert "1 process(es) instead of 2: the batches go on" in done.stderr
    expected, actual = (_weights(tmp_path / name / "run") for name in ("whole", "parted"))
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-3, atol=2e-5)


def _wait_until_nothing_is_left(mark: str) -> None:
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


def test_one_process_trains_without_a_launcher_and_without_a_compiler(
    shards: str, tmp_path: Path
) -> None:
    # An empty PATH hides g++ and ninja, which DeepSpeed would otherwise start on a CPU.
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    environment |= {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    recipe = _recipe(tmp_path, shards, schedule={"epochs": 1}, engine={"zero_stage": 0})
    command = [sys.executable, "-m", "clipsys", "train", str(recipe), "data.workers=0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "extensions").exists()


def test_ranks_started_by_the_deepspeed_launcher_train_together(
    shards: str, tmp_path: Path
) -> None:
    recipe = _recipe(tmp_path, shards, schedule={"epochs": 1}, engine={"zero_stage": 2})
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
    recipe = _recipe(tmp_path, shards, schedule={"epochs": 1})
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
    from clipsys.shard_writing import write_shards
    from clipsys.shards import Sample

    def samples() -> Any:
        for number in range(48):
            image = b"nothing" if number % 4 == 0 else _png(number)
            yield Sample(f"{number:03d}", image, "png", (f"text {number}",))

    write_shards(samples(), tmp_path / "bad")
    recipe = _recipe(tmp_path, str(tmp_path / "bad"), data={"validation": None})
    done = _train(recipe)
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and "data.max_bad_share = 1.0%" in error
    lines = (tmp_path / "run" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    listed = [json.loads(line) for line in lines]
    assert {entry["reason"] for entry in listed} == {"not an image"}
    assert all(int(entry["key"]) % 4 == 0 for entry in listed)
    allowed = _train(recipe, "data.max_bad_share=0.5", f"output={tmp_path / 'again'}")
    assert allowed.returncode == 0, allowed.stderr
    assert "samples could not be used; see" in allowed.stderr


def _png(number: int) -> bytes:
    from tests.conftest import encode_png

    return encode_png(np.asarray(noise_image(number, (32, 32))))


def test_a_failing_rank_ends_all_with_its_error(shards: str, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, shards, optimizer={"lr": 1e30}, engine={"gradient_clipping": 0.0})
    started = time.monotonic()
    done = _train(recipe, "--nproc", 2)
    assert done.returncode == 1
    assert "the loss is not finite on rank" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 120
    assert not (tmp_path / "run" / "model").exists()


def test_the_loss_of_one_rank_ends_all_ranks(shards: str, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, shards, schedule={"epochs": 1000})
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
    _wait_until_nothing_is_left(mark)
    assert latest.exists()


def _has(path: Path, *parts: str) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return all(part.encode() in content for part in parts)


def test_micro_batches_change_no_result(shards: str, tmp_path: Path) -> None:
    plain = {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "flip": 0.0, "brightness": 0.0}
    losses = []
    for name, settings in (("whole", []), ("parts", ["data.micro_batch_size=2"])):
        folder = tmp_path / name
        folder.mkdir()
        recipe = _recipe(
            folder, shards, schedule={"epochs": 1}, augmentation=plain,
            optimizer={"name": "sgd", "lr": 0.05}, engine={"zero_stage": 2},
        )  # fmt: skip
        done = _train(recipe, "--nproc", 2, *settings)
        assert done.returncode == 0, done.stderr
        assert ("2 micro-batches" in done.stderr) == bool(settings)
        assert "a step takes" in done.stderr
        (last,) = (entry for entry in read_metrics(folder / "run") if "loss" in entry)
        losses.append(last["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    whole, parts = _weights(tmp_path / "whole" / "run"), _weights(tmp_path / "parts" / "run")
    for name, weight in whole.items():
        np.testing.assert_allclose(parts[name], weight, atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["data.batch_size=7"],
            "data.batch_size is 7, which does not divide among 2 processes; try 6",
        ),
        (["data.batchsize=7"], "data.batchsize is not a setting; did you mean data.batch_size?"),
        (["engine.zero_stage=5"], "engine.zero_stage is 5"),
        (
            ["engine.zero_stage=3", "engine.ema_decay=0.9"],
            "engine.ema_decay needs whole parameters",
        ),
        (["data.label_key=x"], "does nothing unless objective.positives is label"),
        (["data.train=/nowhere/*.tar"], "no file matches this pattern"),
        (["model.architecture=ViT-X"], "'ViT-X' is not a model that open_clip knows"),
        (["model.pretrained=/nowhere"], "there is no such model folder"),
        (["data.batch_size=100"], "batch_size is 100, but the shards hold only 50 samples"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_starts_nothing(
    shards: str, tmp_path: Path, change: list[str], message: str
) -> None:
    done = _train(_recipe(tmp_path, shards), *change, "--nproc", 2)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert message in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_resuming_what_was_never_started_is_said(shards: str, tmp_path: Path) -> None:
    done = _train(_recipe(tmp_path, shards), "--resume")
    assert (done.returncode, "there is no run to resume" in done.stderr) == (1, True)


def test_a_resumed_run_must_be_the_same_run(finished: Path) -> None:
    done = _train(finished.parent / "recipe.yaml", "--resume", "seed=5", "--nproc", 2)
    assert done.returncode == 1
    assert "the run was started with seed 0, now it is 5" in done.stderr


def test_curves_are_drawn_even_of_an_empty_run(tmp_path: Path) -> None:
    plot_curves(tmp_path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_steps_done_twice_count_once(tmp_path: Path) -> None:
    lines = [{"step": 10, "loss": 2.0}, {"step": 10, "val/x": 1}, {"step": 10, "loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_metrics(tmp_path) == [{"step": 10, "val/x": 1}, {"step": 10, "loss": 1.5}]


def test_slurm_variables_become_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from clipsys.training.launch import join_environment

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not join_environment()
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert not join_environment()  # one task: an interactive shell
    for name, value in {"SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77",
                        "MASTER_ADDR": "node0"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch removes them again
        monkeypatch.delenv(name)
    assert join_environment()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["3", "4", "1"]


def test_a_node_list_that_cannot_be_expanded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from clipsys.training.launch import _first_host

    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[0-3]")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="set MASTER_ADDR to the first node"):
        _first_host()
