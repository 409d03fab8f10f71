from __future__ import annotations

from pathlib import Path

import pytest

from clipsys.errors import DataError
from clipsys.evaluation.class_names import class_names


def _names(labels: list[str], folder: Path, file: str | None = None) -> dict[str, str]:
    return class_names(labels, [folder], file=file, setting="evaluation.classnames")


def test_labels_that_are_names_stay(tmp_path: Path) -> None:
    assert _names(["dog", "7", "dog"], tmp_path) == {"7": "7", "dog": "dog"}


def test_numbers_are_refused_unless_something_names_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels are numbers \(0, 7\).*evaluation\.classnames"):
        _names(["7", "0"], tmp_path)


@pytest.mark.parametrize("place", ["inner", "."])
def test_a_file_beside_the_data_names_them(tmp_path: Path, place: str) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / place / "classnames.txt").write_text("cat\ndog\nfish \n\n", encoding="utf-8")
    expected = {"0": "cat", "01": "dog", "2": "fish"}  # a class without an image is a candidate
    assert _names(["0", "01"], tmp_path / "inner") == expected


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("cat\ndog\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"names\.txt: has no name for class 2 \(line 3\)"):
        _names(["0", "2"], tmp_path, str(path))
    with pytest.raises(DataError, match="does nothing: labels such as 'cat' are names already"):
        _names(["cat"], tmp_path, str(path))
    with pytest.raises(DataError, match="cannot be read"):
        _names(["0"], tmp_path, str(tmp_path / "gone.txt"))
