"""What another policy would have earned, from a log of what one policy did: importance-weighted estimates.

Bandits (one action a sample, `RewardLog` with propensities): inverse propensity scores, their self-normalised form
(Swaminathan & Joachims 2015) and the doubly robust one (Dudik et al. 2011, arXiv:1103.4601). Token policies
(`Trajectories`, whose log-probs are those that were drawn from): per-decision importance sampling (Precup et al. 2000).

A sample is weighted by how much likelier the target policy makes it than the log did. Three things must hold:
- the log could have drawn, and did draw, what the target draws. Weights are 1 on average if so. Where they are less,
  mass that the target has is not in the log: long completions that each were unlikely are the usual case;
- a sample's reward depends on that sample alone. Rewards that compare a group (distinct answers) do not: weighting
  single samples says nothing about them;
- masked rewards (NaN, left out) are masked whatever was drawn; the self-normalised forms need only that a mask does not
  depend on which policy drew the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from asn_rl.errors import DataError, InvalidValue
from asn_rl.evaluation.reward_log import RewardLog, check_distribution
from asn_rl.evaluation.statistics import Interval, Resampling
from asn_rl.protocols import Policy
from asn_rl.types import Trajectories
from asn_rl.unroll import recorded_logprobs

_BATCH = 1_000_000
"""numbers held at a time by the bootstrap"""


@dataclass(frozen=True)
class Estimate:
    """An off-policy estimate of a mean reward. NaN where no sample has any weight."""

    reward: Interval
    """mean over strata of the mean over prompts; bounds are NaN where resamples occur that have no weight"""
    ess: float
    """effective sample size; see `effective_sample_size`"""
    mean_weight: float
    """1 in expectation; what it lacks is mass of the target that the log does not hold"""


@dataclass(frozen=True)
class Terms:
    """Per-prompt means that a ratio estimate is made of: sum over K of mean numerator / mean denominator.

    K is 1, or the number of decisions that are normalised one by one.
    """

    numerators: np.ndarray
    """(P, K)"""
    denominators: np.ndarray
    """(P, K)"""
    prompts: np.ndarray
    """P prompts, ascending"""
    strata: np.ndarray
    """P labels"""
    ess: float
    mean_weight: float

    def estimate(self, how: Resampling | None = None) -> Estimate:
        return Estimate(self.interval(how or Resampling()), self.ess, self.mean_weight)

    def minus(self, values: np.ndarray) -> Terms:
        """Terms of the difference to the mean of (P,) values of the same prompts: both are resampled together, so that
        what the prompts share cancels."""
        column = np.asarray(values, dtype=np.float64)[:, None]
        return replace(
            self,
            numerators=np.concatenate([self.numerators, -column], 1),
            denominators=np.concatenate([self.denominators, np.ones_like(column)], 1),
        )

    def interval(self, how: Resampling) -> Interval:
        """The estimate with its bootstrap percentile interval."""
        generator = np.random.default_rng(how.seed)
        parts = [self.strata == label for label in np.unique(self.strata)]
        mean = np.mean([_ratio(self.numerators[rows].mean(0), self.denominators[rows].mean(0)) for rows in parts])
        draws = np.mean([self._draws(rows, how.resamples, generator) for rows in parts], 0)
        low, high = np.quantile(draws, [(1 - how.level) / 2, (1 + how.level) / 2])
        return Interval(float(mean), float(low), float(high))

    def _draws(self, rows: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
        """(resamples,) estimates of one stratum; a batch of resamples at a time."""
        numerators, denominators = self.numerators[rows], self.denominators[rows]
        count, width = numerators.shape
        step = max(1, _BATCH // max(count, width))
        draws = []
        for done in range(0, resamples, step):
            times = generator.multinomial(count, np.full(count, 1 / count), min(step, resamples - done)).astype(float)
            draws.append(_ratio(times @ numerators / count, times @ denominators / count))
        return np.concatenate(draws)


def _ratio(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """(...) sum over the last axis of the ratios; NaN where a denominator is 0."""
    positive = denominators > 0
    return np.where(positive, numerators / np.where(positive, denominators, 1), np.nan).sum(-1)


# Bandits


def ips(log: RewardLog, target: np.ndarray, how: Resampling | None = None) -> Estimate:
    """Inverse propensity scores: mean of w r. Unbiased; its spread grows with the largest weight.

    Args:
        target: (P, A) action probabilities of the policy in question.

    Raises:
        InvalidValue: a log without propensities, or a target that is no distribution over its actions.
    """
    return _bandit_estimate(log, target, None, normalise=False, how=how)


def self_normalised(log: RewardLog, target: np.ndarray, how: Resampling | None = None) -> Estimate:
    """Sum of w r over sum of w, within a stratum: consistent, never outside the range of the rewards. See `ips`."""
    return _bandit_estimate(log, target, None, normalise=True, how=how)


def doubly_robust(log: RewardLog, target: np.ndarray, model: np.ndarray, how: Resampling | None = None) -> Estimate:
    """Mean of sum_a pi(a) q(a) + w (r - q(drawn action)): unbiased for any q, and exact where q is. See `ips`.

    Args:
        model: (P, A) predicted rewards q, from a model that has not seen the log's own rewards of the same prompt, as
            `reward_prediction.cross_fitted_rewards` makes them.
    """
    if model.shape != log.means.shape or not np.isfinite(model).all():
        raise InvalidValue("model", f"shape {model.shape}", f"finite predictions {log.means.shape}")
    return _bandit_estimate(log, target, model, normalise=False, how=how)


def _bandit_estimate(
    log: RewardLog, target: np.ndarray, model: np.ndarray | None, *, normalise: bool, how: Resampling | None
) -> Estimate:
    if log.propensities is None:
        raise InvalidValue(
            "propensities",
            None,
            "the (P, A) probabilities that the logged actions were drawn with",
            "a log without propensities cannot be weighted. Where every action was run, average its rewards instead",
        )
    check_distribution("target", target, log.propensities.shape)
    action = log.present.argmax(1)  # (P, S)
    rewards = np.take_along_axis(log.rewards, action[:, None], 1)[:, 0]
    weights = np.take_along_axis(target / np.where(log.propensities > 0, log.propensities, 1), action, 1)
    prompts = np.repeat(np.arange(len(rewards)), rewards.shape[1])
    baseline, direct = np.zeros_like(rewards), np.zeros(len(rewards))
    if model is not None:
        baseline, direct = np.take_along_axis(model, action, 1), (target * model).sum(-1)
    gains = (weights * (rewards - baseline) + direct[:, None]).reshape(-1, 1)
    flat = weights.reshape(-1)
    kept = ~np.isnan(gains[:, 0])
    with np.errstate(divide="ignore"):
        log_weights = np.log(flat)[kept]
    denominators = flat[kept, None] if normalise else np.ones_like(gains[kept])
    labels = np.asarray(log.strata)[prompts[kept]]
    return _terms(gains[kept], denominators, log_weights, prompts[kept], labels).estimate(how)


# Token policies


def log_ratios(policy: Policy, trajectories: Trajectories) -> Tensor:
    """(S,) float64 log(pi / behaviour) of every token, nats; -inf: `policy` never draws it.

    Exact: both sides are log-probs of the distributions over points that are drawn from. What happens inside a point
    is the base model's, and cancels.

    Raises:
        DataError: the log has no propensities (`Trajectories.recorded`), or they are not finite; or the policy reads
            something that the trajectories did not record.
    """
    if not trajectories.recorded:
        raise DataError(
            "the log has no propensities: its log-probs are those of the policy that it was replayed under, not of "
            "what drew its tokens. Give `replay` the log-probs that were recorded with them, or roll out anew"
        )
    if not bool(trajectories.behaviour_logprobs.isfinite().all()):
        wrong = int((~trajectories.behaviour_logprobs.isfinite()).nonzero()[0])
        raise DataError(
            f"the log-prob of token {wrong} in the log is {trajectories.behaviour_logprobs[wrong].item()}; a token "
            "that was drawn has a finite one. Leave its completion out, or record it anew"
        )
    obs = trajectories.observations
    missing = sorted(name for name in policy.needs if getattr(obs, name) is None)
    if missing:
        raise DataError(
            f"the log did not record {', '.join(missing)}, which {type(policy).__name__} reads; roll out with "
            f"capture={missing}"
        )
    at_point = trajectories.points.unsqueeze(-1)
    inner = trajectories.base_logprobs - obs.sketch.log_mass.gather(-1, at_point).squeeze(-1)
    target = recorded_logprobs(policy, trajectories).gather(-1, at_point).squeeze(-1)
    return target.double() + inner.double() - trajectories.behaviour_logprobs.double()


def per_decision(
    policy: Policy,
    trajectories: Trajectories,
    rewards: np.ndarray,
    strata: Sequence[str] | None = None,
    *,
    token_rewards: np.ndarray | None = None,
    normalise: bool = True,
    how: Resampling | None = None,
) -> Estimate:
    """Mean reward of a policy from completions that another one drew.

    The reward of a completion is weighted by the product of all its ratios, a token's own reward by the product up to
    that token only, as later choices cannot change it (Precup et al. 2000, equation 3).

    Args:
        rewards: (B,) reward of each completion, from that completion alone; NaN: masked, with its token rewards.
        strata: B labels, equal for completions of one prompt; default: one stratum.
        token_rewards: (S,) further rewards by token, for example minus a price.
        normalise: divide by the mean weight, step by step where there are token rewards: consistent and far less
            spread; else unbiased.

    Raises:
        InvalidValue: arrays of the wrong length, or everything masked.
        DataError: see `log_ratios`.
    """
    ratios = log_ratios(policy, trajectories).numpy()
    return decision_terms(ratios, trajectories, rewards, strata, token_rewards, normalise).estimate(how)


def decision_terms(
    ratios: np.ndarray,
    trajectories: Trajectories,
    rewards: np.ndarray,
    strata: Sequence[str] | None = None,
    token_rewards: np.ndarray | None = None,
    normalise: bool = True,
) -> Terms:
    """What `per_decision` is made of, given (S,) log ratios."""
    count, lengths = len(trajectories), trajectories.lengths.numpy()
    if rewards.shape != (count,):
        raise InvalidValue("rewards shape", rewards.shape, f"({count},), one a completion")
    if token_rewards is not None and token_rewards.shape != ratios.shape:
        raise InvalidValue("token_rewards shape", token_rewards.shape, f"{ratios.shape}, one a token")
    if strata is not None and len(strata) != count:
        raise InvalidValue("strata", len(strata), f"{count} labels, one a completion")
    rows, steps = np.repeat(np.arange(count), lengths), np.concatenate([np.arange(n) for n in lengths])
    # After its end a completion keeps its weight.
    by_step = np.zeros((count, lengths.max()))
    by_step[rows, steps] = ratios
    log_weights = by_step.cumsum(1) if token_rewards is not None else by_step.sum(1, keepdims=True)
    gains = np.zeros_like(log_weights)
    if token_rewards is not None:
        gains[rows, steps] = token_rewards
    gains[:, -1] += rewards  # the last column holds the weights of whole completions
    kept = ~np.isnan(rewards)
    log_weights, gains = log_weights[kept], gains[kept]
    weights = _scaled(log_weights) if normalise else np.exp(log_weights)
    ids = np.array([prompt.id for prompt in trajectories.prompts])[kept]
    labels = np.array(["all"] * count if strata is None else strata)[kept]
    denominators = weights if normalise else np.ones_like(weights)
    return _terms(weights * gains, denominators, log_weights[:, -1], ids, labels)


def effective_sample_size(log_weights: np.ndarray) -> float:
    """How many unweighted samples (n,) log-weights are worth; 0 where none has weight.

    (sum of weights)^2 / (sum of squared weights) (Kong 1992) alone is blind to what was never drawn: it may be high
    while much of the target's mass is missing. Weights add up to n in expectation. Where they add up to less, what is
    missing is counted as one sample that was not seen, and the smaller of the two figures is taken.
    """
    scaled = _scaled(log_weights)
    squares = float((scaled**2).sum())
    if not squares > 0:
        return 0.0
    kong = float(scaled.sum()) ** 2 / squares
    weights = np.exp(log_weights)
    missing = len(weights) - float(weights.sum())
    return min(kong, len(weights) ** 2 / (float((weights**2).sum()) + missing**2)) if missing > 0 else kong


def _scaled(log_weights: np.ndarray) -> np.ndarray:
    """Weights of (n, ...) log-weights up to a factor that makes the largest 1: those of long completions may all be
    below the smallest float."""
    peak = log_weights.max(0, initial=-np.inf)
    return np.exp(log_weights - np.where(np.isfinite(peak), peak, 0))


def _terms(
    numerators: np.ndarray, denominators: np.ndarray, log_weights: np.ndarray, prompts: np.ndarray, strata: np.ndarray
) -> Terms:
    """Means over the samples of each prompt, of (n, K) terms with (n,) log-weights and labels."""
    if not len(prompts):
        raise InvalidValue("rewards", "only NaN", "at least one number", "all are masked")
    names, first, index = np.unique(prompts, return_index=True, return_inverse=True)
    if (strata != strata[first][index]).any():
        raise InvalidValue("strata", "several of one prompt", "equal for all completions of a prompt")
    counts = np.bincount(index)[:, None]

    def mean(part: np.ndarray) -> np.ndarray:
        total = np.zeros((len(names), part.shape[1]))
        np.add.at(total, index, part / counts[index])
        return total

    sizes = [effective_sample_size(log_weights[strata == label]) for label in np.unique(strata)]
    # The mean over strata has the mean of their variances over their number.
    ess = len(sizes) ** 2 / sum(1 / size for size in sizes) if min(sizes) > 0 else 0.0
    reached = float(np.exp(log_weights).mean())
    return Terms(mean(numerators), mean(denominators), names, strata[first], ess, reached)
