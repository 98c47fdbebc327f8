"""Reinforcement learning: GRPO from any policy folder, with any reward, against an older checkpoint.

    python scripts/train_rl.py --init policies/min-p --reward numeric_answer distinct_valid --run runs/rl
    python scripts/train_rl.py --init policies/nucleus --reward my_rewards:brevity \
        --source jsonl --path questions.jsonl --run runs/brief --steps 50

Rewards are built-in names or `module:function` with TRL's signature; several are summed. The run folder holds
checkpoints, metrics (JSONL, TensorBoard) and rollouts; the same command continues an interrupted run. All settings of
GRPO are fields of `GRPOConfig`; `asn-rl reinforce` takes them from YAML.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from asn_rl.threads import limit_spinning

limit_spinning()

import _recipe

from asn_rl.checkpoint import check_compatible, load_policy
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.rollout import RolloutConfig
from asn_rl.runs import open_run
from asn_rl.training import parallel
from asn_rl.training.grpo import GRPOConfig, train


def main() -> int:
    options = _options()
    return _recipe.exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    parallel.join()
    backend, prompts = _recipe.load(options, "train")
    with parallel.main_first():
        open_run(options.run, {name: str(value) for name, value in vars(options).items()})
    spec = check_compatible(options.init, fingerprint=backend.fingerprint)
    if options.reference:
        check_compatible(options.reference, fingerprint=backend.fingerprint, architecture=spec.policy)
    size = RolloutConfig(max_new_tokens=options.max_new_tokens)
    train(
        load_policy(options.init),
        load_policy(options.reference or options.init),
        backend,
        prompts,
        RewardSuite([RewardConfig(name) for name in options.reward]),
        size,
        GRPOConfig(steps=options.steps, learning_rate=options.learning_rate, beta=options.beta, seed=options.seed),
        options.run,
        metadata={
            "base_model": options.model,
            "fingerprint": backend.fingerprint,
            "sketch": {"head": size.head, "tail": size.tail},
        },
    )
    print(f"the policy is in {options.run / 'policy'}; curves: tensorboard --logdir {options.run}")


def _options() -> argparse.Namespace:
    parser = _recipe.parser(__doc__)
    parser.add_argument("--init", type=Path, required=True, help="policy folder to start from")
    parser.add_argument("--reference", type=Path, help="policy folder of the KL penalty; default: the start")
    parser.add_argument("--reward", nargs="+", required=True, help="reward names or module:function")
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    _recipe.add_model_and_data(parser, seed=0)
    parser.add_argument("--steps", type=int, default=50, help="policy updates")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="AdamW step size")
    parser.add_argument("--beta", type=float, default=0.05, help="coefficient of the KL penalty")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
