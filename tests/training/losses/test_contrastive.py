from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from clipsys.errors import ConfigError
from clipsys.training.losses import auto_tile_size, info_nce, sigmoid_loss
from clipsys.training.losses import tiled as cross_entropy
from clipsys.training.losses.tiled import differentiable, one_way
from clipsys.training.losses.tiles import Pairing
from tests.ranks import run_ranks


def naive_info_nce(
    image_ND: torch.Tensor,
    text_ND: torch.Tensor,
    scale: torch.Tensor,
    ids_N: torch.Tensor,
    *,
    ignore_groups: bool = False,
) -> torch.Tensor:
    """One process, the whole matrix, plain autograd."""
    logits_NN = scale * image_ND @ text_ND.T
    target_NN = (ids_N[:, None] == ids_N[None, :]).to(logits_NN.dtype)
    if ignore_groups:
        own_NN = torch.eye(len(ids_N), dtype=target_NN.dtype)
        logits_NN = logits_NN.masked_fill((target_NN - own_NN).bool(), -1e30)
        target_NN = own_NN
    target_NN = target_NN / target_NN.sum(dim=1, keepdim=True)
    rows = -(target_NN * logits_NN.log_softmax(dim=1)).sum(dim=1).mean()
    columns = -(target_NN * logits_NN.T.log_softmax(dim=1)).sum(dim=1).mean()
    return (rows + columns) / 2


def naive_sigmoid_loss(
    image_ND: torch.Tensor,
    text_ND: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    ids_N: torch.Tensor,
    *,
    ignore_groups: bool = False,
) -> torch.Tensor:
    """Zhai et al. 2023, algorithm 1, with several positives."""
    logits_NN = scale * image_ND @ text_ND.T + bias
    same_NN = ids_N[:, None] == ids_N[None, :]
    own_NN = torch.eye(len(ids_N), dtype=torch.bool)
    sign_NN = torch.where(own_NN if ignore_groups else same_NN, 1.0, -1.0)
    terms_NN = -F.logsigmoid(sign_NN * logits_NN)
    if ignore_groups:
        terms_NN = terms_NN.masked_fill(same_NN & ~own_NN, 0.0)
    return terms_NN.sum() / len(ids_N)


def _features(count: int, *, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(count)
    draw = [F.normalize(torch.randn(count, 8, generator=generator), dim=1) for _ in range(2)]
    ids = torch.randint(0, max(2, count // 2), (count,), generator=generator)
    return draw[0].to(dtype), draw[1].to(dtype), torch.tensor([20.0], dtype=dtype), ids


def _gradients(loss: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("count", [1, 2, 13])
@pytest.mark.parametrize("tile_size", [None, 1, 4, 100])
@pytest.mark.parametrize(("grouped", "ignore"), [(False, False), (True, False), (True, True)])
def test_loss_and_gradients_equal_the_naive_ones(
    count: int, tile_size: int | None, grouped: bool, ignore: bool
) -> None:
    image, text, scale, ids = _features(count)
    options: Any = {"groups": ids if grouped else None, "ignore_groups": ignore}
    ours = _gradients(lambda i, t, s: info_nce(i, t, s, tile_size, **options), image, text, scale)
    reference = ids if grouped else torch.arange(count)
    naive = _gradients(
        lambda i, t, s: naive_info_nce(i, t, s, reference, ignore_groups=ignore),
        image, text, scale,
    )  # fmt: skip
    for actual, expected in zip(ours, naive, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("tile_size", [1, 3, 4, 100])
@pytest.mark.parametrize(("grouped", "ignore"), [(False, False), (True, False), (True, True)])
def test_rows_are_the_same_in_tiles_of_any_shape(
    tile_size: int, whole_rows: bool, grouped: bool, ignore: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A rank with queries 5 to 8 of 13 keys. Logits of several hundred overflow an unshifted sum.
    monkeypatch.setattr(cross_entropy, "_WHOLE_ROWS", 1 if whole_rows else 1_000)
    image, text, scale, ids = _features(13, dtype=torch.float32)
    own, scale = slice(5, 9), 400 * scale.reshape(()) / scale.item()
    pairing = Pairing(5, ids if grouped else None, ignore)
    compute = partial(one_way, pairing=pairing, tile_size=tile_size)
    ours = _gradients(lambda q, k, s: differentiable(compute, q, k, s), image[own], text, scale)

    def naive(query: torch.Tensor, key: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        logits = scale * query @ key.T
        same = ids[own, None] == ids if grouped else torch.eye(13, dtype=torch.bool)[own]
        mine = torch.eye(13, dtype=torch.bool)[own]
        target = (mine if ignore else same).double()
        if ignore:
            logits = logits.masked_fill(same & ~mine, -1e30)
        return -(target / target.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()

    expected = _gradients(naive, image[own].double(), text.double(), scale.double())
    for actual, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 13])
@pytest.mark.parametrize("tile_size", [None, 1, 4, 100])
@pytest.mark.parametrize(("grouped", "ignore"), [(False, False), (True, False), (True, True)])
def test_the_sigmoid_loss_and_its_gradients_equal_the_naive_ones(
    count: int, tile_size: int | None, grouped: bool, ignore: bool
) -> None:
    image, text, scale, ids = _features(count)
    bias = torch.tensor([-5.0], dtype=torch.float64)
    options: Any = {"groups": ids if grouped else None, "ignore_groups": ignore}
    ours = _gradients(
        lambda i, t, s, b: sigmoid_loss(i, t, s, b, tile_size, **options), image, text, scale, bias
    )
    reference = ids if grouped else torch.arange(count)
    naive = _gradients(
        lambda i, t, s, b: naive_sigmoid_loss(i, t, s, b, reference, ignore_groups=ignore),
        image, text, scale, bias,
    )  # fmt: skip
    for actual, expected in zip(ours, naive, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 60.0, 100.0, 1000.0])
def test_no_scale_loses_a_sum_to_underflow_or_overflow(dtype: torch.dtype, scale: float) -> None:
    # One text is opposed to every image and the first pairs match perfectly: at a high scale the
    # column of the opposed text vanishes beside the others, in any shift that they all share.
    image, text, _, _ = _features(12, dtype=torch.float64)
    image = F.normalize(image + 2.0, dim=1)
    text = torch.cat([image[:11], -image.mean(dim=0, keepdim=True)])
    text = F.normalize(text, dim=1)
    arguments = (image.to(dtype), text.to(dtype), torch.tensor([scale], dtype=dtype))
    ours = _gradients(lambda i, t, s: info_nce(i, t, s, 5), *arguments)
    exact = _gradients(
        lambda i, t, s: naive_info_nce(i, t, s, torch.arange(12)),
        *(argument.double() for argument in arguments),
    )
    # float32 logits of this size are known to scale · 1e-7, and exp() makes that relative.
    tolerance = 1e-5 * max(1.0, scale / 100) if dtype == torch.float32 else 1e-9
    for actual, expected in zip(ours, exact, strict=True):
        assert torch.isfinite(actual).all()
        torch.testing.assert_close(
            actual.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )


def test_autocast_around_the_loss_does_not_reach_its_products() -> None:
    image, text, scale, _ = _features(16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = _gradients(info_nce, image, text, scale * 5)
    for actual, expected in zip(inside, _gradients(info_nce, image, text, scale * 5), strict=True):
        assert torch.equal(actual, expected)


class _LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
def test_no_tensor_is_larger_than_a_tile_or_the_features(loss: str, grouped: bool) -> None:
    count, tile = 1024, 16
    image, text, scale, ids = _features(count, dtype=torch.float32)
    options: Any = {"tile_size": tile, "groups": ids if grouped else None}
    with _LargestTensor() as largest:
        if loss == "info_nce":
            _gradients(lambda i, t, s: info_nce(i, t, s, **options), image, text, scale)
        else:
            bias = torch.tensor([-5.0])
            _gradients(
                lambda i, t, s, b: sigmoid_loss(i, t, s, b, **options), image, text, scale, bias
            )
    assert largest.elements == tile * count


def test_the_automatic_tile_stays_within_its_memory() -> None:
    cpu = torch.device("cpu")
    assert auto_tile_size(16_384, cpu) * 16_384 * 4 == 8 << 20
    assert auto_tile_size(10**9, cpu) == 16
    assert auto_tile_size(1, cpu) >= 1


def test_the_loss_equals_open_clips() -> None:
    from open_clip.loss import ClipLoss

    image, text, scale, _ = _features(16, dtype=torch.float32)
    torch.testing.assert_close(info_nce(image, text, scale), ClipLoss()(image, text, scale[0]))


def test_gradcheck_accepts_the_backward() -> None:
    image, text, scale, ids = _features(5)
    leaves = (image.requires_grad_(), text.requires_grad_(), scale.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda i, t, s: info_nce(i, t, s, tile_size=2, groups=ids), leaves
    )


def test_low_precision_features_have_float32_logits() -> None:
    image, text, scale, _ = _features(32, dtype=torch.float32)
    low = info_nce(image.bfloat16(), text.bfloat16(), scale * 5)
    exact = info_nce(image.bfloat16().double(), text.bfloat16().double(), scale.double() * 5)
    assert low.dtype == torch.float32
    # bf16 logits at scale 100 would be off by about 1e-2.
    torch.testing.assert_close(low.double(), exact, rtol=1e-5, atol=1e-6)


def test_all_in_one_group_gives_the_loss_of_even_targets() -> None:
    image, text, scale, _ = _features(6)
    ids = torch.zeros(6, dtype=torch.int64)
    torch.testing.assert_close(
        info_nce(image, text, scale, groups=ids), naive_info_nce(image, text, scale, ids)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"image_features": torch.ones(3, 4)},
            r"image features \(3, 4\) and text features \(2, 4\)",
        ),
        ({"groups": torch.zeros(3)}, r"groups has shape \(3,\); expected \(2,\)"),
        ({"tile_size": 0}, "tile_size is 0"),
    ],
)
def test_shapes_that_do_not_fit_are_said(change: dict[str, Any], message: str) -> None:
    arguments = {"image_features": torch.ones(2, 4), "text_features": torch.ones(2, 4),
                 "logit_scale": torch.ones(1), **change}  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        info_nce(**arguments)


def _share(
    rank: int, world_size: int, loss: str, tile_size: int | None, grouped: bool, ignore: bool
) -> list[torch.Tensor]:
    """This rank's loss and what reaches its own features, the scale and the bias."""
    image, text, scale, ids = _features(12)
    local = 12 // world_size
    rows = slice(rank * local, (rank + 1) * local)
    options: Any = {
        "tile_size": tile_size,
        "groups": ids[rows] if grouped else None,
        "ignore_groups": ignore,
    }
    bias = torch.tensor([-5.0], dtype=torch.float64)
    if loss == "info_nce":
        compute = lambda i, t, s, b: info_nce(i, t, s, **options) + 0 * b.sum()  # noqa: E731
    else:
        compute = lambda i, t, s, b: sigmoid_loss(i, t, s, b, **options)  # noqa: E731
    gradients = _gradients(compute, image[rows], text[rows], scale, bias)
    return [gradient.numpy() for gradient in gradients]  # type: ignore[misc]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("loss", ["info_nce", "sigmoid"])
@pytest.mark.parametrize(
    ("tile_size", "grouped", "ignore"),
    [(None, False, False), (None, True, False), (3, True, False), (3, True, True)],
)
def test_gathered_loss_equals_single_process_loss(
    world_size: int, loss: str, tile_size: int | None, grouped: bool, ignore: bool
) -> None:
    image, text, scale, ids = _features(12)
    reference = ids if grouped else torch.arange(12)
    bias = torch.tensor([-5.0], dtype=torch.float64)
    if loss == "info_nce":
        naive = lambda i, t, s, b: (  # noqa: E731
            naive_info_nce(i, t, s, reference, ignore_groups=ignore) + 0 * b.sum()
        )
    else:
        naive = lambda i, t, s, b: naive_sigmoid_loss(  # noqa: E731
            i, t, s, b, reference, ignore_groups=ignore
        )
    value, *expected = _gradients(naive, image, text, scale, bias)
    shares = run_ranks(_share, world_size, loss, tile_size, grouped, ignore)
    average = sum(torch.as_tensor(share[0]) for share in shares) / world_size
    torch.testing.assert_close(average, value)
    # The average over ranks, as DDP takes it, divides what each rank contributes by W.
    for position in (1, 2):
        stacked = torch.cat([torch.as_tensor(share[position]) for share in shares]) / world_size
        torch.testing.assert_close(stacked, expected[position - 1])
    for position in (3, 4):
        gradient = sum(torch.as_tensor(share[position]) for share in shares) / world_size
        torch.testing.assert_close(gradient, expected[position - 1])
