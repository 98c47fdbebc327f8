"""Memory and time of selecting among a million labelled candidates: 2 GiB over the peak of the resident set.

Writes 6,250 prompts x 20 heuristics x 8 seeds with three labellers as the JSONL shards that the stages leave, then
reads and selects them in a process of its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from _benchmark import finish, options

from asn_rl.labelling.grid import Grid
from asn_rl.labelling.labels import read_labels
from asn_rl.labelling.records import Record, ShardWriter, candidate_record, label_record
from asn_rl.labelling.select import SelectConfig, select
from asn_rl.labelling.store import CandidateStore
from asn_rl.types import Candidate

LIMIT, GOAL = 2 * 2**30, 1.0
WEIGHTS = {"quality": 1.0, "verifier": 1.0, "diversity": 0.3}
STRATA = ("maths", "writing", "chat")
WORDS = ("the", "model", "samples", "one", "token", "after", "another", "and", "a", "rule", "decides", "which")
BATCH = 4096


def main() -> int:
    example = "python scripts/benchmark_select.py --prompts 6250"
    arguments = options(__doc__ or "", example, prompts=6250, heuristics=20, seeds=8)
    prompts, heuristics = (625, 10) if arguments.quick else (arguments.prompts, arguments.heuristics)
    shape = prompts, heuristics, arguments.seeds
    with TemporaryDirectory() as folder:
        begin = time.perf_counter()
        _synthesise(Path(folder), _grid(*shape))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.jsonl"))
        print(f"{np.prod(shape)} candidates, {size / 2**20:.0f} MiB written in {time.perf_counter() - begin:.0f} s")
        command = [sys.executable, __file__, "measure", folder, *map(str, shape)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    found = json.loads(report)
    for stage, took in found["seconds"].items():
        print(f"{stage}: {took:.1f} s")
    print(f"peak resident set {found['peak'] / 2**20:.0f} MiB; imports alone {found['imports'] / 2**20:.0f} MiB")
    return finish("benchmark_select", LIMIT / found["peak"], GOAL, at_least=True)


def _measure(folder: Path, grid: Grid) -> None:
    """Read and select; prints times and the peak as a JSON line."""
    imports, times = _peak(), {}

    def timed(stage: str, function: Callable[[], object]) -> object:
        begin = time.perf_counter()
        made = function()
        times[stage] = time.perf_counter() - begin
        return made

    store = timed("scan candidates", lambda: CandidateStore(grid, folder / "candidates"))
    assert isinstance(store, CandidateStore)
    labels = {}
    timed("read labels", lambda: labels.update({n: read_labels(folder / "labels" / n, n, store) for n in WEIGHTS}))
    strata = [STRATA[i % len(STRATA)] for i in range(len(grid.prompts))]
    config = SelectConfig(top_k=2, target="soft")
    timed("select", lambda: select(store, labels, WEIGHTS, strata, config, folder / "selected"))
    print(json.dumps({"imports": imports, "peak": _peak(), "seconds": times}))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _grid(prompts: int, heuristics: int, seeds: int) -> Grid:
    return Grid(
        tuple(f"prompt-{i:06d}" for i in range(prompts)),
        tuple(f"top_p={j / heuristics:.3f}" for j in range(heuristics)),
        tuple(range(1000, 1000 + seeds)),
    )


def _synthesise(folder: Path, grid: Grid) -> None:
    candidates = _candidates(grid)
    with ShardWriter(folder / "candidates") as shard:
        while batch := list(islice(candidates, BATCH)):
            shard.write([candidate_record(candidate) for candidate in batch])
    for name in WEIGHTS:
        labels = _labels(grid, name)
        with ShardWriter(folder / "labels" / name) as shard:
            while batch := list(islice(labels, BATCH)):
                shard.write(batch)


def _candidates(grid: Grid) -> Iterator[Candidate]:
    """About 40 tokens each; the first heuristic is deterministic."""
    generator = np.random.default_rng(0)
    cells = grid.keys(np.ones(grid.shape, bool))
    ids: list[int] = []
    for number, (prompt, heuristic, seed) in enumerate(cells):
        if heuristic != grid.heuristics[0] or number % len(grid.seeds) == 0:
            ids = generator.integers(0, 49_152, 40).tolist()
        text = " ".join(WORDS[i % len(WORDS)] for i in ids)
        yield Candidate(prompt, heuristic, seed, text, ids, terminated=ids[0] % 10 > 0)


def _labels(grid: Grid, name: str) -> Iterator[Record]:
    """Verifiers do not apply to a third of the prompts; one quality score in a hundred is missing."""
    generator = np.random.default_rng(len(name))
    _, heuristics, seeds = grid.shape
    candidates = _candidates(grid)
    for i in range(len(grid.prompts)):
        scores = generator.normal(np.linspace(0, 0.5, heuristics)[:, None], 1, (heuristics, seeds))
        masked = generator.random((heuristics, seeds)) < 0.01
        if name == "verifier":
            scores, masked = (scores > 0).astype(float), np.full((heuristics, seeds), i % len(STRATA) == 1)
        for j, k in np.ndindex(heuristics, seeds):
            yield label_record(next(candidates), name, None if masked[j, k] else float(scores[j, k]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        _measure(Path(sys.argv[2]), _grid(*map(int, sys.argv[3:])))
        sys.exit(0)
    sys.exit(main())
