"""Rewards predicted from what is known of a prompt, for estimates that need a model of them."""

from __future__ import annotations

import numpy as np

from asn_rl.errors import InvalidValue
from asn_rl.evaluation.reward_log import RewardLog
from asn_rl.training.bandit import stratified_folds


def cross_fitted_rewards(log: RewardLog, *, folds: int = 5, ridge: float = 1.0, seed: int = 0) -> np.ndarray:
    """(P, A) rewards of every prompt and action, predicted by a model that was fitted on other prompts: what
    `off_policy.doubly_robust` needs (cross-fitting: Chernozhukov et al. 2018, arXiv:1608.00060).

    The model is a ridge regression an action, on the prompts' standardised features and strata, that shrinks towards
    the action's mean reward. An action that no other fold holds is predicted by the mean of all.

    Args:
        folds: parts of the prompts; each part's rewards are predicted from the others.
        ridge: penalty of a squared coefficient, in samples.
        seed: keys the folds.

    Raises:
        InvalidValue: fewer prompts than folds, fewer than 2 folds, a negative penalty, or a part without any reward
            outside it.
    """
    count = len(log.prompt_ids)
    if not 2 <= folds <= count:
        raise InvalidValue("folds", folds, f"in [2, {count}], the prompts of the log")
    if not ridge > 0:
        raise InvalidValue("ridge", ridge, "> 0")
    inputs = _inputs(log)
    known = ~np.isnan(log.rewards)
    sums, counts = np.where(known, log.rewards, 0.0).sum(2), known.sum(2)
    fold = stratified_folds(log.strata, folds, seed)
    predicted = np.empty(sums.shape)
    for held in range(folds):
        out = fold == held
        if not counts[~out].any():
            raise InvalidValue("log", "no reward outside a fold", "rewards of at least two prompts", "lower folds")
        everything = sums[~out].sum() / counts[~out].sum()
        for action in range(sums.shape[1]):
            total, samples = sums[~out, action], counts[~out, action]
            predicted[out, action] = _ridge(inputs[~out], total, samples, ridge, inputs[out], everything)
    return predicted


def _inputs(log: RewardLog) -> np.ndarray:
    """(P, D + strata) features of mean 0 and standard deviation 1, and which stratum it is."""
    features = log.features - log.features.mean(0)
    spread = features.std(0)
    labels = np.asarray(log.strata)
    return np.concatenate([features / np.where(spread > 0, spread, 1), labels[:, None] == np.unique(labels)], 1)


def _ridge(
    inputs: np.ndarray, sums: np.ndarray, counts: np.ndarray, penalty: float, others: np.ndarray, fallback: float
) -> np.ndarray:
    """Predictions at `others` (Q, D) of a regression of the mean rewards sums / counts (n,) on inputs (n, D), weighted
    by counts, with a free intercept."""
    if not counts.any():
        return np.full(len(others), fallback)
    centre, mean = counts @ inputs / counts.sum(), sums.sum() / counts.sum()
    centred, gaps = inputs - centre, sums - counts * mean
    weighted = counts[:, None] * centred
    # In the smaller of the two spaces: embeddings are longer than logs.
    if inputs.shape[1] <= len(inputs):
        slope = np.linalg.solve(weighted.T @ centred + penalty * np.eye(inputs.shape[1]), centred.T @ gaps)
    else:
        slope = centred.T @ np.linalg.solve(weighted @ centred.T + penalty * np.eye(len(inputs)), gaps)
    return mean + (others - centre) @ slope
