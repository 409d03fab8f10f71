"""The DeepSpeed engine around a contrastive model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clipsys.devices import choose_device
from clipsys.errors import ConfigError
from clipsys.training.distributed import local_rank, world_size
from clipsys.training.launch import free_port
from clipsys.training.recipe import EngineConfig, OptimizerConfig
from clipsys.training.repartition import load_parts, parts_to_divide
from clipsys.training.towers import ContrastiveModel, Features, parameter_groups

_logger = logging.getLogger(__name__)

#: A collective that waits longer than this for another rank fails.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def start_processes(asked_device: str) -> torch.device:
    """Joins the process group that the launcher's environment describes; a group of one without.

    Returns:
        This rank's device.

    Raises:
        ConfigError: the device asked for is not there.
    """
    device = choose_device(asked_device)
    if device.type == "cuda":
        device = torch.device("cuda", local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    deepspeed = import_deepspeed()
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=COLLECTIVE_TIMEOUT,
        )
    return device


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and without its compiled extension for shared-memory collectives.

    That extension only serves inference, yet DeepSpeed compiles it at every first start on a CPU,
    and fails where there is no C++ compiler (`build_shm_op` in deepspeed/comm/torch.py, 0.19.8).
    """
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    log = logging.getLogger("DeepSpeed")
    for handler in list(log.handlers):  # it writes to stdout, which is for results
        log.removeHandler(handler)
    log.propagate = True
    return deepspeed


class Engine:
    """Trains a `ContrastiveModel` through DeepSpeed: forward, backward, step, save, load."""

    def __init__(
        self,
        model: ContrastiveModel,
        *,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        local_batch_size: int,
        device: torch.device,
    ) -> None:
        deepspeed = import_deepspeed()
        self.config = config
        self.device = device
        self._peak_lr = optimizer.lr
        model = model.to(device)
        groups = parameter_groups(model, optimizer.weight_decay)
        adamw = torch.optim.AdamW(
            groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=adamw,
            config=self._deepspeed_config(local_batch_size),
            dist_init_required=False,
        )
        self._average = WeightAverage(model, config.ema_decay) if config.ema_decay else None

    def _deepspeed_config(self, local_batch_size: int) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": local_batch_size,
            "gradient_accumulation_steps": 1,
            # DeepSpeed clips at 1.0 unless a value is said.
            "gradient_clipping": self.config.gradient_clipping,
            "zero_optimization": {"stage": self.config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1_000_000_000,
        }

    @property
    def module(self) -> ContrastiveModel:
        """The model inside."""
        module: ContrastiveModel = self._engine.module
        return module

    def forward(self, image_BCHW: torch.Tensor, tokens_BL: torch.Tensor) -> Features:
        """Encodes one batch with gradients."""
        if self.config.channels_last:
            image_BCHW = image_BCHW.contiguous(memory_format=torch.channels_last)
        features: Features = self._engine(image_BCHW, tokens_BL)
        return features

    def update(self, loss: torch.Tensor, lr_factor: float) -> float:
        """Backward, reduce, clip, step. Returns the global gradient norm before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._peak_lr * lr_factor
        self._engine.backward(loss)
        norm = self._stage_0_norm() if self.config.zero_stage == 0 else None
        self._engine.step()
        if self._average:
            self._average.update(self.module)
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def _stage_0_norm(self) -> torch.Tensor:
        # Without ZeRO, DeepSpeed reports no norm; gradients are whole on every rank.
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def train(self) -> None:
        """Training mode."""
        self._engine.train()

    @contextmanager
    def evaluating(self) -> Iterator[ContrastiveModel]:
        """Evaluation mode, without gradients, with averaged weights where they are kept."""
        self._share_buffers()
        self._engine.eval()
        swapped = self._average.swapped(self.module) if self._average else _nothing()
        try:
            with torch.no_grad(), swapped:
                yield self.module
        finally:
            self._engine.train()

    def _share_buffers(self) -> None:
        """Averages running statistics (batch norm) over ranks: each saw its part of the data."""
        if world_size() == 1:
            return
        for name, buffer in self.module.named_buffers():
            if "running_" in name:
                dist.all_reduce(buffer)
                buffer.div_(world_size())

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Writes ``folder/tag``, from every rank together."""
        if self._average:
            state = {**state, "average": self._average.state()}
        self._engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """Reads what `save` wrote, on every rank together, and returns the state given then.

        Raises:
            ConfigError: it was written with another ZeRO stage, or at stage 3 by another number of
                ranks.
        """
        parts = parts_to_divide(folder / tag, zero_stage=self.config.zero_stage)
        try:
            path, state = self._engine.load_checkpoint(
                str(folder), tag=tag, load_optimizer_states=not parts
            )
            if parts:
                load_parts(self._optimizer, parts)
        except (RuntimeError, KeyError, ValueError, AssertionError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"{folder / tag}: the checkpoint does not fit this run ({first}); resume with the "
                "same model, ZeRO stage and number of processes"
            ) from error
        if path is None:
            raise ConfigError(f"{folder / tag}: DeepSpeed cannot load this checkpoint")
        average = state.pop("average", None)
        if self._average and average is not None:
            self._average.load(average)
        return dict(state)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Whole weights of the open_clip model, averaged ones where they are kept.

        Every rank must call it: ZeRO-3 gathers its partitions.
        """
        deepspeed = import_deepspeed()
        self._share_buffers()
        if self.config.zero_stage == 3:
            parameters = list(self.module.parameters())
            with deepspeed.zero.GatheredParameters(parameters):
                return _copy(self.module.clip.state_dict())
        with self._average.swapped(self.module) if self._average else _nothing():
            return _copy(self.module.clip.state_dict())


def _copy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().float().cpu().clone().contiguous()
        if tensor.is_floating_point()
        else tensor.detach().cpu().clone()
        for name, tensor in state.items()
    }


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class WeightAverage:
    """Exponential moving average of weights and running statistics (Polyak & Juditsky 1992).

    The decay starts low, min(decay, (1 + t) / (10 + t)), so that the first steps do not hang on to
    random weights. Batch norm's statistics are averaged with the weights that they belong to.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self._decay = decay
        self._updates = 0
        self._shadow = [tensor.detach().clone() for tensor in _averaged(model)]

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """Moves the average towards the model."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(self._shadow, _averaged(model), 1 - decay)

    @contextmanager
    def swapped(self, model: torch.nn.Module) -> Iterator[None]:
        """Puts the average into the model for a while."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: torch.nn.Module) -> None:
        for shadow, tensor in zip(self._shadow, _averaged(model), strict=True):
            kept = tensor.clone()
            tensor.copy_(shadow)
            shadow.copy_(kept)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"updates": self._updates, "shadow": self._shadow}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self._updates = state["updates"]
        for shadow, saved in zip(self._shadow, state["shadow"], strict=True):
            shadow.copy_(saved)


def _averaged(model: torch.nn.Module) -> list[torch.Tensor]:
    parameters = [parameter.detach() for parameter in model.parameters()]
    # Not every buffer: an attention mask holds -inf, and -inf - -inf is NaN.
    return parameters + [buffer for name, buffer in model.named_buffers() if "running_" in name]
