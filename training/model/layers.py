"""The layers of a tower: which parameters stand how far from its output."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from torch import nn

from clipsys.errors import ConfigError

Tower = Literal["image", "text"]

#: Parameters that belong to no tower.
TEMPERATURE_NAMES = ("logit_scale", "logit_bias")


#: Beginnings of the names of heads, by tower: timm's, those of open_clip's own transformers, its
#: attention pool; Hugging Face's, and open_clip's.
HEADS: dict[Tower, tuple[str, ...]] = {
    "image": ("visual.head.", "visual.proj", "visual.attnpool.c_proj."),
    "text": ("text.proj.", "text.text_projection", "text_projection"),
}


class _Layers(NamedTuple):
    """How the names of a tower's parameters tell their layer; each is matched at the start."""

    bottom: str
    block: str
    top: str


_TRANSFORMER_BLOCK = r"transformer\.resblocks\.(\d+)\."
_IMAGE_TOWERS = (
    _Layers(
        bottom=r"conv1\.|class_embedding|positional_embedding|ln_pre\.",
        block=_TRANSFORMER_BLOCK,
        top=r"ln_post\.|proj$|attn_pool",
    ),
    _Layers(bottom=r"(conv|bn)[123]\.", block=r"layer(\d+)\.(\d+)\.", top=r"attnpool\."),
)
_TEXT_TOWERS = (
    _Layers(
        bottom=r"token_embedding\.|positional_embedding|cls_emb",
        block=_TRANSFORMER_BLOCK,
        top=r"ln_final\.|text_projection",
    ),
    # Hugging Face's: BERT and RoBERTa, the encoders of mT5 and of M2M100 (NLLB).
    _Layers(
        bottom=r"transformer\.embeddings\.",
        block=r"transformer\.encoder\.layer\.(\d+)\.",
        top=r"transformer\.pooler\.|proj\.",
    ),
    _Layers(
        bottom=r"transformer\.embed_tokens\.",
        block=r"transformer\.block\.(\d+)\.",
        top=r"transformer\.final_layer_norm\.|proj\.",
    ),
    _Layers(
        bottom=r"transformer\.(embed_tokens|embed_positions|layernorm_embedding)\.",
        block=r"transformer\.layers\.(\d+)\.",
        top=r"transformer\.layer_norm\.|proj\.",
    ),
)


def tower_depths(clip: nn.Module, tower: Tower, *, setting: str) -> dict[str, int]:
    """The layer of each parameter of a tower, counted from the top: 0 is the projection.

    The last block is 1, the first of n blocks n, what feeds it (patches, tokens, positions) n + 1,
    as in BEiT (Bao et al. 2022). ``logit_scale`` and ``logit_bias`` are in no tower.

    Args:
        clip: open_clip's CLIP or CustomTextCLIP.
        tower: ``image`` or ``text``.
        setting: what needs to know, for the error's message.

    Raises:
        ConfigError: the tower's structure is not known.
    """
    names = [name for name, _ in clip.named_parameters() if name not in TEMPERATURE_NAMES]
    depths: dict[str, int] | None = None
    if tower == "image":
        module = getattr(clip, "visual", clip)
        if hasattr(module, "trunk"):
            depths = _timm_depths(module)
        own = [name for name in names if name.startswith("visual.")]
        if depths is None:
            depths = _tower_depths("visual.", own, _IMAGE_TOWERS)
    else:
        module = getattr(clip, "text", clip)
        own = [name for name in names if not name.startswith("visual.")]
        depths = _tower_depths("text." if hasattr(clip, "text") else "", own, _TEXT_TOWERS)
    if depths is None and own and all(name.startswith(HEADS[tower]) for name in own):
        depths = dict.fromkeys(own, 0)  # the head of a tower whose features are stored
    if depths is None:
        raise _unknown_layers(tower, module, setting)
    return depths


def _unknown_layers(tower: str, module: Any, setting: str) -> ConfigError:
    trunk = getattr(module, "trunk", None) or getattr(module, "transformer", None) or module
    return ConfigError(
        f"{setting}: the layers of the {tower} tower ({type(module).__name__} around "
        f"{type(trunk).__name__}) are not known; expected open_clip's own transformers, its "
        f"ResNet, a timm trunk or a Hugging Face encoder; set {setting} to null"
    )


def _tower_depths(
    prefix: str, names: Iterable[str], structures: Iterable[_Layers]
) -> dict[str, int] | None:
    """Depths by the first structure that explains every name; None if none does."""
    for layers in structures:
        places = {name: _place(name.removeprefix(prefix), layers) for name in names}
        if None not in places.values():
            return _count_from_top({name: place for name, place in places.items() if place})
    return None


def _place(name: str, layers: _Layers) -> tuple[int, ...] | None:
    """Sorts from the bottom (0,) over the blocks (1, i) to the top (2,)."""
    if re.match(layers.bottom, name):
        return (0,)
    if re.match(layers.top, name):
        return (2,)
    block = re.match(layers.block, name)
    return (1, *map(int, block.groups())) if block else None


def _timm_depths(visual: Any) -> dict[str, int] | None:
    from timm.models import group_parameters

    if not hasattr(visual.trunk, "group_matcher"):
        return None
    # timm counts the final norm to the last block, and the classifier, if any, one above it.
    layer_of = group_parameters(
        visual.trunk, visual.trunk.group_matcher(coarse=False), reverse=True
    )
    places: dict[str, tuple[int, ...]] = {
        f"visual.trunk.{name}": (0, layer) for name, layer in layer_of.items()
    }
    places |= {f"visual.head.{name}": (1,) for name, _ in visual.head.named_parameters()}
    return _count_from_top(places)


def _count_from_top(places: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    ordered = sorted(set(places.values()), reverse=True)
    depth_of = {place: depth for depth, place in enumerate(ordered)}
    return {name: depth_of[place] for name, place in places.items()}
