"""What the sampling rules share: the class, checks of their parameters, and cutting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from asn_rl.errors import InvalidValue
from asn_rl.ops.logprobs import normalize
from asn_rl.types import Observation, State


@dataclass(frozen=True)
class Rule:
    """One step of a pipeline. Stateless rules override `apply`; stateful ones also `initial_state` and `advance`."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    """optional observation entries it reads"""

    @property
    def layer_count(self) -> int:
        """Earlier layers that it reads at least."""
        return 0

    def apply(self, logprobs: Tensor, obs: Observation, state: State) -> Tensor:
        """(..., N) log-probabilities over points -> the same after this rule."""
        raise NotImplementedError

    def initial_state(self, batch_size: int, device: torch.device) -> State:
        return {}

    def advance(self, obs: Observation, state: State) -> State:
        """The state at this step, given what the observation says about the previous token."""
        return state


def require(ok: bool, rule: str, name: str, value: object, allowed: str, advice: str = "") -> None:
    if not ok:
        raise InvalidValue(f"{rule}.{name}", value, allowed, advice)


def require_count(rule: str, name: str, value: object) -> None:
    require(isinstance(value, int) and value >= 1, rule, name, value, "an integer >= 1")


def entry(obs: Observation, name: str) -> Tensor:
    """An optional entry of the observation.

    Raises:
        InvalidValue: it was not captured.
    """
    value = getattr(obs, name)
    if value is None:
        raise InvalidValue(f"observation.{name}", None, "a tensor", "a rule reads it; capture it in the rollout")
    return value


def cut(logprobs: Tensor, keep: Tensor) -> Tensor:
    """Log-probabilities with only the points of `keep` (..., N) left."""
    return normalize(torch.where(keep, logprobs, -math.inf))
