"""Checks for plug-ins, for their authors' tests."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asn_rl.errors import InvalidPolicyOutput, RewardError
from asn_rl.ops.context import context_vector
from asn_rl.ops.sketch import Sketch, SketchSize, build_sketch
from asn_rl.protocols import Policy
from asn_rl.rewards.contract import check_signature, checked_scores
from asn_rl.types import Observation


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


@torch.no_grad()
def check_policy(
    policy: Policy, *, hidden_size: int = 0, condition_size: int = 0, size: SketchSize | None = None, seed: int = 0
) -> None:
    """Call a policy on random distributions, with ties and impossible tokens, and check its contract.

    Its log-probs have the sketch's shape, sum to one, and are -inf where a point is empty; the same observation gives
    the same answer; a completion's answer does not depend on the others of its batch; a stateless policy takes (batch,
    time) leading axes; a state has one row a completion. Equivariance and shift invariance need no check: a sketch
    holds no token ids and is normalised.

    Where it reads `layer_logprobs`, its attribute `layer_count` says of how many layers (default 1).

    Args:
        hidden_size: of the base model, where the policy reads `hidden` or `prompt_embedding`.
        condition_size: length of `condition`, where the policy reads it.
        size: sketch size; default 16 + 8.

    Raises:
        InvalidPolicyOutput: the contract is broken; the message says how.
    """
    name = type(policy).__name__
    obs = _random_observation(policy, hidden_size, condition_size, size or SketchSize(16, 8), seed)
    first = _well_formed_answer(policy, obs)
    if not torch.equal(first, _well_formed_answer(policy, obs)):
        raise InvalidPolicyOutput(f"{name} answers the same observation differently; the drawing is done elsewhere")
    alone = _well_formed_answer(policy, obs.index(slice(1, 2)))[0]
    if not torch.allclose(alone.exp(), first[1].exp(), atol=1e-4):
        raise InvalidPolicyOutput(f"{name} answers for a completion differently beside others; keep rows independent")
    if policy.initial_state(1, torch.device("cpu")) is None:
        pairs = torch.arange(len(first)).reshape(-1, 2)
        if not torch.allclose(_well_formed_answer(policy, obs.index(pairs)).exp(), first[pairs].exp(), atol=1e-4):
            raise InvalidPolicyOutput(f"{name} mixes up (batch, time) leading axes; work on the last axis only")


def _random_observation(
    policy: Policy, hidden_size: int, condition_size: int, size: SketchSize, seed: int
) -> Observation:
    """Four rows: a common one, one with ties, one with three possible tokens, a confident one."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(4, 200, generator=generator)
    logits[1, 50:] = logits[1, 50]
    logits[2, 3:] = -torch.inf
    logits[3, 0] = 30.0
    sketch, _ = build_sketch(logits, size)
    ones = torch.ones(len(logits))
    layers = getattr(policy, "layer_count", 1)
    widths = {
        "hidden": hidden_size,
        "prompt_embedding": hidden_size,
        "condition": condition_size,
        "layer_logprobs": layers,
    }
    optional = {name: random_entry(name, sketch, widths.get(name, 0), generator) for name in sorted(policy.needs)}
    return Observation(sketch, context_vector(sketch, 3 * ones, 9 * ones, 2.5 * ones, 7 * ones), **optional)


def random_entry(name: str, sketch: Sketch, size: int, generator: torch.Generator) -> Tensor:
    """An optional observation entry for a sketch of shape (B, N), within its documented range, on the CPU.

    Args:
        name: among `asn_rl.types.OPTIONAL_INPUTS`.
        size: length of a vector entry, or the number of earlier layers.
    """
    rows, points = sketch.log_mass.shape
    if name == "last_point":
        return torch.randint(-1, points, (rows,), generator=generator)
    if name == "history":
        count = torch.randint(0, 4, (rows, points), generator=generator).float()
        since = torch.randint(1, 9, (rows, points), generator=generator)
        return torch.stack([count, (count > 0) / since], -1)
    if name == "layer_logprobs":
        return torch.randn(rows, points, size, generator=generator).mul(4).log_softmax(1)
    return torch.randn(rows, size, generator=generator)


def _well_formed_answer(policy: Policy, obs: Observation) -> Tensor:
    name, mask, rows = type(policy).__name__, obs.sketch.mask, len(obs.context)
    output = policy(obs, policy.initial_state(rows, obs.context.device))
    logprobs = output.logprobs
    if logprobs.shape != mask.shape:
        raise InvalidPolicyOutput(
            f"{name} answers with log-probs of shape {tuple(logprobs.shape)}, the sketch has {tuple(mask.shape)}"
        )
    if logprobs.isnan().any() or (logprobs[~mask] > -torch.inf).any():
        raise InvalidPolicyOutput(f"the log-probs of {name} must be numbers, and -inf where a point is empty")
    total = logprobs.double().exp().sum(-1).flatten()
    if (total - 1).abs().max() > 1e-3:
        raise InvalidPolicyOutput(f"the probabilities of {name} sum to {float(total[0]):g}, not to 1; normalise them")
    for key, value in (output.state or {}).items():
        if len(value) != rows:
            raise InvalidPolicyOutput(f"state {key!r} of {name} has {len(value)} rows for {rows} completions")
    return logprobs
