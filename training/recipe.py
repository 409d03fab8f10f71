"""A recipe: everything that decides a run, section by section."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from clipsys.config import Settings
from clipsys.errors import ConfigError
from clipsys.training.augmentation import AugmentationConfig
from clipsys.training.data import DataConfig
from clipsys.training.optimizers import OptimizerConfig
from clipsys.training.samples import Positives
from clipsys.training.schedule import ScheduleConfig


class ModelConfig(Settings):
    """What is trained."""

    architecture: str | dict[str, Any] = Field(
        "ViT-B-32", description="a name that open_clip knows, or a model_cfg of its own"
    )
    pretrained: str | None = Field(
        None, description="start from these weights: NAME/TAG, hf-hub:ORG/REPO or a model folder"
    )
    preprocess: dict[str, Any] = Field(
        default_factory=dict, description="what differs from open_clip's default preprocess_cfg"
    )
    initial_logit_scale: PositiveFloat | None = Field(
        None, description="inverse temperature at the start; default the model's (1/0.07)"
    )
    initial_logit_bias: float | None = Field(
        None, description="bias of the sigmoid loss at the start; default -10"
    )
    patch_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of image patches left out in training (FLIP)"
    )
    unlocked_image_blocks: NonNegativeInt | None = Field(
        None,
        description="train only the last blocks of the image tower and what follows; 0 locks all "
        "of it (LiT); default: train everything",
    )
    unlocked_text_blocks: NonNegativeInt | None = Field(
        None, description="the same for the text tower"
    )


class ObjectiveConfig(Settings):
    """What is minimised."""

    loss: Literal["infonce", "sigmoid"] = Field(
        "infonce", description="softmax over all pairs (CLIP) or a decision for each (SigLIP)"
    )
    positives: Positives = Field(
        "image",
        description="which samples are positives of each other: none but the pair, equal images, "
        "equal captions or equal labels",
    )
    duplicates: Literal["attract", "ignore"] = Field(
        "attract",
        description="what such samples are to each other: positives too, or left out of the "
        "negatives",
    )
    tile_size: PositiveInt | None = Field(
        None, description="rows of logits held at once; default what suits the device"
    )


class EngineConfig(Settings):
    """How the run is carried out."""

    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    precision: Literal["auto", "fp32", "bf16", "bf16_params", "fp16"] = Field(
        "auto",
        description="bf16 is autocast over fp32 parameters; bf16_params and fp16 (with loss "
        "scaling) have parameters of 16 bits and fp32 masters in the optimizer",
    )
    gradient_clipping: float = Field(1.0, ge=0, description="largest global norm; 0 clips nothing")
    channels_last: bool = Field(
        False,
        description="feed images in the layout that convolutions prefer; the weights keep "
        "theirs, since DeepSpeed flattens them",
    )
    grad_checkpointing: bool = Field(
        False, description="compute the activations of transformer blocks twice to save memory"
    )
    compile: bool = Field(False, description="torch.compile both towers; needs a C++ compiler")
    cache_on_host: bool = Field(
        False, description="keep the features of micro-batches in the host's memory"
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="average of the weights that is evaluated and exported; 0: none",
    )
    device: str = Field("auto", description="auto, cpu, cuda or mps")


class EvaluationConfig(Settings):
    """What is measured during training, on ``data.validation``."""

    every_epochs: NonNegativeInt = Field(1, description="0: only at the end")
    captions: Literal["first", "all"] = Field("all", description="which captions are queries")
    match: str | None = Field(
        None, description="metadata key: an image with the query's value is a hit"
    )
    zeroshot: str | list[str] | None = Field(
        None, description="labelled shards (.cls) for zero-shot classification"
    )
    templates: list[str] = Field(
        ["a photo of a {}."], min_length=1, description="prompts, with {} for the class"
    )
    batch_size: PositiveInt = Field(128, description="images encoded at once, on each rank")


class CheckpointConfig(Settings):
    """What is kept of a run."""

    every_epochs: NonNegativeInt = Field(1, description="0: only at the end")
    every_steps: NonNegativeInt = Field(0, description="besides; 0: not inside an epoch")
    keep: PositiveInt = Field(2, description="newest checkpoints that stay")


class Recipe(Settings):
    """A training run."""

    output: str = Field("runs/clipsys", description="run folder")
    seed: NonNegativeInt = Field(0, description="of weights, order, captions and augmentation")
    nproc: PositiveInt | None = Field(
        None, description="processes on this machine; default one per GPU, or one on a CPU"
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig
    augmentation: AugmentationConfig = AugmentationConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        for fault in (*self._idle_settings(), *self._conflicts()):
            raise ValueError(fault)
        return self

    def _idle_settings(self) -> Iterator[str]:
        """Settings that would silently do nothing."""
        objective, data, model = self.objective, self.data, self.model
        if objective.positives != "label" and data.label_key:
            yield (
                f"data.label_key is {data.label_key!r}, which does nothing unless "
                "objective.positives is label"
            )
        if objective.positives == "pair" and objective.duplicates == "ignore":
            yield (
                "objective.duplicates ignore does nothing while objective.positives is pair: "
                "no two samples are equal; use image, caption or label"
            )
        if objective.loss != "sigmoid" and model.initial_logit_bias is not None:
            yield "model.initial_logit_bias is for objective.loss sigmoid; leave it out"
        if self.engine.cache_on_host and data.micro_batch_size is None:
            yield "engine.cache_on_host does nothing without data.micro_batch_size"
        if model.unlocked_image_blocks == 0 and model.unlocked_text_blocks == 0:
            yield (
                "model.unlocked_image_blocks and model.unlocked_text_blocks are both 0: nothing "
                "would be trained; leave one out"
            )

    def _conflicts(self) -> Iterator[str]:
        """Combinations that cannot be carried out, or not exactly."""
        engine, stage = self.engine, self.engine.zero_stage
        sixteen_bits = engine.precision in ("bf16_params", "fp16")
        if stage == 3 and engine.ema_decay:
            yield (
                "engine.ema_decay needs whole parameters on every rank; with engine.zero_stage 3 "
                "set it to 0, or use stage 0, 1 or 2"
            )
        if sixteen_bits and engine.ema_decay:
            yield (
                f"engine.ema_decay would average parameters of 16 bits (engine.precision "
                f"{engine.precision}); set it to 0, or use fp32 or bf16"
            )
        if sixteen_bits and stage == 0:
            yield (
                f"engine.precision {engine.precision} needs the masters that ZeRO keeps; use "
                "engine.zero_stage 1, 2 or 3"
            )
        if stage == 3 and engine.compile:
            yield (
                "engine.compile needs whole parameters; with engine.zero_stage 3 set it to false"
            )
        if self.optimizer.needs_whole_tensors and stage != 0:
            yield (
                f"engine.zero_stage is {stage}, which flattens parameters, and optimizer.name "
                f"{self.optimizer.name} needs the norm of each; use engine.zero_stage 0 or "
                "optimizer.name adamw"
            )
        micro, batch = self.data.micro_batch_size, self.data.batch_size
        if micro and micro > batch:
            yield (
                f"data.micro_batch_size is {micro}, more than data.batch_size {batch}; lower it, "
                "or leave it out"
            )

    def check_world(self, world_size: int) -> None:
        """Checks what depends on the number of ranks.

        Raises:
            ConfigError: the batch does not divide evenly.
        """
        if self.data.batch_size % world_size:
            lower = self.data.batch_size - self.data.batch_size % world_size
            raise ConfigError(
                f"data.batch_size is {self.data.batch_size}, which does not divide among "
                f"{world_size} processes; try {lower or world_size}"
            )
        share, micro = self.data.batch_size // world_size, self.data.micro_batch_size
        if micro and share % micro:
            near = max(size for size in range(1, min(micro, share) + 1) if share % size == 0)
            raise ConfigError(
                f"data.micro_batch_size is {micro}, which does not divide the {share} pairs of "
                f"each process (data.batch_size {self.data.batch_size} over {world_size}); "
                f"try {near}"
            )

    @property
    def run_folder(self) -> Path:
        """Where the run is kept."""
        return Path(self.output).expanduser()
