"""The parts of a run, made from its recipe; `clipsys.training.loop` runs them."""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipsys.models.open_clip_models import ModelParts
from clipsys.training.checkpoints import Checkpoints
from clipsys.training.data.frames import FrameWindows
from clipsys.training.data.loader import load_batches
from clipsys.training.data.order import SampleOrder
from clipsys.training.data.samples import Batch, Decoder
from clipsys.training.data.shard_set import ShardSet
from clipsys.training.data.skips import SkipLedger
from clipsys.training.distributed.agreement import (
    on_every_rank,
    require_equal,
)
from clipsys.training.distributed.collectives import (
    rank,
    world_size,
)
from clipsys.training.engine.deepspeed_engine import Engine
from clipsys.training.features.batches import FeatureBatches
from clipsys.training.losses import auto_tile_size
from clipsys.training.mining.miner import Miner
from clipsys.training.model.initial import (
    resumed_settings,
)
from clipsys.training.model.outputs import Sizes
from clipsys.training.model.token_ids import token_ids
from clipsys.training.objectives import Objective, make_objective
from clipsys.training.plan import Plan, plan_run
from clipsys.training.precision import choose_training_precision
from clipsys.training.recipe import Recipe
from clipsys.training.run_data import (
    announce_negatives,
    loading_size,
    make_decoder,
    make_miner,
    open_data,
    open_features,
    open_teacher,
    training_batches,
)
from clipsys.training.run_model import (
    begin_model,
    check_view_sizes,
    feature_width,
    make_trained_model,
)
from clipsys.training.run_teacher import begin_teacher
from clipsys.training.step import TrainingStep
from clipsys.training.validation.canary import Canaries
from clipsys.training.validation.classifier import Classifier
from clipsys.training.validation.measuring import Validation

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """The parts of a run on this rank.

    Attributes:
        recipe: the recipe that they were made from, with the precision that was chosen.
        folder: the run folder.
        model: what is trained, with its tokenizer and preprocessing. Its weights belong to the
            engine: ask `Engine.state_dict` for them.
        shard_set: the training data.
        order: which sample, or which window of frames, stands where in each epoch.
        windows: windows of frames, of an objective over ordered frames.
        objective: what is minimised.
        classes: labels of the classes that a classifier tells apart, in the order of their
            numbers; empty where the objective needs none.
        plan: what the run takes.
        engine: gradients, updates, checkpoints of the weights.
        step: makes an update of decoded micro-batches.
        validation: measurements on the way.
        canaries: measurements of what is not trained on.
        checkpoints: states that ``--resume`` continues from.
        skips: samples that could not be used.
        decoder: makes rows of samples.
        miner: mines hard negatives; None where the objective has none.
        encoded: batches of stored features; None where towers are trained.
        checks_precision: whether the first loss is compared with that in fp32.
    """

    recipe: Recipe
    folder: Path
    model: ModelParts
    shard_set: ShardSet
    order: SampleOrder
    windows: FrameWindows | None
    objective: Objective[Any]
    classes: tuple[str, ...]
    plan: Plan
    engine: Engine
    step: TrainingStep
    validation: Validation
    canaries: Canaries
    checkpoints: Checkpoints
    skips: SkipLedger
    decoder: Decoder
    miner: Miner | None = None
    encoded: FeatureBatches | None = None
    checks_precision: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Steps of each epoch."""
        return self.order.steps_per_epoch(self.recipe.data.batch_size)

    @property
    def total_steps(self) -> int:
        """Steps of all epochs."""
        return self.steps_per_epoch * self.recipe.schedule.epochs

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        """This rank's micro-batches from a step on, to the end of the run or the next mining."""
        if self.encoded is not None:
            return self.encoded.from_step(start_step)
        if self.miner is not None:
            return self.miner.batches(start_step)
        data = self.recipe.data
        dataset = training_batches(
            self.recipe, self.shard_set, self.order, self.windows, self.decoder, start_step
        )
        return load_batches(dataset, data.workers, timeout_s=data.timeout_s)


def build_run(recipe: Recipe, device: torch.device, checkpoint: str | None = None) -> Run:
    """Makes the parts of a run. Every rank of the process group calls it; nothing is written.

    Args:
        recipe: the recipe.
        device: this rank's.
        checkpoint: name of the one that the run goes on from; its weights are loaded later.

    Raises:
        ClipsysError: the model, the data or the validation data cannot be used.
    """
    torch.manual_seed(recipe.seed)
    data, folder = recipe.data, recipe.run_folder
    objective = make_objective(recipe.objective)
    checkpoints = Checkpoints(folder, keep=recipe.checkpoint.keep)
    begins_with = recipe.model
    if checkpoint is not None:
        begins_with = resumed_settings(recipe.model, checkpoints.folder / checkpoint / "model")
    model, adapters = begin_model(begins_with, recipe, objective)
    shard_set, windows, classes, order = open_data(recipe, objective)
    validation = _validation(recipe, objective, model, classes)
    canaries = _canaries(recipe, model)
    asked = recipe.engine.precision
    recipe = choose_training_precision(recipe, model, device)
    num_samples = shard_set.num_samples if windows is None else windows.num_windows
    num_classes = len(classes) if objective.needs_classes else 0
    tokens = token_ids(model) if objective.num_texts else None
    teacher = begin_teacher(recipe, objective, model, device)
    sizes = Sizes(
        *(feature_width(model), num_samples, num_classes, tokens),
        teacher=None if teacher is None else teacher.sizes,
    )
    trained = make_trained_model(recipe, objective, model, sizes, adapters)
    views = objective.views(recipe.augmentation)
    with_features = bool(recipe.model.stored_towers)
    if not with_features:
        check_view_sizes(model.model, views, model.preprocessing.size)
    tile_size = objective.tile_size or auto_tile_size(data.batch_size, device)
    plan = plan_run(  # before the engine partitions the model
        recipe,
        trained,
        precision=recipe.engine.precision,
        world_size=world_size(),
        num_samples=order.num_positions,
        embed_dim=sizes.width,
        image_size=loading_size(recipe, model.preprocessing)
        if views and not with_features
        else (0, 0),
        tile_size=tile_size,
        num_frames=objective.num_frames,
    )
    decoder = make_decoder(recipe, objective, model, classes, teacher)
    taught = None
    if teacher is not None:
        taught = open_teacher(recipe, objective, model, teacher, decoder, shard_set, order)
    encoded = None
    if with_features:
        trunks, encoded = open_features(recipe, model, decoder, shard_set, order, device)
        validation.use_trunks(trunks)
        canaries.use_trunks(trunks)
    if objective.negatives_key is not None:
        announce_negatives(recipe, shard_set, objective.negatives_key)
    engine = Engine(
        trained,
        config=recipe.engine,
        optimizer=recipe.optimizer,
        local_batch_size=data.batch_size // world_size(),
        device=device,
        momentum=objective.momentum,
        state=objective.initial_state(sizes, torch.Generator().manual_seed(recipe.seed)),
    )
    run = Run(
        recipe=recipe,
        folder=folder,
        model=model,
        shard_set=shard_set,
        order=order,
        windows=windows,
        objective=objective,
        classes=classes,
        plan=plan,
        engine=engine,
        step=TrainingStep(
            engine,
            model.preprocessing,
            objective=objective,
            augmentation=recipe.augmentation,
            seed=recipe.seed,
            teacher=taught,
        ),
        validation=validation,
        canaries=canaries,
        checkpoints=checkpoints,
        skips=SkipLedger(
            folder,
            max_share=data.max_bad_share,
            epoch_samples=order.num_positions,
            writes=rank() == 0,
        ),
        decoder=decoder,
        miner=make_miner(recipe, objective, model, shard_set, order, decoder),
        encoded=encoded,
        checks_precision=asked == "auto" and recipe.engine.precision == "bf16",
    )
    if rank() == 0:
        _announce(run, device, recipe.engine.precision, min(tile_size, data.batch_size))
    return run


def _validation(
    recipe: Recipe, objective: Objective[Any], model: ModelParts, classes: tuple[str, ...]
) -> Validation:
    """The validation data, the same on every rank."""
    has_text = objective.num_texts > 0
    classifier = None
    if recipe.evaluation.classifier:
        classifier = Classifier(objective.scores, classes, recipe.data.label_key, has_text)
    validation = on_every_rank(
        lambda: Validation(
            recipe.evaluation,
            recipe.data.validation,
            model.preprocessing,
            model.tokenizer,
            has_text=has_text,
            has_images=bool(objective.views(recipe.augmentation)),
            caption_key=recipe.data.caption_key,
            classifier=classifier,
        )
    )
    require_equal(
        {"validation data with the fingerprint": validation.fingerprint()},
        remedy="give every machine the same data.validation and evaluation.zeroshot",
    )
    return validation


def _canaries(recipe: Recipe, model: ModelParts) -> Canaries:
    """The canaries, the same on every rank."""
    canaries = on_every_rank(
        lambda: Canaries(recipe.evaluation, model.preprocessing, model.tokenizer)
    )
    require_equal(
        {
            f"canary {name} with the fingerprint": found
            for name, found in canaries.fingerprints().items()
        },
        remedy="give every machine the same evaluation.canary",
    )
    return canaries


def _announce(run: Run, device: torch.device, precision: str, tile_rows: int) -> None:
    """Says what the run is and what it takes."""
    data = run.recipe.data
    _logger.info(
        "%d process(es) on %s, %s, ZeRO stage %d; %s samples%s in %d shards, %d epochs of %d "
        "steps, %d pairs each, %d rows of logits at once",
        world_size(),
        device.type,
        precision,
        run.recipe.engine.zero_stage,
        f"{run.shard_set.num_samples:,}"
        if run.order.subset is None
        else f"{run.order.num_positions:,} of {run.shard_set.num_samples:,}",
        "" if run.windows is None else f" ({run.windows.num_windows:,} windows)",
        len(run.shard_set.shards),
        run.recipe.schedule.epochs,
        run.steps_per_epoch,
        data.batch_size,
        tile_rows,
    )
    _logger.info("%s", run.plan)
    for warning in run.plan.warnings:
        _logger.warning("%s", warning)
    dropped = run.order.num_positions - run.steps_per_epoch * data.batch_size
    if dropped:
        _logger.info("the last %d samples of each epoch's order are dropped", dropped)
