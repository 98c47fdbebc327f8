"""Weights of particles and their resampling (Puri et al. 2025, arXiv:2502.01618; entropic: arXiv:2510.05825).

NumPy float64 on the (N,) particles of one prompt; weights sum to 1. Whichever way it is drawn, particle i is expected
N w_i times among the N that go on.
"""

from __future__ import annotations

import numpy as np
import torch

from asn_rl.ops.draws import invert_cdf


def particle_weights(scores: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """(N,) softmax(logit(score) / temperature) of scores in (0, 1)."""
    return _softmax((np.log(scores) - np.log1p(-scores)) / temperature)


def effective_sample_size(weights: np.ndarray) -> float:
    """1 / sum w^2: N where all are equal, 1 where one particle has everything."""
    return float(1 / np.square(weights).sum())


def annealing_temperature(weights: np.ndarray, progress: float, ess_share: float, anneal_share: float) -> float:
    """max(1, (1 - progress) N / ESS) while the effective sample size is below `ess_share` of N and the progress below
    `anneal_share`, else 1 (arXiv:2510.05825).

    Args:
        progress: steps done over steps at most, in [0, 1).
    """
    size = effective_sample_size(weights)
    if size >= ess_share * len(weights) or progress >= anneal_share:
        return 1.0
    return max(1.0, (1 - progress) * len(weights) / size)


def tempered(weights: np.ndarray, temperature: float) -> np.ndarray:
    """(N,) weights in proportion to w^(1 / temperature); 0 stays 0."""
    with np.errstate(divide="ignore"):  # a weight may underflow to 0
        return _softmax(np.log(weights) / temperature)


def multinomial(weights: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """(N,) particles, each drawn on its own.

    Args:
        uniforms: (N,) draws in [0, 1).
    """
    rows = torch.from_numpy(weights).expand(len(uniforms), -1)
    return invert_cdf(rows, torch.from_numpy(uniforms)).numpy()


def systematic(weights: np.ndarray, uniform: float) -> np.ndarray:
    """(N,) particles in ascending order, by one draw in [0, 1) for all (Kitagawa 1996): particle i occurs N w_i times,
    rounded up or down."""
    return multinomial(weights, (np.arange(len(weights)) + uniform) / len(weights))


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()
