"""Benchmarks: one versioned YAML file each, from which prompts, columns and verifiers come.

The splits are those of every source. A benchmark whose files do not name all three draws the missing ones from its
train part, or, where there is none, from its test part: rows in file order are shuffled with a fixed seed and dealt out
by `shares`, as the sources `jsonl` and `ifeval` do. A row whose question is also a question of an earlier split (test,
then selection, then train) or of an example is left out, and an example whose question is in the test split is an
error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from asn_rl.config import from_dict
from asn_rl.data.benchmark_files import DataFile, Hub, Row
from asn_rl.data.benchmark_format import FOLLOW_UPS, Column, PromptFormat, content, render
from asn_rl.data.benchmark_splits import Reader, key_of, unclaimed
from asn_rl.data.splits import SPLITS, check_split
from asn_rl.errors import ConfigError, DataError, InvalidValue, UnknownName, check_at_least
from asn_rl.types import Prompt

SCHEMA = "asn_rl.benchmark/1"


@dataclass(frozen=True)
class Files:
    """Where each part lies. What is null is drawn from the train part, else from the test part."""

    train: DataFile | None = None
    selection: DataFile | None = None
    test: DataFile | None = None
    few_shot: DataFile | None = None
    """rows that are examples only"""


@dataclass(frozen=True)
class Shares:
    """How a part is dealt out among the splits that have no file of their own; only the proportions count."""

    train: float = SPLITS["train"]
    selection: float = SPLITS["selection"]
    test: float = SPLITS["test"]

    def __post_init__(self) -> None:
        for name in SPLITS:
            if not 0 <= getattr(self, name) < float("inf"):
                raise InvalidValue(name, getattr(self, name), ">= 0")


@dataclass(frozen=True)
class Generated:
    """A prompt source that makes the rows of every split: field `question`, and its columns."""

    function: str
    """short name of `asn_rl.data.SOURCES`, or module:function"""
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verifier:
    """A reward function that scores completions."""

    name: str
    """what reports call the score"""
    function: str
    """short name of `asn_rl.rewards.REWARDS`, or module:function"""
    arguments: dict[str, Any] = field(default_factory=dict)
    entries: str | None = None
    """column of lists whose entries the score is a mean over; reports then show the mean over all entries (IFEval's
    instruction level) instead of that over prompts"""


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark's YAML file says."""

    name: str
    """begins the ids of its prompts: NAME/PART/ROW"""
    version: int
    """raised by every change that can change a score"""
    title: str
    paper: str
    licence: str
    """of the data"""
    prompt: PromptFormat
    max_new_tokens: int
    family: str = ""
    """the benchmark whose rows these are, too, by part and id; empty: its own, or those of what it extends"""
    files: Files | None = None
    hub: Hub | None = None
    """read where a local file is not there"""
    source: Generated | None = None
    """instead of files"""
    id_field: str | None = None
    """field that identifies a row in its part; null: its number, from 0"""
    shares: Shares = Shares()
    columns: tuple[Column, ...] = ()
    verifiers: tuple[Verifier, ...] = ()
    """the first one's score is the benchmark's; none: only metrics of the texts apply"""
    metrics: tuple[str, ...] = ("accuracy",)
    """what to report, as in `asn_rl.evaluation.metrics`, without the number of samples: accuracy, pass, distinct_2"""
    answers: Literal["number", "marked", "text", "exact"] | None = None
    """how answers are told apart where a majority of completions is taken, as in `asn_rl.evaluation.voting`; null: they
    cannot be"""
    stop: tuple[str, ...] = ()
    """texts that end a completion"""
    gold: str | None = None
    """template over columns and fields: a completion that every verifier must accept; null: no gold answers"""

    def __post_init__(self) -> None:
        if (self.files is None) == (self.source is None):
            raise ConfigError(f"benchmark {self.name!r} needs `files` or a `source`, and not both")
        if self.files is not None and self.files.test is None:
            raise ConfigError(f"benchmark {self.name!r} needs a test part; give files.test")
        part = self.prompt.few_shot.part if self.prompt.few_shot else None
        if part is not None and not (part == "train" if self.files is None else getattr(self.files, part)):
            raise ConfigError(f"benchmark {self.name!r} takes examples from its {part} part, for which it has no file")
        check_at_least(self, 1, "version", "max_new_tokens")
        if self.prompt.follow_ups and self.verifiers:
            raise ConfigError(
                f"benchmark {self.name!r} has follow_ups and verifiers; a verifier knows one turn, so score further "
                "turns by scorers or a judge of the evaluation (evaluate.scorers, evaluate.judge)"
            )
        if self.prompt.follow_ups and FOLLOW_UPS in (column.name for column in self.columns):
            raise InvalidValue("column name", FOLLOW_UPS, "another one", "this one holds the further turns")
        if "" in self.stop:
            raise InvalidValue("stop", list(self.stop), "texts of at least one character")
        for kind, names in (("column", [c.name for c in self.columns]), ("verifier", [v.name for v in self.verifiers])):
            if len(set(names)) != len(names):
                raise InvalidValue(f"{kind} names", names, "different from each other")


def benchmark_names() -> list[str]:
    """The benchmarks that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def load_benchmark(name_or_path: str | Path) -> Benchmark:
    """A benchmark by its name, or from a YAML file (a path that ends in .yaml or .yml).

    A file may say `extends: NAME`: what it does not give is taken from that benchmark of the package.

    Raises:
        UnknownName: no such name.
        ConfigError: no such file; not of the schema `asn_rl.benchmark/1`; an unknown key; a value of the wrong type.
    """
    values, where = _read(name_or_path)
    base = values.pop("extends", None)
    if base is not None:
        inherited, _ = _read(str(base))
        if "extends" in inherited:
            raise ConfigError(f"{where}: 'extends' must name a benchmark that extends no other, got {base!r}")
        family = {} if values.keys() & {"files", "source", "hub", "id_field"} else {"family": base}
        values = {**family, **inherited, **values}
    schema = values.pop("schema", None)
    if schema != SCHEMA:
        raise ConfigError(f"{where}: 'schema' must be {SCHEMA!r}, got {schema!r}")
    try:
        return from_dict(Benchmark, values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def benchmark_prompts(
    benchmark: Benchmark,
    split: str,
    path: str | Path | None = None,
    limit: int | None = None,
    *,
    verify_checksums: bool = True,
) -> list[Prompt]:
    """The prompts of a split, in file order; ids `gsm8k/test/17` by part and row, so that they do not depend on shares.

    Args:
        path: folder of all benchmarks' files; by default the one that the environment variable ASN_RL_DATA names.
        limit: prompts at most, evenly spaced; None: all.
        verify_checksums: False takes files as they are: neither checksums nor numbers of rows are checked.

    Raises:
        DataError: missing or wrong files, malformed rows, an empty split, an example that the test split asks.
    """
    check_split(split)
    if limit is not None and limit < 1:
        raise InvalidValue("limit", limit, ">= 1", "None takes all prompts")
    reader = Reader(benchmark, path, verify_checksums)
    examples = reader.examples()
    rows = unclaimed(benchmark, reader, split, {key_of(question) for question, _ in examples})
    if not rows:
        raise DataError(
            f"the {split!r} split of benchmark {benchmark.name!r} holds no prompts; its YAML file gives it a file of "
            "its own or a share"
        )
    if limit is not None and limit < len(rows):
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    return [_prompt(benchmark, row, examples) for row in rows]


def gold_rows(
    benchmark: Benchmark, path: str | Path | None = None, *, verify_checksums: bool = True
) -> list[tuple[Prompt, dict[str, Any]]]:
    """Every row of every part, asked without examples, and what the template `gold` is rendered over: its fields, its
    columns in place of fields of the same name."""
    reader = Reader(benchmark, path, verify_checksums)
    named = fields(Files) if benchmark.files is not None else ()
    parts = [part.name for part in named if getattr(benchmark.files, part.name) is not None] or list(SPLITS)
    prompts = [(row, _prompt(benchmark, row, ())) for part in parts for row in reader.part(part)]
    return [(prompt, {**row.fields, **prompt.columns}) for row, prompt in prompts]


def benchmark(split: str, *, name: str, path: str | None = None, verify_checksums: bool = True) -> list[Prompt]:
    """Prompt source: a split of a benchmark, by its name or YAML file; see `benchmark_prompts`."""
    return benchmark_prompts(load_benchmark(name), split, path, verify_checksums=verify_checksums)


def _prompt(benchmark: Benchmark, row: Row, examples: Sequence[tuple[str, str]]) -> Prompt:
    columns = {column.name: column.value(row.fields, row.where) for column in benchmark.columns}
    if benchmark.prompt.follow_ups:
        columns[FOLLOW_UPS] = [render(text, row.fields, row.where) for text in benchmark.prompt.follow_ups]
    asked = content(benchmark.prompt, row.fields, examples, row.where)
    return Prompt(f"{benchmark.name}/{row.part}/{row.key}", asked, columns)


def _folder() -> Any:
    return resources.files("asn_rl.data").joinpath("benchmarks")


def _read(name_or_path: str | Path) -> tuple[dict[str, Any], str]:
    """What a YAML file holds, and its name for errors."""
    name = str(name_or_path)
    if Path(name).suffix in (".yaml", ".yml"):
        file: Any = Path(name)
    elif name in benchmark_names():
        file = _folder().joinpath(f"{name}.yaml")
    else:
        raise UnknownName("benchmark", name, benchmark_names(), "Or give the path of a YAML file of your own.")
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the benchmark {file}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a mapping of keys, got {type(values).__name__}")
    return values, str(file)
