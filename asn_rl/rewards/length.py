"""A token budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asn_rl.errors import InvalidValue, RewardError


def length_budget(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    budget: int = 256,
    ramp: int = 0,
    **columns: Any,
) -> list[float | None]:
    """1.0 within the budget, then falling in a straight line to 0.0.

    The soft overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476) plus one: `budget` is its
    L_max - L_cache, `ramp` its L_cache.

    Args:
        budget: tokens that cost nothing, the end-of-sequence token included.
        ramp: tokens beyond the budget over which the score falls to 0; 0 is a hard limit.

    Raises:
        InvalidValue: a budget below 1 or a negative ramp.
        RewardError: called without completion_ids.
    """
    if budget < 1:
        raise InvalidValue("budget", budget, ">= 1 token")
    if ramp < 0:
        raise InvalidValue("ramp", ramp, ">= 0 tokens")
    if completion_ids is None:
        raise RewardError("length_budget counts tokens and needs completion_ids; pass them with the completions")
    return [_score(len(ids) - budget, ramp) for ids in completion_ids]


def _score(excess: int, ramp: int) -> float:
    if excess <= 0:
        return 1.0
    return max(0.0, 1.0 - excess / ramp) if ramp else 0.0
