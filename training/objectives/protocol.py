"""The protocol of an objective: what it declares, what it computes, what it is given.

One step, on every rank::

    views      augmentation draws each view of a micro-batch from its own seed
    targets    momentum towers, without gradients, once a step for each sample      (if any)
    forward    towers and heads, with gradients; twice where micro-batches are cached
    loss       of the rows of all micro-batches: this rank's share, and the state that follows
    update     DeepSpeed steps; then the momentum towers follow and the state is committed,
               neither of them if DeepSpeed skipped the step

The engine takes care of ZeRO, cached micro-batches, 16-bit weights, averages, checkpoints and
export; an objective says nothing of them but what it cannot do.

Shapes: B rows of this rank, N = W·B rows of all W ranks, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import nn

from clipsys.config import Settings
from clipsys.training.data.augmentation import AugmentationConfig, Family
from clipsys.training.data.config import DataConfig
from clipsys.training.data.samples import Positives
from clipsys.training.engine.config import EngineConfig
from clipsys.training.engine.optimizers import OptimizerConfig
from clipsys.training.mining.config import MiningConfig
from clipsys.training.model.initial import ModelConfig
from clipsys.training.model.outputs import Inputs, Outputs, Rows, Sizes, State
from clipsys.training.model.towers import Towers


class ObjectiveConfig(Settings):
    """What is minimised. Each objective derives its own settings and adds a literal ``name``."""

    name: str


ConfigT = TypeVar("ConfigT", bound=ObjectiveConfig)


class Labels(NamedTuple):
    """What is known of the samples of this rank's rows.

    Attributes:
        groups_B: int64; equal ids are positives of each other, as `Objective.positives` says.
        samples_B: int64; the number of each sample among all training samples.
        classes_B: int64; the number of each sample's class, where the objective needs classes.
        present_BT: bool; whether a sample has its t-th text. Texts that a sample lacks are empty.
        further_groups_BT: int64; for each text but the first the group of the sample that it is a
            caption of, -1 where it is of none; None where there are no such texts.
    """

    groups_B: torch.Tensor
    samples_B: torch.Tensor
    classes_B: torch.Tensor | None = None
    present_BT: torch.Tensor | None = None
    further_groups_BT: torch.Tensor | None = None


@dataclass(frozen=True)
class View:
    """How one view of each image is drawn.

    Attributes:
        augmentation: what is done to the image.
        size: (height, width) in pixels; None is the model's image size.
        shares: what is drawn as for the first view, whose augmentation must be the same; the rest
            is drawn anew.
        frame: which frame of a sample is shown, of an objective over ordered frames.
    """

    augmentation: AugmentationConfig
    size: tuple[int, int] | None = None
    shares: frozenset[Family] = frozenset()
    frame: int = 0


class StoredViews(NamedTuple):
    """Vectors of a teacher that are computed once.

    Attributes:
        number: views of each image.
        folder: where they are stored; None is the user's cache folder.
    """

    number: int
    folder: str | None


class Surroundings(NamedTuple):
    """The sections of a recipe that an objective may contradict."""

    data: DataConfig
    augmentation: AugmentationConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    engine: EngineConfig


class Objective(Generic[ConfigT]):
    """What is minimised. The defaults are those of an objective that needs nothing special.

    Attributes:
        config: the class of its settings.
        num_texts: texts of each sample that pass the text tower; with 0, text is not trained and
            samples need no caption.
        trains_temperature: whether the model's own ``logit_scale`` (and bias) are trained.
        needs_bias: whether the model needs a ``logit_bias``.
        needs_negatives: whether rows are contrasted with other rows of the batch; a batch of one
            is then refused.
        needs_classes: whether samples need a label (``.cls``, or what ``data.label_key`` names),
            whose classes are numbered.
        cacheable: whether a row of `forward` depends on its own sample alone, so that a batch may
            pass the towers in micro-batches.
        momentum: share of themselves that the momentum towers keep at each step; None: there are
            none.
    """

    config: ClassVar[type[ObjectiveConfig]]
    num_texts: int = 0
    trains_temperature: bool = False
    needs_bias: bool = False
    needs_negatives: bool = False
    needs_classes: bool = False
    cacheable: bool = True
    momentum: float | None = None

    def __init__(self, settings: ConfigT) -> None:
        self.settings = settings

    @property
    def tile_size(self) -> int | None:
        """Rows of logits that the loss holds at once; None: what suits the device."""
        return None

    @property
    def num_frames(self) -> int:
        """Frames of a sample: 1, or those of the windows that ``data.frames`` makes."""
        return 1

    @property
    def positives(self) -> Positives:
        """Which samples get equal ids in `Labels.groups_B`."""
        return "pair"

    @property
    def takes_sentences(self) -> bool:
        """Whether its texts are sentences of the caption: two neighbours, then others."""
        return False

    @property
    def negatives_key(self) -> str | None:
        """Metadata key that texts beside the caption come from, `num_texts` - 1 each time."""
        return None

    @property
    def mining(self) -> MiningConfig | None:
        """How texts beside the caption are mined, `num_texts` - 1 each time; None: they are not."""
        return None

    @property
    def teacher(self) -> str | None:
        """A model whose vectors of image and text are the targets (`Inputs.teacher`); None: none.

        It sees the first view and the first text of each sample; `momentum` must be None.
        """
        return None

    @property
    def stored_teacher(self) -> StoredViews | None:
        """How the teacher's vectors are stored; None: it is asked at each step."""
        return None

    @property
    def uses_labels(self) -> bool:
        """Whether labels of samples make a difference."""
        return self.needs_classes or self.positives == "label"

    @property
    def classifies(self) -> bool:
        """Whether it trains a classifier of the labels, whose `scores` can be asked for."""
        return self.needs_classes and type(self).scores is not Objective.scores

    def views(self, augmentation: AugmentationConfig) -> tuple[View, ...]:
        """The views of each image, from the recipe's ``augmentation``.

        Without a view the image tower is not trained, and samples need no image.
        """
        return (View(augmentation),)

    def heads(self, sizes: Sizes) -> nn.ModuleDict:
        """What is trained beside the towers.

        A module may list parameters that do not decay in ``no_weight_decay()``; tensors of fewer
        than two dimensions never decay. Scalars have shape (1,): DeepSpeed cannot train 0-d ones.
        """
        return nn.ModuleDict()

    def initial_state(self, sizes: Sizes, generator: torch.Generator) -> State:
        """What is remembered before the first step, on the CPU.

        Args:
            sizes: of features and data.
            generator: source of random numbers; seeded alike on every rank.
        """
        return {}

    def forward(self, towers: Towers, inputs: Inputs) -> Outputs:
        """The outputs of a micro-batch, with gradients."""
        raise NotImplementedError

    def targets(self, momentum_towers: Towers, inputs: Inputs) -> Rows:
        """What the momentum towers say of a micro-batch; they are in evaluation mode."""
        return {}

    def loss(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> tuple[torch.Tensor, State]:
        """This rank's share of the loss, and the state that follows this step.

        The mean of the shares over ranks is the loss of the whole batch, and so are the gradients.
        The state that follows must be equal on every rank and must not depend on their number: what
        is gathered enters it in rank order. Neither ``state`` nor a tensor in it is written into.
        """
        raise NotImplementedError

    def figures(
        self, outputs: Outputs, targets: Rows, labels: Labels, state: State
    ) -> dict[str, torch.Tensor]:
        """What is logged of a step beside its loss: this rank's shares of means over the batch."""
        return {}

    def scores(self, towers: Towers, inputs: Inputs) -> torch.Tensor:
        """(B, C) logits of the classes, of an objective that trains a classifier."""
        raise NotImplementedError

    def faults(self, recipe: Surroundings) -> Iterator[str]:
        """What a recipe must not combine with this objective, each with its remedy."""
        if self.needs_negatives and recipe.data.batch_size < 2:
            yield (
                f"data.batch_size is 1, which leaves objective.name {self.settings.name} no "
                "negatives; raise it"
            )
