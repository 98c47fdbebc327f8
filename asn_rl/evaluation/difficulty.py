"""Easy, normal or hard: levels of prompts from a few samples, and a probe that tells them from the prompt alone.

After DiffAdapt (arXiv:2510.19669). Deviations: the accuracies that part the levels are ours, and the entropy has to be
given, as it depends on the base model; the paper's levels also come with prompts of their own, which are left out, as
they would be confounded with the temperature; classes are weighted instead of sampled evenly.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from asn_rl.errors import InvalidValue, check_at_least, check_positive
from asn_rl.ops.context import entropy
from asn_rl.types import Trajectories

LEVELS = ("easy", "normal", "hard")


@dataclass(frozen=True)
class LevelSettings:
    """How prompts of a level are decoded."""

    temperature: float
    budget_share: float
    """of the token budget"""

    def max_new_tokens(self, budget: int) -> int:
        """Tokens of a completion, at least one."""
        return max(1, math.floor(self.budget_share * budget))


SETTINGS = {"easy": LevelSettings(0.5, 0.4), "normal": LevelSettings(0.8, 1.0), "hard": LevelSettings(0.4, 0.5)}
"""the paper's"""


@dataclass(frozen=True)
class Thresholds:
    """Where the levels part."""

    entropy: float
    """beta, nats a token: normal prompts have a mean entropy of at most this"""
    normal_accuracy: float = 0.7
    """alpha: normal prompts are answered correctly at least this often"""
    hard_accuracy: float = 0.3
    """gamma: hard prompts are answered correctly less often than this"""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "entropy")
        if not 0 <= self.hard_accuracy <= self.normal_accuracy <= 1:
            raise InvalidValue(
                "(hard_accuracy, normal_accuracy)", (self.hard_accuracy, self.normal_accuracy),
                "0 <= hard_accuracy <= normal_accuracy <= 1",
            )  # fmt: skip


def mean_entropies(trajectories: Trajectories) -> np.ndarray:
    """(B,) mean entropy of the base model over the tokens of each completion, nats a token."""
    per_token = entropy(trajectories.observations.sketch).double()
    sums = torch.zeros(len(trajectories), dtype=torch.float64).index_add_(0, trajectories.rows, per_token)
    return (sums / trajectories.lengths).numpy()


def difficulty_levels(accuracy: np.ndarray, entropy: np.ndarray, thresholds: Thresholds) -> np.ndarray:
    """(P,) int64 index into `LEVELS`: normal where accuracy >= alpha and entropy <= beta, hard where accuracy < gamma,
    else easy.

    An easy prompt is thus one that is solved, but with more uncertainty than it deserves (the paper's overthinking).

    Args:
        accuracy: (P,) share of correct samples, of about ten.
        entropy: (P,) mean entropy over the tokens of the samples, nats a token.

    Raises:
        InvalidValue: different lengths, or a value that is not finite (leave out prompts whose samples are all masked).
    """
    if accuracy.shape != entropy.shape or not np.isfinite(accuracy).all() or not np.isfinite(entropy).all():
        raise InvalidValue("accuracy and entropy", (accuracy, entropy), "as many finite numbers of either")
    normal = (accuracy >= thresholds.normal_accuracy) & (entropy <= thresholds.entropy)
    return np.where(normal, LEVELS.index("normal"), np.where(accuracy < thresholds.hard_accuracy, 2, 0))


@dataclass(frozen=True)
class ProbeConfig:
    """How a probe is fitted: AdamW on all prompts at a time, classes weighing the same."""

    width: int = 64
    """hidden units; 0: a linear probe"""
    epochs: int = 100
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0
    """of the weights before the first step"""

    def __post_init__(self) -> None:
        check_at_least(self, 0, "width", "weight_decay")
        check_at_least(self, 1, "epochs")
        check_positive(self, "learning_rate")


@dataclass(frozen=True)
class Probe:
    """A classifier of prompt embeddings."""

    centre: Tensor
    scale: Tensor
    network: nn.Module

    @torch.no_grad()
    def probabilities(self, embeddings: Tensor) -> np.ndarray:
        """(P, D) embeddings -> (P, C) class probabilities."""
        return self.network((embeddings - self.centre) / self.scale).double().softmax(-1).numpy()


def fit_probe(embeddings: Tensor, labels: Sequence[int] | np.ndarray, classes: int, config: ProbeConfig) -> Probe:
    """Fit a two-layer (or linear) probe.

    Args:
        embeddings: (P, D) fp32, for example `Observation.prompt_embedding`.
        labels: P classes in [0, classes). A class without a prompt is never predicted with confidence.

    Raises:
        InvalidValue: different lengths, no prompts, or a label outside the classes.
    """
    target = torch.as_tensor(np.asarray(labels), dtype=torch.long)
    if len(target) != len(embeddings) or len(target) == 0 or not ((target >= 0) & (target < classes)).all():
        raise InvalidValue("labels", list(labels), f"one in [0, {classes}) for each of the {len(embeddings)} prompts")
    centre = embeddings.mean(0)
    scale = embeddings.std(0, correction=0).clamp_min(1e-6)
    inputs = (embeddings - centre) / scale
    counts = torch.bincount(target, minlength=classes)
    weight = len(target) / (counts.clamp_min(1) * (counts > 0).sum())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = _network(inputs.shape[1], classes, config.width)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    for _ in range(config.epochs):
        loss = nn.functional.cross_entropy(network(inputs), target, weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Probe(centre, scale, network)


def _network(inputs: int, classes: int, width: int) -> nn.Module:
    if width == 0:
        return nn.Linear(inputs, classes)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes))


def folds(groups: Sequence[Hashable], count: int, seed: int = 0) -> np.ndarray:
    """(P,) int64 fold of each prompt; prompts of one group (the same question in other words) share theirs.

    Raises:
        InvalidValue: fewer groups than folds, or fewer than two folds.
    """
    names = list(dict.fromkeys(groups))
    if not 2 <= count <= len(names):
        raise InvalidValue("folds", count, f"in [2, {len(names)}], the number of groups of prompts")
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of = {names[int(group)]: place % count for place, group in enumerate(order)}
    return np.array([fold_of[group] for group in groups])


def cross_validated(
    embeddings: Tensor, labels: np.ndarray, classes: int, config: ProbeConfig, fold: np.ndarray
) -> np.ndarray:
    """(P, classes) probabilities of every prompt by a probe that was fitted without the prompt's fold."""
    probabilities = np.empty((len(labels), classes))
    for held_out in np.unique(fold):
        inside = torch.from_numpy(fold == held_out)
        probe = fit_probe(embeddings[~inside], labels[fold != held_out], classes, config)
        probabilities[fold == held_out] = probe.probabilities(embeddings[inside])
    return probabilities


def predicted_curves(
    embeddings: Tensor, curves: np.ndarray, levels: np.ndarray, classes: int, config: ProbeConfig, fold: np.ndarray
) -> np.ndarray:
    """(P, K + 1) success with 0, ..., K samples that is expected of every prompt from its embedding: the mean curve of
    each level, weighted by the probe's probabilities; both from the other folds.

    Args:
        curves: (P, K + 1) measured success, for example `AnswerLog.vote_accuracy`.
        levels: (P,) class of every prompt in [0, classes).
    """
    probabilities = cross_validated(embeddings, levels, classes, config, fold)
    predicted = np.empty_like(curves)
    for held_out in np.unique(fold):
        rest = fold != held_out
        of_level = [curves[rest & (levels == level)] for level in range(classes)]
        # A level that the other folds lack: what is known of any prompt.
        means = np.stack([part.mean(0) if len(part) else curves[rest].mean(0) for part in of_level])
        predicted[~rest] = probabilities[~rest] @ means
    return predicted
