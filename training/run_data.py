"""The training data of a run: shards, classes, order, batches, mined negatives."""

from __future__ import annotations

import logging
from typing import Any

import torch

from clipsys.images.preprocessing import Preprocessing
from clipsys.models.open_clip_models import ModelParts
from clipsys.shards.remote import is_remote
from clipsys.training.data.batches import TrainingBatches, sample_numbers
from clipsys.training.data.classes import class_names, read_labels
from clipsys.training.data.frames import FrameWindows, read_windows
from clipsys.training.data.further_texts import StatedNegatives, check_negatives_key
from clipsys.training.data.order import SampleOrder
from clipsys.training.data.ordering import sample_order
from clipsys.training.data.samples import Decoder
from clipsys.training.data.shard_set import ShardSet, open_shards
from clipsys.training.data.subset import LabelNoise, Subset, draw_subset
from clipsys.training.distributed.agreement import require_same_files
from clipsys.training.distributed.collectives import on_first_rank, rank, world_size
from clipsys.training.features.batches import BatchShape, FeatureBatches, FeatureTable
from clipsys.training.features.config import FeaturesConfig
from clipsys.training.features.extraction import FeatureSource, stored_features
from clipsys.training.features.taught import StoredTeacher, store_teacher
from clipsys.training.features.trunks import Trunks
from clipsys.training.mining.miner import Miner
from clipsys.training.model.teacher import Teacher
from clipsys.training.objectives import Objective
from clipsys.training.recipe import Recipe
from clipsys.training.run_model import feature_width

_logger = logging.getLogger(__name__)


def open_data(
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


def loading_size(recipe: Recipe, preprocessing: Preprocessing) -> tuple[int, int]:
    """(height, width) of the images that reach the device."""
    side = recipe.data.load_size
    return (side, side) if side else preprocessing.size


def make_decoder(
    recipe: Recipe,
    objective: Objective[Any],
    model: ModelParts,
    classes: tuple[str, ...],
    teacher: Teacher | None = None,
) -> Decoder:
    """What makes rows of a batch of raw samples, as recipe, objective and model need them."""
    data, target, stored = recipe.data, model.preprocessing, objective.stored_teacher
    return Decoder(
        preprocessing=Preprocessing(**{**vars(target), "size": loading_size(recipe, target)}),
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
        teacher_tokenizer=None if teacher is None or stored else teacher.tokenizer,
        stored_views=stored.number if stored else 0,
    )


def open_teacher(
    recipe: Recipe,
    objective: Objective[Any],
    model: ModelParts,
    teacher: Teacher,
    decoder: Decoder,
    shard_set: ShardSet,
    order: SampleOrder,
) -> Teacher | StoredTeacher:
    """The teacher, or its vectors of all samples where the objective stores them."""
    stored = objective.stored_teacher
    if stored is None:
        return teacher
    source = FeatureSource(
        FeaturesConfig(views=stored.number, folder=stored.folder),
        recipe.augmentation,
        decoder,
        shard_set,
        sample_numbers(order, shard_set),
        recipe.seed,
        recipe.data.shard_cache,
        drawn_for=model.preprocessing.size,
    )
    return store_teacher(source, teacher, precision=recipe.engine.precision)


def announce_negatives(recipe: Recipe, shard_set: ShardSet, key: str) -> None:
    """Says how many samples have a wrong caption; refuses a key that none has."""
    share = on_first_rank(lambda: check_negatives_key(recipe.data, shard_set, key))
    if rank() == 0:
        _logger.info("about %.0f%% of the samples have texts at %s", 100 * share, key)


def training_batches(
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


def open_features(
    recipe: Recipe,
    model: ModelParts,
    decoder: Decoder,
    shard_set: ShardSet,
    order: SampleOrder,
    device: torch.device,
) -> tuple[Trunks, FeatureBatches]:
    """The locked towers, and batches of their features of all samples; every rank calls it."""
    data, settings = recipe.data, recipe.features
    numbers = sample_numbers(order, shard_set)
    source = FeatureSource(
        settings,
        recipe.augmentation,
        decoder,
        shard_set,
        numbers,
        recipe.seed,
        data.shard_cache,
    )
    trunks = Trunks(
        model,
        device,
        stored=recipe.model.stored_towers,
        precision=recipe.engine.precision,
        channels_last=recipe.engine.channels_last,
    )
    stores = stored_features(source, trunks, model, precision=recipe.engine.precision)
    table = FeatureTable(*stores, numbers, views=settings.views, shard_set=shard_set)
    share = data.batch_size // world_size()
    shape = BatchShape(data.batch_size, data.micro_batch_size or share, rank(), world_size())
    return trunks, FeatureBatches(
        table,
        order,
        shape,
        views=settings.views,
        captions=data.captions,
        positives=decoder.positives,
        seed=recipe.seed,
        epochs=recipe.schedule.epochs,
    )


def make_miner(
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
        training_batches(recipe, shard_set, order, None, decoder, 0),
        model.preprocessing,
        run=recipe.run_folder,
        num_negatives=objective.num_texts - 1,
        steps_per_epoch=order.steps_per_epoch(data.batch_size),
        epochs=recipe.schedule.epochs,
        num_samples=shard_set.num_samples,
        width=feature_width(model),
        batch_size=recipe.evaluation.batch_size,
        workers=data.workers,
        timeout_s=data.timeout_s,
    )
