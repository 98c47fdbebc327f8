"""Which rows of a benchmark are in which split, and which are its examples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from asn_rl.data.benchmark_files import Row, read_part
from asn_rl.data.benchmark_format import render
from asn_rl.data.splits import SPLITS
from asn_rl.errors import DataError, InvalidValue

if TYPE_CHECKING:
    from asn_rl.data.benchmark import Benchmark, Shares

_SEED = 0


class Reader:
    """Rows of parts and splits, each part read once."""

    def __init__(self, benchmark: Benchmark, root: str | Path | None, verify: bool) -> None:
        self.benchmark, self.root, self.verify = benchmark, root, verify
        self._parts: dict[str, list[Row]] = {}

    def part(self, name: str) -> list[Row]:
        if name not in self._parts:
            self._parts[name] = self._generated(name) if self.benchmark.files is None else self._read(name)
        return self._parts[name]

    def split(self, name: str) -> list[Row]:
        files = self.benchmark.files
        if files is None:
            return self.part(name)
        donor = "train" if files.train is not None else "test"
        takers = [split for split in SPLITS if split == donor or getattr(files, split) is None]
        if name not in takers:
            return self.part(name)
        return self.part(donor) if takers == [donor] else _dealt(self.part(donor), name, takers, self.benchmark.shares)

    def examples(self) -> list[tuple[str, str]]:
        """(question, answer) of each example."""
        format = self.benchmark.prompt
        shown = format.few_shot
        if shown is None:
            return []
        rows = [Row("few_shot", str(n), row, f"example {n}") for n, row in enumerate(shown.examples)]
        if shown.part is not None:
            part = self.part(shown.part)
            if not all(0 <= n < len(part) for n in shown.rows):
                raise InvalidValue("few_shot.rows", list(shown.rows), f"in [0, {len(part) - 1}]")
            rows = [part[n] for n in shown.rows]
        return [
            (render(format.text, row.fields, row.where), render(format.target, row.fields, row.where)) for row in rows
        ]

    def _read(self, part: str) -> list[Row]:
        b, file = self.benchmark, getattr(self.benchmark.files, part)
        return read_part(b.name, part, file, b.hub, self.root, id_field=b.id_field, verify=self.verify)

    def _generated(self, part: str) -> list[Row]:
        from asn_rl.data import DataConfig, load_prompts  # which knows this module's source by name

        source = self.benchmark.source
        assert source is not None
        prompts = load_prompts(DataConfig(source.function, dict(source.arguments)), part)
        return [
            Row(part, str(n), {"question": prompt.last_turn, **prompt.columns}, prompt.id)
            for n, prompt in enumerate(prompts)
        ]


def unclaimed(benchmark: Benchmark, reader: Reader, split: str, examples: set[str]) -> list[Row]:
    """Rows of a split whose questions no earlier split and no example asks."""
    claimed: set[str] = set()
    rows: list[Row] = []
    for name in ("test", "selection", "train"):
        asked = [(key_of(render(benchmark.prompt.text, row.fields, row.where)), row) for row in reader.split(name)]
        if name == "test":
            shown = [row.where for key, row in asked if key in examples]
            if shown:
                raise DataError(
                    f"benchmark {benchmark.name!r} shows an example that the test split asks ({shown[0]}); take its "
                    "examples from the train part or write others"
                )
            claimed |= examples
        rows = [row for key, row in asked if key not in claimed]
        if name == split:
            break
        claimed |= {key for key, _ in asked}
    return rows


def _dealt(rows: Sequence[Row], name: str, takers: Sequence[str], shares: Shares) -> list[Row]:
    """The rows that fall to a split, in file order."""
    order = list(range(len(rows)))
    random.Random(_SEED).shuffle(order)
    total = sum(getattr(shares, taker) for taker in takers)
    if total == 0:
        return []
    before = sum(getattr(shares, taker) for taker in takers[: takers.index(name)])
    low, high = before / total, (before + getattr(shares, name)) / total
    return [rows[i] for i in sorted(order[round(low * len(rows)) : round(high * len(rows))])]


def key_of(question: str) -> str:
    """A question without differences in spaces, by which repetitions are found."""
    return " ".join(question.split())
