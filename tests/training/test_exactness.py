"""The contract of training: any split of the work gives the gradients of one process, exactly.

Every case is trained by the real engine in real processes and compared with a naive reference: the
whole batch, the whole matrix of logits, plain autograd and plain optimizers in float64.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.models.open_clip_models import build_model
from clipsys.training.engine.deepspeed_engine import Engine
from clipsys.training.engine.optimizers import OptimizerConfig, build_optimizer, parameter_groups
from clipsys.training.model.initial import lock_tower
from clipsys.training.model.outputs import Inputs, Sizes
from clipsys.training.model.towers import TowerOptions, rest_frozen
from clipsys.training.model.trained import TrainedModel
from clipsys.training.objectives.infonce import InfoNCE, InfoNCEConfig
from clipsys.training.objectives.protocol import Labels
from clipsys.training.objectives.sigmoid import Sigmoid, SigmoidConfig
from clipsys.training.recipe import EngineConfig
from tests.conftest import no_tokenizer
from tests.ranks import run_ranks
from tests.training.losses.test_contrastive import naive_info_nce, naive_sigmoid_loss

_STEPS, _BATCH = 5, 24
_MODEL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 500, "width": 32, "heads": 2, "layers": 2},
}


class Case(NamedTuple):
    """One way of splitting the work; the defaults are those of one plain process."""

    stage: int = 0
    micro_batches: int = 1
    tile_size: int | None = None
    optimizer: str = "sgd"
    loss: str = "infonce"
    groups: str | None = None
    clipping: float = 0.0
    dropout: bool = False
    frozen: str | None = None
    checkpointing: bool = False
    precision: str = "fp32"
    on_host: bool = False


class _Dropout(nn.Module):
    """Drops half, by random numbers that do not depend on the precision of what is dropped."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value * 2 * (torch.rand(value.shape) < 0.5) if self.training else value


def _clip(case: Case) -> Any:
    config = {**_MODEL, "vision_cfg": dict(_MODEL["vision_cfg"])}
    if case.dropout:
        config["vision_cfg"]["patch_dropout"] = 0.5
    if case.loss == "sigmoid":
        config |= {"init_logit_bias": -3.0, "init_logit_scale": 1.5}
    torch.manual_seed(0)
    model: Any = build_model(config, for_training=True, tokenizer=no_tokenizer).model
    if case.dropout:
        # In the image tower: text is cut to the longest caption of what is encoded at once, which
        # draws other numbers in the reference.
        block = model.visual.transformer.resblocks[0]
        block.ln_2 = nn.Sequential(block.ln_2, _Dropout())
    if case.frozen:
        lock_tower(model, *case.frozen.split("/")[:1], int(case.frozen.split("/")[1]))  # type: ignore[arg-type]
    return model


def _batch(step: int, case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(step)
    image = torch.randn(_BATCH, 3, 32, 32, generator=generator)
    tokens = torch.randint(1, 498, (_BATCH, 12), generator=generator)
    tokens[:, 6] = 499
    tokens[:, 7:] = 0
    groups = torch.randint(0, 16, (_BATCH,), generator=generator)
    return image, tokens, groups if case.groups else None


def _optimizer(case: Case) -> OptimizerConfig:
    if case.optimizer == "sgd":
        return OptimizerConfig(name="sgd", lr=0.02, weight_decay=0.1)
    # eps stands far above rounding: some gradients are exactly zero (the bias of attention's keys),
    # and Adam would blow up the rounding error that stands in their place.
    return OptimizerConfig(lr=1e-3, eps=1e-4, weight_decay=0.1)


def _seed(step: int, rank: int) -> int:
    return 100 * step + rank


class Result(NamedTuple):
    """What a case leads to; arrays, since tensors do not travel between processes for long."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]


def _reference(case: Case, world_size: int) -> Result:
    """One process, float64. Only dropout depends on how the work was split."""
    model = _clip(case).double()
    rest_frozen(model.train())
    config = _optimizer(case)
    optimizer = build_optimizer(parameter_groups(model, config), config)
    losses, norms, first = [], [], {}
    for step in range(_STEPS):
        image, tokens, groups = _batch(step, case)
        ids = torch.arange(_BATCH) if groups is None else groups
        features: list[tuple[torch.Tensor, torch.Tensor]] = []
        parts = _BATCH // world_size // case.micro_batches
        for rank in range(world_size):
            torch.manual_seed(_seed(step, rank))
            for part in range(case.micro_batches):
                start = (rank * case.micro_batches + part) * parts
                rows = slice(start, start + parts)
                features.append(
                    (
                        F.normalize(model.encode_image(image[rows].double()), dim=-1),
                        F.normalize(model.encode_text(tokens[rows]), dim=-1),
                    )
                )
        image_ND, text_ND = (torch.cat(parts) for parts in zip(*features, strict=True))
        ignore = case.groups == "ignore"
        scale = model.logit_scale.exp()
        if case.loss == "sigmoid":
            loss = naive_sigmoid_loss(
                image_ND, text_ND, scale, model.logit_bias, ids, ignore_groups=ignore
            )
        else:
            loss = naive_info_nce(image_ND, text_ND, scale, ids, ignore_groups=ignore)
        optimizer.zero_grad()
        loss.backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        first = first or {n: p.grad.numpy().copy() for n, p in trained.items()}
        losses.append(float(loss.detach()))
        limit = case.clipping or float("inf")
        norms.append(float(nn.utils.clip_grad_norm_(trained.values(), limit)))
        optimizer.step()
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    return Result(losses, norms, first, weights)


def _objective(case: Case) -> Any:
    settings: dict[str, Any] = {
        "positives": "label" if case.groups else "pair",
        "duplicates": "ignore" if case.groups == "ignore" else "attract",
        "tile_size": case.tile_size or _BATCH,
    }
    if case.loss == "sigmoid":
        return Sigmoid(SigmoidConfig(**settings))
    return InfoNCE(InfoNCEConfig(**settings))


def _on_rank(rank: int, world_size: int, cases: list[Case]) -> list[Result]:
    return [_train(rank, world_size, case) for case in cases]


def _train(rank: int, world_size: int, case: Case) -> Result:
    objective = _objective(case)
    options = TowerOptions(case.precision, case.checkpointing)
    engine = Engine(
        TrainedModel(_clip(case), objective, options, sizes=Sizes(16)),
        config=EngineConfig(
            zero_stage=case.stage, gradient_clipping=case.clipping, cache_on_host=case.on_host
        ),
        optimizer=_optimizer(case),
        local_batch_size=_BATCH // world_size,
        device=torch.device("cpu"),
    )
    engine.train()
    local = _BATCH // world_size
    micro = local // case.micro_batches
    losses, norms, first = [], [], {}
    for step in range(_STEPS):
        image, tokens, groups = _batch(step, case)
        own = slice(rank * local, (rank + 1) * local)
        inputs = [
            lambda a=start: Inputs((image[a : a + micro],), (tokens[a : a + micro],))  # noqa: B023
            for start in range(own.start, own.stop, micro)
        ]
        ids = torch.arange(_BATCH) if groups is None else groups
        labels = Labels(ids[own], torch.arange(_BATCH)[own])
        torch.manual_seed(_seed(step, rank))
        value, _ = engine.accumulate(
            inputs,
            lambda outputs, targets, state: objective.loss(outputs, targets, labels, state),  # noqa: B023
        )
        if step == 0:
            first = {
                name.removeprefix("clip."): gradient.float().numpy()
                for name, gradient in engine.gradients().items()
            }
        losses.append(float(value))
        norms.append(engine.update(1.0))
    weights = {name: value.numpy() for name, value in engine.state_dict().items()}
    return Result(losses, norms, first, weights)


def _distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative, in the Euclidean norm."""
    actual, expected = (np.asarray(a, np.float64).reshape(-1) for a in (actual, expected))
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-12))


def _check(cases: list[Case], world_size: int, tolerance: float = 1e-5) -> None:
    """Every case at once: starting processes takes longer than training in them."""
    references: dict[Case, Result] = {}
    results = run_ranks(_on_rank, world_size, cases)
    for number, case in enumerate(cases):
        # What is split cannot change the reference, unless random numbers depend on the split.
        key = case._replace(stage=0, tile_size=None, checkpointing=False, on_host=False)
        key = key if case.dropout else key._replace(micro_batches=1)
        if key not in references:
            references[key] = _reference(key, world_size if case.dropout else 1)
        expected = references[key]
        shares = [result[number] for result in results]
        losses = np.mean([share.losses for share in shares], axis=0)
        assert np.allclose(losses, expected.losses, rtol=tolerance), case
        for share in shares:
            assert np.allclose(share.norms, expected.norms, rtol=10 * tolerance), case
            assert set(share.gradients) == set(expected.gradients), case
            for name, gradient in expected.gradients.items():
                assert _distance(share.gradients[name], gradient) < tolerance, (case, name)
            for name, weight in expected.weights.items():
                np.testing.assert_allclose(
                    share.weights[name].reshape(weight.shape), weight, rtol=0, atol=tolerance,
                    err_msg=f"{case}: {name}",
                )  # fmt: skip


_SPLITS = [
    Case(stage=stage, micro_batches=micro, tile_size=tile, optimizer=optimizer)
    for stage, micro, tile, optimizer in itertools.product(
        range(4), (1, 2, 4), (None, 5), ("sgd", "adamw")
    )
]
#: Each stage with each number of micro-batches; tiles and optimizers take turns.
_FEW_SPLITS = [
    Case(stage=stage, micro_batches=micro, tile_size=(None, 5)[(stage + n) % 2],
         optimizer=("sgd", "adamw")[n % 2])
    for stage in range(4)
    for n, micro in enumerate((1, 2, 4))
]  # fmt: skip


#: Each stage once.
_STAGES = [_FEW_SPLITS[3 * stage + n] for stage, n in enumerate((1, 2, 0, 1))]


@pytest.mark.parametrize(("world_size", "cases"), [(1, _STAGES), (2, _FEW_SPLITS), (3, _STAGES)])
def test_every_stage_and_number_of_micro_batches_is_exact(
    world_size: int, cases: list[Case]
) -> None:
    _check(cases, world_size)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("stage", range(4))
def test_the_whole_matrix_is_exact(stage: int, world_size: int) -> None:
    _check([case for case in _SPLITS if case.stage == stage], world_size)


_VARIANTS = {
    "dropout": {"dropout": True},
    "several positives": {"groups": "attract"},
    "equal samples left out": {"groups": "ignore"},
    "clipping": {"clipping": 0.05},
    "locked image tower": {"frozen": "image/0"},
    "text tower locked but for a block": {"frozen": "text/1"},
    "sigmoid loss": {"loss": "sigmoid", "groups": "attract"},
    "gradient checkpointing": {"checkpointing": True},
    "features on the host": {"on_host": True},
}


@pytest.mark.parametrize("world_size", [2])
def test_every_option_is_exact_in_one_of_the_splits(world_size: int) -> None:
    cases = [
        Case(stage=number % 4, micro_batches=(4, 1, 2)[number % 3], tile_size=5, **options)
        for number, options in enumerate(_VARIANTS.values())
    ]
    _check(cases, world_size)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("variant", list(_VARIANTS))
def test_every_option_is_exact_in_all_splits(variant: str) -> None:
    _check([case._replace(**_VARIANTS[variant]) for case in _FEW_SPLITS], 2)


def _autocast(rank: int, world_size: int, cases: list[Case]) -> list[Result]:
    return [_train(rank, world_size, case) for case in cases]


def test_autocast_errs_as_much_in_any_split() -> None:
    # bf16 has 8 bits: a product errs by up to 0.4 %, and a tower of two blocks by a few times that.
    # Splitting the work must add nothing to it but other roundings of the same size.
    reference = _reference(Case(), 1)
    splits = [Case(stage=stage, micro_batches=4, precision="bf16") for stage in (0, 1, 3)]
    shares = run_ranks(_autocast, 2, [Case(stage=1, precision="bf16"), *splits])[0]
    for name, gradient in reference.gradients.items():
        whole, *parts = (_distance(share.gradients[name], gradient) for share in shares)
        assert whole < 0.1, name
        assert max(parts) < max(1.5 * whole, 0.02), name
