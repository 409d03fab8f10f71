"""A recipe: everything that decides a run, section by section."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from clipsys.config import Settings
from clipsys.errors import ConfigError
from clipsys.training.augmentation import AugmentationConfig
from clipsys.training.data import DataConfig
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


class ObjectiveConfig(Settings):
    """What is minimised."""

    positives: Positives = Field(
        "image",
        description="which samples are positives of each other: none but the pair, equal images, "
        "equal captions or equal labels",
    )
    tile_size: PositiveInt | None = Field(None, description="rows of logits held at once")


class OptimizerConfig(Settings):
    """AdamW (Loshchilov & Hutter 2019); no decay for norms, biases and the temperature."""

    lr: PositiveFloat = Field(5e-4, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.98), description="decay of the two moments")
    eps: PositiveFloat = Field(1e-6, description="added to the root of the second moment")
    weight_decay: float = Field(0.2, ge=0, description="of matrices and kernels only")


class EngineConfig(Settings):
    """How the run is carried out."""

    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16 is autocast over fp32 parameters"
    )
    gradient_clipping: float = Field(1.0, ge=0, description="largest global norm; 0 clips nothing")
    channels_last: bool = Field(
        False,
        description="feed images in the layout that convolutions prefer; the weights keep "
        "theirs, since DeepSpeed flattens them",
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
        if self.objective.positives != "label" and self.data.label_key:
            raise ValueError(
                f"data.label_key is {self.data.label_key!r}, which does nothing unless "
                "objective.positives is label"
            )
        if self.engine.zero_stage == 3 and self.engine.ema_decay:
            raise ValueError(
                "engine.ema_decay needs whole parameters on every rank; with engine.zero_stage 3 "
                "set it to 0, or use stage 0, 1 or 2"
            )
        return self

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
