"""Evaluation: policy folders against static sampling rules on held-out prompts, with paired bootstrap intervals.

    python scripts/evaluate.py --policy policies/min-p runs/rl/policy --reward numeric_answer distinct_valid
    python scripts/evaluate.py --policy runs/rl/policy --reward math_answer --source jsonl --path questions.jsonl \
        --pipelines pipelines.yaml

Differences are those to the first static rule. `--pipelines` is a file as `asn-rl grid` writes it; the default is
greedy and the base model at temperature 1. Choose the best static rule on other prompts: `--split selection`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from asn_rl.threads import limit_spinning

limit_spinning()

import _recipe

from asn_policies import Pipeline
from asn_policies.heuristics import read_pipelines
from asn_rl.checkpoint import check_compatible, load_policy
from asn_rl.evaluation.comparison import Arm, arm_result, run_arm, table
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.rollout import RolloutConfig
from asn_rl.runs import console, progress


def main() -> int:
    options = _options()
    return _recipe.exit_status(lambda: _print(evaluate(options)))


def _print(rows: list[dict]) -> None:
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        reward, gap = row["reward"], row["difference"]
        console.print(
            f"{row['name']:{width}s}  {reward['mean']:.3f} [{reward['low']:.3f}, {reward['high']:.3f}]  difference "
            f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]  tokens {row['tokens']:.1f}  truncated "
            f"{row['truncated']:.0%}",
            highlight=False,
        )


def evaluate(options: argparse.Namespace) -> list[dict]:
    backend, prompts = _recipe.load(options, options.split)
    if options.pipelines:
        arms = [Arm(str(i), pipeline) for i, pipeline in enumerate(read_pipelines(options.pipelines))]
    else:
        arms = [Arm("greedy", Pipeline([{"name": "greedy"}]), deterministic=True), Arm("T=1", Pipeline([]))]
    for folder in options.policy:
        check_compatible(folder, fingerprint=backend.fingerprint)
        arms.append(Arm(str(folder), load_policy(folder)))
    rewards = RewardSuite([RewardConfig(name) for name in options.reward])
    config, samples = RolloutConfig(max_new_tokens=options.max_new_tokens), options.num_generations
    results = []
    with progress("evaluate", len(arms)) as advance:
        for arm in arms:
            results.append(
                arm_result(arm.name, run_arm(arm, backend, prompts, config, samples, options.seed), rewards, samples)
            )
            advance(1, arm.name)
    return table(results, ["all"] * len(prompts), arms[0].name)


def _options() -> argparse.Namespace:
    parser = _recipe.parser(__doc__)
    parser.add_argument("--policy", type=Path, nargs="+", required=True, help="policy folders")
    parser.add_argument("--reward", nargs="+", required=True, help="reward names or module:function")
    parser.add_argument("--pipelines", type=Path, help="YAML file of static rules; default: greedy and T = 1")
    _recipe.add_model_and_data(parser, seed=2000)
    parser.add_argument("--split", default="test", choices=("train", "selection", "test"), help="which prompts")
    parser.add_argument("--num-generations", type=int, default=8, help="completions of every prompt under every arm")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
