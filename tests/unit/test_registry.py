from __future__ import annotations

from pathlib import Path

import pytest

from asn_rl.errors import ConfigError, UnknownName
from asn_rl.registry import Registry, load_attribute


def test_short_names_and_paths_resolve_to_the_same_object():
    registry = Registry("codec", {"json": "json:loads"})
    registry.register("parts", "os.path:split")
    assert registry.resolve("json") is registry.resolve("json:loads")
    assert registry.resolve("parts")("a/b") == ("a", "b")


def test_registering_twice_is_harmless_but_a_name_has_one_meaning():
    registry = Registry("codec", {})
    registry.register("json", "json:loads")
    registry.register("json", "json:loads")
    with pytest.raises(ConfigError, match="codec 'json' already means 'json:loads'"):
        registry.register("json", "json:dumps")


def test_a_registry_keeps_its_own_copy_of_the_entries():
    entries = {"json": "json:loads"}
    Registry("codec", entries).register("other", "json:dumps")
    assert entries == {"json": "json:loads"}


def test_an_unknown_name_gets_a_suggestion_the_list_and_the_way_out():
    with pytest.raises(UnknownName) as caught:
        Registry("codec", {"json": "json:loads", "text": "builtins:str"}).resolve("jsn")
    assert str(caught.value) == (
        "unknown codec 'jsn'. Did you mean 'json'? Known: json, text. "
        "Or give a codec of your own as 'module:attribute'."
    )


def test_a_misspelt_attribute_gets_a_suggestion():
    with pytest.raises(UnknownName, match=r"attribute of module 'json' 'load_s'. Did you mean 'loads'"):
        load_attribute("json:load_s")


def test_a_module_that_cannot_be_imported_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "needs_more.py").write_text("import a_package_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot import 'needs_more'.*a_package_nobody_has.*PYTHONPATH"):
        load_attribute("needs_more:thing")


@pytest.mark.parametrize("path", ["", ":", ":name", "json:", "json", ".relative:name", "..up:name"])
def test_a_path_of_another_form_is_refused(path: str):
    with pytest.raises(ConfigError, match="not of the form 'module:attribute'"):
        load_attribute(path)
