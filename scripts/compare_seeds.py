"""One comparison over several training seeds of the same job: the method, or one lucky run of it?

    for n in 0 1 2; do python scripts/quickstart.py --seed $n --run runs/demo-$n; done
    python scripts/compare_seeds.py runs/demo-0 runs/demo-1 runs/demo-2

Reads what the runs' comparisons left; nothing is generated. For each learned policy and each run: held-out reward minus
that of the run's best static rule. `these seeds`: 95 % interval over prompts, for the policies at hand. `method`: over
prompts and seeds, for policies trained in this way.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from asn_rl.threads import limit_spinning

limit_spinning()

import _recipe
import numpy as np

from asn_rl.config import load_config
from asn_rl.data.store import load_trajectories
from asn_rl.errors import DataError
from asn_rl.evaluation.comparison import arm_result
from asn_rl.evaluation.seeds import seed_report
from asn_rl.job import JobConfig
from asn_rl.job.config import CONTROLS
from asn_rl.rewards.compose import RewardSuite
from asn_rl.runs import console

LEARNED = ("distilled", "rl", *CONTROLS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, each with a comparison")
    runs = parser.parse_args().runs
    return _recipe.exit_status(lambda: _print(runs))


def _print(runs: list[Path]) -> None:
    found = [gaps(run) for run in runs]
    prompts, strata = found[0][0]
    for run, (kind, _) in zip(runs, found, strict=True):
        if kind != (prompts, strata):
            raise DataError(f"{run} compares other prompts than {runs[0]}; give runs of one job with several seeds")
    shared = [name for name in LEARNED if all(name in values for _, values in found)]
    pairs = [(name, "best static") for name in shared] + [("rl", name) for name in CONTROLS if name in shared]
    for name, other in pairs:
        parts = [values[name] - values.get(other, 0.0) for _, values in found]
        report = seed_report(np.stack(parts, 1), strata)
        these, method = report.interval, report.crossed
        console.print(
            f"{name} minus {other}: by seed {' '.join(f'{mean:+.3f}' for mean in report.by_seed)}, mean "
            f"{these.mean:+.3f}, these seeds [{these.low:+.3f}, {these.high:+.3f}], method [{method.low:+.3f}, "
            f"{method.high:+.3f}]",
            highlight=False,
        )


def gaps(run: Path) -> tuple[tuple[list[str], list[str]], dict[str, np.ndarray]]:
    """Ids and strata of a run's held-out prompts; for each learned policy (P,) rewards minus the best static rule's."""
    path = run / "comparison.json"
    if not path.exists():
        raise DataError(f"{path} is not there; finish the run first: asn-rl run --config {run}/config.yaml --run {run}")
    record = json.loads(path.read_text())
    config = load_config(JobConfig, run / "config.yaml", [])
    names = [record["best_static"], *(name for name in LEARNED if (run / "comparison" / name).exists())]
    with RewardSuite(config.rewards) as rewards:
        arms = {name: load_trajectories(run / "comparison" / name) for name in names}
        means = {name: arm_result(name, arm, rewards, record["samples"]).per_prompt() for name, arm in arms.items()}
    prompts = arms[names[0]].prompts[:: record["samples"]]
    column = config.compare.stratify_by
    strata = ["" if column is None else str(prompt.columns[column]) for prompt in prompts]
    return ([p.id for p in prompts], strata), {name: means[name] - means[names[0]] for name in names[1:]}


if __name__ == "__main__":
    sys.exit(main())
