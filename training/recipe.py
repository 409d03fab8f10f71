"""A recipe: everything that decides a run, section by section."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, PositiveInt, model_validator

from clipsys.config import MAX_SEED, PathText, Settings
from clipsys.errors import ConfigError
from clipsys.training.checkpoints import CheckpointConfig
from clipsys.training.data.augmentation import AugmentationConfig
from clipsys.training.data.config import DataConfig
from clipsys.training.engine.config import EngineConfig
from clipsys.training.engine.optimizers import OptimizerConfig
from clipsys.training.engine.schedule import ScheduleConfig
from clipsys.training.engine.zero import zero_faults
from clipsys.training.features.config import FeaturesConfig, UnlockConfig
from clipsys.training.features.faults import feature_faults, idle_settings
from clipsys.training.model.adapter_faults import adapter_faults
from clipsys.training.model.initial import ModelConfig
from clipsys.training.objectives import (
    Objective,
    ObjectiveConfig,
    ObjectiveSection,
    Surroundings,
    make_objective,
)
from clipsys.training.objectives.infonce import InfoNCEConfig
from clipsys.training.validation.config import EvaluationConfig


class Recipe(Settings):
    """A training run."""

    output: PathText = Field("runs/clipsys", description="run folder")
    seed: int = Field(
        0, ge=0, le=MAX_SEED, description="of weights, order, captions and augmentation"
    )
    nproc: PositiveInt | None = Field(
        None, description="processes on this machine; default one per GPU, or one on a CPU"
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig
    augmentation: AugmentationConfig = AugmentationConfig()
    objective: ObjectiveSection = InfoNCEConfig()
    features: FeaturesConfig = FeaturesConfig()
    unlock: UnlockConfig | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        objective = make_objective(self.objective)
        surroundings = Surroundings(
            self.data, self.augmentation, self.model, self.optimizer, self.engine
        )
        faults = (
            *self._idle_settings(objective),
            *self._idle_labels(objective),
            *self._idle_with_data(objective),
            *self._frame_faults(objective),
            *self._conflicts(objective),
            *feature_faults(
                self.objective.name,
                objective,
                num_views=len(objective.views(self.augmentation)),
                model=self.model,
                features=self.features,
                unlock=self.unlock,
            ),
            *idle_settings(
                self.model, {"engine": self.engine, "optimizer": self.optimizer}, self.unlock
            ),
            *objective.faults(surroundings),
        )
        for fault in faults:
            raise ValueError(fault)
        return self

    def _idle_settings(self, objective: Objective[ObjectiveConfig]) -> Iterator[str]:
        """Settings that would silently do nothing."""
        data, model, name = self.data, self.model, self.objective.name
        if not objective.views(self.augmentation):
            yield from self._idle_without_images(name)
        if not objective.needs_bias and model.initial_logit_bias is not None:
            yield "model.initial_logit_bias is for objective.name sigmoid; leave it out"
        if not objective.trains_temperature and model.initial_logit_scale is not None:
            yield (
                f"model.initial_logit_scale does nothing for objective.name {name}, which does not "
                "use the model's temperature; set objective.temperature"
            )
        if not objective.num_texts and model.unlocked_text_blocks is not None:
            yield (
                f"model.unlocked_text_blocks does nothing for objective.name {name}, which trains "
                "no text; leave it out"
            )
        if not objective.num_texts and self.evaluation.zeroshot and not model.pretrained:
            yield (
                f"evaluation.zeroshot needs text, and objective.name {name} trains none; use "
                "evaluation.knn, or start from a model that knows text (model.pretrained)"
            )
        lacking = [] if objective.views(self.augmentation) else ["image"]
        lacking += [] if objective.num_texts else ["text"]
        if self.evaluation.canary and lacking and not model.begins_with_weights:
            yield (
                f"evaluation.canary needs images and texts, and objective.name {name} trains no "
                f"{lacking[0]}; start from a model that knows both (model.pretrained)"
            )
        default_drop = type(self.evaluation).model_fields["canary_drop"].default
        if self.evaluation.canary_drop != default_drop and not self.evaluation.canary:
            yield "evaluation.canary_drop does nothing without evaluation.canary"
        yield from adapter_faults(
            model,
            objective_name=name,
            precision=self.engine.precision,
            trains_images=bool(objective.views(self.augmentation)),
            trains_text=objective.num_texts > 0,
        )
        if self.evaluation.knn and not data.validation:
            yield "evaluation.knn does nothing without data.validation"
        if self.engine.cache_on_host and data.micro_batch_size is None:
            yield "engine.cache_on_host does nothing without data.micro_batch_size"
        is_locked = model.unlocked_image_blocks == 0 and model.unlocked_text_blocks == 0
        if is_locked and model.lora is None:
            yield (
                "model.unlocked_image_blocks and model.unlocked_text_blocks are both 0: nothing "
                "would be trained; leave one out"
            )

    def _idle_labels(self, objective: Objective[ObjectiveConfig]) -> Iterator[str]:
        """Settings about labels and classifiers, for an objective that has no use for them."""
        data, name = self.data, self.objective.name
        if data.label_key and not objective.uses_labels:
            yield (
                f"data.label_key is {data.label_key!r}, which does nothing for objective.name "
                f"{name} unless objective.positives is label; leave it out"
            )
        if data.label_noise and not objective.uses_labels:
            yield (
                f"data.label_noise does nothing for objective.name {name}, which uses no labels; "
                "leave it out"
            )
        if data.classes is not None and not (objective.needs_classes or data.label_noise):
            yield (
                f"data.classes does nothing for objective.name {name}, which trains no classifier; "
                "leave it out"
            )
        if self.evaluation.classifier and not objective.classifies:
            yield (
                f"evaluation.classifier does nothing for objective.name {name}, which trains no "
                "classifier; leave it out"
            )
        if self.evaluation.classifier and not data.validation:
            yield "evaluation.classifier does nothing without data.validation"

    def _idle_without_images(self, name: str) -> Iterator[str]:
        """Settings about images, for an objective that shows none."""
        if self.augmentation != AugmentationConfig():
            yield (
                f"augmentation does nothing for objective.name {name}, which trains no image; "
                "leave it out"
            )
        for place, value in (
            ("model.unlocked_image_blocks", self.model.unlocked_image_blocks),
            ("data.load_size", self.data.load_size),
            ("model.patch_dropout", self.model.patch_dropout or None),
            ("evaluation.knn", self.evaluation.knn),
            ("evaluation.match", self.evaluation.match),
            ("evaluation.captions", _unless(self.evaluation.captions, "all")),
            ("evaluation.duplicates", _unless(self.evaluation.duplicates, "equal")),
        ):
            if value is not None:
                yield (
                    f"{place} does nothing for objective.name {name}, which trains no image; "
                    "leave it out"
                )

    def _idle_with_data(self, objective: Objective[ObjectiveConfig]) -> Iterator[str]:
        """Settings about texts and labels that the objective and the data have no use for."""
        for place, section, setting in (
            ("data", self.data, "captions"),
            ("data", self.data, "caption_key"),
            ("evaluation", self.evaluation, "captions"),
        ):
            is_set = getattr(section, setting) != type(section).model_fields[setting].default
            if is_set and not objective.num_texts:
                yield (
                    f"{place}.{setting} does nothing for objective.name {self.objective.name}, "
                    "which trains no text; leave it out"
                )
        if self.evaluation.classnames and not self.evaluation.zeroshot:
            yield "evaluation.classnames does nothing without evaluation.zeroshot"

    def _frame_faults(self, objective: Objective[ObjectiveConfig]) -> Iterator[str]:
        """Windows of frames that the objective does not take, or none of those that it takes."""
        frames, name, length = self.data.frames, self.objective.name, objective.num_frames
        if length == 1 and frames is not None:
            yield (
                f"data.frames does nothing for objective.name {name}, which takes single images; "
                "leave it out"
            )
        if length > 1 and frames is None:
            yield (
                f"objective.name {name} needs windows of {length} frames; set data.frames: "
                f"{{length: {length}}}"
            )
        if length > 1 and frames is not None and frames.length != length:
            yield (
                f"objective.frames is {length} and data.frames.length {frames.length}; give both "
                "the same number"
            )

    def _conflicts(self, objective: Objective[ObjectiveConfig]) -> Iterator[str]:
        """Combinations that cannot be carried out, or not exactly."""
        engine, stage = self.engine, self.engine.zero_stage
        yield from zero_faults(engine)
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
                f"{self.optimizer.name} needs each one whole; use engine.zero_stage 0 or "
                f"optimizer.name {self.optimizer.without_whole_tensors}"
            )
        micro, batch = self.data.micro_batch_size, self.data.batch_size
        if micro and not objective.cacheable:
            yield (
                f"data.micro_batch_size would change what objective.name {self.objective.name} "
                "computes, whose rows depend on one another; leave it out"
            )
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
        """Where the run is stored."""
        return Path(self.output)


def _unless(value: str, default: str) -> str | None:
    return None if value == default else value
