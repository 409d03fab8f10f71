"""Weights between two models: exact, and refused where nothing lies between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipsys.errors import ConfigError, ModelError
from clipsys.models.encoder import Encoder
from clipsys.models.interpolation import interpolate, mixed
from clipsys.models.open_clip_models import ModelParts, build_model, fingerprint
from tests.conftest import TINY_MODEL, noise_image

RESNET: dict[str, Any] = {
    **TINY_MODEL,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
}


def _built(seed: int, config: dict[str, Any] = TINY_MODEL, **options: Any) -> ModelParts:
    torch.manual_seed(seed)
    return replace(build_model(config, **options), name=f"model {seed}")


def _images() -> list[Image.Image]:
    return [noise_image(seed) for seed in range(3)]


def test_the_ends_are_the_models_themselves_bit_for_bit() -> None:
    base, tuned = _built(1), _built(2)
    assert fingerprint(interpolate(base, tuned, 0.0)) == fingerprint(base)
    assert fingerprint(interpolate(base, tuned, 1.0)) == fingerprint(tuned)


def test_every_value_lies_between_as_a_loop_says() -> None:
    base, tuned = _built(1, RESNET), _built(2, RESNET)
    for parts, fill in ((base, 2.0), (tuned, 6.0)):
        for name, buffer in parts.model.named_buffers():
            if name.endswith("running_var"):
                buffer.fill_(fill)
            if name.endswith("num_batches_tracked"):
                buffer.fill_(int(fill))
    between = interpolate(base, tuned, 0.25).model.state_dict()
    first, second = base.model.state_dict(), tuned.model.state_dict()
    assert any(name.endswith("running_var") for name in between)
    for name, tensor in between.items():
        if name.endswith("num_batches_tracked"):
            assert int(tensor) == 6  # a count has no fractions: the tuned model's
            continue
        if name.endswith("running_var"):
            assert torch.equal(tensor, torch.full_like(tensor, 3.0))
        pairs = zip(first[name].flatten().tolist(), second[name].flatten().tolist(), strict=True)
        expected = [0.75 * a + 0.25 * b for a, b in pairs]
        np.testing.assert_allclose(tensor.flatten().tolist(), expected, rtol=1e-6, atol=1e-9)


def test_the_temperature_is_averaged_in_its_logarithm() -> None:
    base, tuned = _built(1), _built(2)
    with torch.no_grad():
        base.model.logit_scale.fill_(np.log(4.0))  # type: ignore[operator]
        tuned.model.logit_scale.fill_(np.log(100.0))  # type: ignore[operator]
    encoder = Encoder(interpolate(base, tuned, 0.5), precision="fp32")
    assert encoder.logit_scale == pytest.approx(20.0)


def test_neither_model_is_changed_and_the_result_encodes() -> None:
    base, tuned = _built(1), _built(2)
    marks = fingerprint(base), fingerprint(tuned)
    vectors = Encoder(interpolate(base, tuned, 0.5), precision="fp32").encode_image(_images())
    assert np.isfinite(vectors).all()
    assert (fingerprint(base), fingerprint(tuned)) == marks


def test_a_scale_of_training_and_one_of_an_export_fit_each_other() -> None:
    base, tuned = _built(1), _built(2, for_training=True)
    assert interpolate(base, tuned, 0.5).model.logit_scale.shape == (1,)


def test_infinite_values_that_are_equal_stay() -> None:
    mask = torch.tensor([0.0, -torch.inf])
    for alpha in (0.0, 0.5, 1.0):
        assert torch.equal(mixed({"mask": mask}, {"mask": mask}, alpha)["mask"], mask)


def _other_tokenizer(texts: list[str]) -> torch.Tensor:
    return torch.zeros(len(texts), 16, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            lambda: _built(2, {**TINY_MODEL, "text_cfg": {**TINY_MODEL["text_cfg"], "layers": 2}}),
            "text_cfg.layers is 1 and 2",
        ),
        (lambda: _built(2, {**TINY_MODEL, "quick_gelu": True}), "quick_gelu is None and True"),
        (
            lambda: _built(2, preprocess={"mean": [0.5, 0.5, 0.5]}),
            r"preprocess_cfg.mean is .* and \(0.5, 0.5, 0.5\)",
        ),
        (
            lambda: replace(_built(2), tokenizer=_other_tokenizer),
            "their tokenizers make different tokens of 'a photo of a cat'",
        ),
        (
            lambda: _built(2, {**TINY_MODEL, "init_logit_bias": -10}),
            "only model 2 has the weight logit_bias",
        ),
    ],
)
def test_the_first_difference_is_named(changed: Any, message: str) -> None:
    with pytest.raises(ModelError, match=f"model 1 and model 2 cannot be interpolated: {message}"):
        interpolate(_built(1), changed(), 0.5)


def test_other_shapes_and_shares_are_refused() -> None:
    wider = {**TINY_MODEL, "embed_dim": 16}
    with pytest.raises(ModelError, match=r"the weight \S+ has the shape \(32, 32\) and \(32, 16\)"):
        interpolate(_built(1), replace(_built(2, wider), config=TINY_MODEL), 0.5)
    with pytest.raises(ConfigError, match=r"alpha is 1\.5; expected a share"):
        interpolate(_built(1), _built(2), 1.5)


def test_where_the_weights_came_from_is_no_difference() -> None:
    tuned = _built(2)
    text = {**tuned.config["text_cfg"], "hf_tokenizer_name": None}
    moved = replace(tuned, config={**tuned.config, "text_cfg": text, "init_logit_scale": 2.6})
    interpolate(_built(1), moved, 0.5)
