"""A gate over temperatures that is told how many samples will be drawn in parallel, and is paid for the best of them.

    python scripts/parallel_samples.py
    python scripts/parallel_samples.py --budgets 1 8 --steps 20 --seed 1 --run runs/parallel-samples-1

With one sample the surest answer pays; with eight, eight different ones do. `asn_policies:SequenceStrategy` reads the
prompt and log2(B), and is trained by GRPO for pass@B, every prompt of a step with a B of its own (the contextual bandit
of arXiv:2603.09065). Prints pass@B on held-out prompts: of every temperature, of the policy, and of the policy told
another B (the list in reverse); and paired differences to the temperature that is best on other prompts, one for all B
and one for each B. Interrupted, the training continues. About fifteen minutes at the defaults on two cores.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asn_rl.threads import limit_spinning

limit_spinning()

import _recipe
import numpy as np
import torch

from asn_policies import Pipeline, SequenceStrategy
from asn_rl.backends import BackendConfig, Example, load_backend
from asn_rl.data import DataConfig, load_prompts
from asn_rl.errors import InvalidValue
from asn_rl.evaluation.statistics import bootstrap
from asn_rl.evaluation.voting import pass_at_k
from asn_rl.protocols import LogitsBackend, Policy
from asn_rl.rewards.compose import RewardConfig, RewardSuite, score
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.runs import console
from asn_rl.training import grpo
from asn_rl.types import Prompt

SYSTEM = "You give short answers."
EXAMPLES = (Example("What is 10 + 2?", "12"), Example("Name a season.", "Winter"))
TEMPERATURES = (0.0, 0.3, 0.6, 1.0, 1.5)
LIMITS = RolloutConfig(max_new_tokens=24)


@dataclass(frozen=True)
class Exam:
    """How pass@B is measured."""

    backend: LogitsBackend
    rewards: RewardSuite
    budgets: Sequence[int]
    samples: int

    def passes(self, arm: Policy, prompts: Sequence[Prompt], seed: int, told: int | None = None) -> np.ndarray:
        """(P, len(budgets)) unbiased pass@B of every prompt; `told` is the B that the policy reads."""
        conditions = None if told is None else torch.full((len(prompts), 1), math.log2(told))
        drawn = rollout(
            arm, self.backend, prompts, LIMITS, num_generations=self.samples, seed=seed, conditions=conditions
        )
        correct = score(self.rewards, drawn).total.reshape(len(prompts), self.samples).sum(1).long().tolist()
        return np.array([[pass_at_k(self.samples, right, b) for b in self.budgets] for right in correct])


def main() -> int:
    options = _options()
    return _recipe.exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    budgets = sorted(set(options.budgets))
    if len(budgets) < 2 or budgets[0] < 1 or budgets[-1] >= options.samples:
        allowed = f"at least two different numbers in [1, {options.samples - 1}], below --samples"
        raise InvalidValue("--budgets", options.budgets, allowed)
    model = BackendConfig(model=options.model, device=options.device, system_prompt=SYSTEM, examples=EXAMPLES)
    backend = load_backend(model)
    data = DataConfig("arithmetic", {"operations": "+-*"}, limit=options.prompts)
    rewards = RewardSuite([RewardConfig("numeric_answer")])
    rules = {f"T={t:g}": _rule(t) for t in TEMPERATURES}
    arms = {name: Pipeline(rule["processors"]) for name, rule in rules.items()}

    chosen = load_prompts(data, "selection")
    console.print(f"{len(arms)} temperatures on {len(chosen)} prompts of the selection split", highlight=False)
    exam = Exam(backend, rewards, budgets, options.samples)
    means = {name: exam.passes(arm, chosen, options.seed).mean(0) for name, arm in arms.items()}
    _print_table(budgets, means)
    overall = max(means, key=lambda name: means[name].mean())
    by_budget = [max(means, key=lambda name, i=i: means[name][i]) for i in range(len(budgets))]

    torch.manual_seed(options.seed)
    policy = SequenceStrategy(
        list(rules.values()), inputs=["prompt_embedding", "condition"], hidden_size=backend.hidden_size, projection=4,
        condition_size=1, start=overall, start_share=0.5,
    )  # fmt: skip
    config = grpo.GRPOConfig(
        steps=options.steps, prompts_per_step=24, num_generations=options.samples, advantage="pass_at_k",
        pass_k=tuple(budgets), learning_rate=2e-3, beta=0.05, minibatch_tokens=2048, save_every=5, seed=options.seed,
    )  # fmt: skip
    console.print(f"\nGRPO for pass@B, B in {budgets}, beginning at {overall}", highlight=False)
    grpo.train(policy, policy, backend, load_prompts(data, "train"), rewards, LIMITS, config, options.run)

    held_out = load_prompts(data, "test")
    console.print(f"\npass@B on {len(held_out)} held-out prompts, {options.samples} samples each", highlight=False)
    seed = options.seed + 1
    found = {name: exam.passes(arm, held_out, seed) for name, arm in arms.items()}
    told = {b: exam.passes(policy, held_out, seed, told=b) for b in budgets}
    found["policy"] = np.stack([told[b][:, i] for i, b in enumerate(budgets)], 1)
    found["told another B"] = np.stack([told[b][:, i] for i, b in enumerate(reversed(budgets))], 1)
    _print_table(budgets, {name: values.mean(0) for name, values in found.items()})
    own = np.stack([found[name][:, i] for i, name in enumerate(by_budget)], 1)
    for name, other in (
        (f"{overall}, best for all B", found[overall]),
        (f"{', '.join(by_budget)}, best for each B", own),
        ("the policy told another B", found["told another B"]),
    ):
        gap = bootstrap((found["policy"] - other).mean(1), ["all"] * len(held_out))
        console.print(
            f"policy minus {name}: {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], mean over B", highlight=False
        )


def _rule(temperature: float) -> dict[str, Any]:
    step = {"name": "temperature", "params": {"temperature": temperature}} if temperature else {"name": "greedy"}
    return {"name": f"T={temperature:g}", "processors": [step]}


def _print_table(budgets: Sequence[int], means: Mapping[str, np.ndarray]) -> None:
    console.print("  " + " " * 16 + "".join(f"  B={b:<4d}" for b in budgets) + "  mean", highlight=False)
    for name, values in means.items():
        cells = "".join(f"  {value:.3f} " for value in values)
        console.print(f"  {name:16s}{cells}  {values.mean():.3f}", highlight=False)


def _options() -> argparse.Namespace:
    parser = _recipe.parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="embedded short name, hub id or folder")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 2, 4, 8], help="parallel samples B, at least two")
    parser.add_argument("--samples", type=int, default=16, help="completions of a prompt in training and evaluation")
    parser.add_argument("--steps", type=int, default=40, help="GRPO steps of 24 prompts")
    parser.add_argument("--prompts", type=int, help="prompts of a split at most; default: all")
    parser.add_argument("--run", type=Path, default=Path("runs/parallel-samples"), help="folder of the training")
    parser.add_argument("--seed", type=int, default=0, help="keys every draw")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
