"""Adapters in runs: exact on real ranks, resumed bit for bit, exported merged and by themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import clipsys
from clipsys.errors import ClipsysError, ModelError, TrainingError
from clipsys.models.adapters import Base
from clipsys.models.open_clip_models import build_model, load_model, save_model
from clipsys.training.engine.config import EngineConfig
from clipsys.training.engine.deepspeed_engine import Engine
from clipsys.training.engine.optimizers import OptimizerConfig
from clipsys.training.export import export_model
from clipsys.training.model.adapters import Adapters, LoraConfig
from clipsys.training.model.adding_adapters import add_adapters
from clipsys.training.model.outputs import Inputs, Sizes
from clipsys.training.model.trained import TrainedModel
from clipsys.training.objectives.infonce import InfoNCE, InfoNCEConfig
from clipsys.training.objectives.protocol import Labels
from tests.conftest import TINY_MODEL, noise_image
from tests.ranks import run_ranks
from tests.tiny_models import hf_text_config, write_text_model
from tests.training.runs import Attempt, have_same_weights, train_in_group, write_recipe
from tests.two_towers import tower_sections

IMAGES = [noise_image(seed) for seed in range(4)]
TEXTS = ["picture number 1", "image 7", "a red square"]

# ---- exactness -----------------------------------------------------------------------------------

_STEPS, _BATCH = 2, 12
_OBJECTIVE = InfoNCE(InfoNCEConfig(positives="pair"))
_LORA = LoraConfig(rank=4, alpha=8)


def _adapted() -> tuple[Any, Adapters]:
    """A model with adapters that are not zero, the same on every rank."""
    torch.manual_seed(0)
    parts = build_model(TINY_MODEL, for_training=True)
    adapters = add_adapters(parts, _LORA, base=Base())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in parts.model.named_parameters():
        if "lora_B" in name:
            parameter.detach().copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return parts.model, adapters


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, 999, (_BATCH, 16), generator=generator)
    tokens[:, 6], tokens[:, 7:] = 49407, 0
    return torch.randn(_BATCH, 3, 32, 32, generator=generator), tokens


def _train(
    rank: int, world_size: int, cases: list[tuple[int, int]]
) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Gradients of the first step, and the merged weights after all steps."""
    results = []
    for stage, micro_batches in cases:
        clip, adapters = _adapted()
        engine = Engine(
            TrainedModel(clip, _OBJECTIVE, sizes=Sizes(32), adapters=adapters),
            config=EngineConfig(zero_stage=stage, gradient_clipping=0.0),  # type: ignore[arg-type]
            optimizer=OptimizerConfig(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0),
            local_batch_size=_BATCH // world_size,
            device=torch.device("cpu"),
        )
        engine.train()
        gradients: dict[str, np.ndarray] = {}
        share = _BATCH // world_size
        for step in range(_STEPS):
            image, tokens = _batch(step)
            numbers = torch.arange(_BATCH)[rank * share : (rank + 1) * share]
            inputs = [
                lambda rows=rows, image=image, tokens=tokens: Inputs(
                    (image[rows],), (tokens[rows],)
                )
                for rows in numbers.chunk(micro_batches)
            ]
            engine.accumulate(
                inputs,
                lambda outputs, targets, state, numbers=numbers: _OBJECTIVE.loss(
                    outputs, targets, Labels(numbers, numbers), state
                ),
            )
            found = engine.gradients()
            gradients = gradients or {name: one.numpy() for name, one in found.items()}
            engine.update(1.0)
        results.append((gradients, {n: t.numpy() for n, t in engine.state_dict().items()}))
    return results


def _naive() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """One float64 process: the plain model with W + 2 B A in the place of each adapted weight."""
    adapted, adapters = _adapted()
    state = {n: t.double() for n, t in adapted.state_dict().items() if t.is_floating_point()}
    frozen = {n.replace(".base_layer", ""): t for n, t in state.items() if ".lora_" not in n}
    leaves = {n: t.requires_grad_() for n, t in state.items() if ".lora_" in n}
    leaves["logit_scale"] = frozen["logit_scale"].clone().requires_grad_()
    torch.manual_seed(0)
    plain = build_model(TINY_MODEL, for_training=True).model.double()
    kept: dict[str, np.ndarray] = {}

    def weights() -> dict[str, torch.Tensor]:
        merged = {**frozen, "logit_scale": leaves["logit_scale"]}
        for layer, name in adapters.names.items():
            place = next(p for p in (f"{layer}.weight", f"{layer}.in_proj_weight") if p in merged)
            down = leaves[f"{name}.lora_A.default.weight"]
            up = leaves[f"{name}.lora_B.default.weight"]
            merged[place] = merged[place] + 8 / 4 * up @ down
        return merged

    for step in range(_STEPS):
        image, tokens = _batch(step)
        outputs = torch.func.functional_call(plain, weights(), (image.double(), tokens))
        logits = outputs[2] * outputs[0] @ outputs[1].T
        target = torch.arange(_BATCH)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        kept = kept or {f"clip.{name}": one.numpy() for name, one in gradients.items()}
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf -= 0.1 * gradients[name]
    return kept, {name: tensor.detach().numpy() for name, tensor in weights().items()}


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        (2, [(0, 1), (1, 2), (2, 1), (3, 2)]),
        pytest.param(1, [(s, m) for s in range(4) for m in (1, 3)], marks=pytest.mark.slow),
        pytest.param(2, [(s, m) for s in range(4) for m in (1, 2)], marks=pytest.mark.slow),
        pytest.param(3, [(s, m) for s in range(4) for m in (1, 2)], marks=pytest.mark.slow),
    ],
)
def test_adapters_train_exactly_on_every_rank_and_stage(
    world_size: int, cases: list[tuple[int, int]]
) -> None:
    expected_gradients, expected_weights = _naive()
    for results in run_ranks(_train, world_size, cases):
        for case, (gradients, weights) in zip(cases, results, strict=True):
            assert gradients.keys() == expected_gradients.keys(), case
            for name, gradient in gradients.items():
                expected = expected_gradients[name].reshape(gradient.shape)
                scale = max(float(np.linalg.norm(expected)), 1e-3)
                assert np.linalg.norm(gradient - expected) / scale < 2e-5, (case, name)
            for name, expected in expected_weights.items():
                np.testing.assert_allclose(
                    weights[name], expected, atol=1e-5, rtol=0, err_msg=f"{case} {name}"
                )


# ---- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that runs begin with: CLIP's form, and a convolutional timm tower with BERT."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    save_model(build_model(TINY_MODEL, for_training=True), folder / "clip")
    config = hf_text_config(write_text_model(folder / "bert", "bert"))
    vision = {"timm_model_name": "test_efficientnet", "image_size": 32, "timm_pool": "avg"}
    config["vision_cfg"] = {**vision, "timm_proj": "linear"}
    save_model(build_model(config, for_training=True), folder / "two_towers")
    return folder


def _attempt(folder: Path, shards: str, base: Path, lora: dict[str, Any], **more: Any) -> Attempt:
    model = {"architecture": None, "pretrained": str(base), "lora": {"rank": 4, "alpha": 8, **lora}}
    more = {**_SHORT, **more, "model": {**model, **more.get("model", {})}}
    return Attempt(write_recipe(folder, shards, **more))


#: Three steps an epoch, without measurements.
_SHORT: dict[str, Any] = {"data": {"batch_size": 16, "validation": None}}


_RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "clip": ("clip", {"dropout": 0.1}, {"engine": {"zero_stage": 1, "ema_decay": 0.9}}),
    "two_towers": (
        "two_towers",
        {},
        {"engine": {"zero_stage": 3}, "optimizer": {"layer_decay": 0.7, "lr": 1e-3}},
    ),
    "quantised": ("clip", {"quantised": True}, {"engine": {"zero_stage": 2}}),
}


@pytest.fixture(scope="module")
def runs(bases: Path, shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks, with two checkpoints each."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("runs")
    attempts = [
        _attempt(folder / name, shards, bases / base, lora, **more)
        for name, (base, lora, more) in _RUNS.items()
    ]
    outcomes = train_in_group(attempts, 2)[0]
    assert [outcome.error for outcome in outcomes] == [""] * len(attempts)
    (folder / "log.txt").write_text("\n".join(outcome.log for outcome in outcomes))
    return folder


@pytest.fixture(scope="module")
def resumed_runs(runs: Path) -> Path:
    """The same runs with a copy of each that was resumed from its first checkpoint."""
    _resume(runs, {name: Attempt(runs / name / "recipe.yaml") for name in _RUNS})
    return runs


def _resume(folder: Path, attempts: dict[str, Attempt]) -> None:
    """Goes on with copies of runs from the first of their two checkpoints."""
    resumed = []
    for name, attempt in attempts.items():
        copy = shutil.copytree(folder / name / "run", folder / name / "resumed")
        shutil.rmtree(copy / "model")
        shutil.rmtree(copy / "checkpoints" / "step-00000006")
        (copy / "checkpoints" / "latest").write_text("step-00000003\n")
        resumed.append(Attempt(attempt.recipe, (f"output={copy}",), resume=True))
    assert [outcome.error for outcome in train_in_group(resumed, 2)[0]] == [""] * len(resumed)


@pytest.mark.parametrize("name", _RUNS)
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not(resumed_runs: Path, name: str) -> None:
    assert have_same_weights(resumed_runs / name / "run", resumed_runs / name / "resumed")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        one, other = (
            resumed_runs / name / of / "model/adapter" / file for of in ("run", "resumed")
        )
        assert one.read_bytes() == other.read_bytes(), file


@pytest.mark.slow
def test_momentum_towers_sigmoid_and_checkpointing_go_with_adapters(
    bases: Path, shards: str, tmp_path: Path
) -> None:
    moco = {"objective": {"name": "moco", "queue_size": 16}}
    cases: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        "moco": ("clip", {"towers": ["image"]}, moco),
        "moco_3": ("clip", {"towers": ["image"]}, {**moco, "engine": {"zero_stage": 3}}),
        "sigmoid": ("clip", {}, {"objective": {"name": "sigmoid"}}),
        "bf16_params": ("clip", {}, {"engine": {"zero_stage": 1, "precision": "bf16_params"}}),
        "plain": ("two_towers", {}, {}),
        "checkpointing": ("two_towers", {}, {"engine": {"grad_checkpointing": True}}),
        "locked": ("clip", {"towers": ["image"]}, {"model": {"unlocked_text_blocks": 0}}),
    }
    attempts = {
        name: _attempt(tmp_path / name, shards, bases / base, lora, **more)
        for name, (base, lora, more) in cases.items()
    }
    sections = {**tower_sections(tmp_path / "weights"), "lora": {"rank": 4, "alpha": 8}}
    recipe = write_recipe(
        tmp_path / "towers", shards, model={"architecture": None, **sections}, **_SHORT
    )
    attempts["towers"] = Attempt(recipe)
    outcomes = train_in_group(list(attempts.values()), 2)[0]
    assert [outcome.error for outcome in outcomes] == [""] * len(attempts)
    assert ", 10,240 of heads, 1 of temperature" in outcomes[-1].log
    with pytest.raises(TrainingError, match=r"began with towers of several models"):
        export_model(tmp_path / "towers" / "run", tmp_path / "adapter", adapter=True)
    resumed = ("moco", "moco_3", "bf16_params", "towers")
    _resume(tmp_path, {name: attempts[name] for name in resumed})
    for name in resumed:
        assert have_same_weights(tmp_path / name / "run", tmp_path / name / "resumed"), name
    np.testing.assert_allclose(
        _vectors(tmp_path / "checkpointing" / "run"), _vectors(tmp_path / "plain" / "run"),
        atol=1e-5,
    )  # fmt: skip
    texts = clipsys.load(tmp_path / "locked" / "run", precision="fp32").encode_text(TEXTS)
    base = clipsys.load(bases / "clip", precision="fp32")
    np.testing.assert_array_equal(texts, base.encode_text(TEXTS))
    card = json.loads((tmp_path / "sigmoid/run/model/adapter/clipsys.json").read_text())
    assert "objective.name" in card["base"]["changed_by"][0]


def test_what_is_trained_is_said_with_its_numbers(runs: Path) -> None:
    log = (runs / "log.txt").read_text()
    assert "rank 4, alpha 8 on 3 layers of the image tower (1 attn, 1 c_fc, 1 c_proj)" in log
    assert "trained are 4,096 of adapters, 1 of temperature; 1,633,984 parameters are frozen" in log
    assert "of heads, 1 of temperature" in log
    assert "; without adapters: 2 depthwise or grouped convolutions" in log
    assert "of them in NF4" in log


def _vectors(spec: str | Path, **options: Any) -> np.ndarray:
    encoder = clipsys.load(spec, precision="fp32", **options)
    return np.concatenate([encoder.encode_image(IMAGES), encoder.encode_text(TEXTS)])


@pytest.mark.parametrize("name", ["clip", "two_towers"])
def test_peft_reads_an_adapter_folder_onto_the_base(
    runs: Path, bases: Path, name: str, tmp_path: Path
) -> None:
    from peft import PeftConfig, PeftModel

    from clipsys.training.model.adapter_layers import AttentionAdapter

    export_model(runs / name / "run", tmp_path / "adapter", adapter=True)
    parts = load_model(bases / name)
    config = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    # As docs/fine-tuning.md says; peft 0.21 itself adds an adapter of attention twice.
    config._register_custom_module({torch.nn.MultiheadAttention: AttentionAdapter})
    wrapped = PeftModel.from_pretrained(parts.model, str(tmp_path / "adapter"), config=config)
    encoder = clipsys.load(runs / name / "run", precision="fp32")
    pixels = torch.from_numpy(np.stack([encoder.preprocess(image) for image in IMAGES]))
    inner = wrapped.base_model.model.eval()
    with torch.no_grad():
        image = F.normalize(inner.encode_image(encoder.normalised(pixels)), dim=-1)
        text = F.normalize(inner.encode_text(parts.tokenizer(TEXTS)), dim=-1)
    actual, merged = torch.cat([image, text]).numpy(), _vectors(runs / name / "run")
    np.testing.assert_allclose(actual, merged, atol=1e-6)
    assert abs(merged - _vectors(bases / name)).max() > 1e-3


@pytest.mark.parametrize("name", _RUNS)
def test_an_adapter_is_loaded_onto_its_base_as_the_merged_model(
    runs: Path, bases: Path, name: str, tmp_path: Path
) -> None:
    merged = clipsys.load(runs / name / "run", precision="fp32")
    export_model(runs / name / "run", tmp_path / "adapter", adapter=True)
    expected = _vectors(runs / name / "run")
    base = bases / _RUNS[name][0]
    encoder = clipsys.load(base, adapter=tmp_path / "adapter", precision="fp32")
    assert encoder.fingerprint == merged.fingerprint
    assert encoder.logit_scale == pytest.approx(merged.logit_scale, rel=1e-6)
    for spec in (encoder.spec, tmp_path / "adapter"):  # the adapter names its base
        np.testing.assert_allclose(_vectors(spec), expected, atol=1e-6)
    export_model(tmp_path / "adapter", tmp_path / "model")
    np.testing.assert_allclose(_vectors(tmp_path / "model"), expected, atol=1e-6)


def test_stock_open_clip_loads_the_merged_model(runs: Path) -> None:
    import open_clip

    folder = runs / "clip" / "run" / "model"
    stock, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    with torch.no_grad():
        actual = stock.eval().encode_image(torch.stack([transform(i) for i in IMAGES]), True)
    np.testing.assert_allclose(actual.numpy(), _vectors(folder)[: len(IMAGES)], atol=1e-5)


def test_another_base_is_refused_with_both_fingerprints(
    runs: Path, bases: Path, tmp_path: Path
) -> None:
    adapter = runs / "clip" / "run" / "model" / "adapter"
    base = load_model(bases / "clip").loaded_fingerprint
    torch.manual_seed(9)
    other = save_model(build_model(TINY_MODEL, for_training=True), tmp_path / "other")
    with pytest.raises(ModelError) as caught:
        clipsys.load(tmp_path / "other", adapter=adapter)
    assert base[:12] in str(caught.value) and other[:12] in str(caught.value)
    assert "\n" not in str(caught.value)


def _spoilt(folder: Path, adapter: Path) -> Iterator[tuple[Path, str]]:
    def copied(name: str) -> Path:
        return shutil.copytree(adapter, folder / name)

    altered = copied("altered")
    (altered / "adapter_model.safetensors").write_bytes(
        (adapter.parents[3] / "resumed_elsewhere.safetensors").read_bytes()
    )
    yield altered, "the adapter is not the one that was exported"
    lost = copied("lost")
    card = json.loads((lost / "clipsys.json").read_text())
    card["base"]["model"] = str(folder / "gone")
    (lost / "clipsys.json").write_text(json.dumps(card))
    yield lost, "its base cannot be loaded .* name the place of the base: BASE::"
    foreign = copied("foreign")
    config = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    yield foreign, "use_dora is True, and only plain LoRA is merged"
    empty = copied("empty")
    (empty / "adapter_model.safetensors").unlink()
    yield empty, "the adapter folder has no adapter_model.safetensors"
    nameless = copied("nameless")
    (nameless / "clipsys.json").unlink()
    yield nameless, "the adapter does not say what its base is; name it: BASE::"


def test_a_damaged_adapter_is_refused(runs: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = runs / "clip" / "run" / "model" / "adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, runs / "resumed_elsewhere.safetensors")
    for folder, message in _spoilt(tmp_path, adapter):
        with pytest.raises(ModelError, match=message) as caught:
            clipsys.load(folder)
        assert "\n" not in str(caught.value)


def test_an_adapter_of_peft_is_merged_as_peft_computes_it(
    runs: Path, bases: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    adapter = shutil.copytree(runs / "clip" / "run" / "model" / "adapter", tmp_path / "adapter")
    for file in ("clipsys.json", "trained.safetensors"):
        (adapter / file).unlink()
    parts = load_model(bases / "clip")
    wrapped = PeftModel.from_pretrained(parts.model, str(adapter))
    with torch.no_grad():
        text = wrapped.base_model.model.eval().encode_text(parts.tokenizer(TEXTS))
    actual = clipsys.load(bases / "clip", adapter=adapter, precision="fp32").encode_text(TEXTS)
    np.testing.assert_allclose(actual, F.normalize(text, dim=-1).numpy(), atol=1e-6)


def test_export_says_what_it_cannot_write(runs: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "letter.txt").write_text("dear")
    with pytest.raises(ModelError, match="is no adapter folder, which alone is replaced"):
        export_model(runs / "clip" / "run", taken, adapter=True)
    export_model(runs / "clip" / "run", tmp_path / "out", adapter=True)
    with pytest.raises(ModelError, match=r"already exists; .* pass --overwrite"):
        export_model(runs / "clip" / "run", tmp_path / "out", adapter=True)
    export_model(runs / "clip" / "run", tmp_path / "out", adapter=True, overwrite=True)
    other = shutil.copytree(runs / "clip" / "run", tmp_path / "other")
    card = other / "model" / "adapter" / "clipsys.json"
    document = json.loads(card.read_text())
    document["base"]["changed_by"] = ["model.image_size"]
    card.write_text(json.dumps(document))
    with pytest.raises(TrainingError, match=r"elsewhere than at .*model\.image_size.*--adapter"):
        export_model(other, tmp_path / "more", adapter=True)
    export_model(other, tmp_path / "merged")
    shutil.rmtree(other / "model" / "adapter")
    with pytest.raises(TrainingError, match=r"trained no adapters \(model\.lora\)"):
        export_model(other, tmp_path / "none", adapter=True)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"name": "simclr"}}, r"set model\.lora\.towers: \[image\]"),
        (
            {"model": {"unlocked_image_blocks": 1}},
            r"image_blocks is 1, and model.lora freezes the image tower beside",
        ),
        (
            {
                "model": {
                    "pretrained": None,
                    "image_tower": {"name": "timm:test_efficientnet", "unlocked_blocks": None},
                    "text_tower": {"name": "hf:texts"},
                }
            },
            r"image_tower.unlocked_blocks is null, and .*; set .* to 0",
        ),
        ({"model": {"pretrained": None}}, "these would be random; set model.pretrained"),
        (
            {
                "model": {"lora": {"quantised": True}},
                "engine": {"precision": "bf16_params", "zero_stage": 1},
            },
            "use fp32 or bf16",
        ),
        ({"model": {"lora": {"rank": 0}}}, "model.lora.rank.*greater than"),
        ({"model": {"lora": {"towers": ["text", "text"]}}}, "towers names text twice"),
        ({"model": {"lora": {"rnak": 8}}}, "rnak is not a setting; did you mean .*rank"),
    ],
)
def test_a_recipe_whose_adapters_would_do_something_else_is_refused(
    sections: dict[str, Any], message: str, shards: str, tmp_path: Path, bases: Path
) -> None:
    from clipsys.config import load_settings
    from clipsys.training.recipe import Recipe

    model = {"architecture": None, "pretrained": str(bases / "clip"), "lora": {}}
    sections = {**sections, "model": {**model, **sections.get("model", {})}}
    with pytest.raises(ClipsysError, match=message):
        load_settings(Recipe, write_recipe(tmp_path, shards, **sections), ())


# ---- batch norm ----------------------------------------------------------------------------------


def _statistics(model: Any) -> dict[str, torch.Tensor]:
    return {n: t for n, t in model.state_dict().items() if "running_" in n}


def test_fine_tuning_keeps_the_statistics_of_batch_norm(
    bases: Path, shards: str, tmp_path: Path
) -> None:
    model = {"architecture": None, "pretrained": str(bases / "two_towers")}
    one = {"epochs": 1}
    cases: dict[str, dict[str, Any]] = {
        "default": {"model": model},
        "micro": {
            "model": model,
            "objective": {"name": "simclr"},
            "data": {"micro_batch_size": 8},
        },
        "moving": {"model": {**model, "freeze_batch_norm": False}},
        "refused": {
            "model": {**model, "freeze_batch_norm": False},
            "objective": {"name": "simclr"},
            "data": {"micro_batch_size": 8},
        },
        "needless": {
            "model": {**model, "pretrained": str(bases / "clip"), "freeze_batch_norm": True}
        },
    }
    attempts = [
        Attempt(
            write_recipe(
                tmp_path / name,
                shards,
                schedule=one,
                **{**sections, "data": {**_SHORT["data"], **sections.get("data", {})}},
            )
        )
        for name, sections in cases.items()
    ]
    errors = dict(
        zip(cases, (outcome.error for outcome in train_in_group(attempts, 1)[0]), strict=True)
    )
    before = _statistics(load_model(bases / "two_towers").model)
    assert before
    for name in ("default", "micro", "moving"):
        assert errors[name] == ""
        after = load_model(tmp_path / name / "run").model
        same = all(torch.equal(value, before[key]) for key, value in _statistics(after).items())
        assert same is (name != "moving"), name
        weight = "visual.trunk.bn1.weight"  # scale and shift are trained
        assert not torch.equal(
            after.state_dict()[weight], load_model(bases / "two_towers").model.state_dict()[weight]
        )
    assert "with statistics that rest (model.freeze_batch_norm)" in errors["refused"]
    assert "the towers have no batch norm; leave it out" in errors["needless"]


def test_models_without_weights_learn_the_statistics_of_batch_norm() -> None:
    from clipsys.training.model.initial import ModelConfig

    assert not ModelConfig().rests_batch_norm
    assert ModelConfig(freeze_batch_norm=True).rests_batch_norm
    assert ModelConfig(pretrained="RN50/openai").rests_batch_norm
    assert not ModelConfig(pretrained="RN50/openai", freeze_batch_norm=False).rests_batch_norm
    with_trunk = {"vision_cfg": {"timm_model_pretrained": True}, "text_cfg": {}}
    assert ModelConfig(architecture=with_trunk).rests_batch_norm
