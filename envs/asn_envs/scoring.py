"""Calls a reward function on the episodes that ended in a step, and holds it to its contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asn_envs.sources import function_name
from asn_rl.protocols import RewardFunction
from asn_rl.rewards.compose import call_inputs
from asn_rl.rewards.contract import checked_scores
from asn_rl.types import Prompt


@dataclass(frozen=True)
class Episode:
    """A completion that has ended."""

    prompt: Prompt
    completion_ids: Sequence[int]
    completion: str
    terminated: bool
    """by an end-of-sequence token; False: cut off by the token limit"""


def score(reward: RewardFunction, episodes: Sequence[Episode]) -> list[float | None]:
    """One reward per episode, in one call; None where the function says "not applicable".

    Raises:
        RewardError: not one value an episode, or a value that is neither None nor a finite number.
    """
    inputs = call_inputs(
        [episode.prompt for episode in episodes],
        [episode.completion for episode in episodes],
        [episode.completion_ids for episode in episodes],
        [episode.terminated for episode in episodes],
    )
    return checked_scores(function_name(reward), reward(**inputs), len(episodes))
