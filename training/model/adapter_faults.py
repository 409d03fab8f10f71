"""Adapters of a recipe that would not be trained, or beside something that they do not go with."""

from __future__ import annotations

from collections.abc import Iterator

from clipsys.training.model.initial import ModelConfig
from clipsys.training.model.layers import Tower


def adapter_faults(
    model: ModelConfig,
    *,
    objective_name: str,
    precision: str,
    trains_images: bool,
    trains_text: bool,
) -> Iterator[str]:
    """What is wrong with ``model.lora``, each fault with its remedy.

    Args:
        model: the recipe's section.
        objective_name: of the objective, for messages.
        precision: ``engine.precision``.
        trains_images: whether the objective trains the image tower.
        trains_text: whether it trains the text tower.
    """
    lora = model.lora
    if lora is None:
        return
    trained: dict[Tower, bool] = {"image": trains_images, "text": trains_text}
    left = [tower for tower in lora.towers if trained[tower]]
    for tower in lora.towers:
        if not trained[tower]:
            remedy = f"set model.lora.towers: [{', '.join(left)}]" if left else "leave lora out"
            yield (
                f"model.lora.towers names {tower}, and objective.name {objective_name} trains no "
                f"{tower}; {remedy}"
            )
        place, unlocked, is_free = _unlocked(model, tower)
        if is_free:
            number = "null" if unlocked is None else unlocked
            yield (
                f"model.{place} is {number}, and model.lora freezes the {tower} tower beside its "
                f"adapters; set model.{place} to 0, or leave {tower} out of model.lora.towers"
            )
    if not model.begins_with_weights:
        yield (
            "model.lora adapts weights that were trained before, and these would be random; set "
            "model.pretrained"
        )
    if lora.quantised and precision in ("bf16_params", "fp16"):
        yield (
            f"model.lora.quantised holds the frozen weights in 4 bits, and engine.precision "
            f"{precision} the rest in 16; use fp32 or bf16"
        )


def _unlocked(model: ModelConfig, tower: Tower) -> tuple[str, int | None, bool]:
    """The setting that unlocks a tower's weights, its value, and whether it unlocks any."""
    if model.towers is not None:
        blocks = model.towers[tower == "text"].unlocked_blocks
        return f"{tower}_tower.unlocked_blocks", blocks, blocks != 0
    place = f"unlocked_{tower}_blocks"
    blocks = getattr(model, place)
    return place, blocks, bool(blocks)
