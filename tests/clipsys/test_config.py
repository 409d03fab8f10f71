from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from clipsys.config import Settings, dump_settings, find_recipe, load_settings, shipped_recipes
from clipsys.errors import ConfigError


class Inner(Settings):
    batch_size: int = Field(8, ge=1)
    rate: float = 0.1


class Outer(Settings):
    data: Inner = Inner()
    name: str


def _file(folder: Path, text: str) -> Path:
    path = folder / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = _file(tmp_path, "name: x\ndata: {batch_size: 16}\n")
    settings = load_settings(Outer, path, ["data.rate=3e-4"])
    assert (settings.data.batch_size, settings.data.rate) == (16, 3e-4)
    assert load_settings(Outer, path, ["data.batch_size=4"]).data.batch_size == 4


def test_every_fault_is_reported_with_place_value_and_remedy(tmp_path: Path) -> None:
    path = _file(tmp_path, "data: {batchsize: 3, batch_size: 0}\nnam: x\n")
    with pytest.raises(ConfigError) as caught:
        load_settings(Outer, path, ["data.rate=fast"])
    lines = str(caught.value).splitlines()
    assert f"{path}: data.batchsize is not a setting; did you mean data.batch_size?" in lines
    assert f"{path}: nam is not a setting; did you mean name?" in lines
    assert f"{path}: name is missing" in lines
    assert any(line.startswith(f"{path}: data.batch_size is 0; ") for line in lines)
    assert any(line.startswith("command line: data.rate is 'fast'; ") for line in lines)


def test_a_key_in_the_wrong_section_is_found(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rate is not a setting; did you mean data\.rate\?"):
        load_settings(Outer, _file(tmp_path, "name: x\nrate: 1\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"a\.yaml:\d+: not valid YAML"),
        ("- 1", r"expected sections with settings"),
        ("name: x\nname: y\n", r"a\.yaml:2: the key 'name' occurs twice"),
        ("name: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_a_file_that_cannot_be_understood_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(Outer, _file(tmp_path, text))


@pytest.mark.parametrize("override", ["name", "=x", "data.=1", "name=[1"])
def test_an_override_that_is_none_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"expected section\.key=value|not valid YAML"):
        load_settings(Outer, {"name": "x"}, [override])


def test_the_callers_document_is_left_as_it_was() -> None:
    document = {"name": "x", "data": {"batch_size": 2}}
    load_settings(Outer, document, ["data.batch_size=4"])
    assert document == {"name": "x", "data": {"batch_size": 2}}


def test_the_dump_reads_back_to_the_same_settings(tmp_path: Path) -> None:
    settings = load_settings(Outer, {"name": "é", "data": {"rate": 1e-7}})
    assert load_settings(Outer, _file(tmp_path, dump_settings(settings))) == settings


def test_shipped_recipes_are_found_by_name() -> None:
    assert find_recipe("demo") == shipped_recipes()["demo"]
    with pytest.raises(ConfigError, match=r"no such recipe; did you mean demo\?"):
        find_recipe("demoo")
    with pytest.raises(ConfigError, match=r"shipped recipes: .*demo"):
        find_recipe("zzzzzz")


class Switch(Settings):
    on: bool = False
    text: str = ""
    pair: tuple[float, float] = (0.0, 1.0)


@pytest.mark.parametrize("word", ["yes", "on", "true", "2024-01-31", "1:30", ".nan", ".inf", "~"])
def test_what_is_no_number_is_refused_as_one(word: str) -> None:
    for name in ("data.batch_size", "data.rate"):
        with pytest.raises(ConfigError, match=rf"^command line: {name} is "):
            load_settings(Outer, {"name": "x"}, [f"{name}={word}"])
    with pytest.raises(ConfigError, match=r"pair.* is "):
        load_settings(Switch, {}, [f"pair=[{word}, 1]"])


def test_a_number_with_a_leading_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml:2: .*010 has a leading zero"):
        load_settings(Outer, _file(tmp_path, "name: x\ndata: {batch_size: 010}\n"))
    with pytest.raises(ConfigError, match="010 has a leading zero"):
        load_settings(Outer, {"name": "x"}, ["data.batch_size=010"])
    assert load_settings(Switch, {}, ["text='010'"]).text == "010"


@pytest.mark.parametrize(
    ("word", "number"),
    [("1_000", 1000), ("0x10", 16), ("+7", 7), ("0o17", 15), ("8.0", 8), ("1e3", 1000)],
)
def test_every_plain_way_to_write_a_number_is_read(word: str, number: int) -> None:
    assert (
        load_settings(Outer, {"name": "x"}, [f"data.batch_size={word}"]).data.batch_size == number
    )


def test_words_switch_switches_and_are_texts_elsewhere() -> None:
    settings = load_settings(Switch, {}, ["on=yes", "text=on"])
    assert (settings.on, settings.text) == (True, "on")
    assert load_settings(Switch, {}, ["text=2024-01-31"]).text == "2024-01-31"


def test_a_nested_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_settings(Outer, _file(tmp_path, "a: " + "[" * 5000))
