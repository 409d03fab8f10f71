"""The parts of a run, made from its recipe; `clipsys.training.loop` runs them."""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipsys.errors import ConfigError
from clipsys.images.preprocessing import Preprocessing
from clipsys.models.open_clip_models import ModelParts
from clipsys.shards.remote import is_remote
from clipsys.training.checkpoints import Checkpoints
from clipsys.training.data.batches import TrainingBatches
from clipsys.training.data.classes import class_names, read_labels
from clipsys.training.data.frames import FrameWindows, read_windows
from clipsys.training.data.further_texts import StatedNegatives, check_negatives_key
from clipsys.training.data.loader import load_batches
from clipsys.training.data.order import SampleOrder
from clipsys.training.data.ordering import sample_order
from clipsys.training.data.samples import Batch, Decoder
from clipsys.training.data.shard_set import ShardSet, open_shards
from clipsys.training.data.skips import SkipLedger
from clipsys.training.data.subset import LabelNoise, Subset, draw_subset
from clipsys.training.distributed.agreement import (
    on_every_rank,
    require_equal,
    require_same_files,
)
from clipsys.training.distributed.collectives import (
    on_first_rank,
    rank,
    world_size,
)
from clipsys.training.engine.deepspeed_engine import Engine
from clipsys.training.losses import auto_tile_size
from clipsys.training.mining.miner import Miner
from clipsys.training.model.initial import (
    ModelConfig,
    fingerprint,
    freeze_unused,
    initial_model,
    resumed_settings,
)
from clipsys.training.model.outputs import Sizes
from clipsys.training.model.token_ids import token_ids
from clipsys.training.model.towers import TowerOptions
from clipsys.training.model.trained import TrainedModel
from clipsys.training.objectives import Objective, make_objective
from clipsys.training.plan import Plan, plan_run
from clipsys.training.precision import choose_training_precision
from clipsys.training.recipe import Recipe
from clipsys.training.step import TrainingStep
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
        checkpoints: states that ``--resume`` continues from.
        skips: samples that could not be used.
        decoder: makes rows of samples.
        miner: mines hard negatives; None where the objective has none.
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
    checkpoints: Checkpoints
    skips: SkipLedger
    decoder: Decoder
    miner: Miner | None = None
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
        if self.miner is not None:
            return self.miner.batches(start_step)
        data = self.recipe.data
        dataset = _dataset(
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
    model = _model(begins_with, recipe, objective)
    shard_set, windows, classes, order = _data(recipe, objective)
    validation = _validation(recipe, objective, model, classes)
    asked = recipe.engine.precision
    recipe = choose_training_precision(recipe, model, device)
    num_samples = shard_set.num_samples if windows is None else windows.num_windows
    num_classes = len(classes) if objective.needs_classes else 0
    tokens = token_ids(model) if objective.num_texts else None
    sizes = Sizes(_width(model), num_samples, num_classes, tokens)
    trained = _trained_model(recipe, objective, model, sizes)
    views = objective.views(recipe.augmentation)
    tile_size = objective.tile_size or auto_tile_size(data.batch_size, device)
    plan = plan_run(  # before the engine partitions the model
        recipe,
        trained,
        precision=recipe.engine.precision,
        world_size=world_size(),
        num_samples=order.num_positions,
        embed_dim=sizes.width,
        image_size=_loading_size(recipe, model.preprocessing) if views else (0, 0),
        tile_size=tile_size,
        num_frames=objective.num_frames,
    )
    decoder = _decoder(recipe, objective, model, classes)
    if objective.negatives_key is not None:
        _announce_negatives(recipe, shard_set, objective.negatives_key)
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
        ),
        validation=validation,
        checkpoints=checkpoints,
        skips=SkipLedger(
            folder,
            max_share=data.max_bad_share,
            epoch_samples=order.num_positions,
            writes=rank() == 0,
        ),
        decoder=decoder,
        miner=_miner(recipe, objective, model, shard_set, order, decoder),
        checks_precision=asked == "auto" and recipe.engine.precision == "bf16",
    )
    if rank() == 0:
        _announce(run, device, recipe.engine.precision, min(tile_size, data.batch_size))
    return run


def _model(settings: ModelConfig, recipe: Recipe, objective: Objective[Any]) -> ModelParts:
    """The model that every rank begins with, with what the objective does not train frozen."""
    model = on_every_rank(
        lambda: initial_model(
            settings,
            with_bias=objective.needs_bias,
            trains_images=bool(objective.views(recipe.augmentation)),
        )
    )
    require_equal(
        {"a model with the fingerprint": fingerprint(model, weights=bool(settings.pretrained))},
        remedy="give every machine the same model.architecture and model.pretrained",
    )
    freeze_unused(
        model.model,
        image=bool(objective.views(recipe.augmentation)),
        text=objective.num_texts > 0,
        temperature=objective.trains_temperature,
    )
    return model


def _width(model: ModelParts) -> int:
    """Width of the features of both towers."""
    return int(model.config["embed_dim"])


def _data(
    recipe: Recipe, objective: Objective[Any]
) -> tuple[ShardSet, FrameWindows | None, tuple[str, ...], SampleOrder]:
    """The training data, the same files on every rank: shards, windows, classes, order."""
    data = recipe.data
    shard_set = on_first_rank(lambda: open_shards(data))
    local = [shard for shard in shard_set.shards if not is_remote(shard)]
    require_same_files(local, setting="data.train")
    windows, frames = None, data.frames
    if frames is not None:
        windows = on_first_rank(lambda: read_windows(frames, shard_set, data.shard_cache))
    classes, subset = on_first_rank(lambda: _classes_and_subset(recipe, objective, shard_set))
    order = sample_order(data, shard_set, recipe.seed, windows=windows, subset=subset)
    order.steps_per_epoch(data.batch_size)  # raises where there is not one
    return shard_set, windows, classes, order


def _classes_and_subset(
    recipe: Recipe, objective: Objective[Any], shard_set: ShardSet
) -> tuple[tuple[str, ...], Subset | None]:
    """The classes, where they are needed, and the samples that are trained on, if not all are."""
    data = recipe.data
    needs_classes = objective.needs_classes or data.label_noise > 0
    needs_draw = data.num_samples is not None
    labels = None
    if objective.uses_labels and (needs_draw or (needs_classes and data.classes is None)):
        labels = read_labels(data, shard_set, needs_caption=objective.num_texts > 0)
    classes = class_names(data, shard_set, labels) if needs_classes else ()
    if data.num_samples is None:
        return classes, None
    strata = None if labels is None else labels.among(classes) if classes else labels.of_shards
    seed = _subset_seed(recipe)
    return classes, draw_subset(shard_set.counts, data.num_samples, seed, strata)


def _subset_seed(recipe: Recipe) -> int:
    seed = recipe.data.subset_seed
    return recipe.seed if seed is None else seed


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


def _trained_model(
    recipe: Recipe, objective: Objective[Any], model: ModelParts, sizes: Sizes
) -> TrainedModel:
    engine = recipe.engine
    options = TowerOptions(engine.precision, engine.grad_checkpointing, engine.compile)
    trained = TrainedModel(model.model, objective, options, sizes=sizes)
    _check_batch_norm(trained, recipe)
    return trained


def _check_batch_norm(model: TrainedModel, recipe: Recipe) -> None:
    """Refuses micro-batches where batch norm would make them change the result.

    Raises:
        ConfigError: a head has batch norm, or a tower of an objective that has no older recipes.
    """
    if recipe.data.micro_batch_size is None:
        return
    model.train()
    # InfoNCE and the sigmoid loss have allowed it in a tower from the start; the docs say so.
    parts = ("heads.",) if recipe.objective.name in ("infonce", "sigmoid") else ("heads.", "clip.")
    for name, module in model.named_modules():
        is_active = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        if is_active and name.startswith(parts):
            raise ConfigError(
                f"data.micro_batch_size is {recipe.data.micro_batch_size}, but {name} is batch "
                "normalisation, which would take its statistics over a micro-batch: another "
                "result; leave data.micro_batch_size out, or use a model without batch norm"
            )


def _loading_size(recipe: Recipe, preprocessing: Preprocessing) -> tuple[int, int]:
    """(height, width) of the images that reach the device."""
    side = recipe.data.load_size
    return (side, side) if side else preprocessing.size


def _decoder(
    recipe: Recipe, objective: Objective[Any], model: ModelParts, classes: tuple[str, ...]
) -> Decoder:
    data, target = recipe.data, model.preprocessing
    return Decoder(
        preprocessing=Preprocessing(**{**vars(target), "size": _loading_size(recipe, target)}),
        tokenizer=model.tokenizer,
        captions=data.captions,
        positives=objective.positives,
        label_key=data.label_key,
        max_image_pixels=data.max_image_pixels,
        seed=recipe.seed,
        decode=data.decode,
        needs_image=bool(objective.views(recipe.augmentation)),
        needs_caption=objective.num_texts > 0,
        caption_key=data.caption_key,
        class_numbers={name: number for number, name in enumerate(classes)}
        if objective.needs_classes
        else None,
        num_sentences=objective.num_texts if objective.takes_sentences else 0,
        label_noise=LabelNoise(data.label_noise, _subset_seed(recipe), classes)
        if data.label_noise
        else None,
        further=None
        if objective.negatives_key is None
        else StatedNegatives(objective.negatives_key, objective.num_texts - 1),
    )


def _announce_negatives(recipe: Recipe, shard_set: ShardSet, key: str) -> None:
    """Says how many samples have a wrong caption; refuses a key that none has."""
    share = on_first_rank(lambda: check_negatives_key(recipe.data, shard_set, key))
    if rank() == 0:
        _logger.info("about %.0f%% of the samples have texts at %s", 100 * share, key)


def _dataset(
    recipe: Recipe,
    shard_set: ShardSet,
    order: SampleOrder,
    windows: FrameWindows | None,
    decoder: Decoder,
    start_step: int,
) -> TrainingBatches:
    """This rank's micro-batches from a step on."""
    data = recipe.data
    return TrainingBatches(
        shard_set,
        order,
        decoder,
        windows=windows,
        cache=data.shard_cache,
        pixel_cache_bytes=int(data.pixel_cache_gb * 1e9),
        batch_size=data.batch_size,
        micro_batch_size=data.micro_batch_size,
        rank=rank(),
        world_size=world_size(),
        epochs=recipe.schedule.epochs,
        start_step=start_step,
    )


def _miner(
    recipe: Recipe,
    objective: Objective[Any],
    model: ModelParts,
    shard_set: ShardSet,
    order: SampleOrder,
    decoder: Decoder,
) -> Miner | None:
    """What mines hard negatives, where the objective asks for them."""
    if objective.mining is None:
        return None
    data = recipe.data
    return Miner(
        objective.mining,
        _dataset(recipe, shard_set, order, None, decoder, 0),
        model.preprocessing,
        run=recipe.run_folder,
        num_negatives=objective.num_texts - 1,
        steps_per_epoch=order.steps_per_epoch(data.batch_size),
        epochs=recipe.schedule.epochs,
        num_samples=shard_set.num_samples,
        width=_width(model),
        batch_size=recipe.evaluation.batch_size,
        workers=data.workers,
        timeout_s=data.timeout_s,
    )


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
