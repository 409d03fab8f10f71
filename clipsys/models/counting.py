"""What an architecture takes: counted on torch's meta device, without weights.

Operations are counted by torch's `FlopCounterMode`: those of matrix products, convolutions and
attention, a multiplication with its addition as two. Activations are counted by following which
intermediate tensors are alive after each operation.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from clipsys.models.architectures import complete_config, contrastive_pair, image_size_of


@dataclass(frozen=True)
class Count:
    """What the two towers of an architecture take.

    Attributes:
        image_parameters, text_parameters: numbers of weights.
        image_gflop, text_gflop: 1e9 operations for one image, and for one text of the context's
            full length.
        activation_mb: intermediate float32 values of one image that are alive at once, in MB.
    """

    image_parameters: int
    text_parameters: int
    image_gflop: float
    text_gflop: float
    activation_mb: float


def count(architecture: Mapping[str, Any], text_model: Mapping[str, Any] | None = None) -> Count:
    """Counts an architecture.

    Args:
        architecture: open_clip's ``model_cfg``.
        text_model: configuration of the text tower, where that is one of Hugging Face's.
    """
    config = contrastive_pair(architecture)
    length = int(complete_config(config)["text_cfg"]["context_length"])
    model = _on_meta(config, text_model)
    image_1CHW = torch.empty(1, 3, *image_size_of(config), device="meta")
    tokens_1L = torch.zeros(1, length, dtype=torch.long, device="meta")
    image_parameters = sum(one.numel() for one in model.visual.parameters())
    return Count(
        image_parameters,
        sum(one.numel() for one in model.parameters()) - image_parameters,
        _gflop(lambda: model.encode_image(image_1CHW)),
        # Hugging Face's mask of the padding depends on values, which meta tensors lack.
        _gflop(
            lambda: (
                model.encode_text(tokens_1L)
                if text_model is None
                else model.text.transformer(input_ids=tokens_1L)
            )
        ),
        _activation_mb(model, lambda: model.encode_image(image_1CHW)),
    )


def _on_meta(config: dict[str, Any], text_model: Mapping[str, Any] | None) -> Any:
    from open_clip.model import CLIP, CustomTextCLIP

    model_class: Any = CustomTextCLIP if config.pop("custom_text", False) else CLIP
    with tempfile.TemporaryDirectory(prefix="clipsys-count-") as folder, torch.device("meta"):
        if text_model is not None:
            model_class = CustomTextCLIP
            Path(folder, "config.json").write_text(json.dumps(dict(text_model)), encoding="utf-8")
            own = {"hf_model_name": folder, "hf_model_pretrained": False}
            config = {**config, "text_cfg": {**config["text_cfg"], **own}}
        # Weights that want a gradient make the counter follow gradients, which are off here.
        return model_class(**config).eval().requires_grad_(False)


def _gflop(forward: Callable[[], object]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return float(counter.get_total_flops()) / 1e9


def _activation_mb(model: Any, forward: Callable[[], object]) -> float:
    weights = {one.untyped_storage()._cdata for one in (*model.parameters(), *model.buffers())}
    alive = _Alive(weights)
    with torch.no_grad(), alive:
        forward()
    return alive.peak_bytes / 1e6


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of intermediate tensors; a tensor and its views count once."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._weights = weights
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self._alive = {
            key: (ref, size)
            for key, (ref, size) in self._alive.items()
            if not ref.expired()  # type: ignore[no-untyped-call]
        }
        for output in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(output, torch.Tensor):
                storage = output.untyped_storage()
                if storage._cdata not in self._weights:
                    self._alive[storage._cdata] = (
                        StorageWeakRef(storage),  # type: ignore[no-untyped-call]
                        storage.nbytes(),
                    )
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._alive.values()))
        return outputs
