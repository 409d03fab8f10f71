"""What passes between data, model and loss, whatever the objective.

Shapes: B rows of this rank, L tokens, V views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

#: (B, ...) of this rank by name, one row a sample.
Rows = dict[str, torch.Tensor]
#: What an objective remembers from step to step by name: queues, banks, centres. Equal on every
#: rank; a value that is replaced and never written into.
State = dict[str, torch.Tensor]


class TokenIds(NamedTuple):
    """The tokens of the text tower.

    Attributes:
        number: how many it knows.
        padding: what fills a text up.
        mask: what stands for a hidden token.
    """

    number: int
    padding: int
    mask: int


class TeacherSizes(NamedTuple):
    """What an objective needs to know of a teacher.

    Attributes:
        width: width of its vectors.
        scale: what it multiplies cosines with (no logarithm).
    """

    width: int
    scale: float


class Sizes(NamedTuple):
    """What heads and states are shaped by.

    Attributes:
        width: width of the features of both towers.
        num_samples: samples of the training data.
        num_classes: classes of their labels; 0 unless the objective needs them.
        tokens: of the text tower; None where the objective trains no text.
        teacher: of the objective's teacher; None where it has none.
    """

    width: int
    num_samples: int = 0
    num_classes: int = 0
    tokens: TokenIds | None = None
    teacher: TeacherSizes | None = None


class Inputs(NamedTuple):
    """What a micro-batch shows to the towers.

    Attributes:
        views: V of float32 (B, 3, H, W), normalised; views may differ in size. None where the
            objective trains no image. Of a locked tower its features (B, F).
        texts: T of int64 (B, L); none where the objective trains no text. Of a locked tower its
            features, float32 (B, F).
        seeds_B: int64, a random number of each row, for what an objective draws itself: the same
            whenever the micro-batch is shown.
        teacher: what a teacher says of each row by name, without gradients; None where there is no
            teacher.
    """

    views: tuple[torch.Tensor, ...] = ()
    texts: tuple[torch.Tensor, ...] = ()
    seeds_B: torch.Tensor | None = None
    teacher: Rows | None = None


class Outputs(NamedTuple):
    """What a loss is taken of.

    Attributes:
        rows: (B, ...) by name: features, scores. They are stacked over micro-batches.
        shared: tensors without rows by name: temperature, prototypes. The same in each micro-batch.
    """

    rows: Rows
    shared: dict[str, torch.Tensor]

    @classmethod
    def stack(cls, parts: Sequence[Outputs], device: torch.device) -> Outputs:
        """The outputs of consecutive micro-batches as leaves of a new graph."""
        rows = stack_rows([part.rows for part in parts])
        return cls(
            *({n: _leaf(t, device) for n, t in part.items()} for part in (rows, parts[0][1]))
        )

    def gradients(self) -> Outputs:
        """The gradients that a loss left in these leaves; zeros where it does not depend on one."""
        return Outputs(
            *(
                {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in part.items()}
                for part in self
            )
        )

    def split(self, number: int) -> list[Outputs]:
        """Gradients of ``number`` micro-batches; those of what is shared in equal shares."""
        chunks = {name: tensor.chunk(number) for name, tensor in self.rows.items()}
        shared = {name: tensor / number for name, tensor in self.shared.items()}
        return [
            Outputs({name: parts[index] for name, parts in chunks.items()}, dict(shared))
            for index in range(number)
        ]

    def dot(self, other: Outputs) -> torch.Tensor:
        """The sum of all products: a scalar whose gradient towards these outputs is ``other``."""
        products = [
            (mine[name] * theirs[name]).sum()
            for mine, theirs in zip(self, other, strict=True)
            for name in mine
        ]
        total = products[0]
        for product in products[1:]:
            total = total + product
        return total

    def to(self, device: torch.device) -> Outputs:
        """The same outputs on another device."""
        return Outputs(*({n: t.to(device) for n, t in part.items()} for part in self))


def stack_rows(parts: Sequence[Rows]) -> Rows:
    """Rows of consecutive micro-batches, joined."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _leaf(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    leaf = tensor.detach().to(device).clone()
    return leaf.requires_grad_() if leaf.is_floating_point() else leaf
