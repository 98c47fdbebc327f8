"""Pairwise comparison by a language model: a Swiss tournament among a prompt's candidates, rated by Bradley-Terry.

Each pair is judged in both orders, as the probability of the next token: P(A) / (P(A) + P(B)). Two orders averaged
cancel most of a judge's preference for a position, and their difference measures it (Zheng et al. 2023,
arXiv:2306.05685). A judge that answers neither letter has not judged: that comparison is void, it is no tie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asn_rl.errors import InvalidValue
from asn_rl.ops.pairwise import bradley_terry, swiss_pairs, swiss_rounds
from asn_rl.rewards.contract import Estimate
from asn_rl.rewards.inputs import group_keys
from asn_rl.rewards.letter_judge import Comparison, Judge, first_preferred, letter_judge, one_question


@dataclass(frozen=True)
class TournamentResult:
    """Ratings of the n texts of one prompt."""

    strength: np.ndarray
    """(n,) Bradley-Terry strengths, nats, mean 0 over distinct texts"""
    stderr: np.ndarray
    """(n,) their standard deviations; the prior's where nothing was compared"""
    position_bias: float | None
    """mean P(first is better) - 1/2 over valid answers, both orders of a pair; None without any"""
    comparisons: np.ndarray
    """(n,) pairs each text was validly compared in; 0: its strength is the prior, not a finding"""
    answers: int
    """what the judge was asked, two a pair"""
    first_preferred: int
    """valid answers with P(first is better) > 1/2: half of them without position bias"""
    neither: int
    """void answers, on which the judge put too little probability on either letter"""


def pairwise_judge(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Any = None,
    *,
    model: str = "smollm2-135m-instruct",
    dtype: str = "auto",
    device: str = "cpu",
    chat_template: bool = True,
    batch_size: int = 32,
    rounds: int | None = None,
    minimum_share: float = 0.2,
    prior: float = 1.0,
    seed: int = 0,
    **columns: Any,
) -> list[float | None]:
    """Bradley-Terry strength of each completion among those of its prompt, judged in pairs by a causal language model.

    Strengths are relative: comparable within a prompt, not between prompts. Equal texts share one player. Each is an
    `Estimate` with its standard deviation. None for a completion without a valid comparison (alone, or all its answers
    void).

    A tournament is among equal cells of the column `prompt_id`, else equal prompts: candidates of all heuristics meet.
    `pairwise_judge.counts` has `answers`, `first_preferred` and `neither` (see `TournamentResult`), `too_long` (of
    those void, the ones beyond the judge's context) and `uncompared` completions. `tournaments` gives the exact bias.

    Args:
        model: embedded short name, hub id or folder of a causal language model.
        dtype: precision of the judge, as in the backend's configuration.
        device: torch device of the judge.
        chat_template: ask through the judge's chat template; off for models that have none.
        batch_size: answers computed at a time; memory and speed, not results, depend on it.
        rounds: Swiss rounds; None: ceil(log2 n) + 1 for n distinct texts.
        minimum_share: least probability on the two letters together for an answer to be valid, in [0, 1].
        prior: standard deviation of strengths before any comparison, nats.
        seed: of the first round's pairing and of ties.

    Raises:
        RewardError: the judge's tokenizer has no single token for each letter.
        BackendError, UnknownName: no such model.
        InvalidValue: an argument out of range.
    """
    keys = group_keys(prompts, {"prompt_id": columns.get("prompt_id")})  # not `group`: heuristics meet
    members: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        members.setdefault(key, []).append(i)
    fields = [one_question([prompts[i] for i in rows], [completions[i] for i in rows]) for rows in members.values()]
    judge = letter_judge(model, dtype, device, chat_template, batch_size, COUNTS)
    results = tournaments(fields, judge, rounds=rounds, minimum_share=minimum_share, prior=prior, seed=seed)
    for event in ("answers", "first_preferred", "neither"):
        COUNTS[event] += sum(getattr(result, event) for result in results)
    scores: list[float | None] = [None] * len(keys)
    for rows, result in zip(members.values(), results, strict=True):
        said = zip(rows, result.strength.tolist(), result.stderr.tolist(), result.comparisons.tolist(), strict=True)
        for i, strength, stderr, compared in said:
            scores[i] = Estimate(strength, stderr) if compared else None
    COUNTS["uncompared"] += sum(score is None for score in scores)
    return scores


def tournament(
    question: str,
    texts: Sequence[str],
    judge: Judge,
    *,
    rounds: int | None = None,
    minimum_share: float = 0.2,
    prior: float = 1.0,
    seed: int = 0,
) -> TournamentResult:
    """Ratings of some texts that answer one question; see `pairwise_judge`."""
    options: dict[str, Any] = {"rounds": rounds, "minimum_share": minimum_share, "prior": prior, "seed": seed}
    return tournaments([(question, texts)], judge, **options)[0]


def tournaments(
    fields: Sequence[tuple[str, Sequence[str]]],
    judge: Judge,
    *,
    rounds: int | None = None,
    minimum_share: float = 0.2,
    prior: float = 1.0,
    seed: int = 0,
) -> list[TournamentResult]:
    """Tournaments side by side: the judge is called once a round, with the pairs of all of them in both orders.

    Args:
        fields: (question, texts) of each tournament.
        judge: gives probabilities; see `Judge`.
    """
    if rounds is not None and rounds < 1:
        raise InvalidValue("rounds", rounds, ">= 1", "null takes ceil(log2 n) + 1")
    tables = [_Table(question, texts) for question, texts in fields]
    limits = [swiss_rounds(table.players) if rounds is None or table.players < 2 else rounds for table in tables]
    for number in range(max(limits, default=0)):
        playing = [table for table, limit in zip(tables, limits, strict=True) if number < limit]
        drawn = [(table, pair) for table in playing for pair in table.draw(number, seed)]
        asked = [comparison for table, pair in drawn for comparison in table.both_orders(*pair)]
        answers = first_preferred(asked, judge, minimum_share).reshape(len(drawn), 2)
        for (table, pair), first in zip(drawn, answers, strict=True):
            table.record(*pair, first)
    return [table.result(prior) for table in tables]


class _Table:
    """One tournament under way; equal texts are one player."""

    def __init__(self, question: str, texts: Sequence[str]) -> None:
        self.question = question
        self.texts = list(dict.fromkeys(texts))
        place = {text: i for i, text in enumerate(self.texts)}
        self.player = [place[text] for text in texts]
        self.players = n = len(self.texts)
        self.wins, self.played = np.zeros((n, n)), np.zeros((n, n), dtype=np.int64)
        self.points = np.zeros(n)
        self.firsts: list[float] = []
        self.neither = 0

    def draw(self, number: int, seed: int) -> list[tuple[int, int]]:
        pairing = swiss_pairs(self.points, self.played, number, seed)
        if pairing.bye is not None:
            self.points[pairing.bye] += 0.5  # counts for the next draw, not for the rating
        return pairing.pairs

    def both_orders(self, i: int, j: int) -> list[Comparison]:
        a, b = self.texts[i], self.texts[j]
        return [Comparison(self.question, a, b), Comparison(self.question, b, a)]

    def record(self, i: int, j: int, first: np.ndarray) -> None:
        """Take in (2,) P(first is better) of both orders; NaN: void.

        A pair counts only when both orders are valid: one alone would carry the position bias.
        """
        valid = ~np.isnan(first)
        self.neither += int((~valid).sum())
        self.firsts += first[valid].tolist()
        won = (first[0] + 1 - first[1]) / 2 if valid.all() else 0.5
        if valid.all():
            self.wins[i, j] += won
            self.wins[j, i] += 1 - won
        self.points[[i, j]] += won, 1 - won
        self.played[[i, j], [j, i]] += 1

    def result(self, prior: float) -> TournamentResult:
        rating = bradley_terry(self.wins, prior)
        # The two shares of a pair sum to 1, so this counts pairs.
        compared = np.rint((self.wins + self.wins.T).sum(1)).astype(np.int64)
        bias = float(np.mean(self.firsts)) - 0.5 if self.firsts else None
        return TournamentResult(
            strength=rating.strength[self.player],
            stderr=rating.stderr[self.player],
            position_bias=bias,
            comparisons=compared[self.player],
            answers=len(self.firsts) + self.neither,
            first_preferred=sum(first > 0.5 for first in self.firsts),
            neither=self.neither,
        )


COUNTS: Counter[str] = Counter()
pairwise_judge.__dict__["counts"] = COUNTS
pairwise_judge.__dict__["compares"] = "prompt"
