"""The DeepSpeed engine around any objective: exact gradients in any number of micro-batches.

One micro-batch is a plain forward and backward. With more, the loss still contrasts the whole batch
(GradCache; Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup")::

    pass 1   outputs of every micro-batch, without gradients, and targets of the momentum towers
    loss     of all outputs of all ranks, and its gradient towards this rank's outputs
    pass 2   every micro-batch again, with the same dropout; what is propagated back through it is
             Σ output · its gradient, so that the parameters' gradients add up to the whole
             batch's. They are exchanged between ranks once, after the last.

DeepSpeed's own gradient accumulation would contrast each micro-batch on its own: another objective.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import nn

from clipsys.errors import ConfigError
from clipsys.training.distributed.collectives import average_over_ranks
from clipsys.training.distributed.process_group import import_deepspeed
from clipsys.training.engine.checkpoint_fit import (
    check_layout,
    check_objective_state,
    settings_of,
)
from clipsys.training.engine.config import EngineConfig
from clipsys.training.engine.ema import WeightAverage, running_statistics
from clipsys.training.engine.gradient_check import (
    NonFiniteGradientError,
    describe,
    refuse_unless_finite,
    watch_norm,
)
from clipsys.training.engine.momentum import MomentumAverage
from clipsys.training.engine.optimizers import OptimizerConfig, build_optimizer, parameter_groups
from clipsys.training.engine.repartition import SavedBy, load_parts, parts_to_divide
from clipsys.training.engine.replay import (
    kept_statistics,
    random_state,
    set_random_state,
    uncompiled,
)
from clipsys.training.engine.whole_weights import (
    copied,
    discovering_parameters,
    exact_scalars,
    exact_values,
    gathered,
    masters_of,
    set_masters,
)
from clipsys.training.engine.zero import zero_section
from clipsys.training.model.outputs import Inputs, Outputs, Rows, State, stack_rows
from clipsys.training.model.trained import TrainedModel

_logger = logging.getLogger(__name__)

#: Gives what a micro-batch shows to the towers, the same at each call.
MakeInputs = Callable[[], Inputs]
#: From this rank's outputs, targets and state to its share of the loss and the state that follows.
Loss = Callable[[Outputs, Rows, State], tuple[torch.Tensor, State]]


class Accumulated(NamedTuple):
    """What `Engine.accumulate` found.

    Attributes:
        loss: this rank's share of the loss, without gradient.
        shared: the outputs without rows (temperature, prototypes) that it was taken with.
    """

    loss: torch.Tensor
    shared: dict[str, torch.Tensor]


class Engine:
    """Trains a `TrainedModel` through DeepSpeed: gradients, steps, checkpoints."""

    def __init__(
        self,
        model: TrainedModel,
        *,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        local_batch_size: int,
        device: torch.device,
        momentum: float | None = None,
        state: State | None = None,
    ) -> None:
        """
        Args:
            model: what is trained.
            config: how the run is carried out.
            optimizer: the optimizer and its settings.
            local_batch_size: rows of a step on this rank.
            device: this rank's.
            momentum: share of themselves that the momentum towers keep at each step.
            state: what the objective remembers before the first step.
        """
        deepspeed = import_deepspeed()
        self.config = config
        self.device = device
        self._peak_lr = optimizer.lr
        # Weights of 16 bits have masters of 32: the temperature is read from those.
        self._has_masters = model.precision in ("bf16_params", "fp16")
        model = model.to(device)
        exact = exact_values(model) if self._has_masters else {}
        self._state = {name: tensor.to(device) for name, tensor in (state or {}).items()}
        self._next_state = self._state
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(parameter_groups(model, optimizer), optimizer),
            config=self._deepspeed_config(local_batch_size, model),
            dist_init_required=False,
        )
        if config.zero_stage and model.precision != "fp16":
            watch_norm(self._optimizer, model, zero_stage=config.zero_stage)
        self._momentum = None
        if momentum is not None:
            self._momentum = MomentumAverage(
                model, momentum, is_partitioned=config.zero_stage == 3, exact=exact
            )
        set_masters(self.module, exact, device, is_partitioned=config.zero_stage == 3)
        self._average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
        self._refresh_scale()

    def _deepspeed_config(self, local_batch_size: int, model: TrainedModel) -> dict[str, Any]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return {
            "train_micro_batch_size_per_gpu": local_batch_size,
            "gradient_accumulation_steps": 1,
            # DeepSpeed clips at 1.0 unless one is set.
            "gradient_clipping": self.config.gradient_clipping,
            "zero_optimization": zero_section(
                self.config,
                sum(parameter.numel() for parameter in trained),
                width=2 if self._has_masters else 4,
                device_type=self.device.type,
            ),
            "zero_allow_untested_optimizer": True,
            # torch's optimizers step on the host too; DeepSpeed's own needs a compiler.
            "zero_force_ds_cpu_optimizer": False,
            # Its own check leaves steps out without a word; `watch_norm` stops the run.
            "bf16": {"enabled": model.precision == "bf16_params", "check_grad_overflow": False},
            "fp16": {"enabled": model.precision == "fp16"},
            "steps_per_print": 1_000_000_000,
        }

    @property
    def module(self) -> TrainedModel:
        """The model inside."""
        module: TrainedModel = self._engine.module
        return module

    @property
    def state(self) -> State:
        """What the objective remembers, as the last update left it."""
        return self._state

    def accumulate(self, inputs: Sequence[MakeInputs], loss: Loss) -> Accumulated:
        """Leaves the gradients of the whole batch, for `update`.

        Args:
            inputs: this rank's micro-batches, of equal size; the same number on every rank.
            loss: computes the loss from the outputs of all of them, in order.
        """
        if len(inputs) == 1:
            made = self._prepared(inputs[0])
            targets = self._targets(made)
            outputs: Outputs = self._engine(made)
            value, self._next_state = loss(outputs, targets, self._state)
            self._engine.backward(value)
            return Accumulated(value.detach(), _detached(outputs.shared))
        return self._accumulate_cached(inputs, loss)

    def _prepared(self, make: MakeInputs) -> Inputs:
        inputs = make()
        if not self.config.channels_last:
            return inputs
        layout = torch.channels_last
        views = tuple(
            view.contiguous(memory_format=layout) if view.dim() == 4 else view
            for view in inputs.views
        )
        return inputs._replace(views=views)

    def _targets(self, inputs: Inputs) -> Rows:
        if self._momentum is None:
            return {} if inputs.teacher is None else inputs.teacher
        with torch.no_grad():
            # Through the engine: at stage 3 it gathers what the towers need.
            targets: Rows = self._engine(inputs, wants_targets=True)
        return targets

    def _accumulate_cached(self, inputs: Sequence[MakeInputs], loss: Loss) -> Accumulated:
        with torch.no_grad(), kept_statistics(self.module):
            states, parts, target_parts = [], [], []
            for make in inputs:
                made = self._prepared(make)
                states.append(random_state(self.device))
                parts.append(self._cached(self._engine(made)))
                target_parts.append(self._targets(made))
        leaves = Outputs.stack(parts, self.device)
        value, self._next_state = loss(leaves, stack_rows(target_parts), self._state)
        value.backward()  # type: ignore[no-untyped-call]
        gradients = [self._cached(part) for part in leaves.gradients().split(len(inputs))]
        with self._one_reduction() as announce:
            for number, (make, state, gradient) in enumerate(
                zip(inputs, states, gradients, strict=True)
            ):
                announce(number == len(inputs) - 1)
                set_random_state(state, self.device)
                surrogate = self._engine(self._prepared(make)).dot(gradient.to(self.device))
                # The surrogates are parts of one sum: nothing is to be divided by their number.
                self._engine.backward(surrogate, scale_wrt_gas=False)
        return Accumulated(value.detach(), _detached(leaves.shared))

    def _cached(self, outputs: Outputs) -> Outputs:
        return outputs.to(torch.device("cpu")) if self.config.cache_on_host else outputs

    @contextmanager
    def _one_reduction(self) -> Iterator[Callable[[bool], None]]:
        """One exchange of gradients for all backward passes inside.

        Yields:
            A function to call before each pass, with whether it is the last.
        """
        if self.config.zero_stage == 0:
            yield self._engine.set_gradient_accumulation_boundary
            return
        with self._engine.coalesce_grad_reduction():
            yield lambda last: None

    def loss_in(self, precision: str, inputs: MakeInputs, loss: Loss) -> torch.Tensor:
        """This rank's share of a loss in fp32 or bf16 (autocast); leaves no gradient and no trace.

        Every rank calls it. Random numbers are drawn; the caller seeds them.
        """
        module = self.module
        usual = module.use_precision(precision)
        try:
            with torch.no_grad(), kept_statistics(module), uncompiled(self.config.compile):
                made = self._prepared(inputs)
                targets = self._targets(made)
                value, _ = loss(self._engine(made), targets, self._state)
                return value.detach()
        finally:
            module.use_precision(usual)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Whole gradients by parameter, between `accumulate` and `update`; on every rank."""
        from deepspeed.utils import safe_get_full_grad

        return {
            name: gradient.detach().clone()
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad and (gradient := safe_get_full_grad(parameter)) is not None
        }

    def update(self, lr_factor: float) -> float:
        """Clips and steps; then the momentum towers follow and the objective's state is committed.

        Neither happens if DeepSpeed skipped the step (fp16, while it looks for a loss scale).

        Returns:
            The global gradient norm before clipping; infinite for a step that fp16 skipped.

        Raises:
            NonFiniteGradientError: on every rank, before weights and optimizer are touched.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self._peak_lr * lr_factor * group["lr_factor"]
        norm = self._stage_0_norm() if self.config.zero_stage == 0 else None
        if norm is not None:
            refuse_unless_finite(norm, self.module)
        self._step()
        if self._engine.was_step_applied():
            self._state = self._next_state
            if self._momentum:
                self._share_buffers()
                self._momentum.update()
        if self._average:
            self._average.update(self.module)
        self._refresh_scale()
        return float(self._engine.get_global_grad_norm() if norm is None else norm)

    def _step(self) -> None:
        try:
            self._engine.step()
        except Exception as error:
            # A plain Exception (deepspeed/runtime/fp16/loss_scaler.py, 0.19.8), on every rank.
            if "loss scale already at minimum" not in str(error):
                raise
            cause = describe(self.module)
            raise NonFiniteGradientError(f"{cause} at any loss scale of fp16") from None

    def scaling_figures(self) -> dict[str, float]:
        """The loss scale of fp16 and how many steps it has left out so far; else nothing."""
        if self.module.precision != "fp16":
            return {}
        return {
            "loss_scale": float(self._optimizer.loss_scale),
            "skipped_steps": int(self._engine.skipped_steps),
        }

    @property
    def num_applied_steps(self) -> int:
        """Steps that have changed the weights, those before a resume included."""
        return int(self._engine.global_steps - self._engine.skipped_steps)

    def _stage_0_norm(self) -> torch.Tensor:
        # Without ZeRO, DeepSpeed reports no norm; gradients are whole on every rank.
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _refresh_scale(self) -> None:
        if self._has_masters:
            self.module.keep_exact(exact_scalars(self.module.scalars()))

    def train(self) -> None:
        """Training mode."""
        self._engine.train()

    @contextmanager
    def evaluating(self) -> Iterator[TrainedModel]:
        """Evaluation mode, without gradients, with averaged weights where they are kept."""
        self._share_buffers()
        self._engine.eval()
        try:
            with torch.no_grad(), self._averaged(), self._discovering():
                yield self.module
        finally:
            self._engine.train()

    def _discovering(self) -> AbstractContextManager[None]:
        return discovering_parameters(self.module, is_partitioned=self.config.zero_stage == 3)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        with self._average.swapped(self.module) if self._average else nullcontext():
            yield

    def _share_buffers(self) -> None:
        """Averages running statistics (batch norm) over ranks: each saw its part of the data."""
        average_over_ranks(running_statistics(self.module))
        if self._average:
            average_over_ranks(self._average.statistics(self.module))

    def save(self, folder: Path, tag: str, state: dict[str, Any]) -> None:
        """Writes ``folder/tag``, from every rank together."""
        # Rank 0's are saved for all: a resumed run must begin with what this one goes on with.
        self._share_buffers()
        if self._average:
            state = {**state, "average": self._average.state()}
        if self._state:
            state = {**state, "objective": {n: t.cpu() for n, t in self._state.items()}}
        if self._momentum:
            state = {**state, "momentum": self._momentum.state()}
        self._engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)

    def load(self, folder: Path, tag: str, saved: SavedBy) -> dict[str, Any]:
        """Reads what `save` wrote, on every rank together, and returns the state given then.

        Raises:
            ConfigError: it was written with another ZeRO stage, or at stage 3 by another number of
                ranks.
        """
        check_layout(folder / tag, saved, self.config.zero_stage, self.module.precision)
        parts = parts_to_divide(folder / tag, saved)
        settings = [settings_of(group) for group in self._optimizer.param_groups]
        try:
            path, state = self._engine.load_checkpoint(
                str(folder), tag=tag, load_optimizer_states=not parts
            )
            if parts:
                load_parts(self._optimizer, parts)
        except (RuntimeError, LookupError, ValueError, AssertionError, OSError, EOFError,
                UnpicklingError) as error:  # fmt: skip
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"{folder / tag}: the checkpoint does not fit this run ({first}); resume with the "
                "same model, ZeRO stage and number of processes"
            ) from error
        if path is None:
            raise ConfigError(f"{folder / tag}: DeepSpeed cannot load this checkpoint")
        self._keep_settings(settings)
        average = state.pop("average", None)
        if self._average:
            self._average.load(average or WeightAverage.beginning(self.module))
        if self._momentum:
            self._momentum.load(state.pop("momentum", []))
        remembered = state.pop("objective", {})
        check_objective_state(folder / tag, remembered, self._state)
        self._state = {name: tensor.to(self.device) for name, tensor in remembered.items()}
        self._refresh_scale()
        return dict(state)

    def _keep_settings(self, settings: list[dict[str, Any]]) -> None:
        """Puts this run's settings in the place of those that DeepSpeed loads with the state."""
        for group, own in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(own)
        if hasattr(self._optimizer, "clip_grad"):
            self._optimizer.clip_grad = self.config.gradient_clipping

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Whole float32 weights of the open_clip model, averaged ones where they are kept.

        Adapters are merged into them. Every rank must call it: ZeRO gathers its partitions.
        """
        whole, adapters = self._whole(self.module.clip), self.module.adapters
        return whole if adapters is None else adapters.merged_weights(self.module.clip, whole)

    def adapted_state_dict(self) -> dict[str, torch.Tensor]:
        """The same with the weights and the adapters each by themselves; empty without adapters."""
        return {} if self.module.adapters is None else self._whole(self.module.clip)

    def heads_state_dict(self) -> dict[str, torch.Tensor]:
        """The same of the objective's heads; empty where there are none."""
        return self._whole(self.module.heads) if len(self.module.heads) else {}

    def _whole(self, part: nn.Module) -> dict[str, torch.Tensor]:
        self._share_buffers()
        with gathered(part, is_partitioned=self.config.zero_stage == 3), self._averaged():
            state = copied(part.state_dict())
        return state | masters_of(part, state) if self._has_masters else state


def _detached(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}
