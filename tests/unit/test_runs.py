from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from full_disk import fill_disk
from rich.console import Console

from asn_rl import runs
from asn_rl.config import OPERATIONAL, load_config
from asn_rl.errors import ConfigError, DataError
from asn_rl.runs import open_run, progress, read_jsonl, write_json, write_jsonl


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    patience: int = field(default=1, metadata=OPERATIONAL)


@dataclass(frozen=True)
class Config:
    seed: int = 0
    inner: Inner = field(default_factory=Inner)


def test_a_new_run_holds_its_configuration_and_command(tmp_path: Path):
    run = open_run(tmp_path / "a" / "b", Config(seed=3))
    assert load_config(Config, run / "config.yaml") == Config(seed=3)
    command, commit = (run / "command.txt").read_text().splitlines()
    assert command
    assert commit


def test_a_run_is_reopened_with_the_same_configuration_and_left_as_it_was(tmp_path: Path):
    run = open_run(tmp_path / "run", Config())
    (run / "command.txt").write_text("the first command")
    assert open_run(run, Config()) == run
    assert (run / "command.txt").read_text() == "the first command"


def test_a_run_of_another_configuration_is_refused_with_the_keys_that_differ(tmp_path: Path):
    open_run(tmp_path, Config())
    with pytest.raises(ConfigError) as caught:
        open_run(tmp_path, Config(seed=1, inner=Inner(0.25)))
    message = str(caught.value)
    assert "seed: 0 -> 1" in message
    assert "inner.rate: 0.5 -> 0.25" in message
    assert "Choose another run folder" in message


def test_a_run_goes_on_with_another_way_of_doing_the_work_and_keeps_it(tmp_path: Path):
    open_run(tmp_path, Config())
    patient = Config(inner=Inner(patience=9))
    open_run(tmp_path, patient)
    assert load_config(Config, tmp_path / "config.yaml") == patient


@pytest.mark.parametrize("content", [b"{a: [", b"", b"- 1", b"\xff"])
def test_a_damaged_configuration_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged(?s:.*)choose another run folder"):
        open_run(tmp_path, Config())


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match="cannot make the run folder"):
        open_run(tmp_path / "run", Config())


def test_a_run_opens_where_git_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    run = open_run(tmp_path / "run", Config())
    assert (run / "command.txt").read_text().endswith("no git commit\n")


def test_jsonl_survives_writing_and_reading(tmp_path: Path):
    records = [{"text": "zwölf\n日本", "n": 1}, {"text": "", "n": None}]
    write_jsonl(tmp_path / "deep" / "a.jsonl", records)
    assert list(read_jsonl(tmp_path / "deep" / "a.jsonl")) == [(1, records[0]), (2, records[1])]


def test_a_step_that_is_repeated_replaces_its_records(tmp_path: Path):
    for n in (1, 2):
        write_jsonl(tmp_path / "a.jsonl", [{"n": n}])
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [(1, {"n": 2})]


@pytest.mark.parametrize("torn", [b'{"n": 2, "te', '{"text": "zwö'.encode()[:-1], b"\x00\x00\x00"])
def test_a_torn_last_line_is_dropped_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str], torn: bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n\n' + torn)
    assert list(read_jsonl(path)) == [(1, {"n": 1})]
    assert "dropped a torn last line" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "reason"), [(b"{oops", "is not JSON"), (b"[1]", "must be a JSON object, got list"), (b"\xff", "not JSON")]
)
def test_any_other_malformed_line_is_named_with_file_and_line(tmp_path: Path, line: bytes, reason: str):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n' + line + b'\n{"n": 3}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2.*{reason}"):
        list(read_jsonl(path))


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl"):
        list(read_jsonl(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("write", [write_json, lambda path, value: write_jsonl(path, [value])])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write):
    path = tmp_path / "a.json"
    write(path, {"n": 1})
    fill_disk(monkeypatch, "a.json.part")
    with pytest.raises(OSError, match="No space"):
        write(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 1}


def test_progress_without_a_terminal_ends_with_a_full_count(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(runs, "console", Console(force_terminal=False))
    with progress("work", total=3, done=1) as advance:
        advance(1, "first")
        advance(1, "last")
    assert "work 3/3" in capsys.readouterr().out
