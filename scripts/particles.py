"""Particle filtering, entropic particle filtering and best-of-N at equal tokens, on arithmetic chains.

    python scripts/particles.py
    python scripts/particles.py --prompts 12 --particles 4 --corruption 0 0.3 --seed 1

The base model writes one equation a line; the step scorer checks those equations (`arithmetic_chain`), and with
`--corruption` says the contrary of what it found for that share of texts. All three choose their completion by the
score: a filter the best of its N particles, best-of-N the best of as many independent completions as the filter's
tokens pay for. Prints accuracy of the final number, tokens, distinct completions left and effective sample size, and
paired differences to best-of-N with 95 % intervals over prompts. The scorer does not see the question: a chain of true
equations may still answer another one. About seven minutes a corruption rate at the defaults on two shared cores.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from asn_rl.threads import limit_spinning

limit_spinning()

import _recipe
import numpy as np

from asn_policies import Pipeline
from asn_rl.backends import BackendConfig, Example, load_backend
from asn_rl.data import DataConfig, load_prompts
from asn_rl.errors import InvalidValue
from asn_rl.evaluation.statistics import bootstrap
from asn_rl.evaluation.voting import expected_best_of
from asn_rl.particles import ParticleConfig, particle_filter
from asn_rl.protocols import LogitsBackend
from asn_rl.rewards.numeric import numeric_answer
from asn_rl.rewards.step_scorers import StepScorer, arithmetic_chain, corrupted
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.runs import console
from asn_rl.types import Prompt, Trajectories

_EXAMPLES = (
    Example("9 - 3 + 8 + 1", "9 - 3 = 6\n6 + 8 = 14\n14 + 1 = 15"),
    Example("4 + 7 - 2 - 5", "4 + 7 = 11\n11 - 2 = 9\n9 - 5 = 4"),
    Example("2 + 6 + 5 - 4", "2 + 6 = 8\n8 + 5 = 13\n13 - 4 = 9"),
    Example("8 + 8 - 9 + 3", "8 + 8 = 16\n16 - 9 = 7\n7 + 3 = 10"),
)


@dataclass(frozen=True)
class Outcome:
    """One method on all prompts; arrays are (P,)."""

    correct: np.ndarray
    """chance that the chosen completion is correct"""
    tokens: np.ndarray
    """tokens drawn"""
    distinct: np.ndarray
    """different completions to choose from"""
    effective: float
    """mean effective sample size over steps and prompts; NaN: not a filter"""


def main() -> int:
    options = _options()
    return _recipe.exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    if options.prompts < 2:
        raise InvalidValue("--prompts", options.prompts, ">= 2", "intervals are over prompts")
    prompts = _chains(options.prompts, options.terms)
    backend = load_backend(BackendConfig(model=options.model, device=options.device, examples=_EXAMPLES))
    policy = Pipeline([{"name": "temperature", "params": {"temperature": options.temperature}}])
    config = ParticleConfig(particles=options.particles, step_tokens=16, max_steps=options.terms + 1)
    pool = rollout(
        policy,
        backend,
        prompts,
        RolloutConfig(max_new_tokens=config.budget),
        num_generations=2 * options.particles,
        seed=options.seed + 1,
    )
    for rate in options.corruption:
        scorer = corrupted(arithmetic_chain, rate, options.seed)
        pf = _filtered(policy, backend, prompts, scorer, config, options.seed)
        epf = _filtered(policy, backend, prompts, scorer, replace(config, entropic=True), options.seed)
        console.print(f"scores corrupted: {rate:.0%}", highlight=False)
        for name, outcome in (("PF", pf), ("ePF", epf)):
            best = _best_of_n(pool, prompts, scorer, outcome.tokens)
            _print_pair(name, outcome, best)


def _chains(count: int, terms: int) -> list[Prompt]:
    """Questions that are the chain alone: `4 + 7 - 2 - 5`."""
    shape = {"min_digits": 1, "max_digits": 1, "min_terms": terms, "max_terms": terms}
    data = {"family": "chain_sum", "size": 4 * count, "config": shape}
    prompts = load_prompts(DataConfig("reasoning_gym", data, limit=count), "test")
    return [replace(p, content=p.last_turn.split(": ")[-1].removesuffix(" =")) for p in prompts]


def _filtered(
    policy: Pipeline,
    backend: LogitsBackend,
    prompts: Sequence[Prompt],
    scorer: StepScorer,
    config: ParticleConfig,
    seed: int,
) -> Outcome:
    sets = particle_filter(policy, backend, prompts, scorer, config, seed=seed)
    return Outcome(
        np.array([_chosen_correct(s.prompt, s.completions, s.terminated, list(s.scores)) for s in sets]),
        np.array([s.tokens for s in sets]),
        np.array([len(set(s.completions)) for s in sets]),
        float(np.mean([size for s in sets for size in s.effective_sizes])),
    )


def _best_of_n(pool: Trajectories, prompts: Sequence[Prompt], scorer: StepScorer, budgets: np.ndarray) -> Outcome:
    """The best-scored of the first completions whose tokens stay within each prompt's budget, at least one."""
    count = len(pool) // len(prompts)
    lengths = pool.lengths.numpy().reshape(-1, count).cumsum(1)
    correct, tokens, distinct = [], [], []
    for p, (prompt, spent, budget) in enumerate(zip(prompts, lengths, budgets, strict=True)):
        n = max(1, int((spent <= budget).sum()))
        part = slice(p * count, p * count + n)
        texts = list(pool.completions[part])
        correct.append(_chosen_correct(prompt, texts, pool.terminated[part].tolist(), scorer([prompt] * n, texts)))
        tokens.append(int(spent[n - 1]))
        distinct.append(len(set(texts)))
    return Outcome(np.array(correct), np.array(tokens), np.array(distinct), float("nan"))


def _chosen_correct(prompt: Prompt, texts: Sequence[str], ended: Sequence[bool], scores: Sequence[float]) -> float:
    """Chance that the completion with the highest score is correct; equal scores, which are many, are drawn from."""
    answers = [prompt.columns["answer"]] * len(texts)
    correct = numeric_answer([prompt.content] * len(texts), texts, answer=answers, terminated=ended)
    return expected_best_of(scores, [value for value in correct if value is not None], len(texts))


def _print_pair(name: str, outcome: Outcome, best: Outcome) -> None:
    gap = bootstrap(outcome.correct - best.correct, ["all"] * len(best.correct))
    for label, row in ((name, outcome), ("best-of-N", best)):
        size = "" if np.isnan(row.effective) else f"  effective sample size {row.effective:.1f}"
        console.print(
            f"  {label:9s}  correct {row.correct.mean():.3f}  tokens {row.tokens.mean():.0f}  distinct "
            f"{row.distinct.mean():.1f}{size}",
            highlight=False,
        )
    console.print(f"  {name} minus best-of-N {gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]", highlight=False)


def _options() -> argparse.Namespace:
    parser = _recipe.parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="embedded short name, hub id or folder")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--prompts", type=int, default=32, help="arithmetic chains, at least 2")
    parser.add_argument("--terms", type=int, default=4, help="one-digit terms of a chain")
    parser.add_argument("--particles", type=int, default=8, help="completions of a prompt that are alive at a time")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the base model")
    parser.add_argument("--corruption", type=float, nargs="+", default=[0.0, 0.2], help="shares of scores turned round")
    parser.add_argument("--seed", type=int, default=0, help="keys every draw")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
