"""Strategy policies: a gate over a list of heuristics. The answer is their mixture, in closed form.

After "Learning Adaptive LLM Decoding" (arXiv:2603.09065), whose policies draw a strategy and are trained by the
log-probability of that draw. Here the log-probability is that of the token, log sum_a gate_a pi_a(y): the gradient to a
gate logit is posterior_a - gate_a, which vanishes where the strategies agree, and its variance cannot exceed that of
the paper's (Rao-Blackwell). No strategy is ever drawn while generating; `posterior` says which one it might have been.

- `TokenStrategy`: a gate at every token (the paper's POMDP; the budget enters by the context's `tokens_left`).
- `SequenceStrategy`: one strategy for a whole completion (the paper's contextual bandit).

Heuristics that carry state (mirostat) are allowed: it follows the drawn tokens, whichever strategy they came from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from asn_policies.base import PolicyModule
from asn_policies.features import input_projections, projected, summary_inputs, summary_network, summary_size
from asn_policies.heuristics import Pipeline
from asn_rl.errors import CheckpointError, ConfigError, InvalidValue
from asn_rl.types import Observation, PolicyOutput, State

Strategy = Mapping[str, Any]
"""{"name": ..., "processors": [{name, params}, ...]}; no processors: the base model"""
_RECORD = "strategies_json"
_WEIGHTS, _ANSWERS = "log_weights", "strategy_logprobs"


class _Strategies(PolicyModule):
    """Heuristics with names, a gate over them, and a record of which ones it was made for."""

    gate: _Gate

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
        _check_rows(state, obs)
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


class TokenStrategy(_Strategies):
    """pi(j) = sum_a gate_a(obs) pi_a(j), with a gate at every token.

    Args:
        strategies: list of {name, processors}, with names that differ.
        width: units of the gate's network.
        inputs: optional observation entries to read: "hidden", "prompt_embedding", "condition".
        hidden_size: the base model's hidden size, for "hidden" and "prompt_embedding".
        condition_size: length of "condition".
        projection: units each optional entry is projected to.
        start: strategy that the gate prefers at the start; None: equal shares.
        start_share: its share at the start; the others divide the rest.
        confident_above: where the most probable token exceeds this probability the gate is that of the start and
            passes no gradient (the paper masks tokens above .95; the marginal gradient hardly needs it).
        context_free: one learned gate for all states: the control for everything that reads its context.
        argmax: use the likeliest strategy alone (for inference); passes no gradient.
    """

    paper = "Strategy gate at every token after arXiv:2603.09065, trained through the marginal token probability."

    def __init__(
        self,
        strategies: Sequence[Strategy],
        width: int = 48,
        inputs: tuple[str, ...] | list[str] = (),
        hidden_size: int = 0,
        condition_size: int = 0,
        projection: int = 16,
        start: str | None = None,
        start_share: float = 0.9,
        confident_above: float | None = None,
        context_free: bool = False,
        argmax: bool = False,
    ) -> None:
        super().__init__(strategies, argmax)
        if confident_above is not None and not 0 < confident_above < 1:
            raise InvalidValue("confident_above", confident_above, "in (0, 1)", "None lets the gate move everywhere")
        if context_free and inputs:
            raise InvalidValue("inputs", list(inputs), "empty with context_free", "such a gate reads nothing")
        self.needs |= frozenset(inputs)
        self.hidden_size, self.condition_size = hidden_size, condition_size
        self.confident_above, self.context_free = confident_above, context_free
        self.projections = input_projections(inputs, hidden_size, condition_size, projection)
        start_logits = _start_logits(self.names, start, start_share)
        self.gate = _Gate(0 if context_free else summary_size(inputs, projection), width, start_logits)
        self.register_buffer("start", start_logits, persistent=False)

    def forward(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        answers, following = self.strategy_logprobs(obs, state)
        return PolicyOutput(mixture(self.gate_logprobs(obs), answers), following or None)

    def posterior(self, obs: Observation, points: Tensor, state: State | None = None) -> Tensor:
        """(..., A) probability that each strategy drew the points (...); NaN where none can. Drawing a strategy from
        it gives strategy and token the joint law they have when the strategy is drawn first."""
        answers, _ = self.strategy_logprobs(obs, state)
        return torch.softmax(self.gate_logprobs(obs) + at_points(answers, points), -1)

    def _gate_logits(self, obs: Observation) -> Tensor:
        read = obs.context[..., :0] if self.context_free else summary_inputs(obs, self.projections)
        logits = self.gate(read)
        if self.confident_above is None:
            return logits
        confident = obs.sketch.logprobs.amax(-1, keepdim=True) > math.log(self.confident_above)
        return torch.where(confident, self.get_buffer("start"), logits)


class SequenceStrategy(_Strategies):
    """One strategy for a whole completion: pi(y) = sum_a gate_a(prompt) prod_t pi_a(y_t | y_<t), in closed form.

    Token by token this is the mixture with weights w_a(t), proportional to gate_a prod_{s<t} pi_a(y_s). The state
    carries their logs and the strategies' last answers. Where no strategy could have drawn the last token (text of
    another policy) the completion has probability 0 already, and the weights stay as they were.

    Args:
        strategies: list of {name, processors}, with names that differ.
        width: units of the gate's network.
        inputs: what the gate reads: "prompt_embedding", "condition" (such as the number of parallel samples); none:
            one learned gate for all prompts, the control for both.
        hidden_size: the base model's hidden size, for "prompt_embedding".
        condition_size: length of "condition".
        projection: units each optional entry is projected to.
        start: strategy that the gate prefers at the start; None: equal shares.
        start_share: its share at the start; the others divide the rest.
        argmax: use the likeliest strategy alone (for inference); passes no gradient.
    """

    paper = "Strategy gate for a whole completion after arXiv:2603.09065, trained through its marginal probability."

    def __init__(
        self,
        strategies: Sequence[Strategy],
        width: int = 48,
        inputs: tuple[str, ...] | list[str] = (),
        hidden_size: int = 0,
        condition_size: int = 0,
        projection: int = 16,
        start: str | None = None,
        start_share: float = 0.9,
        argmax: bool = False,
    ) -> None:
        super().__init__(strategies, argmax)
        self.needs |= frozenset(inputs) | {"last_point"}
        self.hidden_size, self.condition_size = hidden_size, condition_size
        fixed = ("prompt_embedding", "condition")
        self.projections = input_projections(inputs, hidden_size, condition_size, projection, allowed=fixed)
        self.gate = _Gate(projection * len(inputs), width, _start_logits(self.names, start, start_share))

    def initial_state(self, batch_size: int, device: torch.device) -> State:
        even = torch.full((batch_size, len(self.names)), -math.log(len(self.names)), device=device)
        return {_WEIGHTS: even, **(super().initial_state(batch_size, device) or {})}

    def forward(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        if state is None:
            raise InvalidValue("state", None, "what initial_state() or the last step returned")
        answers, following = self.strategy_logprobs(obs, state)
        weights = self._weights(obs, state)
        return PolicyOutput(mixture(weights, answers), {**following, _WEIGHTS: weights, _ANSWERS: answers})

    def _weights(self, obs: Observation, state: State) -> Tensor:
        """(B, A) log of w_a at this token; the gate at the first one."""
        if obs.last_point is None:
            raise InvalidValue("observation.last_point", None, "a tensor", "the policy reads it; list it in `needs`")
        gate = self.gate_logprobs(obs)
        if _ANSWERS not in state:
            return gate
        before = state[_WEIGHTS]
        moved = before + at_points(state[_ANSWERS], obs.last_point.clamp_min(0))
        possible = (moved > -math.inf).any(-1, keepdim=True)
        moved = torch.log_softmax(torch.where(possible, moved, before), -1)
        return torch.where((obs.last_point < 0).unsqueeze(-1), gate, moved)

    def _gate_logits(self, obs: Observation) -> Tensor:
        return self.gate(torch.cat([obs.context[..., :0], *projected(obs, self.projections)], -1))


class _Gate(nn.Module):
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


def _start_logits(names: Sequence[str], start: str | None, share: float) -> Tensor:
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


def _check_rows(state: State | None, obs: Observation) -> None:
    for key, part in (state or {}).items():
        if len(part) != len(obs.context):
            advice = "carry the state of the same completions from step to step"
            raise InvalidValue(f"rows of state {key!r}", len(part), f"{len(obs.context)}, as the observation", advice)
