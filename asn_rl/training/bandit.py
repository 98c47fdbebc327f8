"""Contextual bandits on a logged reward tensor, trained without generating.

Every action was run on every prompt, so the gradient of the expected reward sum_a pi(a|x) R[x, a] is exact: nothing is
sampled, and REINFORCE's variance (arXiv:2603.09065, sequence level) does not occur. Optimised by L-BFGS on all prompts
at once; a run is a function of its inputs and the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from asn_rl.errors import InvalidValue, TrainingError, check_at_least
from asn_rl.ops.logprobs import entropy

_ANNEALED = (1.0, 0.1)
"""entropy bonuses that come first: with a large one the objective has a single optimum, which the next starts from"""


@dataclass(frozen=True)
class BanditConfig:
    """A gate over actions that reads the prompt's features. Coefficients are for rewards of about unit scale."""

    width: int = 0
    """hidden units of the gate; 0: linear"""
    l2: float = 0.003
    """penalty on half the squared weights, biases left out, in units of the reward"""
    entropy_coef: float = 0.01
    """bonus on the entropy of the gate, reward a nat"""
    steps: int = 100
    """L-BFGS iterations at most, at each of the falling entropy bonuses"""
    folds: int = 5
    """parts of the prompts in cross-fitting: each is decided by a gate trained on the others"""
    seed: int = 0
    """keys the folds and the hidden layer's first weights"""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "width", "l2", "entropy_coef")
        check_at_least(self, 1, "steps")
        check_at_least(self, 2, "folds")


class BanditGate(nn.Module):
    """Standardised features (P, D) -> log-probabilities of actions (P, A). D = 0: a mixture without context.

    At initialisation a linear gate is uniform.
    """

    def __init__(self, features: Tensor, actions: int, width: int, seed: int) -> None:
        super().__init__()
        size = features.shape[1]
        mean = features.mean(0)
        deviation = (features - mean).square().mean(0).sqrt()
        # Divided by sqrt(D), the features have unit length together, however many they are.
        scale = torch.where(deviation > 1e-6, deviation, torch.inf) * max(size, 1) ** 0.5
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        generator = torch.Generator().manual_seed(seed)
        inner = width or size
        self.hidden = nn.Parameter(torch.randn(size, width, generator=generator, dtype=features.dtype))
        self.hidden_bias = nn.Parameter(torch.zeros(width, dtype=features.dtype))
        self.weight = nn.Parameter(torch.zeros(inner, actions, dtype=features.dtype))
        self.bias = nn.Parameter(torch.zeros(actions, dtype=features.dtype))

    def forward(self, features: Tensor) -> Tensor:
        x = (features - self.get_buffer("mean")) / self.get_buffer("scale")
        if self.hidden.shape[1]:
            x = torch.tanh(x @ self.hidden + self.hidden_bias)
        return torch.log_softmax(x @ self.weight + self.bias, -1)

    def penalty(self) -> Tensor:
        """Half the squared weights."""
        return 0.5 * (self.hidden.square().sum() + self.weight.square().sum())


def expected_rewards(probs: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """(P,) expected reward of (P, A) action probabilities, given (P, A) mean rewards.

    NaN is masked: an action without a reward on a prompt leaves its probability to the others; a prompt without any is
    NaN.
    """
    seen = ~np.isnan(rewards)
    mass = (probs * seen).sum(-1)
    return np.where(mass > 0, (probs * np.where(seen, rewards, 0)).sum(-1) / np.where(mass > 0, mass, 1), np.nan)


def train_bandit(features: np.ndarray, rewards: np.ndarray, strata: Sequence[str], config: BanditConfig) -> BanditGate:
    """Maximise the expected reward, every stratum weighing the same, minus the penalty plus the entropy bonus.

    Args:
        features: (P, D); D = 0 gives the best mixture without context.
        rewards: (P, A) mean reward of each action on each prompt; NaN: masked.
        strata: P labels.

    Raises:
        InvalidValue: lists of different lengths.
        TrainingError: every reward is masked, or the optimisation ended in NaN.
    """
    if not len(features) == len(rewards) == len(strata):
        raise InvalidValue("features", len(features), f"{len(rewards)} rows, one a prompt, as strata ({len(strata)})")
    known = ~np.isnan(rewards).all(-1)
    if not known.any():
        raise TrainingError(
            "every reward of the log is masked, so there is nothing to learn; check the reward functions"
        )
    x, seen = torch.tensor(features[known], dtype=torch.float64), torch.tensor(~np.isnan(rewards[known]))
    values = torch.tensor(np.nan_to_num(rewards[known]), dtype=torch.float64)
    weights = torch.tensor(_even_weights(np.asarray(strata)[known]))
    gate = BanditGate(x, rewards.shape[1], config.width, config.seed)

    def loss(bonus: float) -> Tensor:
        logprobs = gate(x)
        probs = logprobs.exp() * seen
        reward = (probs * values).sum(-1) / probs.sum(-1)
        objective = (weights * (reward + bonus * entropy(logprobs))).sum()
        return config.l2 * gate.penalty() - objective

    for bonus in (*(extra for extra in _ANNEALED if extra > config.entropy_coef), config.entropy_coef):
        _minimise(gate, partial(loss, bonus), config.steps)
    if not torch.isfinite(loss(config.entropy_coef)):
        raise TrainingError("the bandit's loss is not finite; check the features for huge values, or raise l2")
    return gate


def _minimise(gate: BanditGate, loss: Callable[[], Tensor], steps: int) -> None:
    optimizer = torch.optim.LBFGS(gate.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    optimizer.step(closure)


def _even_weights(strata: np.ndarray) -> np.ndarray:
    """(P,) weights with sum 1, each stratum with the same sum."""
    _, index, counts = np.unique(strata, return_inverse=True, return_counts=True)
    return 1.0 / (len(counts) * counts[index])


@dataclass(frozen=True)
class CrossFit:
    """Decisions about prompts by gates that were trained on other prompts."""

    probs: np.ndarray
    """(P, A) action probabilities"""
    fold: np.ndarray
    """(P,) int: prompts of a fold share a gate"""

    def shuffled(self) -> np.ndarray:
        """(P, A) action probabilities where each prompt gets the context of another one of its fold: the mean over all
        choices of the other one, so that no draw adds noise."""
        out = np.empty_like(self.probs)
        for fold in np.unique(self.fold):
            rows = self.fold == fold
            out[rows] = (self.probs[rows].sum(0) - self.probs[rows]) / (rows.sum() - 1)
        return out


@torch.no_grad()
def gate_probs(gate: BanditGate, features: np.ndarray) -> np.ndarray:
    """(P, A) action probabilities of a trained gate."""
    return gate(torch.tensor(features, dtype=torch.float64)).exp().numpy()


def cross_fit(features: np.ndarray, rewards: np.ndarray, strata: Sequence[str], config: BanditConfig) -> CrossFit:
    """Train a gate on all folds but one and decide that one, for every fold; each fold has its share of every stratum.

    Raises:
        InvalidValue: fewer than two prompts a fold.
    """
    if len(features) < 2 * config.folds:
        raise InvalidValue(
            "prompts", len(features), f">= {2 * config.folds} for {config.folds} folds", "lower folds, or log more"
        )
    labels, fold = np.asarray(strata), stratified_folds(strata, config.folds, config.seed)
    probs = np.empty(rewards.shape)
    for held in range(config.folds):
        out = fold == held
        gate = train_bandit(features[~out], rewards[~out], labels[~out].tolist(), config)
        probs[out] = gate_probs(gate, features[out])
    return CrossFit(probs, fold)


def stratified_folds(strata: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """(P,) int64 fold of each prompt, drawn at random; each fold has its share of every stratum."""
    labels, fold = np.asarray(strata), np.empty(len(strata), dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(strata))
    order = order[np.argsort(labels[order], kind="stable")]  # strata one after the other, shuffled within
    fold[order] = np.arange(len(order)) % folds
    return fold
