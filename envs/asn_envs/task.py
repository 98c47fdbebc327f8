"""What the decoding environments share: base model, prompts, reward and limits, checked once, before any episode."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from asn_envs.generation import Generation
from asn_envs.sources import BackendSource, PromptsSource, RewardSource, as_backend, as_prompts, as_reward, find_prompt
from asn_rl.errors import InvalidValue, UnknownName
from asn_rl.protocols import LogitsBackend, RewardFunction
from asn_rl.rollout import RolloutConfig, encoded_prompts
from asn_rl.types import Prompt

DEFAULT_BACKEND = "smollm2-135m-instruct"
NEEDS = frozenset({"hidden", "prompt_embedding", "history", "layer_logprobs"})
"""optional observation entries that the environments capture"""


@dataclass(frozen=True)
class Task:
    backend: LogitsBackend
    reward: RewardFunction
    limits: RolloutConfig
    prompts: Sequence[Prompt]
    prompt_ids: Sequence[Sequence[int]]
    index: Mapping[str, int]
    """prompt id -> position in `prompts`"""

    @classmethod
    def make(cls, prompts: PromptsSource, reward: RewardSource, backend: BackendSource, limits: RolloutConfig) -> Task:
        """Resolve and check the arguments; every prompt is encoded here, so that a bad one fails before training.

        Raises:
            DataError: no prompts, an empty one, one that leaves no room in the context, an id that occurs twice.
            UnknownName, ConfigError, InvalidValue, BackendError: what a name stands for cannot be found or used.
        """
        rows, function, model = as_prompts(prompts), as_reward(reward), as_backend(backend)
        ids = encoded_prompts(model, rows, limits.max_new_tokens)
        return cls(model, function, limits, rows, ids, {prompt.id: i for i, prompt in enumerate(rows)})

    def choose_prompt(self, rng: np.random.Generator, prompt_id: str | None) -> int:
        """Position of the prompt with this id; of a uniformly drawn one when there is none."""
        if prompt_id is None:
            return int(rng.integers(len(self.prompts)))
        return find_prompt(self.index, prompt_id)

    def generation(self, rows: int, needs: Collection[str] = ()) -> Generation:
        """Completions under way in `rows` rows.

        Raises:
            InvalidValue: an optional observation entry in `needs` that the environments do not capture, or
                `layer_logprobs` without `layers`.
        """
        return Generation(self.backend, self.limits, rows, checked_needs(needs))


def checked_needs(needs: Collection[str]) -> frozenset[str]:
    if not NEEDS.issuperset(needs):
        raise InvalidValue("needs", sorted(needs), f"a subset of {sorted(NEEDS)}", "nothing else is captured here")
    return frozenset(needs)


def checked_options(options: Mapping[str, Any] | None, known: Sequence[str]) -> dict[str, Any]:
    """A copy of `reset`'s options: wrappers and the caller keep theirs as it is."""
    options = dict(options or {})
    for name in options:
        if name not in known:
            raise UnknownName("reset option", str(name), known)
    return options
