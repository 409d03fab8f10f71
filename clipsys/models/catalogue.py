"""open_clip's pretrained models: what they take, what they reach, and which of them fit a budget.

Three tables come with the package, in ``tables/``. Each names its source in its first line::

    architectures.csv   parameters, GFLOP and activations, counted by `clipsys.models.counting`;
                        an architecture that is not there is counted when it is listed
    zero_shot.csv       published zero-shot accuracy on ImageNet, and the mean over 38 data sets
    languages.csv       published text to image recall@1 on Crossmodal-3600, by language
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipsys.errors import ConfigError
from clipsys.models.architectures import architecture_config, image_size_of

if TYPE_CHECKING:
    from clipsys.models.counting import Count

_TABLES = Path(__file__).parent / "tables"
ARCHITECTURES = _TABLES / "architectures.csv"
#: Columns of that table.
COUNTED = (
    *("name", "image_size", "image_parameters", "text_parameters"),
    *("image_gflop", "text_gflop", "activation_mb"),
)
#: Images that pass the tower together on a CPU; equal to `clipsys.inference.image_tower.CPU_CHUNK`,
#: which would import torch.
TOGETHER = 16
#: What --language says for any text tower that was trained on many languages.
MULTILINGUAL = "multilingual"
#: Parts of the names of tokenizers that only multilingual text towers have: XLM-R and XLM-V, NLLB,
#: mT5, the multilingual SigLIP, and SigLIP 2 (Gemma's tokenizer, WebLI in 109 languages).
_MULTILINGUAL_TOKENIZERS = ("xlm-", "nllb", "mt5", "i18n", "siglip2")
_QUICK = "-quickgelu"


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
        image_gflop, text_gflop: 1e9 operations for one image, and for one text of full length; a
            multiplication with its addition counts as two. None as above.
        memory_mb: the weights in float32, which is how they are stored in every precision, and the
            activations of 16 images, which pass the tower together on a CPU. Python and torch
            themselves are not counted.
        imagenet_top1, mean_38: published zero-shot accuracy on ImageNet, and its mean over 38 data
            sets; None where open_clip's tables have none.
        multilingual: whether the text tower was trained on many languages.
        language_recall: published text to image recall@1 on Crossmodal-3600 in the language that
            was asked for.
        images_per_s: estimate for this machine's CPU; None where nothing was measured.
        fits: whether it is within the budget; True where there is none.
        best: whether no other that fits reaches as much with fewer operations.
    """

    name: str
    dim: int
    image_size: int
    parameters: int | None
    size_mb: float | None
    tokenizer: str
    image_gflop: float | None = None
    text_gflop: float | None = None
    memory_mb: float | None = None
    imagenet_top1: float | None = None
    mean_38: float | None = None
    multilingual: bool = False
    language_recall: float | None = None
    images_per_s: float | None = None
    fits: bool = True
    best: bool = False


@dataclass(frozen=True)
class Budget:
    """What a model may take; None: any amount.

    Attributes:
        memory_mb: see `PretrainedModel.memory_mb`.
        images_per_s: how many images a second it must encode.
    """

    memory_mb: float | None = None
    images_per_s: float | None = None

    def admits(self, model: PretrainedModel) -> bool:
        """Whether a model is within the budget; one whose figure is not known is not."""
        if self.memory_mb is not None and not _at_most(model.memory_mb, self.memory_mb):
            return False
        speed = self.images_per_s
        return speed is None or (model.images_per_s is not None and model.images_per_s >= speed)


def pretrained_names(pattern: str = "") -> list[tuple[str, str]]:
    """(name, tag) of the weights whose ``NAME/TAG`` contains a text, whatever its case."""
    import open_clip

    pairs = open_clip.list_pretrained()
    return [pair for pair in pairs if pattern.lower() in "/".join(pair).lower()]


def pretrained_models(
    names: Sequence[tuple[str, str]], *, language: str = ""
) -> Iterator[PretrainedModel]:
    """What is known of each, in the order of the names.

    Args:
        names: as `pretrained_names` gives them.
        language: code of the language whose recall is wanted; empty for none.
    """
    for name, tag in names:
        config = architecture_config(name)
        text = config["text_cfg"]
        counted = count_of(name)
        source = _published_name(name, tag)
        accuracy = _table("zero_shot.csv").get((source, tag), {})
        recall = _table("languages.csv").get((source, tag), {})
        model = PretrainedModel(
            name=f"{name}/{tag}",
            dim=int(config["embed_dim"]),
            image_size=image_size_of(config)[0],
            parameters=None,
            size_mb=None,
            tokenizer=text.get("hf_tokenizer_name") or "",
            imagenet_top1=_number(accuracy.get("imagenet_top1")),
            mean_38=_number(accuracy.get("mean_38")),
            multilingual=_is_multilingual(name, text),
            language_recall=_number(recall.get(language)),
        )
        yield model if counted is None else _with_count(model, counted)


def check_language(language: str) -> None:
    """Refuses a language that nothing can be said of.

    Raises:
        ConfigError: it is neither ``multilingual`` nor one of those that figures exist for.
    """
    known = languages()
    if language not in ("", MULTILINGUAL, *known):
        raise ConfigError(
            f"--language {language}: no figures are published for it; known are "
            f"{', '.join(known)}, and {MULTILINGUAL} lists every model of many languages"
        )


def languages() -> list[str]:
    """Codes of the languages that recall is published for."""
    return [key for key in next(iter(_table("languages.csv").values())) if key not in _KEYS]


def speaks(model: PretrainedModel, language: str) -> bool:
    """Whether a model is listed for a language: multilingual by its tower, or measured in it."""
    return language in ("", "en") or model.multilingual or model.language_recall is not None


def ranked(models: Iterable[PretrainedModel], budget: Budget) -> list[PretrainedModel]:
    """Those that fit first, each part by what it reaches; the Pareto front of those is marked.

    What counts is the recall in the language that was asked for, where that is known, or the
    accuracy on ImageNet.
    """
    judged = [replace(model, fits=budget.admits(model)) for model in models]
    by_recall = any(model.language_recall is not None for model in judged)

    def reached(model: PretrainedModel) -> float | None:
        return model.language_recall if by_recall else model.imagenet_top1

    front = pareto_front([(one.image_gflop, reached(one), one.name) for one in judged if one.fits])
    return sorted(
        (replace(model, best=model.name in front) for model in judged),
        key=lambda model: (
            not model.fits,
            -(reached(model) or 0),
            model.size_mb is None,
            model.size_mb or 0,
            model.name,
        ),
    )


def pareto_front(models: Iterable[tuple[float | None, float | None, str]]) -> set[str]:
    """Names of those that no other one beats: no other reaches as much with less, or more with as
    little. Equal ones stand beside each other.

    Args:
        models: GFLOP an image, of which images a second follow; what it reaches; its name. One of
            which either is not known is not on the front.
    """
    known = [
        (gflop, -reached, name)
        for gflop, reached, name in models
        if gflop is not None and reached is not None
    ]
    front: set[str] = set()
    best = (0.0, float("inf"))  # the highest until here, from the cheapest on
    for gflop, error, name in sorted(known):
        if error < best[1] or (gflop, error) == best:
            best = (gflop, error)
            front.add(name)
    return front


def with_speed(models: Iterable[PretrainedModel], gflop_per_s: float) -> list[PretrainedModel]:
    """The same with images a second, at a rate of GFLOP a second."""
    return [
        replace(
            model, images_per_s=None if not model.image_gflop else gflop_per_s / model.image_gflop
        )
        for model in models
    ]


def measured_gflop_per_s() -> float | None:
    """What this machine's CPU computes in a second, of the products of ViT-B/32's image tower.

    Half a second once, then stored (`clipsys.probe`). None where measuring is switched off.
    """
    import torch
    from open_clip.model import CLIP

    from clipsys.models.devices import encoding_work
    from clipsys.probe.machine import available_cores
    from clipsys.probe.probing import probe

    config = architecture_config("ViT-B-32")
    with torch.device("meta"):
        model = CLIP(**config)
    figures = probe(encoding_work(model, "ViT-B-32", image_size_of(config), with_int8=False))
    if figures is None:
        return None
    rate = dict(figures.arrangements).get(figures.arrangement)
    return rate or figures.gflops[figures.precision] * min(
        available_cores(), figures.arrangement.threads
    )


# --- Tables ---------------------------------------------------------------------------------

_KEYS = ("name", "tag")


@cache
def count_of(name: str) -> Count | None:
    """What an architecture takes: from the table, or counted.

    None where the text tower is one of Hugging Face's, whose configuration the hub has.
    """
    from clipsys.models.counting import Count, count

    row = _table(ARCHITECTURES.name).get((name, ""))
    config = architecture_config(name)
    if row is not None and int(row["image_size"]) == image_size_of(config)[0]:
        return Count(
            int(row["image_parameters"]),
            int(row["text_parameters"]),
            *(float(row[key]) for key in ("image_gflop", "text_gflop", "activation_mb")),
        )
    return None if config["text_cfg"].get("hf_model_name") else count(config)


@cache
def _table(file: str) -> dict[tuple[str, str], dict[str, str]]:
    """A table by (name, tag)."""
    with (_TABLES / file).open(encoding="utf-8", newline="") as lines:
        next(lines)  # its source
        return {(row["name"], row.get("tag", "")): row for row in csv.DictReader(lines)}


def _published_name(name: str, tag: str) -> str:
    """The name under which the figures of the network that `clipsys.load` makes were published.

    Weights that were trained with QuickGELU are listed under architectures without it too, and
    `load` gives them their own activation: the figures are those of the name with -quickgelu.
    """
    from clipsys.models.loading import is_listed_with_other_activation

    plain = name.removesuffix(_QUICK)
    if not is_listed_with_other_activation(f"{plain}/{tag}"):
        return name
    quick = plain + _QUICK
    return quick if (quick, tag) in _table("zero_shot.csv") else plain


def _is_multilingual(name: str, text: dict[str, Any]) -> bool:
    words = f"{name} {text.get('hf_tokenizer_name') or ''}".lower()
    return any(word in words for word in _MULTILINGUAL_TOKENIZERS)


def _with_count(model: PretrainedModel, counted: Count) -> PretrainedModel:
    parameters = counted.image_parameters + counted.text_parameters
    return replace(
        model,
        parameters=parameters,
        size_mb=parameters * 4 / 1e6,
        image_gflop=counted.image_gflop,
        text_gflop=counted.text_gflop,
        memory_mb=parameters * 4 / 1e6 + TOGETHER * counted.activation_mb,
    )


def _number(text: str | None) -> float | None:
    return float(text) if text else None


def _at_most(value: float | None, limit: float) -> bool:
    return value is not None and value <= limit
