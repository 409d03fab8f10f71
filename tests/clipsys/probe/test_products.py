"""Which products are recorded, beside torch's own count of their operations."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipsys.models.open_clip_models import build_model
from clipsys.probe.products import Product, largest, record
from tests.conftest import TINY_MODEL

_RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}
_MODELS = {"vit": TINY_MODEL, "resnet": {**TINY_MODEL, "vision_cfg": _RESNET}}


@pytest.mark.parametrize("name", _MODELS)
def test_the_products_are_those_that_the_tower_computes(name: str) -> None:
    model = build_model(_MODELS[name]).model.train()
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    found = (
        *record(model, lambda same: same.encode_image(torch.empty(3, 3, 32, 32, device="meta"))),
        *record(model, lambda same: same.encode_text(tokens.to("meta"))),
    )
    assert model.training
    model.eval()
    # Without fused kernels, some of which the counter does not know.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.encode_image(torch.zeros(3, 3, 32, 32))
        model.encode_text(tokens)
    recorded = sum(product.flops * product.count for product in found)
    assert recorded == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert any(product.convolution for product in found)
    assert any(product.is_linear for product in found)


def test_recording_neither_computes_nor_draws_random_numbers() -> None:
    model = build_model(TINY_MODEL).model
    before = torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert record(model, lambda same: same.encode_image(torch.empty(1, 3, 32, 32, device="meta")))
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_a_model_that_looks_at_values_is_not_recorded() -> None:
    class Curious(torch.nn.Module):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows if rows.sum() > 0 else -rows

    assert record(Curious(), lambda same: same(torch.empty(2, 2, device="meta"))) == ()


@pytest.mark.parametrize(
    ("product", "expected"),
    [
        (Product((3200, 768), (768, 3072)), (320, 768)),
        (Product((40, 768), (768, 3072)), (32, 768)),
        (Product((64, 3, 224, 224), (32, 3, 3, 3), ((2, 2), (1, 1), (1, 1), 1)), (6, 3, 224, 224)),
        (Product((2, 3, 224, 224), (32, 3, 3, 3), ((2, 2), (1, 1), (1, 1), 1)), (1, 3, 224, 224)),
        (Product((768, 50, 64), (768, 64, 50)), (76, 50, 64)),
    ],
)
def test_a_piece_has_fewer_rows_and_is_otherwise_the_same(
    product: Product, expected: tuple[int, ...]
) -> None:
    piece = product.cut(product.flops / 10)
    assert piece.left == expected
    assert piece.right[-2:] == product.right[-2:]
    assert product.cut(product.flops * 2) == product


def test_the_shapes_that_most_work_goes_into_come_first() -> None:
    small, often = Product((10, 10), (10, 10)), Product((20, 20), (20, 20), count=50)
    large = Product((40, 40), (40, 40), count=2)
    assert largest([small, large, often]) == [often, large, small]
    assert len(largest([small] * 30)) == 8
