"""Samples that an adaptive allocation needs for the majority-vote accuracy of uniform 8, as a share of those 8.

Easy and hard arithmetic (one-digit sums, differences and products; sums and differences of three terms) is sampled
once; every allocation is then replayed on the same log, averaged over random orders of each prompt's samples:

- early stop: until the posterior of the leading answer reaches 0.8 (`asn_rl.evaluation.allocation.early_stop`), for
  limits of 1, 2, ... samples;
- marginal gain: fixed numbers of samples by the success that a probe expects of the prompt's embedding, for budgets
  of 1, 2, ... samples a prompt; probe and curves come from other prompts (six folds, operand pairs kept together);
- both: the marginal-gain allocation as each prompt's limit, early stop within it.

The ratio is that of both. Samples needed are interpolated between neighbouring limits; intervals are from resampled
prompts, the interpolation repeated in each resample, "inf" where the accuracy is not reached. As the curves are flat
there, each line also has what a limit chosen on one half of the prompts does on the other (mean of 400 splits). Answers
that are no number or were cut off cast no vote.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from asn_rl.threads import limit_spinning, set_threads

limit_spinning()

import numpy as np
from _benchmark import finish, options

from asn_policies import Pipeline
from asn_rl.backends import BackendConfig, Example, load_backend
from asn_rl.data import DataConfig, load_prompts
from asn_rl.evaluation.allocation import (
    AnswerLog,
    StoppingRule,
    answer_log,
    concave_envelope,
    early_stop,
    fixed,
    marginal_gain_allocation,
    replay,
)
from asn_rl.evaluation.difficulty import ProbeConfig, folds, predicted_curves
from asn_rl.evaluation.statistics import bootstrap
from asn_rl.evaluation.voting import ANSWER_KEYS, read_answers
from asn_rl.rewards.numeric import last_number
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Prompt, Trajectories

GOAL, UNIFORM, CONFIDENCE = 0.6, 8, 0.8
LEVEL_EDGES = (0.1, 0.35, 0.65, 0.9)
"""shares of correct samples at which the probe's five levels part"""
_EXAMPLES = (
    Example("What is 10 + 2?", "10 + 2 = 12"),
    Example("What is 11 - 4?", "11 - 4 = 7"),
    Example("What is 10 * 3?", "10 * 3 = 30"),
)
_THREE_TERMS = {"min_digits": 1, "max_digits": 1, "min_terms": 3, "max_terms": 3}


def main() -> int:
    arguments = options(
        __doc__ or "", "python scripts/benchmark_allocation.py --prompts 72 --samples 32",
        prompts=72, samples=32, temperature_percent=70, resamples=2000, seed=0,
    )  # fmt: skip
    set_threads(arguments.threads)
    quick = arguments.quick
    prompts = _prompts(24 if quick else arguments.prompts)
    samples = 16 if quick else arguments.samples
    trajectories = _sample(prompts, samples, arguments.temperature_percent / 100, arguments.seed)
    log = _log(trajectories, prompts, samples)
    return _report(log, trajectories, prompts, 200 if quick else arguments.resamples)


def _prompts(count: int) -> list[Prompt]:
    """Two thirds one-digit arithmetic, one third chains of three terms."""
    chains = DataConfig("reasoning_gym", {"family": "chain_sum", "size": 200, "config": _THREE_TERMS}, limit=count // 3)
    short = DataConfig("arithmetic", {"operations": "+-*"}, limit=count - count // 3)
    return [*load_prompts(short, "train"), *load_prompts(chains, "train")]


def _sample(prompts: Sequence[Prompt], samples: int, temperature: float, seed: int) -> Trajectories:
    backend = load_backend(BackendConfig(system_prompt="You give short answers.", examples=_EXAMPLES))
    policy = Pipeline([{"name": "temperature", "params": {"temperature": temperature}}])
    config = RolloutConfig(max_new_tokens=14, max_batch=512)
    options = {"num_generations": samples, "seed": seed, "capture": ("prompt_embedding",)}
    return rollout(policy, backend, prompts, config, **options)


def _log(trajectories: Trajectories, prompts: Sequence[Prompt], samples: int) -> AnswerLog:
    answers = read_answers(trajectories.completions, trajectories.terminated.tolist(), ANSWER_KEYS["number"])
    grouped = [answers[i : i + samples] for i in range(0, len(answers), samples)]
    return answer_log(grouped, [last_number(prompt.columns["answer"]) for prompt in prompts])


@dataclass(frozen=True)
class Family:
    """One allocation at growing limits or budgets."""

    name: str
    samples: np.ndarray
    """(F, P) mean samples of each prompt"""
    accuracy: np.ndarray
    """(F, P)"""


def _family(name: str, log: AnswerLog, rules: Sequence[StoppingRule], limit: int, resamples: int) -> Family:
    replays = [replay(log, rule, limit=limit, resamples=resamples) for rule in rules]
    return Family(name, np.stack([r.samples for r in replays]), np.stack([r.accuracy for r in replays]))


def _report(log: AnswerLog, trajectories: Trajectories, prompts: Sequence[Prompt], resamples: int) -> int:
    limit = log.samples // 2
    caps = _caps(log, trajectories, prompts, limit)
    sizes = range(1, limit + 1)
    rules: dict[str, list[StoppingRule]] = {
        "uniform": [fixed([n] * log.prompts) for n in sizes],
        "early stop": [early_stop(n, CONFIDENCE) for n in sizes],
        "marginal gain": [fixed(counts) for counts in caps],
        "both": [early_stop(counts, CONFIDENCE) for counts in caps],
    }
    families = {name: _family(name, log, own, limit, resamples) for name, own in rules.items()}
    target = families["uniform"].accuracy[UNIFORM - 1]
    shares = (log.codes == 0).mean(1)
    print(
        f"{log.prompts} prompts x {log.samples} samples; share correct {shares.mean():.3f}, prompts never right "
        f"{(shares == 0).mean():.0%}, always right {(shares == 1).mean():.0%}; uniform {UNIFORM}: {target.mean():.4f}"
    )
    ratios = {}
    for name, family in families.items():
        _print_curve(family)
        ratio, low, high = _ratio(family, target)
        ratios[name] = ratio
        needed = f"  needs {ratio:.3f} [{low:.3f}, {high:.3f}] of the samples of uniform {UNIFORM}"
        print(f"{needed}; {_at_goal(family, target)}; {_chosen_elsewhere(family, target)}")
    return finish("benchmark_allocation", ratios["both"], GOAL, at_least=False)


def _caps(log: AnswerLog, trajectories: Trajectories, prompts: Sequence[Prompt], limit: int) -> list[np.ndarray]:
    """Marginal-gain allocations for budgets of 1, 2, ... samples a prompt, at least one each."""
    embedding = trajectories.observations.prompt_embedding
    assert embedding is not None
    levels = np.digitize((log.codes == 0).mean(1), LEVEL_EDGES)
    fold = folds([_pair(prompt) for prompt in prompts], 6)
    curves = predicted_curves(
        embedding[:: log.samples], log.vote_accuracy(limit), levels, len(LEVEL_EDGES) + 1, ProbeConfig(width=0), fold
    )
    envelope = concave_envelope(curves)
    return [marginal_gain_allocation(envelope, n * log.prompts, minimum=1) for n in range(1, limit + 1)]


def _pair(prompt: Prompt) -> str:
    """Operands in ascending order: the same pair is asked about several times."""
    return " ".join(sorted(character for character in prompt.last_turn if character.isdigit()))


def _needed(samples: np.ndarray, accuracy: np.ndarray, target: float) -> float:
    """Samples at which the first crossing of the target is interpolated; inf: never."""
    reached = np.flatnonzero(accuracy >= target)
    if len(reached) == 0:
        return float("inf")
    i = int(reached[0])
    if i == 0:
        return float(samples[0])
    share = (target - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
    return float(samples[i - 1] + share * (samples[i] - samples[i - 1]))


def _ratio(family: Family, target: np.ndarray, resamples: int = 2000) -> tuple[float, float, float]:
    """Samples needed over `UNIFORM`, with a 95 % percentile interval over resampled prompts."""
    count = len(target)
    weights = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=resamples) / count
    spent, accuracy, goals = weights @ family.samples.T, weights @ family.accuracy.T, weights @ target
    draws = [_needed(s, a, g) / UNIFORM for s, a, g in zip(spent, accuracy, goals, strict=True)]
    low, high = np.quantile(draws, [0.025, 0.975], method="higher")
    return _needed(family.samples.mean(1), family.accuracy.mean(1), target.mean()) / UNIFORM, float(low), float(high)


def _at_goal(family: Family, target: np.ndarray) -> str:
    """Accuracy lost or gained by the member that comes closest to the goal's samples from below."""
    within = np.flatnonzero(family.samples.mean(1) <= GOAL * UNIFORM)
    i = int(within[family.samples.mean(1)[within].argmax()])
    gap = bootstrap(family.accuracy[i] - target, ["all"] * len(target))
    return (
        f"with {family.samples[i].mean() / UNIFORM:.0%} of them the accuracy differs by {gap.mean:+.4f} "
        f"[{gap.low:+.4f}, {gap.high:+.4f}]"
    )


def _chosen_elsewhere(family: Family, target: np.ndarray, splits: int = 400) -> str:
    """What the first member that reaches the target on one half of the prompts (or the last) does on the other half."""
    generator, spent, gaps = np.random.default_rng(0), [], []
    for _ in range(splits):
        here, there = np.array_split(generator.permutation(len(target)), 2)
        reached = np.flatnonzero(family.accuracy[:, here].mean(1) >= target[here].mean())
        i = int(reached[0]) if len(reached) else len(family.accuracy) - 1
        spent.append(family.samples[i, there].mean() / UNIFORM)
        gaps.append((family.accuracy[i, there] - target[there]).mean())
    return f"chosen on other prompts: {np.mean(spent):.0%} of them, {np.mean(gaps):+.4f}"


def _print_curve(family: Family) -> None:
    points = zip(family.samples.mean(1), family.accuracy.mean(1), strict=True)
    print(f"{family.name}: " + "  ".join(f"{s:.2f}: {a:.4f}" for s, a in points))


if __name__ == "__main__":
    sys.exit(main())
