"""Tune a heuristic's parameter on one batch that was drawn at T = 1: no completion is generated anew.

The base model's own completions have full support, so any temperature, min-p, top-p or mixture of them is the same
batch with other weights. What the weights cannot carry shows in the effective sample size: such values are kept in the
curve and marked as not to be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from asn_rl.errors import DataError, InvalidValue
from asn_rl.evaluation.off_policy import Estimate, per_decision
from asn_rl.evaluation.statistics import Resampling
from asn_rl.protocols import Policy
from asn_rl.types import Trajectories

MIN_ESS = 50.0
"""effective completions below which an estimate is marked"""


@dataclass(frozen=True)
class Setting:
    """One value of a parameter."""

    value: float
    estimate: Estimate
    trusted: bool
    """the effective sample size reaches the bound"""


def tuning_curve(
    policies: Mapping[float, Policy],
    trajectories: Trajectories,
    rewards: np.ndarray,
    strata: Sequence[str] | None = None,
    *,
    min_ess: float = MIN_ESS,
    how: Resampling | None = None,
) -> list[Setting]:
    """Estimated mean reward at every value of a parameter, in the order given.

    Args:
        policies: value -> the heuristic at that value.
        trajectories: completions of the base model itself, at T = 1.
        rewards: (B,) reward of each completion, from that completion alone; NaN: masked.
        strata: B labels, equal for completions of one prompt.
        min_ess: bound on the effective sample size.

    Raises:
        InvalidValue: no values, or a bound that is not above 0.
        DataError: the completions were not drawn at T = 1.
    """
    if not policies:
        raise InvalidValue("policies", {}, "at least one value with its policy")
    if not min_ess > 0:
        raise InvalidValue("min_ess", min_ess, "> 0", "an estimate without any effective sample is none")
    gap = (trajectories.behaviour_logprobs - trajectories.base_logprobs).abs().max().item()
    if not gap < 1e-3:
        raise DataError(
            f"the log-probs of the logged completions differ from the base model's by up to {gap:.3g} nats, so they "
            "were not drawn at T = 1, and what they leave out cannot be weighted; roll out the base model itself"
        )
    estimates = {
        value: per_decision(policy, trajectories, rewards, strata, how=how) for value, policy in policies.items()
    }
    return [Setting(value, estimate, estimate.ess >= min_ess) for value, estimate in estimates.items()]


def best_setting(curve: Sequence[Setting]) -> Setting:
    """The trusted value with the highest lower bound, which does not reward a wide interval.

    Raises:
        DataError: no value is trusted.
    """
    trusted = [setting for setting in curve if setting.trusted]
    if not trusted:
        largest = max(setting.estimate.ess for setting in curve)
        raise DataError(
            f"no value of the curve can be trusted: the effective sample size is {largest:.0f} at most. Log more "
            "completions, or take values closer to T = 1"
        )
    return max(trusted, key=lambda setting: setting.estimate.reward.low)
