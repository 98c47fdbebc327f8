"""Candidates a second with all heuristics in one batch, against one batch per heuristic: 24 heuristics, same cells.

Both sides run the same code on the same prompts and seeds; only the packing differs. The second one is what a system
does that configures its sampler per batch. The ratio is that of tokens a second.
"""

from __future__ import annotations

import sys
import time

from asn_rl.threads import limit_spinning, set_threads

limit_spinning()

from _benchmark import finish, options

from asn_policies import Pipeline
from asn_policies.heuristics import grid
from asn_rl.backends import BackendConfig, load_backend
from asn_rl.data import DataConfig, load_prompts
from asn_rl.labelling.generate import InProcess
from asn_rl.rollout import RolloutConfig
from asn_rl.types import Candidate, Key

GOAL = 5.0
HEURISTICS = 24


def main() -> int:
    arguments = options(
        __doc__ or "", "python scripts/benchmark_generate.py --prompts 1 --seeds 2", prompts=1, seeds=2, tokens=24
    )
    set_threads(arguments.threads)
    prompts, seeds, tokens = arguments.prompts, arguments.seeds, arguments.tokens
    if arguments.quick:
        seeds, tokens = 1, 8
    entries = grid("filtered")
    entries = [entries[i * len(entries) // HEURISTICS] for i in range(HEURISTICS)]
    backend = load_backend(BackendConfig())
    chosen = load_prompts(DataConfig(limit=prompts), "train")
    source = InProcess(
        backend,
        {entry["name"]: Pipeline(entry["processors"]) for entry in entries},
        {prompt.id: prompt for prompt in chosen},
        RolloutConfig(max_new_tokens=tokens, max_batch=1024),
    )
    cells = [(prompt.id, entry["name"], seed) for prompt in chosen for entry in entries for seed in range(seeds)]
    _timed(source, [cells[:2]])  # warm up
    mixed, mixed_rate = _timed(source, [cells])
    apart, apart_rate = _timed(source, [[cell for cell in cells if cell[1] == entry["name"]] for entry in entries])
    same = sum(mixed[key].completion_ids == apart[key].completion_ids for key in cells) / len(cells)
    print(f"{len(cells)} cells ({prompts} prompts x {HEURISTICS} heuristics x {seeds} seeds), up to {tokens} tokens")
    print(
        f"one batch {mixed_rate:.0f} tokens/s; one batch per heuristic {apart_rate:.0f} tokens/s; {same:.0%} same texts"
    )
    return finish("benchmark_generate", mixed_rate / apart_rate, GOAL, at_least=True)


def _timed(source: InProcess, batches: list[list[Key]]) -> tuple[dict[Key, Candidate], float]:
    """The candidates by key, and tokens a second."""
    begin = time.perf_counter()
    found = [candidate for cells in batches for portion in source(cells) for candidate in portion]
    tokens = sum(len(candidate.completion_ids or ()) for candidate in found)
    return {candidate.key: candidate for candidate in found}, tokens / (time.perf_counter() - begin)


if __name__ == "__main__":
    sys.exit(main())
