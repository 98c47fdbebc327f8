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

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from asn_policies.features import input_projections, projected, summary_inputs, summary_size
from asn_policies.gated import Gate, GatedStrategies, Strategy, at_points, mixture, start_logits
from asn_rl.errors import InvalidValue
from asn_rl.types import Observation, PolicyOutput, State

__all__ = ["SequenceStrategy", "Strategy", "TokenStrategy", "at_points", "mixture"]

_WEIGHTS, _ANSWERS = "log_weights", "strategy_logprobs"


class TokenStrategy(GatedStrategies):
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
        first = start_logits(self.names, start, start_share)
        self.gate = Gate(0 if context_free else summary_size(inputs, projection), width, first)
        self.register_buffer("start", first, persistent=False)

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


class SequenceStrategy(GatedStrategies):
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
        self.gate = Gate(projection * len(inputs), width, start_logits(self.names, start, start_share))

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
