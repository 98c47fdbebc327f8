"""Train a small reward model from scored completions: a Bradley-Terry head on frozen features.

Completions of a prompt are compared with each other only: every pair with different scores is an example, be the score
a verifier's 0 or 1, a tournament's rating or a large reward model's. The loss is -log sigmoid(score(better) -
score(worse)) (Bradley & Terry 1952), plus an L2 penalty; it is convex, and L-BFGS finds its minimum in seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from asn_rl.backends import BackendConfig
from asn_rl.errors import DataError, InvalidValue, TrainingError, check_at_least
from asn_rl.rewards.frozen_features import Head, features, load_features, save_head
from asn_rl.types import Prompt

MIN_SCALE = 1e-6
"""a feature that varies less than this does not vary"""


@dataclass(frozen=True)
class RewardModelConfig:
    """A Bradley-Terry head on frozen features."""

    l2: float = 1.0
    """weight of half the squared norm of the head, beside the mean loss of a pair"""
    layer: int | None = None
    """hidden layer whose mean over the completion is read; null: two thirds of the way up"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """precision of the base model; with less than float32 a score depends a little on its batch"""
    holdout: float = 0.3
    """share of the prompts kept to measure the accuracy on"""
    pairs_per_prompt: int = 256
    """pairs of a prompt at most, drawn at random"""
    seed: int = 0
    """choice of the held-out prompts and of the pairs"""

    def __post_init__(self) -> None:
        if not 0 < self.l2 < math.inf:
            raise InvalidValue("l2", self.l2, "a finite number > 0", "without it separable pairs have no best head")
        if not 0 < self.holdout < 1:
            raise InvalidValue("holdout", self.holdout, "in (0, 1)", "a reward model of unknown accuracy is no use")
        check_at_least(self, 1, "pairs_per_prompt")


@dataclass(frozen=True)
class RewardModelReport:
    """How good a head is."""

    accuracy: float
    """share of held-out pairs whose better completion scores higher; ties count half"""
    accuracy_low: float
    """lower end of its 95% bootstrap interval over prompts"""
    accuracy_high: float
    """upper end"""
    held_out_pairs: int
    held_out_prompts: int
    training_accuracy: float
    training_pairs: int
    training_prompts: int
    training_loss: float
    """mean nats a pair, without the penalty"""
    left_out: int
    """completions without token ids, without a score, or beyond the base model's context"""
    seconds: float
    """wall time, loading the base model included"""


def train_reward_model(
    prompts: Sequence[Prompt],
    completion_ids: Sequence[Sequence[int] | None],
    scores: Sequence[float | None],
    *,
    base_model: BackendConfig,
    folder: str | Path,
    config: RewardModelConfig | None = None,
) -> RewardModelReport:
    """Fit a head on scored completions, measure it on held-out prompts, and save it for `bradley_terry_head`.

    Args:
        prompts: B prompts, one a completion; equal ids are compared with each other.
        completion_ids: B lists of token ids as sampled; None or empty: left out.
        scores: B scores, higher is better; None or NaN: left out.
        base_model: the transformers model that features come from; `config.dtype` replaces its precision.
        folder: where the head is saved.

    Raises:
        DataError: lists of different lengths, or fewer than two prompts with completions of different scores.
        TrainingError: the fit did not end in finite numbers.
    """
    begin = time.perf_counter()
    config = config or RewardModelConfig()
    if not len(prompts) == len(completion_ids) == len(scores):
        raise DataError(
            "prompts, completion_ids and scores must have one entry a completion, got "
            f"{len(prompts)}, {len(completion_ids)} and {len(scores)}"
        )
    base_model = replace(base_model, dtype=config.dtype)
    backend = load_features(base_model)
    layers = backend.model.config.get_text_config().num_hidden_layers
    layer = round(2 * layers / 3) if config.layer is None else config.layer
    encoded = {prompt.id: backend.encode(prompt.content) for prompt in prompts}
    usable = {
        i: float(score)
        for i, (prompt, ids, score) in enumerate(zip(prompts, completion_ids, scores, strict=True))
        if ids and score is not None and math.isfinite(score)
        if len(encoded[prompt.id]) + len(ids) <= backend.max_context
    }
    pairs = better_worse_pairs([prompt.id for prompt in prompts], usable, config.pairs_per_prompt, config.seed)
    train, held_out = _split(pairs, config)

    used = sorted({i for part in pairs.values() for i in part.flatten().tolist()})
    row = {i: place for place, i in enumerate(used)}
    inputs = features(backend, [(encoded[prompts[i].id], completion_ids[i] or ()) for i in used], layer).double()
    seen = torch.tensor(sorted({row[i] for key in train for i in pairs[key].flatten().tolist()}))
    mean, scale = inputs[seen].mean(0), inputs[seen].std(0, correction=0).clamp_min(MIN_SCALE)
    standard = (inputs - mean) / scale
    by_row = {key: torch.tensor([[row[i], row[j]] for i, j in part.tolist()]) for key, part in pairs.items()}
    weight, loss = fit_head(standard, torch.cat([by_row[key] for key in train]), config.l2)

    rated = standard @ weight
    accuracy, low, high = _accuracy(rated, [by_row[key] for key in held_out], config.seed)
    report = RewardModelReport(
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        held_out_pairs=sum(len(by_row[key]) for key in held_out),
        held_out_prompts=len(held_out),
        training_accuracy=_accuracy(rated, [by_row[key] for key in train], config.seed)[0],
        training_pairs=sum(len(by_row[key]) for key in train),
        training_prompts=len(train),
        training_loss=loss,
        left_out=len(prompts) - len(usable),
        seconds=time.perf_counter() - begin,
    )
    head = Head(weight, mean, scale, base_model, backend.fingerprint, layer)
    save_head(folder, head, {"config": asdict(config), "report": asdict(report)})
    return report


def better_worse_pairs(
    prompt_ids: Sequence[str], scores: Mapping[int, float], most: int, seed: int
) -> dict[str, np.ndarray]:
    """(n, 2) indices (better, worse) of completions by prompt id; prompts without a difference are left out.

    Args:
        scores: scores of some completions by index.
        most: pairs of a prompt at most, a random choice.
    """
    members: dict[str, list[int]] = {}
    for i in sorted(scores):
        members.setdefault(prompt_ids[i], []).append(i)
    generator = np.random.default_rng(seed)
    pairs: dict[str, np.ndarray] = {}
    for key, rows in members.items():
        index, values = np.array(rows), np.array([scores[i] for i in rows])
        found = index[np.argwhere(values[:, None] > values[None, :])]
        if len(found) > most:
            found = found[np.sort(generator.permutation(len(found))[:most])]
        if len(found):
            pairs[key] = found
    return pairs


def _split(pairs: Mapping[str, np.ndarray], config: RewardModelConfig) -> tuple[list[str], list[str]]:
    """Prompts to train on and to measure on, at least one each."""
    if len(pairs) < 2:
        raise DataError(
            f"{len(pairs)} prompts have completions with different scores; at least 2 are needed, one to train on and "
            "one to measure on. Give more prompts, more completions of each, or a scorer that tells them apart"
        )
    count = min(max(1, round(config.holdout * len(pairs))), len(pairs) - 1)
    shuffled = np.random.default_rng(config.seed).permutation(sorted(pairs)).tolist()
    return sorted(shuffled[count:]), sorted(shuffled[:count])


def fit_head(inputs: Tensor, pairs: Tensor, l2: float) -> tuple[Tensor, float]:
    """(F,) weights w that minimise mean log(1 + exp(-(w . x_better - w . x_worse))) + l2 / 2 |w|^2, and the mean.

    Args:
        inputs: (B, F) float64 features.
        pairs: (n, 2) rows (better, worse).

    Raises:
        TrainingError: not finite.
    """
    weight = torch.zeros(inputs.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def data_loss() -> Tensor:
        rated = inputs @ weight
        return torch.nn.functional.softplus(rated[pairs[:, 1]] - rated[pairs[:, 0]]).mean()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = data_loss() + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    found = weight.detach()
    if not found.isfinite().all():
        raise TrainingError("the head's weights are not finite; check that the base model's hidden states are")
    with torch.no_grad():
        return found, float(data_loss())


def _accuracy(rated: Tensor, parts: Sequence[Tensor], seed: int, resamples: int = 10_000) -> tuple[float, float, float]:
    """Share of pairs in the right order, and a 95% percentile interval from resampled prompts."""
    total = np.array([len(part) for part in parts], dtype=np.float64)
    right = np.array([_right(rated[part[:, 0]] - rated[part[:, 1]]) for part in parts])
    drawn = np.random.default_rng(seed).integers(len(parts), size=(resamples, len(parts)))
    low, high = np.quantile(right[drawn].sum(1) / total[drawn].sum(1), [0.025, 0.975])
    return float(right.sum() / total.sum()), float(low), float(high)


def _right(margin: Tensor) -> float:
    return float((margin > 0).sum() + 0.5 * (margin == 0).sum())
