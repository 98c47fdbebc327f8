"""Completions that were generated and scored once, as arrays: what every metric is computed from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from asn_rl.errors import InvalidValue


@dataclass(frozen=True)
class Samples:
    """What every arm generated: arrays are (P, A, S), S samples of P prompts under A arms. What is None is not known,
    and metrics that need it are refused."""

    arms: tuple[str, ...]
    strata: tuple[str, ...]
    """P labels"""
    scores: np.ndarray
    """by the verifier; NaN: masked"""
    tokens: np.ndarray | None = None
    """length of each completion; NaN: not generated"""
    truncated: np.ndarray | None = None
    """1 where the token limit cut the completion off, else 0; NaN: not generated"""
    answers: np.ndarray | None = None
    """codes as in `allocation.AnswerLog`: 0 correct, 1, 2, ... other answers, -1 none. Equal codes are equal answers of
    the same prompt. A sample whose score is masked is left out"""
    scorers: Mapping[str, np.ndarray] = field(default_factory=dict)
    """scores by which the best of k is chosen; NaN: masked"""
    verifiers: Mapping[str, np.ndarray] = field(default_factory=dict)
    """scores of verifiers by name; NaN: masked"""
    wins: np.ndarray | None = None
    """1 where a judge prefers the completion to the reference's, 0.5 for a tie, 0 where not; NaN: masked"""
    texts: Sequence[Sequence[Sequence[str | None]]] | None = None
    """P x A x S completions; None: not generated"""
    encoder: str | None = None
    """sentence encoder of `vendi`, a name or folder as in `rewards.embedding_diversity`"""
    price: float = 1.0
    """of a token: `cost` is in its currency, or in tokens where it is 1"""

    def __post_init__(self) -> None:
        shape = (len(self.strata), len(self.arms), self.scores.shape[-1])
        arrays = {"scores": self.scores, "tokens": self.tokens, "truncated": self.truncated, "answers": self.answers}
        arrays["wins"] = self.wins
        for name, array in {**arrays, **self.scorers, **self.verifiers}.items():
            if array is not None and array.shape != shape:
                raise InvalidValue(f"shape of {name}", array.shape, f"{shape}: (strata, arms, samples)")
        if len(set(self.arms)) != len(self.arms):
            raise InvalidValue("arms", self.arms, "names that differ")

    @property
    def samples(self) -> int:
        return self.scores.shape[-1]


def by_group(
    samples: Samples, k: int, function: Callable[[tuple[int, int], np.ndarray], float], known: np.ndarray | None = None
) -> np.ndarray:
    """(P, A) `function(cell, kept)` where `kept` (S,) samples, k or more, are not masked; else NaN."""
    kept = ~np.isnan(samples.scores) & (True if known is None else known)
    found = np.full(kept.shape[:2], np.nan)
    for prompt, arm in zip(*np.nonzero(kept.sum(-1) >= k), strict=True):
        found[prompt, arm] = function((prompt, arm), kept[prompt, arm])
    return found


def by_texts(samples: Samples, least: int, function: Callable[[list[str]], float]) -> np.ndarray:
    """(P, A) `function(texts)` of the completions of each prompt and arm, where there are `least` or more; else NaN."""
    assert samples.texts is not None
    found = np.full(samples.scores.shape[:2], np.nan)
    for prompt, arm in np.ndindex(found.shape):
        group = [text for text in samples.texts[prompt][arm] if text is not None]
        if len(group) >= least:
            found[prompt, arm] = function(group)
    return found
