"""Rows of a benchmark: local files with their checksums, or a data set of the Hugging Face Hub.

A local file is JSONL, JSON (a list of objects) or CSV, each also gzipped, or, where the path has a `*`, many JSON files
of one object each. A hub's rows carry no checksum; their `revision`, a commit, does its work.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asn_rl.errors import DataError, InvalidValue
from asn_rl.files import check_unicode

ROOT_VARIABLE = "ASN_RL_DATA"
"""environment variable that names the folder of all benchmarks' files"""
FORMATS = (".jsonl", ".json", ".csv")


@dataclass(frozen=True)
class RowRange:
    """Rows by a whole number in one of their fields."""

    field: str
    least: int
    most: int

    def holds(self, row: Mapping[str, Any], where: str) -> bool:
        value = row.get(self.field)
        if not isinstance(value, int) or isinstance(value, bool):
            raise DataError(f"{where}: {self.field!r} must be a whole number, got {value!r:.100}")
        return self.least <= value <= self.most


@dataclass(frozen=True)
class DataFile:
    """Where the rows of one part come from."""

    path: str
    """below the folder of all benchmarks' files, or absolute; with a `*`: a JSON file a row"""
    sha256: str | None = None
    """of the file as it lies there, hexadecimal; null: not checked, for files whose licence lets nobody pass them on"""
    rows: int | None = None
    """how many the part has; null: not checked"""
    where: RowRange | None = None
    """only these rows of the file"""
    hub_split: str | None = None
    """name of this part on the hub; null: as here"""

    def __post_init__(self) -> None:
        if "*" in self.path and self.sha256 is not None:
            raise InvalidValue("sha256", self.sha256, "null where the path is a pattern of many files")
        suffix = Path(self.path.removesuffix(".gz")).suffix
        if suffix not in FORMATS:
            raise InvalidValue("path", self.path, f"a file that ends in {', '.join(FORMATS)}, .gz after it or not")


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face Hub, read where the local file is not there."""

    dataset: str
    """such as openai/gsm8k"""
    config: str | None = None
    revision: str | None = None
    """commit; null: the newest"""


@dataclass(frozen=True)
class Row:
    """One row of a part."""

    part: str
    key: str
    """unique in the part, and the same however the parts are divided into splits"""
    fields: Mapping[str, Any]
    where: str
    """file and line, for errors"""


def read_part(
    name: str,
    part: str,
    file: DataFile,
    hub: Hub | None,
    root: str | Path | None,
    *,
    id_field: str | None,
    verify: bool,
) -> list[Row]:
    """The rows of a part, from the local file if it is there, else from the hub if that is configured.

    Args:
        name: of the benchmark, for errors.
        root: folder of all benchmarks' files; None: the environment variable ASN_RL_DATA.
        id_field: field that identifies a row; None: its number in the file, from 0.
        verify: check the checksum and the number of rows.

    Raises:
        DataError: neither file nor hub; a wrong checksum or number of rows; a malformed line; a repeated id.
    """
    root = root or os.environ.get(ROOT_VARIABLE)
    local = Path(root or "", file.path)
    if (root or local.is_absolute()) and _is_there(local):
        found = local_rows(local, file.sha256 if verify else None)
    elif hub is not None:
        found = _hub_rows(name, hub, file.hub_split or part, local)
    else:
        raise DataError(_missing(name, file.path, str(root) if root else None))
    if file.where is not None:
        found = [(where, fields) for where, fields in found if file.where.holds(fields, where)]
    if verify and file.rows is not None and len(found) != file.rows:
        raise DataError(f"benchmark {name!r}: its {part} part must have {file.rows} rows, it has {len(found)}")
    rows = [Row(part, _key(fields, id_field, n, where), fields, where) for n, (where, fields) in enumerate(found)]
    seen: dict[str, str] = {}
    for row in rows:
        if row.key in seen:
            raise DataError(f"{row.where}: the id {row.key!r} is that of {seen[row.key]}, too; ids must be unique")
        seen[row.key] = row.where
    return rows


def local_rows(path: Path, sha256: str | None) -> list[tuple[str, dict[str, Any]]]:
    """(file and line, fields) of each row.

    Raises:
        DataError: another checksum, an unreadable file, or a line that is no row.
    """
    if "*" in str(path):
        return [(str(file), _object(_bytes(file), str(file))) for file in _matches(path)]
    data = _bytes(path)
    actual = hashlib.sha256(data).hexdigest()
    if sha256 is not None and actual != sha256.lower():
        raise DataError(
            f"{path} is not the file the benchmark means: sha256 {actual}, expected {sha256}. Fetch it again, or take "
            "it as it is with verify_checksums=False"
        )
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    read = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}[Path(path.name.removesuffix(".gz")).suffix]
    return list(read(text, str(path)))


def _jsonl(text: str, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", _object(line, f"{path}, line {number}")


def _json(text: str, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold a list of objects, got {type(rows).__name__}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, entry {number} must be an object, got {row!r:.100}")
        check_unicode(row, f"{path}, entry {number}")
        yield f"{path}, entry {number}", row


def _csv(text: str, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{where} must have {len(reader.fieldnames or ())} fields as the first line has")
            yield where, dict(row)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is not CSV: {error}") from error


def _object(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} must be a JSON object, got {row!r:.100}")
    check_unicode(row, where)
    return row


def _hub_rows(name: str, hub: Hub, split: str, local: Path) -> list[tuple[str, dict[str, Any]]]:
    advice = f"or put the file at {local} and name its root by the option path or by {ROOT_VARIABLE}"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"benchmark {name!r} would be read from the hub ({hub.dataset}), which needs the package datasets: pip "
            f"install datasets; {advice}"
        ) from error
    try:
        rows = load_dataset(hub.dataset, hub.config, split=split, revision=hub.revision)
    except Exception as error:  # whatever network, hub and file readers raise
        raise DataError(
            f"benchmark {name!r}: cannot read the split {split!r} of {hub.dataset} from the hub ({error}); go online, "
            f"{advice}"
        ) from error
    return [(f"{hub.dataset}, {split} row {number}", dict(row)) for number, row in enumerate(rows)]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _is_there(path: Path) -> bool:
    return bool(_matches(path)) if "*" in str(path) else path.is_file()


def _matches(pattern: Path) -> list[Path]:
    first = next(n for n, step in enumerate(pattern.parts) if "*" in step)
    return sorted(Path(*pattern.parts[:first]).glob(str(Path(*pattern.parts[first:]))))


def _missing(name: str, path: str, root: str | None) -> str:
    if root is None:
        return (
            f"benchmark {name!r} needs the file {path}: give the folder that holds it by the option path, or set the "
            f"environment variable {ROOT_VARIABLE}"
        )
    return f"benchmark {name!r} needs the file {path}, and {root} does not hold it; put it there"


def _key(fields: Mapping[str, Any], id_field: str | None, number: int, where: str) -> str:
    if id_field is None:
        return str(number)
    if not isinstance(fields.get(id_field), str | int):
        raise DataError(f"{where}: the id {id_field!r} must be text or a whole number, got {fields.get(id_field)!r}")
    return str(fields[id_field])
