"""The other side of benchmarks/objective_cost.py: plain PyTorch with lightly's losses.

Both sides have the same encoder, head, optimizer and drawn views; the head has torch's batch norm
where ours has that of all ranks.

Legend of shapes: B batch, D width, K queue or prototypes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from clipsys.training.model.batch_norm import GlobalBatchNorm
from clipsys.training.run import Run

Views = tuple[torch.Tensor, ...]


class Peer:
    """A training step as lightly's examples write it."""

    def __init__(self, run: Run) -> None:
        """
        Args:
            run: ours, which encoder, head and settings are copied from; not used afterwards.
        """
        self._settings = run.objective.settings
        model = run.engine.module
        self.encoder = copy.deepcopy(model.clip.visual)
        self.head = _with_torch_norms(copy.deepcopy(model.heads["projection"]))
        self._momentum: list[nn.Module] = []
        self._extra = nn.ModuleDict()
        self._loss = _LOSSES[self._settings.name](self)
        trained = [self.encoder, self.head, self._extra]
        parameters = [one for module in trained for one in module.parameters()]
        optimizer = run.recipe.optimizer
        groups = [
            {"params": [one for one in parameters if one.ndim > 1]},
            {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps,
            weight_decay=optimizer.weight_decay, fused=True,
        )  # fmt: skip

    def __call__(self, views: Views) -> float:
        """One step; the loss."""
        loss = self._loss(views)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())

    def projected(self, views: Views) -> list[torch.Tensor]:
        """Projections of views, which pass the encoder together."""
        return list(self.head(self.encoder(torch.cat(views))).chunk(len(views)))

    def ntxent(self) -> Callable[[Views], torch.Tensor]:
        """SimCLR."""
        from lightly.loss import NTXentLoss

        loss = NTXentLoss(self._settings.temperature)
        return lambda views: loss(*self.projected(views))

    def moco(self) -> Callable[[Views], torch.Tensor]:
        """MoCo v2: momentum copies and a bank of keys."""
        from lightly.loss import NTXentLoss
        from lightly.models.utils import update_momentum

        settings = self._settings
        loss = NTXentLoss(
            settings.temperature, memory_bank_size=(settings.queue_size, settings.head_width)
        )
        slow_encoder, slow_head = copy.deepcopy(self.encoder), copy.deepcopy(self.head)
        for module in (slow_encoder, slow_head):
            module.requires_grad_(False)

        def step(views: Views) -> torch.Tensor:
            update_momentum(self.encoder, slow_encoder, settings.momentum)
            update_momentum(self.head, slow_head, settings.momentum)
            query_BD = self.head(self.encoder(views[0]))
            with torch.no_grad():
                key_BD = slow_head(slow_encoder(views[1]))
            return loss(query_BD, key_BD)

        return step

    def swav(self) -> Callable[[Views], torch.Tensor]:
        """SwAV with two views and without a queue."""
        from lightly.loss import SwaVLoss
        from lightly.models.modules.heads import SwaVPrototypes

        settings = self._settings
        loss = SwaVLoss(settings.temperature, settings.iterations, settings.epsilon)
        prototypes = SwaVPrototypes(settings.head_width, settings.num_prototypes)
        self._extra["prototypes"] = prototypes

        def step(views: Views) -> torch.Tensor:
            prototypes.normalize()
            features = [F.normalize(one, dim=1) for one in self.projected(views)]
            return loss([prototypes(one) for one in features], [])

        return step

    def barlow_twins(self) -> Callable[[Views], torch.Tensor]:
        """Barlow Twins."""
        from lightly.loss import BarlowTwinsLoss

        loss = BarlowTwinsLoss(self._settings.off_diagonal)
        return lambda views: loss(*self.projected(views))

    def vicreg(self) -> Callable[[Views], torch.Tensor]:
        """VICReg."""
        from lightly.loss import VICRegLoss

        loss = VICRegLoss()
        return lambda views: loss(*self.projected(views))


_LOSSES: Mapping[str, Callable[[Peer], Callable[[Views], torch.Tensor]]] = {
    "simclr": Peer.ntxent,
    "moco": Peer.moco,
    "swav": Peer.swav,
    "barlow_twins": Peer.barlow_twins,
    "vicreg": Peer.vicreg,
}
PEERS = tuple(_LOSSES)


def _with_torch_norms(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, GlobalBatchNorm):
            setattr(module, name, nn.BatchNorm1d(child.num_features))
        else:
            _with_torch_norms(child)
    return module


def our_loss(name: str) -> Callable[..., torch.Tensor]:
    """Our pure loss of `loss_inputs`."""
    from clipsys.training import losses

    if name == "moco":
        return lambda query_BD, key_BD, queue_KD: losses.moco(query_BD, key_BD, queue_KD, 0.2)
    if name == "swav":
        return losses.swav
    if name == "simclr":
        return lambda first_BD, second_BD: losses.nt_xent(first_BD, second_BD, 0.1)
    found: Callable[..., torch.Tensor] = getattr(losses, name)
    return found


def lightly_loss(name: str, inputs: Any) -> Callable[..., torch.Tensor]:
    """The loss of lightly, of the same inputs."""
    from lightly.loss import BarlowTwinsLoss, NTXentLoss, SwaVLoss, VICRegLoss

    if name == "moco":
        bank = NTXentLoss(0.2, memory_bank_size=tuple(inputs[2].shape))
        bank.memory_bank.bank = inputs[2].detach().clone()
        return lambda query_BD, key_BD, queue_KD: bank(query_BD, key_BD)
    if name == "swav":
        swav = SwaVLoss(0.1, 3, 0.05)
        return lambda scores_BVK: swav(list(scores_BVK.unbind(1)), [])
    return {
        "simclr": NTXentLoss(0.1),
        "barlow_twins": BarlowTwinsLoss(0.0051),
        "vicreg": VICRegLoss(),
    }[name]


def loss_inputs(name: str, rows: int) -> tuple[list[torch.Tensor], str]:
    """Inputs of a loss, and their shape in words; gradients where the loss has them."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def unit(*shape: int) -> torch.Tensor:
        return F.normalize(drawn(*shape), dim=-1)

    if name == "swav":
        return [0.3 * drawn(rows, 2, 3000).clamp(-3, 3)], "two views, 3,000 prototypes"
    if name == "moco":
        return [unit(rows, 128), unit(rows, 128), unit(16_384, 128)], "width 128, queue 16,384"
    if name == "simclr":
        return [unit(rows, 128), unit(rows, 128)], "width 128"
    return [drawn(rows, 2048), drawn(rows, 2048)], "width 2,048"


#: How many of the inputs get a gradient.
NUM_TRAINED = {"moco": 1, "swav": 1}
