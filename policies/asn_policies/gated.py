"""What strategy policies share: heuristics with names, a gate over them, and a record of which ones it was made for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from asn_policies.base import PolicyModule, check_rows
from asn_policies.features import summary_network
from asn_policies.heuristics import Pipeline
from asn_rl.errors import CheckpointError, ConfigError, InvalidValue
from asn_rl.types import Observation, State

Strategy = Mapping[str, Any]
"""{"name": ..., "processors": [{name, params}, ...]}; no processors: the base model"""
_RECORD = "strategies_json"


class GatedStrategies(PolicyModule):
    """Heuristics with names, a gate over them, and a record of which ones it was made for."""

    gate: Gate

    def __init__(self, strategies: Sequence[Strategy], argmax: bool) -> None:
        super().__init__()
        self.names, self.argmax = _checked_names(strategies), argmax
        processors = [list(strategy.get("processors") or []) for strategy in strategies]
        pipelines = [Pipeline(steps, name) for steps, name in zip(processors, self.names, strict=True)]
        self.pipelines = nn.ModuleList(pipelines)
        self.needs = frozenset[str]().union(*(pipeline.needs for pipeline in pipelines))
        self.layer_count = max(pipeline.layer_count for pipeline in pipelines)
        # Travels with the weights: a gate means nothing over other strategies, even when they are as many.
        record = json.dumps(list(zip(self.names, processors, strict=True)), sort_keys=True).encode()
        self.register_buffer(_RECORD, torch.tensor(list(record), dtype=torch.uint8))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch.

        Raises:
            CheckpointError: the weights were trained for other strategies (names, processors or order).
        """
        trained = _recorded(state_dict.get(_RECORD))
        here = _recorded(getattr(self, _RECORD))
        if trained is not None and trained != here:
            raise CheckpointError(
                f"the gate was trained for the strategies {trained}, this {type(self).__name__} has {here}; give the "
                "same list, or train a new gate"
            )
        return super().load_state_dict(state_dict, strict, assign)

    def initial_state(self, batch_size: int, device: torch.device) -> State | None:
        state = {
            f"{i}/{key}": value
            for i, pipeline in enumerate(self.pipelines)
            for key, value in (pipeline.initial_state(batch_size, device) or {}).items()  # type: ignore[operator]
        }
        return state or None

    def strategy_logprobs(self, obs: Observation, state: State | None = None) -> tuple[Tensor, State]:
        """(..., A, N) log-probs of every strategy over points, and the next state of those that carry one.

        Raises:
            InvalidValue: the state has another number of rows than the observation.
        """
        check_rows(state, obs)
        answers, following = [], {}
        for i, pipeline in enumerate(self.pipelines):
            prefix = f"{i}/"
            own = {key.removeprefix(prefix): part for key, part in (state or {}).items() if key.startswith(prefix)}
            output = pipeline(obs, own or None)
            answers.append(output.logprobs)
            following |= {prefix + key: part for key, part in (output.state or {}).items()}
        return torch.stack(answers, -2), following

    def gate_logprobs(self, obs: Observation) -> Tensor:
        """(..., A) log of `gate_probabilities`."""
        logprobs = torch.log_softmax(self._gate_logits(obs), -1)
        if not self.argmax:
            return logprobs
        chosen = nn.functional.one_hot(logprobs.argmax(-1), len(self.names)).bool()
        return torch.where(chosen, 0.0, -math.inf)

    def gate_probabilities(self, obs: Observation) -> Tensor:
        """(..., A) share of each strategy, in the order of `names`; of a `SequenceStrategy` before the first token."""
        return self.gate_logprobs(obs).exp()

    def _gate_logits(self, obs: Observation) -> Tensor:
        raise NotImplementedError


class Gate(nn.Module):
    """Inputs (..., n) -> logits (..., A): `start` for all inputs at first, a free vector for good when n = 0."""

    def __init__(self, size: int, width: int, start: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(start.clone())
        self.network = None
        if size:
            last = nn.Linear(width, len(start), bias=False)
            nn.init.zeros_(last.weight)
            self.network = nn.Sequential(summary_network(size, width), last)

    def forward(self, inputs: Tensor) -> Tensor:
        logits = self.logits.expand(*inputs.shape[:-1], -1)
        return logits if self.network is None else logits + self.network(inputs)


def mixture(log_weights: Tensor, logprobs: Tensor) -> Tensor:
    """(..., N) log sum_a exp(log_weights_a) exp(logprobs_a) of (..., A) weights and (..., A, N) log-probs; -inf where
    no part has mass, without gradient there."""
    joint = log_weights.unsqueeze(-1) + logprobs
    possible = (joint > -math.inf).any(-2)
    total = torch.logsumexp(torch.where(possible.unsqueeze(-2), joint, 0.0), -2)
    return torch.where(possible, total, -math.inf)


def at_points(logprobs: Tensor, points: Tensor) -> Tensor:
    """(..., A) of (..., A, N) log-probs at the points (...)."""
    index = points[..., None, None].expand(*logprobs.shape[:-1], 1)
    return logprobs.gather(-1, index).squeeze(-1)


def _checked_names(strategies: Sequence[Strategy]) -> list[str]:
    if not strategies:
        raise InvalidValue("strategies", list(strategies), "at least one {name, processors}")
    for strategy in strategies:
        known = isinstance(strategy, Mapping) and not set(strategy) - {"name", "processors"}
        if not known or not isinstance(strategy.get("name"), str):
            raise ConfigError(f"a strategy is {{name, processors}} with a text as its name, got {strategy!r}")
    names = [strategy["name"] for strategy in strategies]
    if len(set(names)) != len(names):
        raise InvalidValue("strategies", names, "names that differ")
    return names


def start_logits(names: Sequence[str], start: str | None, share: float) -> Tensor:
    """(A,) logits of the gate at the start."""
    if start is None:
        return torch.zeros(len(names))
    if start not in names:
        raise InvalidValue("start", start, f"one of the strategies {list(names)}")
    if not 0 < share < 1:
        raise InvalidValue("start_share", share, "in (0, 1)", "at 1 the other strategies would never get a gradient")
    shares = torch.full((len(names),), (1 - share) / max(len(names) - 1, 1))
    shares[names.index(start)] = share
    return shares.log()


def _recorded(record: Tensor | None) -> str | None:
    """`greedy [...], T=1 []` of the bytes that travel with the weights."""
    if record is None:
        return None
    return ", ".join(f"{name} {json.dumps(steps)}" for name, steps in json.loads(bytes(record.tolist())))
