"""Settings of an evaluation on benchmarks, and what turns labelled candidates into the samples that metrics read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from asn_rl.data.benchmark import Benchmark
from asn_rl.errors import InvalidValue, check_at_least
from asn_rl.evaluation.metrics import METRICS
from asn_rl.evaluation.statistics import Resampling
from asn_rl.evaluation.voting import ANSWER_KEYS
from asn_rl.rewards.compose import RewardConfig


@dataclass(frozen=True)
class EvaluateConfig:
    """Policies and the static rules of the grid on benchmarks."""

    tasks: tuple[str, ...] = ()
    """benchmarks: names as `asn-rl benchmarks` lists them, or YAML files"""
    data: str | None = None
    """folder of the benchmarks' files; null: the one that the environment variable ASN_RL_DATA names"""
    verify_checksums: bool = True
    """off: files are taken as they are"""
    limit: int | None = None
    """prompts a split of a benchmark at most, evenly spaced; null: all"""
    policies: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """policy folders by name, several of a name being training seeds of one method, for example
    {rl: [runs/0/policy, runs/1/policy]}"""
    num_generations: int = 4
    """completions of every prompt under every rule and policy"""
    seed: int = 3000
    """seed of the first completion; the others count on from it"""
    max_new_tokens: int | None = None
    """token budget of a completion; null: the benchmark's own"""
    ks: tuple[int, ...] = ()
    """sample counts k of pass@k, maj@k and best_of@k; none: num_generations"""
    scorers: tuple[RewardConfig, ...] = ()
    """further scores, {function, arguments}, such as a reward model's or a judge's: each is reported, and the best of k
    is chosen by each"""
    judge: RewardConfig | None = None
    """compares every completion with one of the reference's, for example {function: judge_win, arguments: {model:
    NAME}}: win rates are reported and, where a benchmark has no verifiers, arms are compared by them. Any reward
    function that reads the column `references` will do; null: none"""
    reference: str | None = None
    """rule or policy whose completions the judge compares the others with; null: the best static rule on the selection
    split. There, where rules are compared by win rate, they meet this rule, or the first of the grid"""
    resamples: int = 10_000
    """bootstrap resamples of the prompts"""
    level: float = 0.95
    """coverage of the intervals"""
    stop_early: int | None = None
    """prompts after which to look whether every policy is known to be better or worse than the best static rule, and
    to stop if so; null: all prompts are used"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_generations", "resamples")
        for name in ("limit", "max_new_tokens", "stop_early"):
            if getattr(self, name) is not None:
                check_at_least(self, 1, name)
        if self.reference is not None and self.judge is None:
            raise InvalidValue("evaluate.reference", self.reference, "null without a judge", "set evaluate.judge")
        if len(set(self.tasks)) != len(self.tasks):
            raise InvalidValue("evaluate.tasks", list(self.tasks), "names that differ")
        wrong = [k for k in self.ks if not 1 <= k <= self.num_generations]
        if wrong:
            raise InvalidValue("evaluate.ks", wrong[0], f"in [1, {self.num_generations}]", "raise num_generations")
        empty = [name for name, folders in self.policies.items() if not folders]
        if empty:
            raise InvalidValue(f"evaluate.policies.{empty[0]}", [], "a list of at least one policy folder")
        if not 0 < self.level < 1:
            raise InvalidValue("level", self.level, "in (0, 1)")

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seed, self.seed + self.num_generations))

    @property
    def how(self) -> Resampling:
        return Resampling(self.resamples, self.level, self.seed)


def primary_metric(benchmark: Benchmark, judged: bool) -> str:
    """The metric that arms are compared by: the verifier's score, else a judge's win rate, else the first listed."""
    if benchmark.verifiers:
        return "accuracy"
    return "win_rate" if judged else benchmark.metrics[0]


def metric_names(benchmark: Benchmark, ks: Sequence[int], scorers: Sequence[str], judged: bool = False) -> list[str]:
    """Metrics of a benchmark with their numbers of samples (`pass` becomes `pass@4`), then the scores of its other
    verifiers and of the scorers, the best of k by these, a judge's win rate, different words, tokens and truncation."""
    several = [k for k in ks if k > 1]
    tails = {
        "": [""],
        "@k": [f"@{k}" for k in several],
        "@k:scorer": [f"@{k}:{name}" for k in several for name in scorers],
        ":verifier": [f":{name}" for name in (*(v.name for v in benchmark.verifiers[1:]), *scorers)],
    }
    best = ["best_of"] if benchmark.verifiers else []  # else nothing says how good the best one is
    judge = ["win_rate"] if judged else []
    stems = dict.fromkeys([*benchmark.metrics, "score", *best, *judge, "distinct_1", "tokens", "truncated"])
    return [
        stem + tail
        for stem in stems
        if stem != "maj" or benchmark.answers is not None
        for tail in (tails[METRICS[stem].options] if stem in METRICS else [""])
    ]


def answer_codes(texts: Sequence[Sequence[Sequence[str | None]]], scores: np.ndarray, kind: str) -> np.ndarray:
    """(P, A, S) codes of the answers that P x A x S completions give: 0 correct, 1, 2, ... other answers, -1 none.

    Args:
        scores: (P, A, S) of the verifier; what it accepts is the correct answer, however it is written.
        kind: name in `voting.ANSWER_KEYS`.
    """
    codes, key = np.full(scores.shape, -1), ANSWER_KEYS[kind]
    for prompt, groups in enumerate(texts):
        seen: dict[object, int] = {}
        for arm, group in enumerate(groups):
            for sample, text in enumerate(group):
                if scores[prompt, arm, sample] == 1:
                    codes[prompt, arm, sample] = 0
                elif text is not None and (answer := key(text)) is not None:
                    codes[prompt, arm, sample] = seen.setdefault(answer, len(seen) + 1)
    return codes


def per_entry(scores: np.ndarray, columns: Sequence[Mapping[str, object]], name: str) -> np.ndarray:
    """(P, A, S) scores that are means over the entries of a prompt's column, weighted so that their mean over prompts
    is the mean over all entries: IFEval's instruction level."""
    counts = np.array([len(list(prompt[name])) for prompt in columns], dtype=float)  # type: ignore[call-overload]
    return scores * (counts / counts.mean())[:, None, None]
