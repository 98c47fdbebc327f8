"""Strategies: heuristics, or other policies, among which an agent chooses, and completions drawn by them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asn_envs.generation import Drawn, Generation
from asn_envs.infos import Info
from asn_rl.errors import ConfigError, InvalidValue
from asn_rl.ops.draws import invert_cdf
from asn_rl.placement import place
from asn_rl.protocols import Policy
from asn_rl.registry import load_attribute
from asn_rl.rollout import checked_probs
from asn_rl.types import Observation, State

PIPELINE = "asn_policies:Pipeline"
StrategiesSource = Sequence[Mapping[str, Any]]


def as_strategies(source: StrategiesSource, pipeline: str = PIPELINE) -> dict[str, Policy]:
    """Named policies, in the order given.

    Args:
        source: entries `{"name", "processors"}`, as a heuristic grid lists them, or `{"name", "policy"}` with a policy.
        pipeline: "module:attribute" of the class that makes a policy of `processors`.

    Raises:
        InvalidValue: an empty list, or two equal names.
        ConfigError: an entry of another form, or processors that make no policy.
    """
    if not source:
        raise InvalidValue("strategies", list(source), "a list of at least one {name, processors}")
    strategies: dict[str, Policy] = {}
    for entry in source:
        keys = set(entry) if isinstance(entry, Mapping) else set()
        if keys not in ({"name", "processors"}, {"name", "policy"}) or not isinstance(entry["name"], str):
            raise ConfigError(f"a strategy is {{name, processors}} or {{name, policy}}, got {entry!r}")
        name = entry["name"]
        if name in strategies:
            names = [other["name"] for other in source]
            raise InvalidValue("strategies", names, "of names that differ", f"{name!r} occurs twice")
        strategies[name] = entry["policy"] if "policy" in entry else load_attribute(pipeline)(entry["processors"])
        if not isinstance(strategies[name], Policy):
            raise ConfigError(f"strategy {name!r} is no policy (asn_rl.protocols.Policy): {strategies[name]!r}")
    return strategies


def needs_of(strategies: Mapping[str, Policy]) -> frozenset[str]:
    """Optional observation entries that any of them reads."""
    return frozenset().union(*(policy.needs for policy in strategies.values()))


class StrategyDraws:
    """Draws the tokens of a generation's R rows, each by the strategy chosen for it.

    Every strategy with a state sees every observation, whether it is chosen or not: its state is the one it would
    have inside a mixture of the strategies.

    Args:
        generation: captures what the strategies need.
        confident_above: base probability of the most probable token above which the first strategy draws, whatever
            was chosen; None: never.
        budgets: token budgets, one of them a completion, drawn uniformly; None: that of the generation.

    Raises:
        InvalidValue: a bound outside (0, 1), no budgets, or one outside [1, the generation's].
    """

    def __init__(
        self,
        strategies: Mapping[str, Policy],
        generation: Generation,
        confident_above: float | None,
        budgets: Sequence[int] | None,
    ) -> None:
        if confident_above is not None and not 0 < confident_above < 1:
            raise InvalidValue("confident_above", confident_above, "in (0, 1)", "None asks the agent for every token")
        self.generation, self.names = generation, list(strategies)
        self._policies, self._bound = (
            list(strategies.values()),
            math.inf if confident_above is None else confident_above,
        )
        most, why = generation.budget, "max_new_tokens is the upper bound; raise it where the prompts leave room"
        self._budgets = [most] if budgets is None else checked_budgets(budgets, most, why)
        for policy in self._policies:
            place(policy, generation.backend.device)
        self._states = [self._initial(policy, len(generation.active)) for policy in self._policies]

    def begin(self, rows: Sequence[int], rngs: Sequence[np.random.Generator]) -> None:
        """Draw the budgets of completions that have just begun, and give their rows the state before the first token.

        Args:
            rngs: one generator for each of `rows`.
        """
        index = torch.tensor(rows, device=self.generation.backend.device)
        drawn = [self._budgets[int(rng.integers(len(self._budgets)))] for rng in rngs]
        self.generation.budgets[index] = torch.tensor(drawn, device=index.device)
        for a, (policy, state) in enumerate(zip(self._policies, self._states, strict=True)):
            fresh = self._initial(policy, len(rows))
            self._states[a] = state and {name: state[name].index_copy(0, index, fresh[name]) for name in state}

    @torch.no_grad()
    def draw(self, chosen: Tensor, uniforms: Tensor) -> tuple[Drawn, list[str]]:
        """Draw a token in every row under way.

        Args:
            chosen: (R,) int64 strategies.
            uniforms: (R, 2) float64 in [0, 1), for the point and for the token inside it.

        Returns:
            What the step did, and the names of the R strategies that drew.

        Raises:
            InvalidPolicyOutput: the answer of a strategy that draws is no distribution.
        """
        obs = self.generation.observation()
        chosen = torch.where(self.is_decision(obs), chosen, 0)
        points = torch.zeros_like(chosen)
        for a, policy in enumerate(self._policies):
            here = (chosen == a) & self.generation.active
            if not (self._states[a] or here.any()):
                continue
            output = policy(obs, self._states[a] or None)
            self._states[a] = output.state or {}
            points[here] = invert_cdf(checked_probs(policy, output.logprobs[here]), uniforms[here, 0])
        return self.generation.advance(points, uniforms[:, 1]), [self.names[a] for a in chosen.tolist()]

    def is_decision(self, obs: Observation) -> Tensor:
        """(...) bool, False where the base model is so sure that the choice is not the agent's."""
        return obs.sketch.logprobs.amax(-1).exp() <= self._bound

    def state_infos(self, rows: Sequence[int], obs: Observation) -> dict[int, Info]:
        """At every observation: whose episode it is, its budget, and which choices have an effect."""
        decisions, budgets = self.is_decision(obs).tolist(), self.generation.budgets.tolist()
        return {
            row: {
                "prompt_id": prompt.id,
                "budget": budgets[row],
                "decision": decisions[row],
                "action_mask": np.array([True, *[decisions[row]] * (len(self.names) - 1)]),
            }
            for row in rows
            if (prompt := self.generation.prompts[row]) is not None
        }

    def _initial(self, policy: Policy, rows: int) -> State:
        return policy.initial_state(rows, self.generation.backend.device) or {}


def checked_budgets(budgets: Sequence[int], most: int, why: str) -> list[int]:
    """At least one integer in [1, most], else `InvalidValue`, which says `why`."""
    if not budgets:
        raise InvalidValue("budgets", list(budgets), "a list of at least one")
    for budget in budgets:
        if isinstance(budget, bool) or not isinstance(budget, int) or not 1 <= budget <= most:
            raise InvalidValue("budgets", list(budgets), f"integers in [1, {most}]", why)
    return list(budgets)


def strategy_token_infos(rows: Sequence[int], drawn: Drawn, names: Sequence[str]) -> dict[int, Info]:
    """After every step: the token drawn, its base log-probability (nats), and the strategy that drew it."""
    tokens, logprobs = drawn.tokens.tolist(), drawn.base_logprobs.tolist()
    return {row: {"token_id": tokens[row], "base_logprob": logprobs[row], "strategy": names[row]} for row in rows}
