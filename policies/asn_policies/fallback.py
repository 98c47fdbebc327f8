"""A trained policy that hands over to a static rule where its training never was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from asn_policies.base import PolicyModule
from asn_policies.heuristics import Pipeline
from asn_rl.checkpoint import load_policy, read_policy_config
from asn_rl.errors import ConfigError, InvalidValue, UnknownName
from asn_rl.ops.context import CONTEXT
from asn_rl.protocols import TrainablePolicy
from asn_rl.registry import load_attribute
from asn_rl.types import Observation, PolicyOutput, State

Limits = Mapping[str, Sequence[float]]
"""context entry -> [low, high]; an entry that is not named has no limits"""
_INNER, _RULE = "inner/", "rule/"


class Fallback(PolicyModule):
    """The inner policy inside the recorded range of contexts, the static rule outside: row by row, token by token.

    Both carry their state along at every token, whoever answers, so that a row may come back. How often the rule
    answered is counted in every call of the policy (`fallback_share`); the counts are not saved.

    The inner policy's weights are saved with this policy's, in the same folder; `around` makes one from a folder.

    Args:
        inner: the trained policy, {"policy": "module:attribute", "arguments": {...}} as in a policy folder's
            `config.json`.
        rule: steps {name, params} of the static rule, as for `Pipeline`.
        limits: {context entry: [low, high]}, as `asn_rl.evaluation.context_range` fits them; ends belong to the range.

    Raises:
        UnknownName: no such context entry.
        InvalidValue: no limits, low above high, or beyond the entry's documented range.
        ConfigError: `inner` is no policy.
    """

    paper = "Falls back to a static rule outside the recorded range of contexts."

    inner: TrainablePolicy
    low: Tensor
    high: Tensor
    answered: Tensor
    fell_back: Tensor

    def __init__(self, inner: Mapping[str, Any], rule: Sequence[Mapping[str, Any]], limits: Limits) -> None:
        super().__init__()
        self.inner = build_inner(inner)
        self.rule = Pipeline(rule)
        self.needs = self.inner.needs | self.rule.needs
        self.layer_count = max(getattr(self.inner, "layer_count", 0), self.rule.layer_count)
        low, high = _bounds(limits)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("high", high, persistent=False)
        self.register_buffer("answered", torch.zeros((), dtype=torch.long), persistent=False)
        self.register_buffer("fell_back", torch.zeros((), dtype=torch.long), persistent=False)

    @classmethod
    def around(cls, folder: str | Path, rule: Sequence[Mapping[str, Any]], limits: Limits) -> Self:
        """A policy folder's policy, guarded."""
        config, trained = read_policy_config(folder), load_policy(folder)
        guarded = cls({"policy": config.policy, "arguments": config.arguments}, rule, dict(limits))
        guarded.inner.load_state_dict(trained.state_dict())
        return guarded

    def initial_state(self, batch_size: int, device: torch.device) -> State | None:
        inner, rule = (part.initial_state(batch_size, device) for part in (self.inner, self.rule))
        return _joined(inner, rule)

    def forward(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        trained = self.inner(obs, _own(state, _INNER))
        static = self.rule(obs, _own(state, _RULE))
        outside = self.outside(obs)
        self.answered += outside.numel()
        self.fell_back += outside.sum()
        logprobs = torch.where(outside.unsqueeze(-1), static.logprobs, trained.logprobs)
        return PolicyOutput(logprobs, _joined(trained.state, static.state), trained.value)

    def outside(self, obs: Observation) -> Tensor:
        """(...) bool, True where an entry of the context is out of its limits (NaN is): the rule answers."""
        return ~((obs.context >= self.low) & (obs.context <= self.high)).all(-1)

    @property
    def fallback_share(self) -> float:
        """Share of the answers so far that were the rule's; NaN before the first one."""
        return float(self.fell_back) / float(self.answered) if self.answered else float("nan")

    def reset_counts(self) -> None:
        self.answered.zero_()
        self.fell_back.zero_()


def build_inner(inner: Mapping[str, Any]) -> TrainablePolicy:
    """The policy that another one holds, {policy: "module:attribute", arguments: {...}}, untrained.

    Raises:
        ConfigError: it is no policy.
    """
    if not isinstance(inner, Mapping) or set(inner) != {"policy", "arguments"}:
        raise ConfigError(f"inner is {{policy: module:attribute, arguments: {{...}}}}, got {inner!r}")
    cls = load_attribute(inner["policy"])
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):  # only policies are ever called
        raise ConfigError(f"{inner['policy']!r} is no policy: not an nn.Module class")
    policy = cls(**inner["arguments"])
    if not isinstance(policy, TrainablePolicy):
        raise ConfigError(f"{inner['policy']!r} is no policy (asn_rl.protocols.TrainablePolicy)")
    return policy


def _bounds(limits: Limits) -> tuple[Tensor, Tensor]:
    """(C,) least and greatest allowed context; infinite where an entry is not named."""
    names = [entry.name for entry in CONTEXT]
    if not limits:
        raise InvalidValue(
            "limits",
            dict(limits),
            "at least one {context entry: [low, high]}",
            "fit them by asn_rl.evaluation.context_range.context_limits",
        )
    low, high = torch.full((len(names),), -torch.inf), torch.full((len(names),), torch.inf)
    for name, ends in limits.items():
        if name not in names:
            raise UnknownName("context entry", name, names)
        entry = CONTEXT[names.index(name)]
        if len(ends) != 2 or not entry.low <= ends[0] <= ends[1] <= entry.high:
            allowed = f"[low, high] within [{entry.low:g}, {entry.high:g}]"
            raise InvalidValue(f"limits of {name!r}", list(ends), allowed, "low first")
        low[names.index(name)], high[names.index(name)] = ends
    return low, high


def _joined(inner: State | None, rule: State | None) -> State | None:
    state = {_INNER + name: value for name, value in (inner or {}).items()}
    return state | {_RULE + name: value for name, value in (rule or {}).items()} or None


def _own(state: State | None, prefix: str) -> State | None:
    own = {name.removeprefix(prefix): value for name, value in (state or {}).items() if name.startswith(prefix)}
    return own or None
