"""Info dictionaries of one episode: NumPy and Python values only, as Gymnasium's checker and wrappers need them."""

from __future__ import annotations

from typing import Any

import numpy as np

from asn_envs.scoring import Episode

Info = dict[str, Any]


def state_info(prompt_id: str, action_mask: np.ndarray) -> Info:
    """At every observation: whose episode it is, and which points hold tokens."""
    return {"prompt_id": prompt_id, "action_mask": action_mask.copy()}


def token_info(token: int, base_logprob: float, empty_point: bool) -> Info:
    """After every step: the token drawn, its base log-probability (nats), and whether the action was replaced."""
    return {"token_id": token, "base_logprob": base_logprob, "empty_point": empty_point}


def episode_info(episode: Episode, value: float | None) -> Info:
    """After the last step of an episode; `reward_masked`: the reward function said "not applicable".

    `end_of_sequence` is False where the token limit cut the completion off.
    """
    return {
        "completion": episode.completion,
        "length": len(episode.completion_ids),
        "end_of_sequence": episode.terminated,
        "reward_masked": value is None,
    }
