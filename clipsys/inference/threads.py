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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

#: images (B, C, H, W) -> features (B, D), not normalised
EncodeImage = Callable[[torch.Tensor], torch.Tensor]


def in_chunks(encode: EncodeImage, chunk: int) -> EncodeImage:
    """``encode`` for batches of any size: on a CPU up to ``chunk`` images a thread at once.

    Args:
        encode: must be free of state, each image's features depending on that image alone. Runs
            without gradients.
        chunk: images that pass together.
    """
    pool: ThreadPoolExecutor | None = None

    def encode_in_chunks(image_BCHW: torch.Tensor) -> torch.Tensor:
        nonlocal pool
        if image_BCHW.device.type != "cpu" or len(image_BCHW) <= chunk:
            return encode(image_BCHW)
        num_threads = torch.get_num_threads()
        # A multiple of the threads, all of a size: no thread waits at the end.
        num_parts = math.ceil(math.ceil(len(image_BCHW) / chunk) / num_threads) * num_threads
        parts = torch.tensor_split(image_BCHW, min(num_parts, len(image_BCHW)))
        if num_threads == 1:
            return torch.cat([encode(part) for part in parts])
        if pool is None:
            pool = single_threads(num_threads)
        autocast = torch.is_autocast_enabled("cpu")

        def encode_part(part: torch.Tensor) -> torch.Tensor:
            # Both are settings of a thread, not of the process.
            with torch.inference_mode(), torch.autocast("cpu", enabled=autocast):
                return encode(part)

        return torch.cat(list(pool.map(encode_part, parts)))

    return encode_in_chunks


def single_threads(count: int) -> ThreadPoolExecutor:
    """Threads in each of which torch's operations use that thread alone."""
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
    torch.set_num_threads(count)  # for threads that start later, and for this one as it was
    return pool
