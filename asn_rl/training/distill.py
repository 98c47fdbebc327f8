"""Distillation: teach a policy the distribution of heuristics, or the tokens of given text, on visited states.

Towards heuristics: KL(target || policy) over points plus gamma times the mass leaked outside the target's support (the
reference project's TruncatedLogitsLoss; `asn_rl.ops.losses.truncated_kl` names what was mended). Targets come from the
stored sketches, or from the full logits by a probe of the rollout.

Towards tokens: -log pi(point of the token), as AutoDeco (arXiv:2510.26697) trains its soft heads. Over the vocabulary
-log pi(token) is that plus -log(p(token) / p(point)) of the base model, which no policy changes: the gradients are the
same. There is no leak term; it would pull a policy below the entropy of the text. Of the paper's code, leaving out 60 %
of the tokens where greedy decoding is right and weighing tokens by pi(token) are not done.

Several processes (`asn_rl.training.parallel`) hold the same tokens and share every minibatch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from asn_rl.errors import InvalidValue, TrainingError, check_at_least, check_positive
from asn_rl.metrics import MetricsLogger
from asn_rl.ops.context import CONTEXT_SIZE
from asn_rl.ops.losses import truncated_kl
from asn_rl.ops.sketch import PointMap, Sketch, SketchSize, build_sketch, token_points
from asn_rl.placement import device_of, trainable_parameters
from asn_rl.protocols import Policy, TrainablePolicy
from asn_rl.rollout import Probe
from asn_rl.runs import progress
from asn_rl.training import parallel
from asn_rl.training.minibatches import held_out_prompts, whole_completions
from asn_rl.types import Observation, Trajectories
from asn_rl.unroll import recorded_logprobs, unroll


@dataclass(frozen=True)
class DistillConfig:
    """Supervised warm start of a decoding policy."""

    target: Literal["heuristics", "tokens"] = "heuristics"
    """heuristics: the distributions of those that won on each prompt; tokens: the tokens of the selected candidates"""
    epochs: int = 20
    """passes over the recorded tokens"""
    minibatch_tokens: int = 1024
    """tokens in a gradient step"""
    learning_rate: float = 3e-3
    """AdamW step size at the start; falls to zero along a cosine"""
    weight_decay: float = 0.0
    """AdamW weight decay"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    gamma: float = 1.0
    """weight of the probability mass leaked outside the support of the heuristics; without part in target tokens"""
    holdout: float = 0.1
    """share of the prompts kept to measure the loss on"""
    seed: int = 0
    """first weights of the policy, order of the minibatches, choice of the held-out prompts"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "epochs", "minibatch_tokens")
        check_positive(self, "learning_rate", "max_grad_norm")
        check_at_least(self, 0, "weight_decay", "gamma")
        if not 0 <= self.holdout < 1:
            raise InvalidValue("holdout", self.holdout, "in [0, 1)")


def sketch_targets(heuristics: Sequence[Policy], weights: Tensor, trajectories: Trajectories) -> Tensor:
    """(S, N) target log-probs on the stored sketches: the mixture of heuristics with the weights of each completion.

    Args:
        weights: (B, A) shares of the A heuristics, rows sum to 1; a hard choice is one-hot.

    Raises:
        InvalidValue: not a distribution over the heuristics for each completion.
    """
    shape = (len(trajectories), len(heuristics))
    if weights.shape != shape or not bool(((weights.sum(-1) - 1).abs() < 1e-4).all()) or bool((weights < 0).any()):
        raise InvalidValue("weights", tuple(weights.shape), f"shares of shape {shape} that sum to 1 in each row")
    share = weights[trajectories.rows]
    mass = torch.zeros_like(trajectories.observations.sketch.log_mass, dtype=torch.float64)
    for i, heuristic in enumerate(heuristics):
        which = share[:, i].nonzero().squeeze(-1)
        if not len(which):
            continue
        probs = recorded_logprobs(heuristic, trajectories, which).double().exp()
        mass.index_add_(0, which, share[which, i, None] * probs)
    return mass.log().float()


def full_logits_target(heuristic: Policy) -> Probe:
    """A probe for `rollout` that records (B, N) target log-probs computed over the whole vocabulary.

    The heuristic acts on a sketch in which every token is its own point; the result is summed over the points of the
    coarse sketch. Costs a sort of the vocabulary a row: for checks, or where a rule cuts deep in the tail.
    """

    def probe(logits: Tensor, sketch: Sketch, points: PointMap) -> Tensor:
        full, fine = build_sketch(logits, SketchSize(head=logits.shape[-1], tail=1))
        context = torch.zeros(*logits.shape[:-1], CONTEXT_SIZE, device=logits.device)
        fine_logprobs = heuristic(Observation(full, context)).logprobs
        owner = token_points(logits, points).gather(-1, fine.head_ids)
        owner = torch.where(fine.head_slot >= 0, owner, -1)
        mass = torch.zeros_like(sketch.log_mass, dtype=torch.float64)
        first = fine_logprobs[..., : logits.shape[-1]].double().exp()
        mass.scatter_add_(-1, owner.clamp_min(0), torch.where(owner >= 0, first, 0.0))
        return mass.log().float()

    return probe


def distill(
    policy: TrainablePolicy,
    trajectories: Trajectories,
    targets: Tensor,
    config: DistillConfig,
    *,
    log: MetricsLogger | None = None,
    weights: Tensor | None = None,
) -> Mapping[str, float]:
    """Train `policy` in place towards `targets` on the states of `trajectories`.

    Args:
        targets: (S, N) log-probs of the distributions to learn, or (S,) int64 points of the tokens to learn.
        weights: (S,) importance of each token; default all 1.

    Returns:
        Held-out and training KL in nats a token, leak, and the seconds it took. The KL to a token is -log pi(point).

    Raises:
        InvalidValue: targets of another shape.
        TrainingError: no trainable parameter, one of less than 32 bits, none received a gradient, or the loss is not
            finite.
    """
    parallel.join()
    begin = time.perf_counter()
    shape = trajectories.observations.sketch.log_mass.shape
    if targets.shape not in (shape, shape[:1]):
        raise InvalidValue(
            "targets shape", tuple(targets.shape), "that of the sketches, (tokens, points), or (tokens,)"
        )
    parameters = trainable_parameters(policy)
    parallel.check_agreement(0, parameters)
    train, held_out = _split(trajectories, config)
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    seen, total_tokens = 0, config.epochs * len(train)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: (1 + math.cos(math.pi * seen / total_tokens)) / 2)
    generator = torch.Generator().manual_seed(config.seed)
    importance = torch.ones(len(targets)) if weights is None else weights
    device = device_of(policy)
    moved = trajectories.to(device)

    def loss_on(part: Tensor) -> tuple[Tensor | None, float, float]:
        """What this process's share of some tokens adds to the loss, and the KL and the leak of all of them."""
        own = _own(policy, trajectories, part)
        if not len(own):
            return None, *parallel.summed({"kl": 0.0, "leak": 0.0}).values()
        logprobs = unroll(policy, moved, own.to(device)).logprobs
        divergence, leak = _losses(targets[own].to(device), logprobs, config.gamma)
        scale = (importance[own] / importance[part].sum()).to(device)
        kl, leaked = (divergence * scale).sum(), (leak * scale).sum()
        return kl + leaked, *parallel.summed({"kl": kl.item(), "leak": leaked.item()}).values()

    figures: dict[str, float] = {}
    with progress("distil", config.epochs) as advance:
        for epoch in range(1, config.epochs + 1):
            total = 0.0
            for part in _minibatches(policy, trajectories, train, config.minibatch_tokens, generator):
                loss, divergence, leak = loss_on(part)
                optimizer.zero_grad(set_to_none=True)
                if loss is not None:
                    loss.backward()
                parallel.sum_gradients(parameters)
                _check_gradients(policy, parameters, divergence + leak)
                nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                seen += len(part)
                schedule.step()
                total += divergence * len(part) / len(train)
            figures = {"loss/distill_kl": total}
            if len(held_out):
                with torch.no_grad():
                    _, divergence, leak = loss_on(held_out)
                figures |= {"eval/distill_kl": divergence, "eval/distill_leak": leak}
            if log is not None:
                log.log(epoch, figures)
            advance(1, f"KL {figures.get('eval/distill_kl', total):.4f}")
    return figures | {"time/distill": time.perf_counter() - begin}


def _losses(targets: Tensor, logprobs: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """(S',) KL to the targets, and the (S',) leak."""
    if targets.ndim == 2:
        return truncated_kl(targets, logprobs, gamma)
    divergence = -logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return divergence, torch.zeros_like(divergence)


def _minibatches(
    policy: Policy, trajectories: Trajectories, tokens: Tensor, size: int, generator: torch.Generator
) -> Sequence[Tensor]:
    """Tokens in random order; those of whole completions where the policy carries state."""
    if policy.initial_state(1, torch.device("cpu")) is None:
        return tokens[torch.randperm(len(tokens), generator=generator)].split(size)
    return whole_completions(trajectories.lengths, trajectories.rows[tokens].unique(), size, generator)


def _own(policy: Policy, trajectories: Trajectories, part: Tensor) -> Tensor:
    """Of a minibatch the tokens that this process sees to; whole completions where the policy carries state."""
    if parallel.size() == 1 or policy.initial_state(1, torch.device("cpu")) is None:
        return parallel.shard(part)
    place = torch.unique_consecutive(trajectories.rows[part], return_inverse=True)[1]
    mine = parallel.shard(torch.arange(int(place.max()) + 1))
    return part[torch.isin(place, mine)]


def _split(trajectories: Trajectories, config: DistillConfig) -> tuple[Tensor, Tensor]:
    """Token indices to train on and to measure on; no prompt is in both."""
    held = held_out_prompts([prompt.id for prompt in trajectories.prompts], config.holdout, config.seed)
    is_held = torch.tensor([prompt.id in held for prompt in trajectories.prompts])[trajectories.rows]
    return (~is_held).nonzero().squeeze(-1), is_held.nonzero().squeeze(-1)


def _check_gradients(policy: TrainablePolicy, parameters: Sequence[nn.Parameter], loss: float) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the distillation loss is {loss}; a policy that cuts hard gives infinite KL, so train it softly"
        )
    if not any(p.grad is not None and bool((p.grad != 0).any()) for p in parameters) and loss > 1e-6:
        raise TrainingError(
            f"no trainable parameter of {type(policy).__name__} received a gradient; check that its log-probs depend "
            "on its parameters (no detach, no inference mode)"
        )
