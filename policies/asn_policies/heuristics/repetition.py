"""Penalties on tokens that the completion already holds. They count generated text only, not the prompt, and only its
latest distinct tokens (`rollout.tracked`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asn_policies.heuristics.rule import Rule, entry, require
from asn_rl.ops.history import HISTORY
from asn_rl.ops.logprobs import normalize
from asn_rl.ops.truncation import token_logprobs
from asn_rl.types import Observation, State

_COUNT = HISTORY.index("count")


@dataclass(frozen=True)
class RepetitionPenalty(Rule):
    """Log-probabilities of tokens that occurred, times `penalty`; below 1 it invites repetition (Keskar et al. 2019,
    arXiv:1909.05858, section 4.1).

    transformers divides positive scores and multiplies negative ones. On raw logits that depends on where their zero
    lies, which no distribution tells: adding a constant changes the result. Here the scores are what the rule before
    left, normalised, which is never positive; so p becomes p^penalty, renormalised. It is what transformers computes
    where it works on log-probabilities (beam search). A token close to certainty is hardly penalised, as log 1 = 0.
    """

    penalty: float
    name: ClassVar[str] = "repetition_penalty"
    needs: ClassVar[frozenset[str]] = frozenset({"history"})

    def __post_init__(self) -> None:
        require(0 < self.penalty < math.inf, self.name, "penalty", self.penalty, "in (0, inf)", "1 changes nothing")

    def apply(self, logprobs: Tensor, obs: Observation, state: State) -> Tensor:
        occurred = entry(obs, "history")[..., _COUNT] > 0
        tokens = token_logprobs(logprobs, obs.sketch.log_count)
        return normalize(torch.where(occurred, self.penalty * tokens + obs.sketch.log_count, logprobs))


@dataclass(frozen=True)
class FrequencyPresence(Rule):
    """OpenAI's and vLLM's penalties: every token's logit falls by frequency * count + presence * [count > 0]."""

    frequency: float = 0.0
    presence: float = 0.0
    name: ClassVar[str] = "frequency_presence"
    needs: ClassVar[frozenset[str]] = frozenset({"history"})

    def __post_init__(self) -> None:
        require(-2 <= self.frequency <= 2, self.name, "frequency", self.frequency, "in [-2, 2]")
        require(-2 <= self.presence <= 2, self.name, "presence", self.presence, "in [-2, 2]")

    def apply(self, logprobs: Tensor, obs: Observation, state: State) -> Tensor:
        count = entry(obs, "history")[..., _COUNT]
        return normalize(logprobs - self.frequency * count - self.presence * (count > 0))
