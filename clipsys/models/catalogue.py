"""open_clip's pretrained models, with what they take of memory.

Sizes are counted, not remembered: each architecture is built on torch's meta device, which takes a
tenth of a second and no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from clipsys.models.architectures import architecture_config, contrastive_pair, image_size_of


@dataclass(frozen=True)
class PretrainedModel:
    """One set of weights.

    Attributes:
        name: ``NAME/TAG``, as `clipsys.load` takes it.
        dim: width of the embeddings.
        image_size: side in pixels of the images that it sees.
        parameters: number of them; None where the hub has to be asked for the text tower.
        size_mb: size of the weights in float32, in MB; None likewise.
        tokenizer: where a tokenizer of Hugging Face comes from; empty for CLIP's own.
    """

    name: str
    dim: int
    image_size: int
    parameters: int | None
    size_mb: float | None
    tokenizer: str


def pretrained_names(pattern: str = "") -> list[tuple[str, str]]:
    """(name, tag) of the weights whose ``NAME/TAG`` contains a text, whatever its case."""
    import open_clip

    pairs = open_clip.list_pretrained()
    return [pair for pair in pairs if pattern.lower() in "/".join(pair).lower()]


def pretrained_models(names: list[tuple[str, str]]) -> Iterator[PretrainedModel]:
    """What is known of each, in the order of the names."""
    for name, tag in names:
        config = architecture_config(name)
        count = _count_parameters(name)
        yield PretrainedModel(
            name=f"{name}/{tag}",
            dim=int(config["embed_dim"]),
            image_size=image_size_of(config)[0],
            parameters=count,
            size_mb=None if count is None else count * 4 / 1e6,
            tokenizer=config["text_cfg"].get("hf_tokenizer_name") or "",
        )


@cache
def _count_parameters(name: str) -> int | None:
    import torch
    from open_clip.model import CLIP, CustomTextCLIP

    config = contrastive_pair(architecture_config(name))
    if config["text_cfg"].get("hf_model_name"):
        return None
    model_class: Any = CustomTextCLIP if config.pop("custom_text", False) else CLIP
    with torch.device("meta"):
        model = model_class(**config)
    return int(sum(parameter.numel() for parameter in model.parameters()))
