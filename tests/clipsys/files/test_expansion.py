from __future__ import annotations

from pathlib import Path

import pytest

from clipsys.config import PathText, Settings, load_settings
from clipsys.errors import ConfigError
from clipsys.files.expansion import expand_path
from clipsys.shards.reading import expand_shards


def test_variables_and_the_home_folder_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_path("$DATA/a-{0..3}.tar") == "/data/a-{0..3}.tar"
    assert expand_path("${DATA}x") == "/datax"
    assert expand_path("~/a") == "/home/me/a"
    assert expand_path("s3://bucket/a$5") == "s3://bucket/a$5"


def test_a_variable_that_is_not_set_is_named() -> None:
    with pytest.raises(ConfigError, match=r"\$NOWHERE/a: the environment variable NOWHERE is not"):
        expand_path("$NOWHERE/a")


def test_a_setting_that_is_a_path_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Section(Settings):
        output: PathText | list[PathText]

    monkeypatch.setenv("RUNS", "/runs")
    assert load_settings(Section, {"output": ["$RUNS/a"]}).output == ["/runs/a"]
    with pytest.raises(ConfigError) as caught:
        load_settings(Section, {}, ["output=$NOWHERE/a"])
    assert str(caught.value) == (
        "command line: output is '$NOWHERE/a'; $NOWHERE/a: the environment variable NOWHERE is "
        "not set"
    )


@pytest.mark.parametrize("name", ["[2024]", "a{1,2}", "what?", "$x", "a*b"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    shard = folder / "[0].tar"
    shard.touch()
    assert expand_shards(folder) == [str(shard)]
    assert expand_shards(shard) == [str(shard)]
    if "{" not in name and "$" not in name:
        assert expand_shards(str(folder / "*.tar")) == [str(shard)]
