"""Scoring speed against lm-evaluation-harness 0.4.13 on the same 500 completions of GSM8K and of IFEval.

Ours: the benchmarks' verifiers, with IFEval's four accuracies from one pass (`evaluate_ifeval`, in two worker processes
that are there already). lm-eval's: the filters and metrics of its own tasks, once its rows are loaded. Both give the
same scores (`check_lm_eval.py`). The ratio is lm-eval's time for both benchmarks over ours.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from _benchmark import finish, options, seconds

from asn_rl.threads import limit_spinning

limit_spinning()

from _completions import made
from _harness import GSM8K, IFEVAL, Comparison, lm_eval_task, rows, scored_by_lm_eval, scored_by_us

from asn_rl.rewards.ifeval import evaluate_ifeval

GOAL = 1.0


def main() -> int:
    example = "ASN_RL_DATA=data python scripts/benchmark_scoring.py --quick"
    arguments = options(__doc__ or "", example, completions=500, repeats=3, workers=2)
    if "ASN_RL_DATA" not in os.environ:
        print("set ASN_RL_DATA to the folder of the benchmarks' files", file=sys.stderr)
        return 2
    repeats = 1 if arguments.quick else arguments.repeats
    ours, theirs = zip(
        *(_times(case, arguments.completions, repeats, arguments.workers) for case in (GSM8K, IFEVAL)), strict=True
    )
    return finish("benchmark_scoring", sum(theirs) / sum(ours), GOAL, at_least=True)


def _times(comparison: Comparison, count: int, repeats: int, workers: int) -> tuple[float, float]:
    """Seconds that we and lm-eval take."""
    items = made(comparison, rows(comparison, None), count)
    completions = [item.completion for item in items]
    columns = [[item.prompt.columns.get(name) for item in items] for name in ("instruction_id_list", "kwargs")]
    with tempfile.TemporaryDirectory() as folder:
        task = lm_eval_task(comparison, items, Path(folder))
        theirs = seconds(lambda: scored_by_lm_eval(task, completions), repeats)
        if comparison is IFEVAL:
            ours = seconds(lambda: evaluate_ifeval(completions, *columns, workers=workers), repeats)  # type: ignore[arg-type]
        else:
            ours = seconds(lambda: scored_by_us(comparison, items), repeats)
    rates = f"{count / ours:.0f} completions/s, lm-eval {count / theirs:.0f}"
    print(f"{comparison.benchmark}: {rates}, ratio {theirs / ours:.2f}")
    return ours, theirs


if __name__ == "__main__":
    sys.exit(main())
