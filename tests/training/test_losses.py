from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from clipsys.errors import ConfigError
from clipsys.training.losses import info_nce
from tests.ranks import run_ranks


def naive_info_nce(
    image_ND: torch.Tensor, text_ND: torch.Tensor, scale: torch.Tensor, ids_N: torch.Tensor
) -> torch.Tensor:
    """One process, the whole matrix, plain autograd."""
    logits_NN = scale * image_ND @ text_ND.T
    target_NN = (ids_N[:, None] == ids_N[None, :]).to(logits_NN.dtype)
    target_NN = target_NN / target_NN.sum(dim=1, keepdim=True)
    rows = -(target_NN * logits_NN.log_softmax(dim=1)).sum(dim=1).mean()
    columns = -(target_NN * logits_NN.T.log_softmax(dim=1)).sum(dim=1).mean()
    return (rows + columns) / 2


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
@pytest.mark.parametrize("grouped", [False, True])
def test_loss_and_gradients_equal_the_naive_ones(
    count: int, tile_size: int | None, grouped: bool
) -> None:
    image, text, scale, ids = _features(count)
    groups = ids if grouped else None
    ours = _gradients(
        lambda i, t, s: info_nce(i, t, s, tile_size=tile_size, groups=groups), image, text, scale
    )
    reference = ids if grouped else torch.arange(count)
    naive = _gradients(lambda i, t, s: naive_info_nce(i, t, s, reference), image, text, scale)
    for actual, expected in zip(ours, naive, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


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


def _share(rank: int, world_size: int, tile_size: int | None, grouped: bool) -> list[torch.Tensor]:
    """This rank's loss and what reaches its own features and the scale."""
    image, text, scale, ids = _features(12)
    local = 12 // world_size
    rows = slice(rank * local, (rank + 1) * local)
    groups = ids[rows] if grouped else None
    gradients = _gradients(
        lambda i, t, s: info_nce(i, t, s, tile_size=tile_size, groups=groups),
        image[rows], text[rows], scale,
    )  # fmt: skip
    return [gradient.numpy() for gradient in gradients]  # type: ignore[misc]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("tile_size", "grouped"), [(None, False), (None, True), (3, True)])
def test_gathered_loss_equals_single_process_loss(
    world_size: int, tile_size: int | None, grouped: bool
) -> None:
    image, text, scale, ids = _features(12)
    reference = ids if grouped else torch.arange(12)
    loss, *expected = _gradients(
        lambda i, t, s: naive_info_nce(i, t, s, reference), image, text, scale
    )
    shares = run_ranks(_share, world_size, tile_size, grouped)
    average = sum(torch.as_tensor(share[0]) for share in shares) / world_size
    torch.testing.assert_close(average, loss)
    # The average over ranks, as DDP takes it, divides what each rank contributes by W.
    for position in (1, 2):
        stacked = torch.cat([torch.as_tensor(share[position]) for share in shares]) / world_size
        torch.testing.assert_close(stacked, expected[position - 1])
    scale_gradient = sum(torch.as_tensor(share[3]) for share in shares) / world_size
    torch.testing.assert_close(scale_gradient, expected[2])
