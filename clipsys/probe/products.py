"""The products and convolutions of a tower, recorded without computing them.

The tower runs once on tensors that have shapes and no values (torch's ``meta`` device), and every
product that reaches torch's kernels is noted. So no list of architectures is needed, and half a
gigabyte of weights is neither read nor copied.

B images or texts, C channels, H x W pixels, L tokens; a product is (rows, inputs) x (inputs,
outputs).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

_logger = logging.getLogger(__name__)

#: Rows of a product, or pairs of matrices, that a smaller piece keeps: with fewer, a kernel is
#: another one.
_MIN_ROWS = 32
#: The same products with something added, which comes first.
_WITH_SUM = {"addmm": "mm", "baddbmm": "bmm"}
#: Different shapes that are measured; those that most of the work goes into.
_MAX_SHAPES = 8


@dataclass(frozen=True)
class Product:
    """One shape of product of a tower.

    Attributes:
        left: (rows, inputs); (pairs, rows, inputs) of attention; (B, C, H, W) of a convolution.
        right: (inputs, outputs); (pairs, inputs, outputs); (O, C / groups, height, width).
        convolution: stride, padding, dilation and groups; None for the others.
        count: how often the tower computes it.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    convolution: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int] | None = None
    count: int = 1

    @property
    def is_linear(self) -> bool:
        """Whether the right side is a weight that all rows are multiplied with."""
        return self.convolution is None and len(self.left) == 2

    @property
    def flops(self) -> int:
        """Floating-point operations of one of them."""
        if self.convolution is None:
            return 2 * math.prod(self.left) * self.right[-1]
        stride, padding, dilation, _ = self.convolution
        outputs = [
            (size + 2 * pad - wide * (kernel - 1) - 1) // step + 1
            for size, kernel, step, pad, wide in zip(
                self.left[2:], self.right[2:], stride, padding, dilation, strict=True
            )
        ]
        return 2 * self.left[0] * math.prod(outputs) * math.prod(self.right)

    def cut(self, flops: float) -> Product:
        """The same with fewer rows or images, so that one takes about so much."""
        smallest = 1 if self.convolution else _MIN_ROWS
        rows = int(self.left[0] * min(1.0, flops / self.flops))
        rows = min(self.left[0], max(smallest, rows))
        right = self.right if len(self.right) != 3 else (rows, *self.right[1:])
        return replace(self, left=(rows, *self.left[1:]), right=right)


def largest(products: Iterable[Product]) -> list[Product]:
    """The shapes that most of the work goes into, the largest share first."""
    return sorted(products, key=lambda one: -one.flops * one.count)[:_MAX_SHAPES]


def record(model: nn.Module, forward: Callable[[Any], object]) -> tuple[Product, ...]:
    """The products of one call; none where the model cannot run without values.

    Args:
        model: stays as it is.
        forward: runs the model that it is given on inputs of the ``meta`` device.
    """
    shapes = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    was_training = model.training
    model.eval()
    recorder = _Recorder()
    try:
        with torch.no_grad(), recorder:
            functional_call(
                _Wrapped(model, forward), {f"model.{name}": one for name, one in shapes.items()}, ()
            )
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        _logger.debug("this tower cannot be recorded (%s)", first)
        return ()
    finally:
        model.train(was_training)
    return tuple(replace(one, count=count) for one, count in recorder.found.items())


class _Wrapped(nn.Module):
    """Lets `functional_call` replace the weights for any call, not only for ``forward``."""

    def __init__(self, model: nn.Module, call: Callable[[Any], object]) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self) -> object:
        return self._call(self.model)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[Product] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        product = _product(func.overloadpacket.__name__, args)
        if product is not None and product.flops:
            self.found[product] += 1
        return func(*args, **(kwargs or {}))


def _product(name: str, args: tuple[Any, ...]) -> Product | None:
    if name in _WITH_SUM:
        name, args = _WITH_SUM[name], args[1:]
    if name == "convolution":
        left, right, _, stride, padding, dilation, transposed, _, groups = args
        if transposed or left.dim() != 4:
            return None
        options = (tuple(stride), tuple(padding), tuple(dilation), int(groups))
        return Product(tuple(left.shape), tuple(right.shape), options)
    if name not in ("mm", "bmm"):
        return None
    left, right = args[:2]
    if name == "bmm" and right.stride(0) == 0:  # one weight for all
        return Product((left.shape[0] * left.shape[1], left.shape[2]), tuple(right.shape[1:]))
    return Product(tuple(left.shape), tuple(right.shape))
