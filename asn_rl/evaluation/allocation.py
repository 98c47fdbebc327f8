"""How many samples each prompt gets, and what that is worth: replayed on logged samples, without generating.

An allocation is a stopping rule: after every sample it sees the votes so far and says whether the prompt has had
enough. Uniform and marginal-gain allocation fix the number in advance; self-consistency stops early. All are replayed
alike: a random order of a prompt's logged samples is what a fresh run would have drawn, as long as the log is not
exhausted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from asn_rl.errors import DataError, InvalidValue
from asn_rl.evaluation.voting import Answer, vote_accuracy

StoppingRule = Callable[[np.ndarray, int, int], np.ndarray]
"""(votes (R, A), prompt, drawn) -> (R,) bool: which of R runs, each with `drawn` samples of one prompt and its own
votes, have had enough. Asked before the first sample, too, with `drawn` = 0. A rule that keeps to the contract of a
decoder does not read which answer is correct: it must treat the A answers alike."""


@dataclass(frozen=True)
class AnswerLog:
    """Answers that were sampled once: n of each of P prompts."""

    codes: np.ndarray
    """(P, n) int64: 0 is the correct answer of the prompt, 1, 2, ... its wrong ones, -1 masked"""

    @property
    def prompts(self) -> int:
        return self.codes.shape[0]

    @property
    def samples(self) -> int:
        return self.codes.shape[1]

    def votes(self) -> np.ndarray:
        """(P, A) votes of all samples for each answer, the correct one first."""
        return (self.codes[:, :, None] == np.arange(max(1, int(self.codes.max()) + 1))).sum(1)

    def vote_accuracy(self, samples: int) -> np.ndarray:
        """(P, samples + 1) accuracy of the majority vote at 0, ..., `samples` draws from each prompt's empirical
        answers.

        A plug-in estimate, exact for the empirical distribution: the mode of the log counts as the mode of the model,
        so that hard prompts look more decided than they are.
        """
        return np.stack([vote_accuracy(row, samples) for row in self.votes() / self.samples])


def answer_log(answers: Sequence[Sequence[Answer]], correct: Sequence[Hashable | None]) -> AnswerLog:
    """Number the answers of every prompt.

    Args:
        answers: P lists of n answers, None where masked.
        correct: P correct answers.

    Raises:
        DataError: no prompts or samples, prompts with different numbers of samples, or one without a correct answer.
    """
    sizes = {len(row) for row in answers}
    if len(answers) != len(correct) or len(sizes) != 1 or 0 in sizes:
        raise DataError(
            f"a log needs as many samples (at least one) of every prompt and one correct answer each, got "
            f"{len(answers)} prompts with {sorted(sizes)} samples and {len(correct)} correct answers"
        )
    if any(gold is None for gold in correct):
        raise DataError(f"prompt {list(correct).index(None)} has no correct answer; leave such prompts out of the log")
    codes = np.empty((len(answers), sizes.pop()), dtype=np.int64)
    for row, given, gold in zip(codes, answers, correct, strict=True):
        number: dict[Answer, int] = {None: -1, gold: 0}
        row[:] = [number.setdefault(answer, len(number) - 1) for answer in given]
    return AnswerLog(codes)


@dataclass(frozen=True)
class Replay:
    """What an allocation spent and reached; arrays are (P,), means over orders of the log."""

    samples: np.ndarray
    """samples drawn"""
    accuracy: np.ndarray
    """probability that the majority vote over them is correct, ties broken by an even draw"""


def replay(log: AnswerLog, rule: StoppingRule, *, limit: int, resamples: int = 200, seed: int = 0) -> Replay:
    """Follow a stopping rule through random orders of every prompt's logged samples, majority vote at the end.

    Orders depend on the seed and the prompt only: two rules see the same ones.

    Args:
        limit: most samples a prompt may get.

    Raises:
        InvalidValue: a limit beyond the log, or no resamples.
    """
    if not 1 <= limit <= log.samples:
        raise InvalidValue("limit", limit, f"in [1, {log.samples}], the samples logged a prompt", "log more samples")
    if resamples < 1:
        raise InvalidValue("resamples", resamples, ">= 1")
    spent, credit = np.empty(log.prompts), np.empty(log.prompts)
    width = log.votes().shape[1]
    for prompt, codes in enumerate(log.codes):
        order = np.random.default_rng([seed, prompt]).permuted(np.tile(codes, (resamples, 1)), axis=1)
        votes, drawn = np.zeros((resamples, width), dtype=np.int64), np.zeros(resamples, dtype=np.int64)
        active = np.arange(resamples)
        for step in range(limit):
            active = active[~rule(votes[active], prompt, step)]
            if len(active) == 0:
                break
            answer = order[active, step]
            given = answer >= 0
            votes[active[given], answer[given]] += 1
            drawn[active] += 1
        spent[prompt], credit[prompt] = drawn.mean(), _credit(votes).mean()
    return Replay(spent, credit)


def _credit(votes: np.ndarray) -> np.ndarray:
    """(R,) probability that the majority vote is the first answer, ties broken by an even draw."""
    tied = (votes == votes.max(-1, keepdims=True)) & (votes > 0)
    return tied[:, 0] / np.maximum(1, tied.sum(-1))


def fixed(counts: Sequence[int] | np.ndarray) -> StoppingRule:
    """So many samples of each prompt; `[n] * P` is the uniform allocation."""
    counts = np.asarray(counts)
    return lambda votes, prompt, drawn: np.full(len(votes), drawn >= counts[prompt])


def early_stop(limit: int | Sequence[int] | np.ndarray, confidence: float = 1.0) -> StoppingRule:
    """Self-consistency that stops when the vote is settled.

    Settled: the leading answer cannot be reached within the limit any more; or the posterior probability that it is
    more frequent than the runner-up reaches `confidence` (Adaptive-Consistency, Aggarwal et al. 2023, arXiv:2305.11860,
    its Beta criterion). At 1 only the first, which never changes the vote.

    Args:
        limit: most samples of a prompt, or one limit a prompt, for example of `marginal_gain_allocation`.
        confidence: in (0.5, 1].

    Raises:
        InvalidValue: a limit below 0 (or one for all below 1), or a confidence outside its range.
    """
    limits = np.asarray(limit)
    if limits.size == 0 or limits.min() < (1 if limits.ndim == 0 else 0):
        raise InvalidValue("limit", limit, ">= 1 samples, or a list of one >= 0 for each prompt")
    if not 0.5 < confidence <= 1:
        raise InvalidValue("confidence", confidence, "in (0.5, 1]", "1 stops only when the vote cannot change any more")
    counts = range(int(limits.max()) + 1)
    posterior = np.array([[mode_posterior(first, second) for second in counts] for first in counts])

    def rule(votes: np.ndarray, prompt: int, drawn: int) -> np.ndarray:
        left = int(limits if limits.ndim == 0 else limits[prompt]) - drawn
        ranked = np.sort(np.pad(votes, ((0, 0), (1, 0))), axis=-1)  # a lone answer has a runner-up without votes
        second, first = ranked[:, -2], ranked[:, -1]
        return (first > second + left) | (posterior[first, second] >= confidence) | (left <= 0)

    return rule


def mode_posterior(first: int, second: int) -> float:
    """P(the leading answer is the more frequent one of the first two | their votes), under a uniform prior.

    P(q > 1/2) for q ~ Beta(first + 1, second + 1), a binomial tail for whole numbers; others' votes do not count.
    """
    trials = first + second + 1
    return sum(math.comb(trials, i) for i in range(first + 1)) / 2**trials


def concave_envelope(values: np.ndarray) -> np.ndarray:
    """(P, K + 1) the least concave curves above these: what mixtures of sample counts reach.

    The accuracy of a majority vote is not concave in its samples: two votes decide no better than one.
    """
    x = np.arange(values.shape[1])
    rows = []
    for row in values:
        corners = [0]
        for i in x[1:]:
            while len(corners) > 1 and _below(row, corners[-2], corners[-1], int(i)):
                corners.pop()
            corners.append(int(i))
        rows.append(np.interp(x, corners, row[corners]))
    return np.stack(rows)


def _below(row: np.ndarray, a: int, b: int, c: int) -> bool:
    """Does the curve at b lie on or below the line from a to c?"""
    return (row[b] - row[a]) * (c - a) <= (row[c] - row[a]) * (b - a)


def marginal_gain_allocation(values: np.ndarray, budget: int, *, minimum: int = 0) -> np.ndarray:
    """(P,) samples of each prompt: the next sample always goes where the predicted success grows most (Damani et al.
    2024, arXiv:2410.04707, section 3), while it grows at all.

    Optimal where every curve is concave; `concave_envelope` makes them so. Of equal gains the earlier prompt's comes
    first.

    Args:
        values: (P, K + 1) predicted success with 0, 1, ..., K samples; a prompt gets at most K.
        budget: samples in all.
        minimum: samples that every prompt gets in any case.

    Raises:
        InvalidValue: values that are not finite or not concave, or a budget below P * minimum.
    """
    gains = np.diff(values, axis=-1)
    if values.ndim != 2 or not np.isfinite(values).all() or (np.diff(gains, axis=-1) > 1e-9).any():
        raise InvalidValue(
            "values", f"shape {values.shape}", "(P, K + 1) finite and concave in the number of samples",
            "pass them through concave_envelope first",
        )  # fmt: skip
    prompts, most = gains.shape
    if not 0 <= minimum <= most:
        raise InvalidValue("minimum", minimum, f"in [0, {most}]")
    if budget < prompts * minimum:
        raise InvalidValue("budget", budget, f">= {prompts * minimum}, {minimum} for each of {prompts} prompts")
    owner = np.repeat(np.arange(prompts), most - minimum)
    offered = gains[:, minimum:].reshape(-1)
    # Stable: a prompt's own samples stay in their order, so that what is taken is always a beginning of its curve.
    order = np.argsort(-offered, kind="stable")[: budget - prompts * minimum]
    taken = order[offered[order] > 1e-12]
    return minimum + np.bincount(owner[taken], minlength=prompts)
