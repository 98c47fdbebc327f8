"""Holding a requested surprise: a recurrent policy against Mirostat v2 (eta 0.1) at the same targets.

Trained on 16 writing prompts: first on Mirostat's answers along Mirostat's completions, then in the closed loop on the
sketches of these (asn_rl.training.surprise_control). Measured on 16 other prompts, both sides in one run, on common
draws; also Mirostat with eta 1, which follows its target fastest.

The error of a completion is |mean of -log2 p_base over its tokens - target| in bits; the windows' is the mean over all
windows of 50 tokens. A completion that ends early counts with the tokens it has (if fewer than 50, one window). The
divergence from the base model, in nats a token, says what holding costs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from asn_rl.threads import limit_spinning, set_threads

limit_spinning()

import numpy as np
import torch
from _benchmark import finish, options
from torch import Tensor

from asn_policies import Pipeline, RecurrentPolicy
from asn_rl.backends import BackendConfig, load_backend
from asn_rl.evaluation.statistics import bootstrap
from asn_rl.mixed_batch import MixedBatch
from asn_rl.protocols import LogitsBackend, Policy
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.training.distill import DistillConfig, distill, sketch_targets
from asn_rl.training.surprise_control import SurpriseControlConfig, train_surprise_control
from asn_rl.types import Prompt, Trajectories

GOAL = 1.0
TARGETS = (1.5, 2.0, 2.5, 3.0)
"""bits a token; the base model's own mean is about 4"""
ETAS = (0.1, 1.0)
WINDOW = 50
_TASKS = (
    "Write a long story about {}.",
    "Tell me everything you know about {}.",
    "Describe a day in the life of somebody who loves {}.",
    "Write a letter to a friend about {}.",
)
_TOPICS = {
    "train": ("the sea", "a small town in winter", "the history of bread", "bicycles"),
    "test": ("music", "an old library", "the moon", "gardens"),
}


def main() -> int:
    arguments = options(__doc__ or "", "python scripts/benchmark_surprise.py --tokens 200", tokens=200, steps=40)
    set_threads(arguments.threads)
    tokens, topics, etas, steps = arguments.tokens, 4, ETAS, arguments.steps
    if arguments.quick:
        tokens, topics, etas, steps = min(tokens, 40), 1, ETAS[:1], min(steps, 10)
    backend = load_backend(BackendConfig())
    policy = trained(backend, prompts("train", topics), tokens, steps)
    sides = measured(policy, backend, prompts("test", topics), tokens, etas)
    for name, run in sides.items():
        print(described(name, run))
    ours, theirs = (mean_errors(sides[name]).mean() for name in ("recurrent", f"mirostat eta={ETAS[0]}"))
    count = sum(parameter.numel() for parameter in policy.parameters())
    print(f"{count} parameters; limit {tokens} tokens, {len(prompts('test', topics))} prompts, targets {TARGETS} bits")
    return finish("benchmark_surprise", float(ours / theirs), GOAL, at_least=False)


def prompts(split: str, topics: int) -> list[Prompt]:
    """Open prompts with long answers, no topic in both splits."""
    chosen = _TOPICS[split][:topics]
    return [Prompt(f"{i}/{topic}", task.format(topic)) for topic in chosen for i, task in enumerate(_TASKS)]


def mirostat(target: float, eta: float) -> Pipeline:
    return Pipeline([{"name": "mirostat", "params": {"tau": target, "eta": eta, "version": 2}}])


def drawn(
    policies: Sequence[Policy],
    member: Sequence[int],
    backend: LogitsBackend,
    rows: list[Prompt],
    tokens: int,
    seed: int,
) -> Trajectories:
    """Completions of every prompt at every target in turn; the condition is the target in nats."""
    targets = torch.tensor(TARGETS).repeat(len(rows) // len(TARGETS)).unsqueeze(-1)
    config = RolloutConfig(max_new_tokens=tokens, max_batch=len(rows))
    return rollout(MixedBatch(policies, member), backend, rows, config, seed=seed, conditions=targets * math.log(2))


def trained(backend: LogitsBackend, some: list[Prompt], tokens: int, steps: int) -> RecurrentPolicy:
    """Distilled from Mirostat, then trained in the closed loop."""
    torch.manual_seed(0)
    policy = RecurrentPolicy(inputs=["condition"], condition_size=1, holds_surprise=True)
    in_closed_loop(policy, taught(policy, backend, some, tokens), steps)
    return policy


def taught(policy: RecurrentPolicy, backend: LogitsBackend, some: list[Prompt], tokens: int) -> Trajectories:
    """Distil Mirostat into the policy, on Mirostat's completions."""
    teachers = [mirostat(target, ETAS[0]) for target in TARGETS]
    rows = [prompt for prompt in some for _ in TARGETS]
    member = list(range(len(TARGETS))) * len(some)
    run = drawn(teachers, member, backend, rows, tokens, seed=0)
    config = DistillConfig(epochs=10, minibatch_tokens=16 * tokens, learning_rate=1e-2)
    figures = distill(policy, run, sketch_targets(teachers, torch.eye(len(TARGETS))[member], run), config)
    print("distilled: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    return run


def in_closed_loop(policy: RecurrentPolicy, stored: Trajectories, steps: int) -> None:
    assert stored.observations.condition is not None
    config = SurpriseControlConfig(steps=steps, window=WINDOW)
    figures = train_surprise_control(policy, stored, stored.observations.condition.squeeze(-1), config)
    print("closed loop: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))


def measured(
    policy: RecurrentPolicy, backend: LogitsBackend, some: list[Prompt], tokens: int, etas: Sequence[float]
) -> dict[str, Trajectories]:
    """Completions of each side, by name, on common draws."""
    sides: dict[str, list[Policy]] = {"recurrent": [policy] * len(TARGETS)}
    sides |= {f"mirostat eta={eta:g}": [mirostat(target, eta) for target in TARGETS] for eta in etas}
    everything = {}
    for name, policies in sides.items():
        rows = [prompt for prompt in some for _ in TARGETS]
        everything[name] = drawn(policies, list(range(len(TARGETS))) * len(some), backend, rows, tokens, seed=99)
    return everything


def surprises(run: Trajectories) -> list[tuple[Tensor, float]]:
    """(T,) bits, and the target, of each completion."""
    bits = (-run.base_logprobs / math.log(2)).split(run.lengths.tolist())
    return [(row, TARGETS[i % len(TARGETS)]) for i, row in enumerate(bits)]


def mean_errors(run: Trajectories) -> np.ndarray:
    """(prompts, targets) bits."""
    return _by_prompt([abs(float(row.mean()) - target) for row, target in surprises(run)])


def window_errors(run: Trajectories) -> np.ndarray:
    """(prompts, targets) bits, mean over the windows of a completion."""
    values = []
    for row, target in surprises(run):
        width = min(WINDOW, len(row))
        means = row.unfold(0, width, 1).mean(-1)
        values.append(float((means - target).abs().mean()))
    return _by_prompt(values)


def _by_prompt(values: list[float]) -> np.ndarray:
    return np.asarray(values).reshape(-1, len(TARGETS))


def described(name: str, run: Trajectories) -> str:
    parts = []
    for what, errors in (("mean", mean_errors(run)), ("windows", window_errors(run))):
        found = bootstrap(errors.mean(1), ["all"] * len(errors))
        by_target = " ".join(f"{value:.3f}" for value in errors.mean(0))
        parts.append(f"{what} {found.mean:.3f} [{found.low:.3f}, {found.high:.3f}] bits (by target {by_target})")
    divergence = float((run.behaviour_logprobs - run.base_logprobs).mean())
    ended = float(run.terminated.float().mean())
    return f"{name}: " + "; ".join(parts) + f"; {divergence:.3f} nats a token from the base model, {ended:.0%} ended"


if __name__ == "__main__":
    sys.exit(main())
