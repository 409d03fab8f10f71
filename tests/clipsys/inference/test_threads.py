from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from clipsys.inference.threads import in_chunks


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [0, 1, 4, 5, 23])
def test_chunks_are_put_together_in_their_order(batch: int) -> None:
    image_BCHW = torch.arange(batch * 12.0).view(batch, 3, 2, 2)
    encode = in_chunks(lambda part: part.flatten(1) * 2, 4)
    torch.testing.assert_close(encode(image_BCHW), image_BCHW.flatten(1) * 2, atol=0, rtol=0)


def test_each_thread_works_alone_and_the_setting_of_the_others_stays() -> None:
    seen: list[tuple[str, int, int, bool, bool]] = []
    both = threading.Barrier(2)

    def encode(part: torch.Tensor) -> torch.Tensor:
        both.wait(timeout=30)  # two chunks are under way at the same time
        seen.append(
            (
                threading.current_thread().name,
                len(part),
                torch.get_num_threads(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
            )
        )
        return part

    chunked = in_chunks(encode, 3)
    for _ in range(2):  # the threads stay
        with torch.autocast("cpu", dtype=torch.bfloat16):
            chunked(torch.zeros(12, 3, 2, 2))
    assert {name for name, *_ in seen} == {"clipsys-encode_0", "clipsys-encode_1"}
    assert {rest for _, *rest_list in seen for rest in [tuple(rest_list)]} == {(3, 1, True, True)}
    assert torch.get_num_threads() == 2
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


def test_an_error_in_a_chunk_is_raised() -> None:
    def encode(part: torch.Tensor) -> torch.Tensor:
        if float(part.max()) > 5:
            raise ValueError("this chunk")
        return part

    with pytest.raises(ValueError, match="this chunk"):
        in_chunks(encode, 2)(torch.arange(8.0).view(8, 1, 1, 1))


def test_one_thread_and_small_batches_start_none() -> None:
    names: set[str] = set()

    def encode(part: torch.Tensor) -> torch.Tensor:
        names.add(threading.current_thread().name)
        return part

    in_chunks(encode, 4)(torch.zeros(4, 3, 2, 2))
    torch.set_num_threads(1)
    in_chunks(encode, 4)(torch.zeros(9, 3, 2, 2))
    assert names == {threading.current_thread().name}
