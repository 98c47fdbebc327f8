"""Reward functions in TRL's signature, and their composition.

A reward function is `f(prompts, completions, completion_ids=None, **columns) -> list[float | None]`, known by a short
name of `REWARDS` or as "module:function". Everything here is imported on first use: worker processes that score
completions load neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asn_rl.registry import Registry, load_attribute

if TYPE_CHECKING:
    from asn_rl.rewards.compose import RewardConfig, RewardResult, RewardSuite
    from asn_rl.rewards.diversity import distinct_valid
    from asn_rl.rewards.format import format_match
    from asn_rl.rewards.inputs import completion_text
    from asn_rl.rewards.length import length_budget
    from asn_rl.rewards.math import math_answer
    from asn_rl.rewards.numeric import exact_answer, numeric_answer

REWARDS = Registry(
    "reward function",
    {
        "numeric_answer": "asn_rl.rewards.numeric:numeric_answer",
        "exact_answer": "asn_rl.rewards.numeric:exact_answer",
        "math_answer": "asn_rl.rewards.math:math_answer",
        "length_budget": "asn_rl.rewards.length:length_budget",
        "format_match": "asn_rl.rewards.format:format_match",
        "distinct_valid": "asn_rl.rewards.diversity:distinct_valid",
    },
)

_LAZY = {
    "RewardConfig": "compose",
    "RewardResult": "compose",
    "RewardSuite": "compose",
    "completion_text": "inputs",
    "distinct_valid": "diversity",
    "exact_answer": "numeric",
    "format_match": "format",
    "length_budget": "length",
    "math_answer": "math",
    "numeric_answer": "numeric",
}

__all__ = [
    "REWARDS",
    "RewardConfig",
    "RewardResult",
    "RewardSuite",
    "completion_text",
    "distinct_valid",
    "exact_answer",
    "format_match",
    "length_budget",
    "math_answer",
    "numeric_answer",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return load_attribute(f"{__name__}.{_LAZY[name]}:{name}")
