"""A batch on a CPU, a few images at a time and each thread on its own.

A model's operations usually share each piece of work among all threads and wait for the last of
them, hundreds of times a batch; what one thread wrote lies in another one's cache, and whenever a
processor does something else as well (decoding the next images), all wait. Threads that take a few
images each through the whole tower wait once. Their activations fit their caches.

On two cores ViT-B/32 encodes 1.2 times as fast as with operations that are shared.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

#: images (B, C, H, W) -> features (B, D), not normalised
EncodeImage = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Arrangement:
    """How threads divide the work.

    Attributes:
        threads: number of threads.
        apart: each takes its own images through the whole tower; otherwise all share each
            operation.
    """

    threads: int
    apart: bool = False

    def __str__(self) -> str:
        if self.threads == 1:
            return "1 thread"
        return f"{self.threads} threads" + (" apart" if self.apart else "")


def in_chunks(
    encode: EncodeImage,
    chunk: int,
    arrangement: Arrangement | None = None,
    *,
    is_fixed: bool = False,
) -> EncodeImage:
    """``encode`` for batches of any size: on a CPU up to ``chunk`` images a thread at once.

    With ``is_fixed`` exactly ``chunk`` images at once, on any device, the last ones repeated where
    there are fewer. A row's bits then do not depend on what else is encoded and by how many
    threads: measured on a CPU in fp32, bf16 and int8 on a vision transformer and a ResNet, they
    depend on the number of images that pass together (fp32: ViT below 6 images, ResNet at each
    number; up to 2e-7), and neither on an image's place among them, nor on its neighbours, nor on
    whether 1 or 2 threads share the operations.

    Args:
        encode: must be free of state, each image's features depending on that image alone. Runs
            without gradients.
        chunk: images that pass together.
        arrangement: default as many threads as torch has, apart.
        is_fixed: see above.
    """
    pool: ThreadPoolExecutor | None = None

    def encode_in_chunks(image_BCHW: torch.Tensor) -> torch.Tensor:
        nonlocal pool
        is_cpu = image_BCHW.device.type == "cpu"
        if not is_fixed and (not is_cpu or len(image_BCHW) <= chunk):
            return encode(image_BCHW)
        chosen = arrangement or Arrangement(torch.get_num_threads(), apart=True)
        if is_fixed:
            parts = _equal_parts(image_BCHW, chunk)
        else:
            # A multiple of the threads, all of a size: no thread waits at the end.
            num_parts = math.ceil(len(image_BCHW) / chunk / chosen.threads) * chosen.threads
            parts = list(torch.tensor_split(image_BCHW, min(num_parts, len(image_BCHW))))
        if not is_cpu:
            return torch.cat([encode(part) for part in parts])[: len(image_BCHW)]
        if chosen.threads == 1 or not chosen.apart or len(parts) == 1:
            with limited_threads(chosen.threads):
                return torch.cat([encode(part) for part in parts])[: len(image_BCHW)]
        if pool is None:
            pool = single_threads(chosen.threads)
        autocast = torch.is_autocast_enabled("cpu")

        def encode_part(part: torch.Tensor) -> torch.Tensor:
            # Both are settings of a thread, not of the process.
            with torch.inference_mode(), torch.autocast("cpu", enabled=autocast):
                return encode(part)

        return torch.cat(list(pool.map(encode_part, parts)))[: len(image_BCHW)]

    return encode_in_chunks


def _equal_parts(rows: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Parts of exactly ``size`` rows, the last one filled with its own last row."""
    parts = list(torch.split(rows, size))
    lacking = size - len(parts[-1])
    if lacking:
        parts[-1] = torch.cat([parts[-1], *[parts[-1][-1:]] * lacking])
    return parts


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Lets torch's operations of this thread use that many threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def single_threads(count: int) -> ThreadPoolExecutor:
    """Threads in each of which torch's operations use that thread alone."""
    before = torch.get_num_threads()
    all_started = threading.Barrier(count + 1)

    def start() -> None:
        # The number of threads is a setting of each thread, and of those that start later. A thread
        # takes it over when it first asks, which must not be after it was set.
        torch.get_num_threads()
        torch.set_num_threads(1)
        all_started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="clipsys-encode", initializer=start)
    for _ in range(count):
        pool.submit(lambda: None)
    all_started.wait()
    torch.set_num_threads(before)  # for threads that start later, and for this one as it was
    return pool
