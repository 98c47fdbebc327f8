"""Checks for plug-ins, for their authors' tests."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from asn_rl.errors import RewardError
from asn_rl.rewards.contract import check_signature, checked_scores


def check_reward(
    function: Callable[..., Any], prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
) -> list[float | None]:
    """Call a reward function and check its contract.

    It returns a list with one finite number or None a completion; accepts columns it does not know; scores the same
    input alike twice; leaves its inputs, and the global random states of `random`, numpy and torch, as they were.

    Args:
        prompts: texts or message lists, one a completion.
        completions: texts or message lists.
        columns: data columns, lists with one cell a completion; `completion_ids` and `terminated` too where used.

    Returns:
        The scores.

    Raises:
        RewardError: the contract is broken; the message says how.
    """
    name = getattr(function, "__name__", None) or repr(function)
    check_signature(name, function, {})
    inputs = {"completion_ids": None, **columns, "prompts": list(prompts), "completions": list(completions)}
    first = _undisturbed_call(name, function, inputs)
    second = _undisturbed_call(name, function, inputs)
    if first != second:
        raise RewardError(f"reward {name!r} scores the same input differently: {first} then {second}; seed what varies")
    return first


def _undisturbed_call(name: str, function: Callable[..., Any], inputs: dict[str, Any]) -> list[float | None]:
    given = copy.deepcopy(inputs)
    states = _random_states()
    scores = checked_scores(name, function(**given), len(inputs["completions"]))
    for library, before, after in zip(("random", "numpy.random", "torch"), states, _random_states(), strict=True):
        if before != after:
            raise RewardError(
                f"reward {name!r} draws from the global state of {library}, which changes the run it scores; use a "
                "generator of its own"
            )
    for argument, value in inputs.items():
        if given[argument] != value:
            raise RewardError(f"reward {name!r} modifies its input {argument!r}; work on a copy")
    return scores


def _random_states() -> tuple[Any, bytes, bytes]:
    legacy = np.random.get_state()  # noqa: NPY002  (the global state is what is watched)
    return random.getstate(), pickle.dumps(legacy), torch.get_rng_state().numpy().tobytes()
