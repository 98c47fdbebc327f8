from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asn_rl.backends import BackendConfig
from asn_rl.config import changes, describe, from_dict, load_config, save_config, to_dict
from asn_rl.errors import ConfigError, InvalidValue
from asn_rl.job import JobConfig
from asn_rl.rewards.compose import RewardConfig
from asn_rl.rollout import RolloutConfig


@dataclass(frozen=True)
class Wheel:
    """One wheel."""

    size: float = 28.0
    """inches"""
    spokes: int = 32
    """count"""


@dataclass(frozen=True)
class Bicycle:
    """A bicycle."""

    name: str = "mule"
    """what it is called"""
    kind: Literal["road", "cargo"] = "cargo"
    """what it is for"""
    electric: bool = False
    """has a motor"""
    range_km: float | None = None
    """null: none"""
    front: Wheel = field(default_factory=Wheel)
    """the front wheel"""
    spares: tuple[Wheel, ...] = ()
    """wheels on the rack"""
    sidecar: Wheel | None = None
    """the third wheel"""
    tags: list[str] = field(default_factory=list)
    """free text"""
    extra: dict[str, Any] = field(default_factory=dict)
    """anything"""

    def __post_init__(self) -> None:
        if self.range_km is not None and self.range_km < 0:
            raise InvalidValue("range_km", self.range_km, ">= 0")


def load(*overrides: str) -> Bicycle:
    return load_config(Bicycle, None, overrides)


def test_without_file_and_overrides_there_are_the_defaults():
    assert load() == Bicycle()
    assert from_dict(Bicycle, {}) == Bicycle()


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path):
    path = tmp_path / "bicycle.yaml"
    path.write_text("name: donkey\nfront: {spokes: 36}\nspares: [{size: 20}]\nextra: {paint: {color: red}}\n")
    config = load_config(Bicycle, path, ["front.size=26", "extra.paint.shine=2", "tags=[old, fast]"])
    assert config == Bicycle(
        name="donkey",
        front=Wheel(26.0, 36),
        spares=(Wheel(20.0),),
        tags=["old", "fast"],
        extra={"paint": {"color": "red", "shine": 2}},
    )


def test_an_empty_file_holds_the_defaults(tmp_path: Path):
    (tmp_path / "empty.yaml").touch()
    assert load_config(Bicycle, tmp_path / "empty.yaml") == Bicycle()


@pytest.mark.parametrize(
    ("values", "place", "guess"),
    [
        ({"nmae": "x"}, "'nmae'", "'name'"),
        ({"front": {"spoke": 3}}, "'spoke' in 'front'", "'spokes'"),
        ({"spares": [{}, {"sizes": 3}]}, "'sizes' in 'spares[1]'", "'size'"),
        ({"sidecar": {"siez": 3}}, "'siez' in 'sidecar'", "'size'"),
    ],
)
def test_a_misspelt_key_fails_at_any_depth_with_a_suggestion(values: dict[str, Any], place: str, guess: str):
    with pytest.raises(ConfigError) as caught:
        from_dict(Bicycle, values)
    assert f"unknown key {place}; did you mean {guess}? Allowed:" in str(caught.value)


def test_a_key_like_no_other_fails_without_a_guess():
    with pytest.raises(ConfigError, match="unknown key 'zzz' Allowed: electric, extra, front"):
        load("zzz=1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("front=3", "front must be a mapping of keys, got 3"),
        ("front.spokes=3.5", "front.spokes must be a value of type int, got 3.5"),
        ("front.spokes=true", "front.spokes must be a value of type int, got True"),
        ("front.size=true", "front.size must be a value of type float, got True"),
        ("front.size=wide", "front.size must be a number, got 'wide'"),
        ("front.size=nan", "front.size must be a number, got 'nan'"),
        ("front.size=.nan", "front.size must be a number, got nan"),
        ("electric=1", "electric must be a value of type bool, got 1"),
        ("name=7", "name must be a value of type str, got 7"),
        ("kind=boat", "kind must be one of 'road', 'cargo', got 'boat'"),
        ("tags=fast", "tags must be a list, got 'fast'"),
        ("tags=[1]", r"tags\[0\] must be a value of type str, got 1"),
        ("spares=[3]", r"spares\[0\] must be a mapping of keys, got 3"),
        ("extra=3", "extra must be a mapping, got 3"),
        ("range_km=far", "range_km must be float or null, got 'far'"),
        ("sidecar=3", "sidecar must be Wheel or null, got 3"),
        ("name=null", "name must be a value of type str, got None"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_is_allowed(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load(override)


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1.0e-3", "'1e-3'"])
def test_a_number_in_scientific_notation_is_a_number(text: str):
    assert load(f"range_km={text}").range_km == 1e-3


def test_integers_become_floats_where_floats_are_meant():
    assert isinstance(load("front.size=20").front.size, float)


def test_null_is_a_value_of_its_own():
    assert load("range_km=3", "range_km=null").range_km is None


def test_a_value_out_of_range_is_refused_with_its_section():
    with pytest.raises(ConfigError, match=r"configuration: range_km must be >= 0, got -1\.0"):
        load("range_km=-1")
    with pytest.raises(ConfigError, match="rollout: max_new_tokens must be >= 1, got 0"):
        load_config(JobConfig, None, ["rollout.max_new_tokens=0", "rewards=[{function: numeric_answer}]"])


def test_a_missing_required_key_is_named_with_its_place():
    with pytest.raises(ConfigError, match=r"heuristics\[0\]: .*'name'"):
        from_dict(JobConfig, {"heuristics": [{}]})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name", "not of the form key.path=value"),
        ("=3", "not of the form key.path=value"),
        ("name=[1", "is not YAML"),
        ("name.first=x", "unknown key|must be"),
    ],
)
def test_an_override_that_cannot_be_read_is_quoted(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load(override)


def test_an_override_below_a_plain_value_is_refused(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError, match=r"'name\.first': 'name' is not a section"):
        load_config(Bicycle, tmp_path / "a.yaml", ["name.first=y"])


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"{a: [", b"\xff\xfe\x00", None])
def test_a_file_that_holds_no_configuration_is_named(tmp_path: Path, content: bytes | None):
    path = tmp_path / "broken.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(Bicycle, path)


bicycles = st.builds(
    Bicycle,
    name=st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])),
    kind=st.sampled_from(["road", "cargo"]),
    electric=st.booleans(),
    range_km=st.none() | st.floats(0, allow_nan=False),
    front=st.builds(Wheel, st.floats(allow_nan=False), st.integers()),
    spares=st.lists(st.builds(Wheel, st.floats(allow_nan=False), st.integers()), max_size=2).map(tuple),
    sidecar=st.none() | st.just(Wheel(1.0, 2)),
    tags=st.lists(st.sampled_from(["null", "1e-3", "no", "3", ""]), max_size=3),
    extra=st.dictionaries(st.sampled_from("ab"), st.none() | st.integers() | st.lists(st.booleans(), max_size=2)),
)


@given(config=bicycles)
def test_a_saved_configuration_loads_unchanged(tmp_path_factory: pytest.TempPathFactory, config: Bicycle):
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    save_config(config, path)
    assert load_config(Bicycle, path) == config
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]


def test_the_job_survives_saving_with_all_its_sections(tmp_path: Path):
    overrides = ["rewards=[{function: numeric_answer, weight: 0.5}]", "heuristics=[{name: base}]", "grpo.beta=1e-2"]
    config = load_config(JobConfig, None, overrides)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(JobConfig, tmp_path / "config.yaml") == config


def field_paths(cls: type, prefix: str = "") -> list[str]:
    import typing

    paths = []
    for entry in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[entry.name]
        item = next((arg for arg in typing.get_args(hint) if dataclasses.is_dataclass(arg)), None)
        if dataclasses.is_dataclass(hint):
            paths += field_paths(hint, f"{prefix}{entry.name}.")  # type: ignore[arg-type]
            continue
        paths.append(prefix + entry.name)
        if item is not None:
            mark = "[]." if typing.get_origin(hint) is tuple else "."
            paths += field_paths(item, f"{prefix}{entry.name}{mark}")  # type: ignore[arg-type]
    return paths


@pytest.mark.parametrize("cls", [Bicycle, JobConfig, BackendConfig, RolloutConfig])
def test_the_help_names_every_field_at_every_depth_and_says_what_it_means(cls: type):
    lines = describe(cls).splitlines()
    names = [line.split("=")[0].split(" ")[2] for line in lines if line.startswith("  ") and line[2] != " "]
    assert names == field_paths(cls)
    following = [lines[i + 1] for i, line in enumerate(lines[:-1]) if line[2] != " "]
    assert all(line.startswith("      ") for line in following), "a field without a string under it"


def test_the_help_shows_type_default_and_meaning():
    text = describe(Bicycle)
    assert "  kind=cargo  (road | cargo)\n      what it is for\n" in text
    assert "  range_km=null  (float | null)\n" in text
    assert "  front.spokes=32  (int)\n      count\n" in text
    assert "  spares=[]  (list of Wheel)\n" in text
    assert "  spares[].size=28.0  (float)\n      inches\n" in text


def test_changes_name_the_path_and_both_values():
    old, new = to_dict(Bicycle()), Bicycle(name="ox", front=Wheel(spokes=24))
    assert changes(old, new) == ["name: 'mule' -> 'ox'", "front.spokes: 32 -> 24"]
    assert changes(old, Bicycle()) == []
    assert changes({}, Bicycle()) == [], "a field that the saved configuration lacks has its default"
    assert changes({"gone": 1, "name": "mule"}, Bicycle())[0] == "gone: 1 -> None"
    assert changes({"gone": 1}, {"come": math.inf}) == ["gone: 1 -> None", "come: None -> inf"]


def test_how_the_work_is_done_may_change():
    old = JobConfig(rewards=(RewardConfig("numeric_answer"),))
    safe = RewardConfig("numeric_answer", isolation="process", time_limit=5, retries=2)
    new = replace(old, rewards=(safe,), grpo=replace(old.grpo, save_every=3, keep_checkpoints=1))
    assert changes(to_dict(old), new) == []
    assert "rewards" in changes(to_dict(old), replace(new, rewards=(replace(safe, weight=2.0),)))[0]
    assert "A run goes on when it is changed" in describe(RewardConfig)
