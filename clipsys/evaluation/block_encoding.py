"""Blocks of images through the encoder: in this process, or in worker processes.

LocalBlocks     threads decode the next blocks while this process encodes one
WorkerBlocks    each process has its own model, and its own device where there are several
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from clipsys.errors import DataError, ModelError
from clipsys.evaluation.embedded import Floats
from clipsys.processes.pool import process_context, start_worker

if TYPE_CHECKING:
    from clipsys.models.encoder import Encoder

Pixels = npt.NDArray[np.uint8]
#: Images of a block: (key, SHA-256 of the bytes, bytes, uri).
Block: TypeAlias = "list[tuple[bytes, bytes, bytes, str]]"
Results: TypeAlias = "list[Floats | DataError]"

#: Images of a block; a multiple of the groups in which they pass a CPU (16, and 6 in int8).
BLOCK = 96
_LOCAL_AHEAD = 1
#: Blocks that each worker process has, so that it need not wait for the next one.
_WORKER_AHEAD = 2

_logger = logging.getLogger(__name__)


class Corruption(Protocol):
    """A change of an image's pixels.

    It is applied to what the encoder sees, after resize and crop. It must be picklable, and its
    result must depend on nothing but its arguments.
    """

    @property
    def key(self) -> str:
        """A name of everything that the result depends on: kind, severity, version."""
        ...

    def __call__(self, pixels_HWC: Pixels, seed: int) -> Pixels:
        """Uint8 (H, W, 3) -> uint8 of the same shape."""
        ...


@dataclass(frozen=True)
class ImageReading:
    """How bytes become what the encoder sees."""

    is_fast: bool = False
    corruption: Corruption | None = None

    def __call__(
        self, encoder: Encoder, content: bytes, digest: bytes, uri: str
    ) -> Pixels | DataError:
        """Uint8 (3, H, W), or why the image cannot be used. Thread-safe."""
        try:
            pixels_CHW = encoder.read_pixels(content, uri=uri, is_fast=self.is_fast)
        except DataError as error:
            return error
        if self.corruption is None:
            return pixels_CHW
        seed = int.from_bytes(digest[:4], "big")
        changed_HWC = self.corruption(np.ascontiguousarray(pixels_CHW.transpose(1, 2, 0)), seed)
        return np.ascontiguousarray(changed_HWC.transpose(2, 0, 1))


class BlockEncoder(Protocol):
    """Encodes blocks; a context manager.

    Attributes:
        ahead: blocks that should be under way besides the one whose result is waited for.
    """

    ahead: int

    def __enter__(self) -> BlockEncoder:
        """Starts."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends, whatever is under way."""
        ...

    def submit(self, block: Block) -> Future[Results]:
        """Begins a block; the result has a vector or an error for each image."""
        ...


class LocalBlocks(contextlib.AbstractContextManager["LocalBlocks"]):
    """Blocks that this process encodes when their result is asked for; decoding begins at once."""

    ahead = _LOCAL_AHEAD

    def __init__(
        self, encoder: Encoder, precision: str, reading: ImageReading, threads: Executor
    ) -> None:
        self._encoder, self._precision = encoder, precision
        self._reading, self._threads = reading, threads

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    def submit(self, block: Block) -> Future[Results]:
        """See `BlockEncoder`."""
        decoded = [
            self._threads.submit(self._reading, self._encoder, content, digest, uri)
            for _, digest, content, uri in block
        ]

        def encode() -> Results:
            return _encoded(self._encoder, self._precision, [one.result() for one in decoded])

        return _Deferred(encode)


class WorkerBlocks(contextlib.AbstractContextManager["WorkerBlocks"]):
    """Blocks that worker processes encode.

    Args:
        encoder: the one that each of them loads.
        precision: a final one.
        reading: how images are read.
        num_processes: number of workers; the threads of this machine are divided among them.
    """

    def __init__(
        self, encoder: Encoder, precision: str, reading: ImageReading, num_processes: int
    ) -> None:
        self.ahead = _WORKER_AHEAD * num_processes
        self._task = _Task(
            encoder.spec, encoder.fingerprint, str(encoder.device), precision, reading
        )
        self._num_processes = num_processes

    def __enter__(self) -> WorkerBlocks:
        import torch

        context = process_context()
        self._lifeline, self._held = context.Pipe(duplex=False)
        numbers = context.SimpleQueue()
        for number in range(self._num_processes):
            numbers.put(number)
        num_threads = max(1, torch.get_num_threads() // self._num_processes)
        self._pool = ProcessPoolExecutor(
            self._num_processes,
            mp_context=context,
            initializer=_start,
            initargs=(self._lifeline, numbers, num_threads),
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._held.close()  # ends the workers at once, in the middle of a block too
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._held.close()
        self._lifeline.close()

    def submit(self, block: Block) -> Future[Results]:
        """See `BlockEncoder`."""
        future = self._pool.submit(_encode_in_worker, self._task, block)

        def result() -> Results:
            try:
                return future.result()
            except BrokenProcessPool as error:
                raise ModelError(
                    f"{self._task.spec}: a process that encoded images ended unexpectedly (out of "
                    "memory?); use fewer processes; what is encoded is stored"
                ) from error

        return _Deferred(result)


def can_have_workers(encoder: Encoder) -> bool:
    """Whether other processes can load the same model; says so where they cannot."""
    if not encoder.spec:
        _logger.warning(
            "one process encodes: %s was built in this process, and others cannot load it",
            encoder.name,
        )
    return bool(encoder.spec)


class _Deferred(Future["Results"]):
    """A result that is computed when it is asked for."""

    def __init__(self, compute: Callable[[], Results]) -> None:
        super().__init__()
        self._compute = compute

    def result(self, timeout: float | None = None) -> Results:
        return self._compute()


def _encoded(encoder: Encoder, precision: str, pixels: list[Pixels | DataError]) -> Results:
    usable = [one for one in pixels if not isinstance(one, DataError)]
    vectors = iter(encoder.encode_pixels_fixed(np.stack(usable), precision) if usable else ())
    return [one if isinstance(one, DataError) else next(vectors) for one in pixels]


# ---- in a worker process -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """Which encoder, and how images are read."""

    spec: str
    fingerprint: str
    device: str
    precision: str
    reading: ImageReading


_numbers: list[int] = []
_encoders: dict[tuple[str, str, str], Encoder] = {}


def _start(lifeline: Any, numbers: Any, num_threads: int) -> None:
    start_worker(lifeline)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    import signal

    import torch

    # Ctrl-C reaches the whole group of processes; the parent ends the work, and so this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(num_threads)
    _numbers.append(numbers.get())


def _encode_in_worker(task: _Task, block: Block) -> Results:
    encoder = _worker_encoder(task)
    pixels = [task.reading(encoder, content, digest, uri) for _, digest, content, uri in block]
    return _encoded(encoder, task.precision, pixels)


def _worker_encoder(task: _Task) -> Encoder:
    key = (task.spec, task.fingerprint, task.precision)
    if key not in _encoders:
        import torch

        from clipsys.models.encoder import load

        device = task.device
        if device.startswith("cuda"):
            device = f"cuda:{_numbers[0] % torch.cuda.device_count()}"
        encoder = load(task.spec, device=device, precision=task.precision)
        if encoder.fingerprint != task.fingerprint:
            raise ModelError(
                f"{task.spec}: the model has changed since the evaluation began; start it again"
            )
        encoder.settle_for(task.precision)
        _encoders[key] = encoder
    return _encoders[key]
