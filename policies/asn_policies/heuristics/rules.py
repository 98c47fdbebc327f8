"""Sampling heuristics, one small class each. A rule maps a distribution over points to another one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asn_policies.heuristics.layer_contrast import LayerContrast
from asn_policies.heuristics.repetition import FrequencyPresence, RepetitionPenalty
from asn_policies.heuristics.rule import Rule, cut, require, require_count
from asn_rl.ops import truncation
from asn_rl.ops.logprobs import shifted
from asn_rl.types import Observation, State


@dataclass(frozen=True)
class Greedy(Rule):
    """The most probable token; exact ties share it."""

    name: ClassVar[str] = "greedy"

    def apply(self, logprobs: Tensor, obs: Observation, state: State) -> Tensor:
        return cut(logprobs, truncation.top_k(logprobs, obs.sketch.log_count, 1))


@dataclass(frozen=True)
class Temperature(Rule):
    """p_i^(1/T), renormalised. In tail points the mean probability of the point stands for that of each token."""

    temperature: float
    name: ClassVar[str] = "temperature"

    def __post_init__(self) -> None:
        ok = 0 < self.temperature < math.inf
        require(ok, self.name, "temperature", self.temperature, "in (0, inf)", "for T = 0 use greedy")

    def apply(self, logprobs: Tensor, obs: Observation, state: State) -> Tensor:
        return _heated(logprobs, obs, torch.full_like(logprobs[..., :1], self.temperature))


@dataclass(frozen=True)
class EntropyTemperature(Rule):
    """EDT: T = temperature * base^(theta / H), H the entropy in nats (Zhang et al. 2024, arXiv:2403.14541, eq. 3).

    T rises with the entropy towards `temperature`. H is floored at 1e-3 nats, where T is already negligible.
    """

    temperature: float
    theta: float
    base: float = 0.8
    name: ClassVar[str] = "edt"

    def __post_init__(self) -> None:
        require(0 < self.temperature < math.inf, self.name, "temperature", self.temperature, "in (0, inf)")
        require(0 <= self.theta < math.inf, self.name, "theta", self.theta, "in [0, inf)")
        require(0 < self.base <= 1, self.name, "base", self.base, "in (0, 1]")

    def apply(self, logprobs: Tensor, obs: Observation, state: State) -> Tensor:
        entropy = truncation.token_entropy(logprobs, obs.sketch.log_count).clamp_min(1e-3).unsqueeze(-1)
        heat = math.log(self.temperature) + self.theta / entropy * math.log(self.base)
        return _heated(logprobs, obs, heat.clamp_min(math.log(1e-3)).exp())


@dataclass(frozen=True)
class _Truncation(Rule):
    min_tokens_to_keep: int = 1

    def _check_min_tokens(self) -> None:
        require_count(self.name, "min_tokens_to_keep", self.min_tokens_to_keep)


@dataclass(frozen=True, kw_only=True)
class TopK(_Truncation):
    """The k most probable tokens. Exact while k is at most the sketch's head."""

    top_k: int
    name: ClassVar[str] = "top_k"

    def __post_init__(self) -> None:
        self._check_min_tokens()
        require_count(self.name, "top_k", self.top_k)

    def apply(self, logprobs: Tensor, obs: Observation, state: State) -> Tensor:
        return cut(logprobs, truncation.top_k(logprobs, obs.sketch.log_count, self.top_k, self.min_tokens_to_keep))


@dataclass(frozen=True, kw_only=True)
class TopP(_Truncation):
    """The smallest set of most probable tokens whose mass reaches p."""

    top_p: float
    name: ClassVar[str] = "top_p"

    def __post_init__(self) -> None:
        self._check_min_tokens()
        require(0 < self.top_p <= 1, self.name, "top_p", self.top_p, "in (0, 1]")

    def apply(self, logprobs: Tensor, obs: Observation, state: State) -> Tensor:
        return cut(logprobs, truncation.top_p(logprobs, obs.sketch.log_count, self.top_p, self.min_tokens_to_keep))


@dataclass(frozen=True, kw_only=True)
class MinP(_Truncation):
    """Tokens with at least `min_p` times the largest probability."""

    min_p: float
    name: ClassVar[str] = "min_p"

    def __post_init__(self) -> None:
        self._check_min_tokens()
        require(0 <= self.min_p <= 1, self.name, "min_p", self.min_p, "in [0, 1]")

    def apply(self, logprobs: Tensor, obs: Observation, state: State) -> Tensor:
        return cut(logprobs, truncation.min_p(logprobs, obs.sketch.log_count, self.min_p, self.min_tokens_to_keep))


@dataclass(frozen=True, kw_only=True)
class Typical(_Truncation):
    """Tokens whose surprise is closest to the entropy, until `mass` is reached."""

    mass: float
    name: ClassVar[str] = "typical"

    def __post_init__(self) -> None:
        self._check_min_tokens()
        require(0 < self.mass < 1, self.name, "mass", self.mass, "in (0, 1)")

    def apply(self, logprobs: Tensor, obs: Observation, state: State) -> Tensor:
        return cut(logprobs, truncation.typical(logprobs, obs.sketch.log_count, self.mass, self.min_tokens_to_keep))


@dataclass(frozen=True, kw_only=True)
class Epsilon(_Truncation):
    """Tokens with probability at least `epsilon`."""

    epsilon: float
    name: ClassVar[str] = "epsilon"

    def __post_init__(self) -> None:
        self._check_min_tokens()
        require(0 < self.epsilon < 1, self.name, "epsilon", self.epsilon, "in (0, 1)")

    def apply(self, logprobs: Tensor, obs: Observation, state: State) -> Tensor:
        return cut(logprobs, truncation.epsilon(logprobs, obs.sketch.log_count, self.epsilon, self.min_tokens_to_keep))


@dataclass(frozen=True, kw_only=True)
class Eta(_Truncation):
    """Tokens with probability at least min(epsilon, sqrt(epsilon) exp(-H))."""

    epsilon: float
    name: ClassVar[str] = "eta"

    def __post_init__(self) -> None:
        self._check_min_tokens()
        require(0 < self.epsilon < 1, self.name, "epsilon", self.epsilon, "in (0, 1)")

    def apply(self, logprobs: Tensor, obs: Observation, state: State) -> Tensor:
        return cut(logprobs, truncation.eta(logprobs, obs.sketch.log_count, self.epsilon, self.min_tokens_to_keep))


@dataclass(frozen=True, kw_only=True)
class TopNSigma(_Truncation):
    """Logits within n standard deviations of the largest."""

    n: float
    name: ClassVar[str] = "top_n_sigma"

    def __post_init__(self) -> None:
        self._check_min_tokens()
        require(0 < self.n < math.inf, self.name, "n", self.n, "in (0, inf)")

    def apply(self, logprobs: Tensor, obs: Observation, state: State) -> Tensor:
        return cut(logprobs, truncation.top_n_sigma(logprobs, obs.sketch.log_count, self.n, self.min_tokens_to_keep))


@dataclass(frozen=True, kw_only=True)
class TopH(_Truncation):
    """The longest prefix whose entropy is at most `alpha` times the whole."""

    alpha: float = 0.4
    name: ClassVar[str] = "top_h"

    def __post_init__(self) -> None:
        self._check_min_tokens()
        require(0 < self.alpha <= 1, self.name, "alpha", self.alpha, "in (0, 1]")

    def apply(self, logprobs: Tensor, obs: Observation, state: State) -> Tensor:
        return cut(logprobs, truncation.top_h(logprobs, obs.sketch.log_count, self.alpha, self.min_tokens_to_keep))


@dataclass(frozen=True)
class Mirostat(Rule):
    """Feedback control of the observed surprise (Basu et al. 2021, arXiv:2007.14966, algorithms 1 and 2).

    `mu` starts at 2 tau; after every token mu -= eta * (surprise - tau), in bits, the surprise being that of the
    base model. Version 1 keeps the k tokens given by a Zipf fit of the 100 most probable ones (of the sketch's head,
    if that is smaller), version 2 the tokens with a surprise below mu. Both keep at least the most probable token.
    """

    tau: float = 3.0
    eta: float = 0.1
    version: int = 2
    name: ClassVar[str] = "mirostat"

    def __post_init__(self) -> None:
        require(0 < self.tau < math.inf, self.name, "tau", self.tau, "in (0, inf) bits")
        require(0 < self.eta <= 1, self.name, "eta", self.eta, "in (0, 1]")
        require(self.version in (1, 2), self.name, "version", self.version, "1 or 2")

    def initial_state(self, batch_size: int, device: torch.device) -> State:
        return {"mu": torch.full((batch_size,), 2 * self.tau, device=device)}

    def advance(self, obs: Observation, state: State) -> State:
        position, surprise = obs.context[..., _POSITION], obs.context[..., _LAST_SURPRISE] / math.log(2)
        moved = state["mu"] - self.eta * (surprise - self.tau)
        return {"mu": torch.where(position > 0, moved, state["mu"])}

    def apply(self, logprobs: Tensor, obs: Observation, state: State) -> Tensor:
        log_count = obs.sketch.log_count
        tokens = truncation.token_logprobs(logprobs, log_count)
        if self.version == 2:
            keep = -tokens / math.log(2) < state["mu"].unsqueeze(-1)
        else:
            tied = obs.sketch.inner_entropy >= log_count - 1e-5
            k = truncation.zipf_top_k(logprobs, log_count, tied, state["mu"])
            counts = torch.where(logprobs > -math.inf, log_count.exp(), 0.0)
            keep = truncation.exclusive_cumsum(counts).round() < k.unsqueeze(-1)
        return cut(logprobs, keep | truncation.top_k(logprobs, log_count, 1))


_POSITION, _LAST_SURPRISE = 0, 6


def _heated(logprobs: Tensor, obs: Observation, temperature: Tensor) -> Tensor:
    """`temperature` (..., 1)."""
    tokens = truncation.token_logprobs(logprobs, obs.sketch.log_count)
    return shifted(logprobs, (1 / temperature - 1) * tokens)


RULES: dict[str, type[Rule]] = {
    rule.name: rule
    for rule in (
        Greedy, Temperature, EntropyTemperature, TopK, TopP, MinP, Typical, Epsilon, Eta, TopNSigma, TopH, Mirostat,
        RepetitionPenalty, FrequencyPresence, LayerContrast,
    )
}  # fmt: skip
