"""Settings of an evaluation on benchmarks, and what turns labelled candidates into the samples that metrics read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from asn_rl.data.benchmark import Benchmark
from asn_rl.data.benchmark_format import render
from asn_rl.errors import DataError, InvalidValue, UnknownName, check_at_least
from asn_rl.evaluation.metrics import METRICS
from asn_rl.evaluation.statistics import Resampling
from asn_rl.evaluation.voting import ANSWER_KEYS, NO_ANSWER, read_answers
from asn_rl.rewards.compose import RewardConfig
from asn_rl.types import Prompt

EXTRA_METRICS = tuple(name for name, metric in METRICS.items() if {*metric.needs} <= {"texts", "encoder", "tokens"})
"""what any completions can be measured by"""


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
    metrics: tuple[str, ...] = ()
    """what to report besides a benchmark's own metrics, of `EXTRA_METRICS`: distinct_2, self_bleu, vendi, cost, ..."""
    price: float = 1.0
    """price of a generated token, in the currency of the metric `cost`; 1: cost is in tokens"""
    resamples: int = 10_000
    """bootstrap resamples of the prompts"""
    level: float = 0.95
    """coverage of the intervals"""
    stop_early: int | None = None
    """prompts after which to look whether every policy is known to be better or worse than the best static rule, and
    to stop if so; null: all prompts are used"""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "price")
        for name in self.metrics:
            if name not in EXTRA_METRICS:
                raise UnknownName("metric in evaluate.metrics", name, EXTRA_METRICS)
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


def named_verifiers(benchmark: Benchmark) -> list[str]:
    """The verifiers whose scores are reported by name: where there are several, also the first, which is the
    accuracy."""
    names = [verifier.name for verifier in benchmark.verifiers]
    return names if len(names) > 1 else []


def metric_names(
    benchmark: Benchmark, ks: Sequence[int], scorers: Sequence[str], judged: bool = False, extra: Sequence[str] = ()
) -> list[str]:
    """Metrics of a benchmark with their numbers of samples (`pass` becomes `pass@4`), then the scores of its verifiers
    and of the scorers, the best of k by these, a judge's win rate, different words, tokens, truncation and `extra`."""
    several = [k for k in ks if k > 1]
    tails = {
        "": [""],
        "@k": [f"@{k}" for k in several],
        "@k:scorer": [f"@{k}:{name}" for k in several for name in scorers],
        ":verifier": [f":{name}" for name in (*named_verifiers(benchmark), *scorers)],
    }
    best = ["best_of"] if benchmark.verifiers else []  # else nothing says how good the best one is
    judge = ["win_rate"] if judged else []
    stems = dict.fromkeys([*benchmark.metrics, "score", *best, *judge, "distinct_1", "tokens", "truncated", *extra])
    return [
        stem + tail
        for stem in stems
        if stem != "maj" or benchmark.answers is not None
        for tail in (tails[METRICS[stem].options] if stem in METRICS else [""])
    ]


def answer_codes(
    texts: Sequence[Sequence[Sequence[str]]],
    scores: np.ndarray,
    truncated: np.ndarray,
    kind: str,
    golds: Sequence[str | None] | None = None,
) -> np.ndarray:
    """(P, A, S) codes of the answers that P x A x S completions give: 0 correct, 1, 2, ... other answers, -1 none.

    A completion that the token limit cut off gives none, whatever the verifier says of it: if only right ones voted,
    the vote would be right too often.

    Args:
        scores: (P, A, S) of the verifier; what it accepts is the correct answer, however it is written.
        truncated: (P, A, S) 1 where the token limit cut a completion off.
        kind: name in `voting.ANSWER_KEYS`.
        golds: of each prompt, a completion with the right answer, where there is one: who gives its answer votes for
            it, though the verifier may not accept how (a right number without GSM8K's marks).
    """
    codes, key = np.full(scores.shape, NO_ANSWER), ANSWER_KEYS[kind]
    for prompt, groups in enumerate(texts):
        gold = golds[prompt] if golds is not None else None
        right = None if gold is None else key(gold)
        others: dict[object, int] = {}
        for arm, group in enumerate(groups):
            answers = read_answers(group, (truncated[prompt, arm] == 0).tolist(), key)
            for sample, answer in enumerate(answers):
                accepted = scores[prompt, arm, sample] == 1 and not truncated[prompt, arm, sample]
                if accepted or (answer is not None and answer == right):
                    codes[prompt, arm, sample] = 0
                elif answer is not None:
                    codes[prompt, arm, sample] = others.setdefault(answer, len(others) + 1)
    return codes


def gold_texts(benchmark: Benchmark, prompts: Sequence[Prompt]) -> list[str | None]:
    """The gold completion of each prompt; None where the benchmark has none, or reads more than columns for it."""

    def gold(prompt: Prompt) -> str | None:
        with suppress(DataError):
            return render(benchmark.gold or "", prompt.columns, prompt.id) or None
        return None

    return [gold(prompt) for prompt in prompts]


def per_entry(scores: np.ndarray, columns: Sequence[Mapping[str, object]], name: str) -> np.ndarray:
    """(P, A, S) scores that are means over the entries of a prompt's column, weighted so that their mean over prompts
    is the mean over all entries: IFEval's instruction level."""
    counts = np.array([len(list(prompt[name])) for prompt in columns], dtype=float)  # type: ignore[call-overload]
    return scores * (counts / counts.mean())[:, None, None]
