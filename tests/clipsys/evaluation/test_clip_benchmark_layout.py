"""The layout of CLIP benchmark's data sets: names of classes and templates beside the shards."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

import clipsys
from clipsys.errors import DataError
from clipsys.evaluation.class_names import prompt_templates
from clipsys.evaluation.measuring import evaluate
from clipsys.shards.reading import Sample
from clipsys.shards.writing import write_shards
from tests.conftest import encode_png, noise_image


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """Shards of six images of three numbered classes, of which two share a name."""
    samples = (
        Sample(f"{n}", encode_png(np.asarray(noise_image(n, (32, 32)))), "png", (), str(n % 3), {})
        for n in range(6)
    )
    write_shards(samples, tmp_path / "test")
    (tmp_path / "classnames.txt").write_text("missile\ncrane\nmissile\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}.\n\nmy {c}\n")
    return tmp_path


def test_names_and_templates_beside_the_shards_are_used(
    benchmark: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = clipsys.load(model_folder)
    with caplog.at_level(logging.INFO, "clipsys"):
        (found,) = evaluate(encoder, "zeroshot", benchmark / "test", cache=False)
        (whole,) = evaluate(encoder, "zeroshot", benchmark, cache=False)
    assert "2 templates are used" in caplog.text
    templates = ["a {}.", "my {}"]
    (named,) = evaluate(encoder, "zeroshot", benchmark / "test", templates=templates, cache=False)
    assert found.metrics() == named.metrics() == whole.metrics()
    # No prompt tells classes of one name apart.
    assert "labels 0 and 2 are both called 'missile', and count as one class" in caplog.text
    assert found.counts["classes"] == 2


def test_templates_are_read_line_by_line(benchmark: Path) -> None:
    assert prompt_templates([benchmark / "test"]) == ["a {}.", "my {}"]
    (benchmark / "zeroshot_classification_templates.txt").write_text("\n")
    with pytest.raises(DataError, match="has no templates"):
        prompt_templates([benchmark / "test"])
    (benchmark / "zeroshot_classification_templates.txt").unlink()
    assert prompt_templates([benchmark / "test"]) == []
