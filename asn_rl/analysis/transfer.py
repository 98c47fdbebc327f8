"""Transfer curves: what a policy does to the log-probability of a token, at confident and at open positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from asn_rl.ops.context import entropy
from asn_rl.ops.divergences import kl
from asn_rl.ops.logprobs import entropy as point_entropy
from asn_rl.protocols import Policy
from asn_rl.types import Trajectories
from asn_rl.unroll import recorded_logprobs


@dataclass(frozen=True)
class TransferCurves:
    """Base log-probabilities and shifts (policy minus base log-probability) of points, nats, one list a position."""

    title: str
    logprobs: list[list[float]]
    shifts: list[list[float]]


@torch.no_grad()
def transfer_curves(
    policy: Policy,
    trajectories: Trajectories,
    *,
    title: str,
    low: float,
    high: float,
    positions: int = 40,
    seed: int = 0,
) -> TransferCurves:
    """Curves at positions whose base entropy lies between the `low` and `high` quantiles.

    Points that the policy removes are left out.
    """
    spread = entropy(trajectories.observations.sketch)
    bounds = torch.quantile(spread, torch.tensor([low, high]))
    found = ((spread >= bounds[0]) & (spread <= bounds[1])).nonzero().squeeze(-1)
    generator = torch.Generator().manual_seed(seed)
    which = found[torch.randperm(len(found), generator=generator)[:positions]]
    obs = trajectories.per_token(which)
    shift = recorded_logprobs(policy, trajectories)[which] - obs.sketch.log_mass
    keep = torch.isfinite(shift)
    return TransferCurves(
        f"{title} (base entropy {bounds[0]:.2f} to {bounds[1]:.2f} nats)",
        [row[k].tolist() for row, k in zip(obs.sketch.logprobs, keep, strict=True)],
        [row[k].tolist() for row, k in zip(shift, keep, strict=True)],
    )


@dataclass(frozen=True)
class Difference:
    """A position at which two policies disagree."""

    prompt: str
    before: str
    """completion so far"""
    token: str
    """the token that was drawn"""
    kl: float
    """KL(policy || other), nats"""
    entropy: tuple[float, ...]
    """over points: base, policy, other, nats"""


@torch.no_grad()
def largest_differences(
    policy: Policy, other: Policy, trajectories: Trajectories, pieces: Sequence[Sequence[str]], *, count: int = 12
) -> list[Difference]:
    """Where two policies differ most along the completions of the first; one position a completion.

    Args:
        pieces: the text of every token, completion by completion.
    """
    obs = trajectories.per_token()
    mine, theirs = recorded_logprobs(policy, trajectories), recorded_logprobs(other, trajectories)
    entropies = [point_entropy(logprobs) for logprobs in (obs.sketch.log_mass, mine, theirs)]
    # The other rule may cut what the policy uses; the divergence from policy to rule is then infinite. Report the
    # bounded one to the even mixture instead (half of the Jensen-Shannon divergence, at most log 2).
    middle = torch.logaddexp(mine, theirs) - torch.log(torch.tensor(2.0))
    gap = kl(mine, middle)
    rows, starts = trajectories.rows, trajectories.lengths.cumsum(0) - trajectories.lengths
    chosen: list[Difference] = []
    seen: set[str] = set()
    for token in gap.argsort(descending=True).tolist():
        row = int(rows[token])
        prompt = trajectories.prompts[row]
        if prompt.id in seen:
            continue
        seen.add(prompt.id)
        t = int(token) - int(starts[row])
        text = pieces[row]
        spreads = tuple(float(spread[token]) for spread in entropies)
        chosen.append(Difference(prompt.last_turn, "".join(text[:t]), text[t], float(gap[token]), spreads))
        if len(chosen) == count:
            break
    return chosen
