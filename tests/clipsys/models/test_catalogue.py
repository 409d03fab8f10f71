from __future__ import annotations

import re
from pathlib import Path

import pytest

from clipsys.commands.models import _megabytes
from clipsys.errors import ConfigError
from clipsys.models.architectures import architecture_config
from clipsys.models.catalogue import (
    TOGETHER,
    Budget,
    PretrainedModel,
    check_language,
    count_of,
    languages,
    pareto_front,
    pretrained_models,
    pretrained_names,
    ranked,
)
from clipsys.models.counting import count


@pytest.mark.parametrize(
    ("name", "image_gflop", "text_gflop", "million"),
    [
        ("ViT-B-32", 8.82, 5.96, 151.28),
        ("RN50", 12.22, 5.96, 102.01),
        ("ViT-B-16-SigLIP", 35.42, 11.02, 203.16),
    ],
)
def test_counts_are_open_clips_published_ones(
    name: str, image_gflop: float, text_gflop: float, million: float
) -> None:
    counted = count(architecture_config(name))
    assert counted.image_gflop == pytest.approx(image_gflop, rel=0.005)
    assert counted.text_gflop == pytest.approx(text_gflop, rel=0.005)
    total = counted.image_parameters + counted.text_parameters
    assert total / 1e6 == pytest.approx(million, abs=0.01)
    stored = count_of(name)
    assert stored is not None and stored.image_gflop == pytest.approx(counted.image_gflop, abs=1e-3)
    assert stored.image_parameters == counted.image_parameters


def test_activations_pass_together_as_many_as_the_encoder_takes() -> None:
    from clipsys.inference.image_tower import CPU_CHUNK

    assert TOGETHER == CPU_CHUNK


def test_figures_are_those_of_the_network_that_load_makes() -> None:
    def top1(name: str) -> float | None:
        (model,) = pretrained_models(pretrained_names(name))
        return model.imagenet_top1

    assert top1("ViT-B-32/openai") == top1("ViT-B-32-quickgelu/openai") == 0.6332
    assert top1("ViT-B-16-SigLIP2/webli") is None


def _model(name: str, gflop: float | None, top1: float | None, mb: float = 1) -> PretrainedModel:
    return PretrainedModel(
        name, 1, 1, 1, mb, "", image_gflop=gflop, imagenet_top1=top1, memory_mb=mb
    )


def test_the_front_holds_what_no_other_beats() -> None:
    rows = [(1, 0.5, "a"), (2, 0.4, "b"), (2, 0.7, "c"), (2, 0.7, "d"), (None, 1.0, "e")]
    assert pareto_front(rows) == {"a", "c", "d"}
    assert pareto_front([]) == set()


def test_those_that_fit_come_first_and_only_they_are_on_the_front() -> None:
    models = [_model("big", 9, 0.9, 900), _model("low", 1, 0.3), _model("good", 2, 0.6)]
    found = ranked(models, Budget(memory_mb=100))
    assert [(one.name, one.fits, one.best) for one in found] == [
        ("good", True, True), ("low", True, True), ("big", False, False),
    ]  # fmt: skip
    assert not any(one.fits for one in ranked(models, Budget(images_per_s=1)))


def test_sizes_and_languages_are_checked() -> None:
    assert _megabytes("4GB") == 4000
    assert _megabytes("1.5 GiB") == pytest.approx(1610.6, abs=0.1)
    assert _megabytes("500") == 500
    for wrong in ("4XB", "much", "0GB", "-1MB"):
        with pytest.raises(ConfigError, match="is no size above 0; expected a number and a unit"):
            _megabytes(wrong)
    with pytest.raises(ConfigError, match="--language xx: no figures are published"):
        check_language("xx")


def test_the_figures_of_the_page_on_models_are_those_of_the_tables() -> None:
    page = Path(__file__).parents[3] / "docs" / "models.md"
    rows = re.findall(r"^\| `([^/`]+)/([^`]+)` \| (\d.*) \|$", page.read_text(), re.MULTILINE)
    assert len(rows) > 15
    recalls: dict[str, list[float]] = {language: [] for language in languages()}
    for language, found in recalls.items():
        models = pretrained_models([(name, tag) for name, tag, _ in rows], language=language)
        found += [100 * (model.language_recall or 0) for model in models]
    models = pretrained_models([(name, tag) for name, tag, _ in rows])
    for number, (model, (_, _, written)) in enumerate(zip(models, rows, strict=True)):
        assert model.parameters and model.image_gflop and model.memory_mb
        mean = sum(found[number] for found in recalls.values()) / len(recalls)
        expected = [
            *(f"{model.image_size}", f"{model.parameters / 1e6:.0f}", f"{model.image_gflop:.1f}"),
            f"{model.memory_mb:,.0f}",
            *(f"{100 * (one or 0):.1f}" for one in (model.imagenet_top1, model.mean_38)),
            *(f"{recalls['en'][number]:.1f}", f"{mean:.1f}"),
        ]
        assert written.split(" | ") == expected, model.name
