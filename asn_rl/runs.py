"""Run folders: the resolved configuration, checkpoints and what a stage leaves for the next one."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from asn_rl.config import changes, save_config, to_dict
from asn_rl.errors import ConfigError, DataError
from asn_rl.files import check_unicode, write_whole

console = Console(soft_wrap=True)


def open_run(folder: str | Path, config: Any) -> Path:
    """Create a run folder, or return to one that was made with the same configuration. Operational settings
    (`config.OPERATIONAL`: time limits, retries, servers, checkpoints) may have changed; the folder then keeps the new.

    Raises:
        ConfigError: the folder belongs to another configuration; the differing keys are listed.
    """
    run = Path(folder)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the run folder {run}: {error}; choose another one") from error
    path = run / "config.yaml"
    if path.exists():
        try:
            old = yaml.safe_load(path.read_text())
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path} is damaged ({error}); choose another run folder") from error
        if not isinstance(old, dict):
            raise ConfigError(f"{path} is damaged (no mapping of keys); choose another run folder")
        changed = changes(old, config)
        if changed:
            raise ConfigError(
                f"{run} was made with another configuration:\n  " + "\n  ".join(changed) + "\n"
                "Choose another run folder, or remove this one"
            )
        if old != to_dict(config):
            save_config(config, path)
    else:
        (run / "command.txt").write_text(_provenance())
        save_config(config, path)  # last: with it the run is begun
    return run


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """A progress bar with the time left; yields `advance(steps, note)`. Without a terminal: a line now and then."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(label, total=total, completed=done, note="")
            yield lambda steps, note="": bar.update(task, advance=steps, note=note)
        return
    with _plain_progress(label, total, done) as advance:
        yield advance


@contextmanager
def _plain_progress(label: str, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    begin, last, count = time.monotonic(), time.monotonic(), done

    def advance(steps: int, note: str = "") -> None:
        nonlocal last, count
        count += steps
        now = time.monotonic()
        if now - last < 5 and count < total:
            return
        last, rate = now, (count - done) / max(now - begin, 1e-9)
        left = f"{(total - count) / rate:.0f} s left" if rate else "?"
        console.print(f"{label} {count}/{total}, {now - begin:.0f} s, {left} {note}".rstrip(), highlight=False)

    yield advance


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is either whole or not there."""
    write_whole(path, json.dumps(value, indent=1))


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write a JSONL file that is either whole or not there; a step that is repeated after a resume replaces its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, record) of a JSONL file; a torn last line is dropped with a warning.

    Raises:
        DataError: unreadable, or any other line is not a JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)  # decoded line by line: a line may be torn inside a character
        except ValueError as error:
            if number == len(lines):
                console.print(f"[yellow]warning:[/] dropped a torn last line of {path}", highlight=False)
                return
            raise DataError(f"{path}, line {number} is not JSON: {error}. Mend or remove that line") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number} must be a JSON object, got {type(record).__name__}")
        if b"\\u" in line:
            check_unicode(record, f"{path}, line {number}")
        yield number, record


def _provenance() -> str:
    """The command line and, in a git checkout, the commit: enough to repeat the run."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip()
    except OSError:  # git is not installed
        commit = ""
    return f"{shlex.join(sys.argv)}\n{commit or 'no git commit'}\n"
