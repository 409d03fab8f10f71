from __future__ import annotations

import io
from dataclasses import replace

import pytest
from PIL import Image

from clipsys.evaluation.comparison import compare
from clipsys.evaluation.reports.canvas import short_name
from clipsys.evaluation.reports.plots import comparison_plot, overview_plots, plots_of
from clipsys.evaluation.results import CurveDetails, Figure, Result
from tests.clipsys.evaluation.reports.made import HOSTILE, classification, curves, retrieval

RESULTS = {
    "one class, one image": classification(["only"], wrong=False),
    "two classes": classification(),
    "ten images, no mistake": classification(images=10, wrong=False),
    "no probabilities": classification(reliability=False),
    "forty classes with names": classification([f"class {n}" for n in range(40)]),
    "a thousand classes": classification([f"class {n}" for n in range(1000)]),
    "classes without images": classification(["a", "b", "c"], images=1),
    "hostile names": classification(HOSTILE),
    "retrieval": retrieval(),
    "no misses": retrieval(misses=False),
    "one line": curves(1),
    "few shots": curves(1, axis="shots"),
    "four lines": curves(4),
    "nine lines": curves(9),
    "eleven lines without intervals": curves(11, interval=False),
}


@pytest.mark.parametrize("what", RESULTS)
def test_every_kind_of_result_has_pictures_of_a_readable_size(what: str) -> None:
    plots = plots_of(RESULTS[what])
    assert plots
    for plot in plots:
        with Image.open(io.BytesIO(plot.png)) as picture:
            picture.load()
            assert 300 < picture.width < 1300
            assert 150 < picture.height < 1600
            colours = picture.convert("RGB").getcolors(1 << 20)
        assert colours is not None
        assert len(colours) > 20  # something is drawn


def test_results_without_details_have_no_plot() -> None:
    assert plots_of(Result("neighbours", "A", "data", "", {"cosine@1": Figure(0.5, 2)})) == []


def test_the_same_result_gives_the_same_bytes() -> None:
    first, again = plots_of(curves(3)), plots_of(curves(3))
    assert [one.png for one in first] == [one.png for one in again]


def test_a_line_without_a_value_leaves_a_gap() -> None:
    result = curves(2)
    details = result.details
    assert isinstance(details, CurveDetails)
    nothing = [(0.0, Figure(0.8, 9)), (1.0, Figure(float("nan"), 0)), (2.0, Figure(0.7, 9))]
    lines = {**details.lines, "gaps": nothing}
    assert plots_of(replace(result, details=replace(details, lines=lines)))


def test_differences_are_drawn_with_and_without_intervals() -> None:
    first, second = classification(images=9), classification(images=9, model="B", wrong=False)
    found = compare(first, second)
    one = found.differences["accuracy@1"]
    bare = replace(found, differences={"accuracy@1": replace(one, interval=None)})
    assert comparison_plot(found).png != comparison_plot(bare).png


def test_overviews_compare_several_models_on_one_task_alone() -> None:
    first, second = classification(), classification(model="B")
    assert overview_plots([first]) == []
    assert overview_plots([first, retrieval()]) == []
    other = replace(retrieval(), model="B")
    plots = overview_plots([first, retrieval(), second, other])
    assert [one.title for one in plots] == [
        "accuracy@1 of all models, zeroshot",
        "text_to_image/recall@1 of all models, retrieval",
    ]


def test_names_on_axes_have_no_sign_that_the_font_lacks() -> None:
    assert short_name("naïve $x$ <b>") == "naïve $x$ <b>"
    assert short_name("a猫") == "a□"
    assert short_name("नमस्ते", "class 3") == "class 3"
    assert short_name("日本 語", "class 4") == "class 4"
    assert short_name("red\x1b[31m") == "red\\x1b[31m"
    assert len(short_name("long " * 20)) == 24
