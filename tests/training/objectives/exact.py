"""Objectives trained by the real engine on real ranks, against one naive float64 process.

A `Subject` is an objective's settings with a naive loss of the whole batch. `check_exact` compares
the loss, the gradient of every parameter, the weights, the momentum towers and the state over
several steps, for any number of ranks, ZeRO stages and micro-batches; `check_resume` compares a run
that was saved and loaded with one that was not, bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.models.open_clip_models import build_model
from clipsys.training.data.augmentation import AugmentationConfig
from clipsys.training.engine.deepspeed_engine import Engine
from clipsys.training.engine.optimizers import OptimizerConfig, build_optimizer, parameter_groups
from clipsys.training.engine.repartition import SavedBy
from clipsys.training.model.initial import freeze_unused
from clipsys.training.model.outputs import Inputs, Sizes, State, TeacherSizes, TokenIds
from clipsys.training.model.teacher import TEACHER_IMAGE, TEACHER_TEXT
from clipsys.training.model.towers import TowerOptions
from clipsys.training.model.trained import TrainedModel
from clipsys.training.objectives import Labels, ObjectiveConfig, make_objective
from clipsys.training.recipe import EngineConfig
from tests.conftest import no_tokenizer
from tests.ranks import run_ranks

#: 12 rows divide among 1, 2 and 3 ranks, and there into 1 or 2 micro-batches.
STEPS, BATCH, WIDTH = 3, 12, 16
#: Samples and classes that a batch is drawn from: a step meets some samples again.
SIZES = Sizes(WIDTH, 20, 5, TokenIds(50, padding=0, mask=48), TeacherSizes(12, 20.0))
_MODEL: dict[str, Any] = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 1, "layers": 1},
}
#: By how much float32's rounding may grow over the steps.
_GROWTH = 10
#: Settings of a small projection head.
HEAD: dict[str, Any] = {"head_hidden": 24, "head_width": 8}


class Case(NamedTuple):
    """A subject by its name, and how the work is split."""

    name: str
    stage: int = 0
    micro_batches: int = 1
    optimizer: str = "sgd"
    precision: str = "fp32"


class Seen(NamedTuple):
    """What a naive loss is given: float64 modules and the inputs of the whole batch.

    Attributes:
        settings: of the objective.
        clip: open_clip's model.
        heads: heads of the objective.
        slow_clip: momentum copy of the model; None where there is none.
        slow_heads: momentum copy of the heads.
        inputs: views, texts and seeds of the whole batch.
        labels: of the whole batch.
        state: as the step before left it.
        step: number of the step.
    """

    settings: Any
    clip: Any
    heads: Any
    slow_clip: Any
    slow_heads: Any
    inputs: Inputs
    labels: Labels
    state: State
    step: int

    def project(self, image: torch.Tensor, *, slow: bool = False) -> torch.Tensor:
        """Unit-norm projections of images by the trained or the momentum model."""
        clip, heads = (self.slow_clip, self.slow_heads) if slow else (self.clip, self.heads)
        features = clip.visual(image)
        if "projection" in heads:
            features = heads["projection"](features)
        return F.normalize(features, dim=-1)

    def temperature(self) -> Any:
        """The temperature of this step, learned or fixed."""
        if "temperature" in self.heads:
            return (-self.heads["temperature"].log_scale).exp()
        return self.settings.temperature


#: From what is seen to the loss of the whole batch and the state that follows.
Naive = Callable[[Seen], tuple[torch.Tensor, State]]


class Subject(NamedTuple):
    """An objective's settings, with its loss written naively."""

    settings: ObjectiveConfig
    naive: Naive


class Result(NamedTuple):
    """What a case leads to; arrays, since tensors do not travel between processes for long."""

    losses: list[float]
    gradients: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    state: dict[str, np.ndarray]


def few_cases(names: Sequence[str], *, cached: bool = True) -> list[Case]:
    """Each subject with each stage; micro-batches and optimizers take turns."""
    return [
        Case(name, stage, 1 + cached * (stage + number) % 2, ("sgd", "adamw")[stage // 2])
        for number, name in enumerate(names)
        for stage in range(4)
    ]


def all_cases(names: Sequence[str], *, cached: bool = True) -> list[Case]:
    """The whole matrix."""
    micro_batches = (1, 2) if cached else (1,)
    return [
        Case(*parts)
        for parts in itertools.product(names, range(4), micro_batches, ("sgd", "adamw"))
    ]


def batch(step: int, num_views: int, sizes: Sequence[tuple[int, int]]) -> tuple[Inputs, Labels]:
    """The inputs and labels of a step: related views, captions, a sample or two met before."""
    generator = torch.Generator().manual_seed(step)
    # Large values: features of an untrained tower are all but equal otherwise, and gradients small
    # differences, which float32 knows to four digits only.
    image = 8 * torch.randn(BATCH, 3, 32, 32, generator=generator)
    views = []
    for _, size in zip(range(num_views), sizes, strict=True):
        other = image + 4 * torch.randn(BATCH, 3, 32, 32, generator=generator)
        views.append(F.interpolate(other, size))
    texts = torch.randint(1, 49, (BATCH, 8), generator=generator)
    texts[:, 5] = 49  # the largest number ends a text
    texts[:, 6:] = 0
    samples = torch.randperm(SIZES.num_samples, generator=generator)[:BATCH]
    classes = samples % SIZES.num_classes
    seeds = torch.randint(1 << 62, (BATCH,), generator=generator)
    return Inputs(tuple(views), (texts,), seeds), Labels(classes.clone(), samples, classes)


def make_batch(objective: Any, step: int) -> tuple[Inputs, Labels]:
    """`batch` with as many views and texts as an objective takes."""
    views = objective.views(AugmentationConfig())
    inputs, labels = batch(step, len(views), [view.size or (32, 32) for view in views])
    texts = tuple(inputs.texts[0].roll(number, 0) for number in range(objective.num_texts))
    inputs = inputs._replace(texts=texts)
    if objective.negatives_key is not None or objective.mining is not None:
        inputs, labels = _with_further_texts(inputs, labels, step)
    if objective.teacher is not None:
        inputs = inputs._replace(teacher=_taught(step))
    if objective.positives != "label":
        labels = labels._replace(groups_B=labels.samples_B)
    return inputs, labels if objective.needs_classes else labels._replace(classes_B=None)


def _taught(step: int) -> dict[str, torch.Tensor]:
    """What a teacher says: texts near their images."""
    assert SIZES.teacher is not None
    generator = torch.Generator().manual_seed(2000 + step)
    image = torch.randn(BATCH, SIZES.teacher.width, generator=generator)
    text = image + torch.randn(image.shape, generator=generator)
    return {TEACHER_IMAGE: F.normalize(image, dim=1), TEACHER_TEXT: F.normalize(text, dim=1)}


def _with_further_texts(inputs: Inputs, labels: Labels, step: int) -> tuple[Inputs, Labels]:
    """Other texts but the first; some are absent, some are of samples of the batch."""
    generator = torch.Generator().manual_seed(1000 + step)
    first, *others = inputs.texts
    shape = BATCH, len(others)
    texts = [text[torch.randperm(BATCH, generator=generator)] for text in others]
    for text in texts:
        text[:, 1] = torch.randint(1, 49, (BATCH,), generator=generator)
    present = torch.rand(BATCH, 1 + len(others), generator=generator) < 0.7
    present[:, 0] = True
    groups = torch.randint(-1, SIZES.num_samples, shape, generator=generator)
    labels = labels._replace(present_BT=present, further_groups_BT=groups)
    return inputs._replace(texts=(first, *texts)), labels


def make_model(objective: Any, precision: str = "fp32") -> TrainedModel:
    """A small model with an objective's heads, the same each time."""
    torch.manual_seed(0)
    clip = build_model(_MODEL, for_training=True, tokenizer=no_tokenizer).model
    freeze_unused(
        clip,
        image=bool(objective.views(AugmentationConfig())),
        text=objective.num_texts > 0,
        temperature=objective.trains_temperature,
    )
    return TrainedModel(clip, objective, TowerOptions(precision), sizes=SIZES)


def initial_state(objective: Any) -> State:
    """The state before the first step, the same each time."""
    return dict(objective.initial_state(SIZES, torch.Generator().manual_seed(3)))


def _optimizer(name: str) -> OptimizerConfig:
    if name == "sgd":
        return OptimizerConfig(name="sgd", lr=0.02, weight_decay=0.1, logit_scale_lr_factor=0.5)
    return OptimizerConfig(lr=1e-3, eps=1e-4, weight_decay=0.1, logit_scale_lr_factor=0.5)


def reference(subject: Subject, optimizer_name: str) -> Result:
    """The naive float64 process."""
    objective = make_objective(subject.settings)
    model = make_model(objective).double()
    clip, heads = model.clip, model.heads
    slow: Any = deepcopy((clip, heads)) if objective.momentum is not None else (None, None)
    state = {n: t.double() if t.is_floating_point() else t for n, t in _state(objective)}
    config = _optimizer(optimizer_name)
    optimizer = build_optimizer(parameter_groups(model, config), config)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    losses, gradients = [], {}
    for step in range(STEPS):
        inputs, labels = make_batch(objective, step)
        inputs = inputs._replace(views=tuple(view.double() for view in inputs.views))
        seen = Seen(subject.settings, clip, heads, *slow, inputs, labels, state, step)
        loss, state = subject.naive(seen)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in trained.items():
            gradient = parameter.grad if parameter.grad is not None else 0 * parameter
            gradients[f"{step}/{name}"] = gradient.detach().numpy().copy()
        losses.append(float(loss.detach()))
        optimizer.step()
        if objective.momentum is not None:
            _follow(slow, (clip, heads), objective.momentum)
    weights = {f"clip.{name}": value.numpy() for name, value in clip.state_dict().items()}
    weights |= {f"heads.{name}": value.numpy() for name, value in heads.state_dict().items()}
    if objective.momentum is not None:
        weights |= {
            f"momentum.{name}": parameter.detach().numpy()
            for part, module in zip(("clip", "heads"), slow, strict=True)
            for name, parameter in ((f"{part}.{n}", p) for n, p in module.named_parameters())
            if objective.num_texts or name.startswith(("clip.visual.", "heads."))
        }
    return Result(losses, gradients, weights, {n: t.numpy() for n, t in state.items()})


def _state(objective: Any) -> Any:
    return initial_state(objective).items()


@torch.no_grad()
def _follow(slow: Sequence[nn.Module], trained: Sequence[nn.Module], momentum: float) -> None:
    for old, new in zip(slow, trained, strict=True):
        for copy, weight in zip(old.parameters(), new.parameters(), strict=True):
            copy.copy_(momentum * copy + (1 - momentum) * weight)


def make_engine(subject: Subject, case: Case, world_size: int) -> tuple[Any, Engine]:
    """The real engine around an objective, on this rank."""
    objective = make_objective(subject.settings)
    engine = Engine(
        make_model(objective, case.precision),
        config=EngineConfig(
            zero_stage=case.stage,  # type: ignore[arg-type]
            gradient_clipping=0.0,
            precision=case.precision,  # type: ignore[arg-type]
        ),
        optimizer=_optimizer(case.optimizer),
        local_batch_size=BATCH // world_size,
        device=torch.device("cpu"),
        momentum=objective.momentum,
        state=initial_state(objective),
    )
    engine.train()
    return objective, engine


def advance(
    objective: Any, engine: Engine, case: Case, steps: range, rank: int, world_size: int
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Takes steps on this rank's rows: its shares of the losses, and the whole gradients."""
    local = BATCH // world_size
    micro = local // case.micro_batches
    own = slice(rank * local, (rank + 1) * local)
    losses, gradients = [], {}
    for step in steps:
        whole, all_labels = make_batch(objective, step)
        labels = Labels(*(None if one is None else one[own] for one in all_labels))
        inputs = [
            lambda a=start, whole=whole: _rows(whole, slice(a, a + micro))
            for start in range(own.start, own.stop, micro)
        ]
        value, _ = engine.accumulate(
            inputs,
            lambda outputs, targets, state, labels=labels: objective.loss(
                outputs, targets, labels, state
            ),
        )
        gradients |= {f"{step}/{n}": g.float().numpy() for n, g in engine.gradients().items()}
        losses.append(float(value))
        engine.update(1.0)
    return losses, gradients


def _rows(inputs: Inputs, rows: slice) -> Inputs:
    assert inputs.seeds_B is not None
    return Inputs(
        tuple(view[rows] for view in inputs.views),
        tuple(text[rows] for text in inputs.texts),
        inputs.seeds_B[rows],
        None if inputs.teacher is None else {n: t[rows] for n, t in inputs.teacher.items()},
    )


def weights_of(engine: Engine) -> dict[str, np.ndarray]:
    """Whole weights of model, heads and momentum towers."""
    weights = {f"clip.{name}": value for name, value in engine.state_dict().items()}
    weights |= {f"heads.{name}": value for name, value in engine.heads_state_dict().items()}
    if engine.module.momentum is not None:
        copies = engine._whole(engine.module.momentum)
        weights |= {f"momentum.{name}": value for name, value in copies.items()}
    return {name: value.numpy() for name, value in weights.items()}


def _on_rank(
    rank: int, world_size: int, subjects: Mapping[str, ObjectiveConfig], cases: Sequence[Case]
) -> list[Result]:
    results = []
    for case in cases:
        subject = Subject(subjects[case.name], _unused)
        objective, engine = make_engine(subject, case, world_size)
        losses, gradients = advance(objective, engine, case, range(STEPS), rank, world_size)
        state = {name: tensor.numpy() for name, tensor in engine.state.items()}
        results.append(Result(losses, gradients, weights_of(engine), state))
    return results


def _unused(seen: Seen) -> tuple[torch.Tensor, State]:
    raise NotImplementedError


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative, in the Euclidean norm.

    The gradient of a temperature is a sum of large terms of both signs, so that its float32
    rounding is relative to those, and not to what is left of them.
    """
    actual, expected = (np.asarray(a, np.float64).reshape(-1) for a in (actual, expected))
    smallest = 0.1 if expected.size == 1 else 1e-8
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), smallest))


def check_exact(
    subjects: Mapping[str, Subject],
    cases: Sequence[Case],
    world_size: int,
    tolerance: float = 1e-5,
) -> None:
    """Compares each case on real ranks with the naive process."""
    references: dict[tuple[str, str], Result] = {}
    settings = {name: subject.settings for name, subject in subjects.items()}
    results = run_ranks(_on_rank, world_size, settings, list(cases))
    for number, case in enumerate(cases):
        key = case.name, case.optimizer
        if key not in references:
            references[key] = reference(subjects[case.name], case.optimizer)
        shares: list[Result] = [result[number] for result in results]
        _compare(case, references[key], shares, tolerance)


def _compare(case: Case, expected: Result, shares: list[Result], tolerance: float) -> None:
    losses = np.mean([share.losses for share in shares], axis=0)
    np.testing.assert_allclose(losses[0], expected.losses[0], rtol=tolerance, err_msg=str(case))
    np.testing.assert_allclose(losses, expected.losses, rtol=_GROWTH * tolerance, err_msg=str(case))
    for share in shares:
        assert set(share.gradients) == set(expected.gradients), case
        for name, gradient in expected.gradients.items():
            if np.abs(gradient).max() > 1e-6:  # else zero but for rounding
                # From the second step on the weights differ by rounding already, and batch norm
                # over twelve rows magnifies that.
                limit = tolerance if name.startswith("0/") else _GROWTH * tolerance
                assert distance(share.gradients[name], gradient) < limit, (case, name)
        # Of the momentum towers the parameters: their running statistics are copies.
        found = {name for name in share.weights if not _is_copied_statistic(name)}
        assert found == set(expected.weights), case
        for name, weight in expected.weights.items():
            # AdamW takes a step of full length where a gradient is all but zero.
            np.testing.assert_allclose(
                share.weights[name].reshape(weight.shape), weight, rtol=0,
                atol=tolerance if case.optimizer == "sgd" else 5 * tolerance,
                err_msg=f"{case}: {name}",
            )  # fmt: skip
        assert set(share.state) == set(expected.state), case
        for name, value in expected.state.items():
            np.testing.assert_allclose(
                share.state[name], value, rtol=tolerance, atol=tolerance, err_msg=f"{case}: {name}"
            )
            # Equal on every rank to the last bit: each goes on with its own copy.
            np.testing.assert_array_equal(share.state[name], shares[0].state[name])


def _is_copied_statistic(name: str) -> bool:
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return name.startswith("momentum.") and name.endswith(statistics)


def _save_and_load(
    rank: int,
    world_size: int,
    subjects: Mapping[str, ObjectiveConfig],
    cases: Sequence[Case],
    folder: str,
) -> list[bool]:
    outcomes = []
    for number, case in enumerate(cases):
        subject = Subject(subjects[case.name], _unused)
        objective, first = make_engine(subject, case, world_size)
        advance(objective, first, case, range(2), rank, world_size)
        place = Path(folder, str(number))
        first.save(place, "tag", {"step": 2})
        advance(objective, first, case, range(2, STEPS), rank, world_size)
        objective, second = make_engine(subject, case, world_size)
        saved = SavedBy(world_size, case.stage, case.precision)
        assert second.load(place, "tag", saved)["step"] == 2
        advance(objective, second, case, range(2, STEPS), rank, world_size)
        one, two = weights_of(first), weights_of(second)
        same = all(np.array_equal(one[name], two[name]) for name in one)
        same &= first.state.keys() == second.state.keys()
        outcomes.append(
            same and all(torch.equal(first.state[n], second.state[n]) for n in first.state)
        )
    return outcomes


def check_resume(
    subjects: Mapping[str, Subject], cases: Sequence[Case], folder: Path, world_size: int = 2
) -> None:
    """A run that was saved and loaded ends as one that was not, to the last bit."""
    settings = {name: subject.settings for name, subject in subjects.items()}
    outcomes = run_ranks(_save_and_load, world_size, settings, list(cases), str(folder))
    assert outcomes == [[True] * len(cases)] * world_size, cases
