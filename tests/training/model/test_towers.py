from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from clipsys.errors import ConfigError, TrainingError
from clipsys.models.open_clip_models import build_model, fingerprint, load_model
from clipsys.training.model.initial import initial_model, lock_tower
from clipsys.training.model.outputs import Inputs, Sizes
from clipsys.training.model.towers import TowerOptions, Towers
from clipsys.training.model.trained import TrainedModel
from clipsys.training.objectives.infonce import InfoNCE, InfoNCEConfig
from clipsys.training.recipe import ModelConfig
from tests.conftest import TINY_MODEL


def _model(precision: str = "fp32") -> tuple[TrainedModel, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    parts = build_model(TINY_MODEL, for_training=True)
    objective = InfoNCE(InfoNCEConfig())
    model = TrainedModel(parts.model, objective, TowerOptions(precision), sizes=Sizes(32))
    return model, torch.randn(3, 3, 32, 32), parts.tokenizer(["a", "b c", "d e f"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_are_float32_unit_vectors_of_open_clip(precision: str) -> None:
    model, image, tokens = _model(precision)
    rows, shared = model.eval()(Inputs((image,), (tokens,)))
    expected = model.clip.encode_image(image, normalize=True)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    torch.testing.assert_close(rows["image"], expected, atol=tolerance, rtol=0)
    for vectors in rows.values():
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    assert shared["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-4)


@pytest.mark.parametrize(("start", "scale"), [(math.log(50), 50.0), (math.log(400), 100.0)])
def test_the_scale_is_clamped_and_can_come_back(start: float, scale: float) -> None:
    model, *_ = _model()
    with torch.no_grad():
        model.clip.logit_scale.fill_(start)
    value = model.logit_scale()
    assert value.item() == pytest.approx(scale, rel=1e-4)
    value.backward()
    # The gradient above the bound is that at the bound, not zero.
    assert model.clip.logit_scale.grad.item() == pytest.approx(scale, rel=1e-4)


def test_a_run_can_begin_with_pretrained_weights(model_folder: Path) -> None:
    settings = ModelConfig(architecture=TINY_MODEL, pretrained=str(model_folder))
    parts = initial_model(settings)
    assert fingerprint(parts) == fingerprint(load_model(model_folder))
    warmer = initial_model(settings.model_copy(update={"initial_logit_scale": 20.0}))
    assert warmer.model.logit_scale.exp().item() == pytest.approx(20.0)
    wider = {**TINY_MODEL, "embed_dim": 64}
    with pytest.raises(TrainingError, match="the weights do not fit model") as caught:
        initial_model(ModelConfig(architecture=wider, pretrained=str(model_folder)))
    assert "\n" not in str(caught.value)


def test_the_sigmoid_loss_gets_a_bias_and_pretrained_weights_may_lack_it(
    model_folder: Path,
) -> None:
    parts = initial_model(ModelConfig(architecture=TINY_MODEL), with_bias=True)
    assert parts.model.logit_bias.item() == -10
    assert parts.model.logit_scale.exp().item() == pytest.approx(10)
    tuned = initial_model(
        ModelConfig(architecture=TINY_MODEL, pretrained=str(model_folder), initial_logit_bias=-4.0),
        with_bias=True,
    )
    assert tuned.model.logit_bias.item() == -4
    assert Towers(tuned.model).logit_bias().item() == -4
    with pytest.raises(ConfigError, match="initial_logit_bias is -4"):
        initial_model(ModelConfig(architecture=TINY_MODEL, initial_logit_bias=-4.0))


_DEEP = {
    **TINY_MODEL,
    "vision_cfg": {**TINY_MODEL["vision_cfg"], "layers": 3},
    "text_cfg": {**TINY_MODEL["text_cfg"], "layers": 2},
}


@pytest.mark.parametrize(
    ("tower", "blocks", "trained"),
    [
        ("image", 0, set()),
        (
            "image",
            1,
            {"visual.ln_post.weight", "visual.proj", "visual.transformer.resblocks.2.ln_1.weight"},
        ),
        ("text", 1, {"ln_final.weight", "text_projection", "transformer.resblocks.1.ln_1.weight"}),
    ],
)
def test_a_locked_tower_trains_its_last_blocks_and_what_follows(
    tower: str, blocks: int, trained: set[str]
) -> None:
    model = build_model(_DEEP, for_training=True).model
    lock_tower(model, tower, blocks)
    parameters = dict(model.named_parameters())
    assert all(parameters[name].requires_grad for name in trained)
    own = {name for name in parameters if name.startswith("visual.") == (tower == "image")}
    moving = {name for name in own - {"logit_scale"} if parameters[name].requires_grad}
    assert trained <= moving
    last = {0: "resblocks.9.", 1: "resblocks.2." if tower == "image" else "resblocks.1."}[blocks]
    assert {name for name in moving if "resblocks" in name} == {n for n in own if last in n}
    others = set(parameters) - own
    assert all(parameters[name].requires_grad for name in others | {"logit_scale"})


def test_more_unlocked_blocks_than_there_are_is_refused() -> None:
    model = build_model(_DEEP, for_training=True).model
    with pytest.raises(ConfigError, match="is 4, but the image tower has 3 blocks"):
        lock_tower(model, "image", 4)


def test_what_is_locked_rests_in_training_mode() -> None:
    config = {**TINY_MODEL, "vision_cfg": {**TINY_MODEL["vision_cfg"], "patch_dropout": 0.5}}
    parts = build_model(config, for_training=True)
    lock_tower(parts.model, "image", 0)
    model = Towers(parts.model).train()
    assert not model.clip.visual.training and model.clip.transformer.training
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.encode_image(image), model.encode_image(image))


def test_patch_dropout_acts_in_training_only() -> None:
    parts = initial_model(ModelConfig(architecture=TINY_MODEL, patch_dropout=0.5))
    model, image = Towers(parts.model), torch.randn(2, 3, 32, 32)
    assert not torch.equal(model.train().encode_image(image), model.encode_image(image))
    assert torch.equal(model.eval().encode_image(image), model.encode_image(image))
