"""Decoding by choosing, for every token, which heuristic draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gymnasium.spaces import Discrete
from gymnasium.vector.utils import batch_space
from torch import Tensor

from asn_envs.decoding import DecodingEnv
from asn_envs.generation import Drawn
from asn_envs.infos import Info
from asn_envs.sources import BackendSource, PromptsSource, RewardSource
from asn_envs.spaces import observation_space
from asn_envs.strategies import (
    PIPELINE,
    StrategiesSource,
    StrategyDraws,
    as_strategies,
    needs_of,
    strategy_token_infos,
)
from asn_envs.task import DEFAULT_BACKEND
from asn_envs.vector import DecodingVectorEnv
from asn_rl.rollout import RolloutConfig
from asn_rl.types import Observation


class StrategyDecodingEnv(DecodingEnv):
    """Choose the heuristic that draws the next token of a completion (the POMDP of Su et al. 2026, arXiv:2603.09065).

    ## Description
    `DecodingEnv` with another action: the agent names one of A *strategies* (heuristics such as greedy, T = 1, top-p),
    the strategy turns the base model's distribution into its own, a point and then a token are drawn from that. A
    strategy with a state (Mirostat) sees every token of the completion, whether it drew it or not.

    ## Action Space
    `Discrete(A)`, the index of a strategy in the list given.

    ## Observation Space
    That of `DecodingEnv`. The tokens left of the budget are `context[1]`, the bound of `confident_above` is on
    `exp(context[4])`. The paper reads the last hidden state besides; `StrategyDecodingVectorEnv` gives it in
    `observation()`.

    ## Rewards, Episode End
    Those of `DecodingEnv`.

    ## Starting State
    That of `DecodingEnv`; the token budget is drawn uniformly from `budgets`, after the prompt.

    ## Confident tokens
    The paper leaves tokens whose most probable continuation exceeds 0.95 out of the loss: all strategies draw the same
    there, and what they earn later is noise to the choice. An environment has no loss, so with `confident_above` it
    takes the choice away: where the most probable token's base probability exceeds the bound, the first strategy draws,
    whatever the action. `info["decision"]` is then False and `info["action_mask"]` leaves action 0 alone: an algorithm
    with action masks (sb3-contrib's MaskablePPO) gets no gradient from such a step, which is the paper's mask exactly;
    your own loss can leave it out; any other algorithm sees an action without effect, which is unbiased, but noisy.
    Steps are not skipped: an environment step is one token.

    ## Information
    Always `prompt_id` (str), `budget` (int, tokens), `decision` (bool, False: the next action has no effect) and
    `action_mask` (bool, (A,)); after a step `token_id` (int), `base_logprob` (float, nats) and `strategy` (str, the one
    that drew); at the end also what `DecodingEnv` tells.

    ## Arguments
    Those of `DecodingEnv`, and

    * `strategies`: list of `{"name", "processors"}`, or of `{"name", "policy"}` with live policies; names differ.
    * `pipeline`: "module:attribute" of the class that makes a policy of `processors`.
    * `confident_above`: base probability in (0, 1); None: every token is a decision.
    * `budgets`: token budgets in [1, max_new_tokens], one of them a completion; None: always `max_new_tokens`.
    * `tracked`: where a strategy reads `history` (a repetition penalty), so many generated tokens, the latest distinct
      ones, are points of their own, and `points` has so many rows more.
    * `layers`: earlier layers, counted from 1, for strategies that read `layer_logprobs`.

    ## Version History
    * v0: first version.
    """

    action_meaning = "strategy"

    def __init__(
        self,
        prompts: PromptsSource,
        reward: RewardSource,
        strategies: StrategiesSource,
        backend: BackendSource = DEFAULT_BACKEND,
        *,
        pipeline: str = PIPELINE,
        confident_above: float | None = None,
        budgets: Sequence[int] | None = None,
        tracked: int = RolloutConfig.tracked,
        layers: Sequence[int] = (),
        **arguments: Any,
    ) -> None:
        policies = as_strategies(strategies, pipeline)
        super().__init__(prompts, reward, backend, **arguments)
        self.task = replace(self.task, limits=replace(self.task.limits, tracked=tracked, layers=tuple(layers)))
        self._num_actions = len(policies)
        self.action_space = Discrete(self._num_actions)
        self._generation = self.task.generation(1, needs_of(policies))
        self.observation_space = observation_space(self._generation.points)
        self._draws = StrategyDraws(policies, self._generation, confident_above, budgets)

    def _begin(self, prompt_id: str | None) -> None:
        super()._begin(prompt_id)
        self._draws.begin([0], [self.np_random])

    def _draw(self, action: Tensor) -> tuple[Drawn, Info]:
        drawn, names = self._draws.draw(action, self._uniforms(2))
        return drawn, strategy_token_infos([0], drawn, names)[0]

    def _state_info(self, prompt_id: str, observed: Observation) -> Info:
        return self._draws.state_infos([0], observed)[0]


class StrategyDecodingVectorEnv(DecodingVectorEnv):
    """`num_envs` copies of `StrategyDecodingEnv` on one base model, as `DecodingVectorEnv` is of `DecodingEnv`.

    `observation()` captures what the strategies need beside `needs`.

    ## Version History
    * v0: first version.
    """

    action_meaning = "strategy"

    def __init__(
        self,
        prompts: PromptsSource,
        reward: RewardSource,
        strategies: StrategiesSource,
        backend: BackendSource = DEFAULT_BACKEND,
        *,
        pipeline: str = PIPELINE,
        confident_above: float | None = None,
        budgets: Sequence[int] | None = None,
        num_envs: int = 1,
        needs: Sequence[str] = (),
        **arguments: Any,
    ) -> None:
        policies = as_strategies(strategies, pipeline)
        needs = sorted(needs_of(policies).union(needs))
        super().__init__(prompts, reward, backend, num_envs=num_envs, needs=needs, **arguments)
        self._num_actions = len(policies)
        self.single_action_space = Discrete(self._num_actions)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._draws = StrategyDraws(policies, self._generation, confident_above, budgets)

    def _begin(self, rows: Sequence[int], prompt_ids: Sequence[str | None]) -> None:
        super()._begin(rows, prompt_ids)
        self._draws.begin(rows, [self._rngs[row] for row in rows])

    def _draw(self, actions: Tensor, rows: Sequence[int]) -> tuple[Drawn, dict[int, Info]]:
        drawn, names = self._draws.draw(actions, self._uniforms(rows, 2))
        return drawn, strategy_token_infos(rows, drawn, names)

    def _state_infos(self, rows: Sequence[int], observed: Observation) -> dict[int, Info]:
        return self._draws.state_infos(rows, observed)
