"""What the stages leave for each other: append-only shards of versioned JSONL records.

A stage that starts again opens a new shard, so a line that was torn by a crash stays the last of its file, where it is
dropped with a warning; the record is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from asn_rl.errors import DataError
from asn_rl.files import write_whole
from asn_rl.rewards.contract import Estimate
from asn_rl.runs import console
from asn_rl.types import Candidate, Key, Prompt

PROMPT, CANDIDATE, LABEL = "asn_rl.prompt/1", "asn_rl.candidate/1", "asn_rl.label/1"
Record = dict[str, Any]


class ShardWriter:
    """Appends records to a new shard of a folder; every batch of records is on disk before `write` returns."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(path.stem.removeprefix("shard-")) for path in shards(folder)), default=-1)
        self.path = folder / f"shard-{number:05d}.jsonl"
        self._file: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            with _naming(self.path):  # after a full disk there is something left to write
                self._file.close()

    def write(self, records: Sequence[Record]) -> None:
        """Append whole lines and flush them.

        Raises:
            OSError: the disk is full, with the shard's path; what was written before stays, a torn last line is dropped
                when it is read.
        """
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        if self._file is None:
            self._file = self.path.open("x", encoding="utf-8")
        with _naming(self.path):
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of an open file carry no name; give them `path`."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def shards(folder: Path) -> list[Path]:
    """The shards of a folder in the order they were begun."""
    return sorted(path for path in folder.glob("shard-*.jsonl") if re.fullmatch(r"shard-\d+", path.stem))


def read_records(folder: Path, schema: str) -> Iterator[tuple[str, Record]]:
    """(where, record) of every line of every shard, one line in memory at a time.

    Raises:
        DataError: a line that is not JSON (a torn last line is dropped with a warning), or of another schema.
    """
    for path in shards(folder):
        yield from read_file(path, schema)


def read_file(path: Path, schema: str) -> Iterator[tuple[str, Record]]:
    """(where, record) of every line of one file; see `read_records`."""
    return ((where, record) for where, _, record in read_located(path, schema))


def read_located(
    path: Path, schema: str, on_torn: Callable[[], object] = lambda: None
) -> Iterator[tuple[str, int, Record]]:
    """(where, byte offset, record) of every line of one file; see `read_records`. A torn last line is also told."""
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                if not line.endswith(b"\n"):
                    console.print(f"[yellow]warning:[/] dropped a torn last line of {path}", highlight=False)
                    on_torn()
                    return
                raise DataError(f"{where} is not JSON: {error}. Mend or remove that line") from error
            found = record.get("schema") if isinstance(record, dict) else None
            if found != schema:
                raise DataError(
                    f"{where} has schema {found!r}, this version reads {schema!r}; generate and label again in a new "
                    "run folder, or use the version that wrote it"
                )
            yield where, offset, record
            offset += len(line)


def candidate_record(candidate: Candidate) -> Record:
    ids, fields = candidate.completion_ids, dict(vars(candidate))
    if candidate.history is None:
        del fields["history"]
    return {"schema": CANDIDATE, **fields, "completion_ids": None if ids is None else list(ids)}


def as_candidate(record: Mapping[str, Any], where: str) -> Candidate:
    """A candidate of a record.

    Raises:
        DataError: a field is missing or of the wrong type; the message begins with `where`.
    """
    ids = record.get("completion_ids")
    _expect(
        ids is None or (isinstance(ids, list) and all(isinstance(i, int) for i in ids)), record, where, "completion_ids"
    )
    for name, kind in (
        ("prompt_id", str),
        ("heuristic", str),
        ("seed", int),
        ("completion", str),
        ("terminated", bool),
    ):
        value = record.get(name)
        _expect(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), record, where, name)
    history = record.get("history")
    _expect(history is None or (isinstance(history, list) and all(map(_is_message, history))), record, where, "history")
    fields = ("prompt_id", "heuristic", "seed", "completion", "completion_ids", "terminated")
    return Candidate(*(record[name] for name in fields), history=history)


def _is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(name), str) for name in ("role", "content"))


def _expect(ok: bool, record: Mapping[str, Any], where: str, name: str) -> None:
    if not ok:
        kinds = (
            "text, completion_ids a list of integers or null, seed an integer, terminated true or false, history "
            "messages or absent"
        )
        raise DataError(f"{where}: field {name!r} is {record.get(name)!r:.80}; fields of a candidate are {kinds}")


def digest(candidate: Candidate) -> int:
    """64 bits, equal where text, tokens and way of ending are equal."""
    text = json.dumps([candidate.completion, candidate.completion_ids, candidate.terminated])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def label_record(candidate: Candidate, labeller: str, score: float | None, reason: str | None = None) -> Record:
    """A score of one candidate; None: masked, for a `reason`. `digest` says of which text, `stderr` how uncertain the
    score is, where the labeller knows."""
    prompt_id, heuristic, seed = candidate.key
    record = {
        "schema": LABEL, "prompt_id": prompt_id, "heuristic": heuristic, "seed": seed,
        "digest": f"{digest(candidate):016x}", "labeller": labeller, "score": score,
    }  # fmt: skip
    record |= {"stderr": score.stderr} if isinstance(score, Estimate) else {}
    return record if reason is None else record | {"reason": reason}


def as_key(record: Mapping[str, Any], where: str) -> Key:
    """The cell of a record.

    Raises:
        DataError: a prompt id or heuristic that is no text, or a seed that is no integer.
    """
    key = tuple(record.get(name) for name in ("prompt_id", "heuristic", "seed"))
    kinds = (isinstance(key[0], str), isinstance(key[1], str), isinstance(key[2], int) and not isinstance(key[2], bool))
    if not all(kinds):
        raise DataError(
            f"{where}: a cell is prompt_id (text), heuristic (text) and seed (integer), got {key!r:.120}; remove "
            "the line"
        )
    return key  # type: ignore[return-value]


def as_score(record: Mapping[str, Any], where: str, name: str = "score") -> float | None:
    """A score of a label record; None: masked.

    Raises:
        DataError: not there, or neither a finite number nor null.
    """
    score = record.get(name, "nothing")
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= sys.float_info.max:
        raise DataError(f"{where}: {name!r} must be a finite number or null, got {score!r:.80}; label again")
    return float(score)


def folder_name(labeller: str) -> str:
    """A labeller's name as that of a folder."""
    return re.sub(r"[^\w.=+#-]", "_", labeller)


def write_prompts(path: Path, prompts: Mapping[str, Sequence[Prompt]]) -> None:
    """The prompts of each split, so that a run folder explains itself."""
    lines = [
        {"schema": PROMPT, "split": split, "id": p.id, "content": p.content, "columns": dict(p.columns)}
        for split, part in prompts.items()
        for p in part
    ]
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_prompts(path: Path) -> dict[str, list[Prompt]]:
    """What `write_prompts` wrote."""
    splits: dict[str, list[Prompt]] = {}
    for _, record in read_file(path, PROMPT):
        splits.setdefault(record["split"], []).append(Prompt(record["id"], record["content"], record["columns"]))
    return splits
