"""What the variables of launchers say, and what they only seem to say."""

from __future__ import annotations

import logging
import os
import socket

import pytest

from clipsys.errors import ConfigError, TrainingError
from clipsys.training.distributed.environment import _first_host, join_environment

_SRUN = {
    "SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "MASTER_ADDR": "node0",
}  # fmt: skip
_MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
_MPIEXEC = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment without launchers, whose changes are undone."""
    kept = {
        name: value for name, value in os.environ.items()
        if name not in _NAMES and not name.startswith(("SLURM_", "OMPI_", "PMI_", "MPI_"))
    }  # fmt: skip
    monkeypatch.setattr(os, "environ", kept)
    monkeypatch.setattr(logging.getLogger("clipsys"), "level", logging.INFO)
    return kept


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "LOCAL_RANK": "1"}, ("1", "2", "1")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ("0", "1", "0")),
        (_SRUN, ("3", "4", "1")),
        (_MPIRUN, ("1", "2", "1")),
        (_MPIEXEC, ("1", "2", "1")),
        # mpirun starts its daemons by srun: their step has as many tasks as there are machines.
        ({**_SRUN, **_MPIRUN, "SLURM_STEP_NUM_TASKS": "8"}, ("1", "2", "1")),
    ],
)
def test_a_rank_of_several_is_found(
    environment: dict[str, str], variables: dict[str, str], expected: tuple[str, str, str]
) -> None:
    environment |= variables
    assert join_environment()
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == expected
    if expected[1] != "1":
        assert environment["MASTER_ADDR"]


_ONE = {
    "nothing": {},
    "an interactive step of one task": {**_SRUN, "SLURM_NTASKS": "8", "SLURM_PROCID": "0",
                                        "SLURM_STEP_NUM_TASKS": "1"},
    "an sbatch script without srun": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8",
                                      "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    "the batch step with a number": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8",
                                     "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967291"},
    "a shell of salloc": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"},
    "srun --pty bash with several tasks": {**_SRUN, "SLURM_PROCID": "0", "SLURM_PTY_PORT": "4"},
    "srun with PMI, one task": {**_SRUN, "SLURM_STEP_NUM_TASKS": "1", "PMI_RANK": "0",
                                "PMI_SIZE": "8"},
    "mpirun of one": {**_MPIRUN, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    "mpiexec of one": {"PMI_RANK": "0", "PMI_SIZE": "1"},
    "a size without a rank": {"OMPI_COMM_WORLD_SIZE": "4"},
}  # fmt: skip


@pytest.mark.parametrize("place", _ONE)
def test_one_process_is_taken_for_one(
    environment: dict[str, str], place: str, caplog: pytest.LogCaptureFixture
) -> None:
    environment |= _ONE[place]
    with caplog.at_level(logging.INFO):
        assert not join_environment()
    assert "RANK" not in environment
    if "SLURM_JOB_ID" in environment:
        assert "no rank of several: " in caplog.text


def test_processes_that_the_user_wants_are_started_inside_an_allocation(
    environment: dict[str, str],
) -> None:
    environment |= _SRUN
    assert not join_environment(2)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "RANK is '0', but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is '2', but RANK is not set"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "variable RANK is 'x', which is not a number"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "variable RANK is '', which is not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, which is no rank of WORLD_SIZE 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is -1, which is no rank of WORLD_SIZE 2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK is 0, which is no rank of WORLD_SIZE 0"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "p"},
            "variable MASTER_PORT is 'p', which is not a number",
        ),
        ({**_SRUN, "SLURM_STEP_NUM_TASKS": "four"}, "SLURM_STEP_NUM_TASKS is 'four'"),
        ({**_SRUN, "SLURM_PROCID": "4"}, "SLURM_PROCID is 4, which is no rank of"),
        ({**_MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "on several machines; set MASTER_ADDR"),
    ],
)
def test_variables_that_contradict_each_other_are_one_line(
    environment: dict[str, str], variables: dict[str, str], message: str
) -> None:
    environment |= variables
    with pytest.raises(ConfigError) as raised:
        join_environment()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_rank_that_starts_processes_is_refused(environment: dict[str, str]) -> None:
    environment |= {"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "a"}
    with pytest.raises(ConfigError, match="--nproc 2 starts processes, but RANK and WORLD_SIZE"):
        join_environment(2)


def test_a_node_list_that_cannot_be_expanded_is_said(environment: dict[str, str]) -> None:
    environment |= {"SLURM_STEP_NODELIST": "node[0-3]", "PATH": ""}
    with pytest.raises(ConfigError, match="set MASTER_ADDR to the first node"):
        _first_host()


def test_a_port_in_use_is_named(environment: dict[str, str]) -> None:
    from clipsys.training.distributed.process_group import start_processes

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environment |= {
            "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        with pytest.raises(TrainingError, match="that port is in use: set MASTER_PORT") as raised:
            start_processes("cpu")
    assert f"rank 0 of 2 cannot meet the others at 127.0.0.1:{port}" in str(raised.value)
