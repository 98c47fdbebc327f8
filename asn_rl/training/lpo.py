"""LPO: latent preference optimisation of a decoding policy on pairs of completions, without generating.

After "Adaptive Decoding via Latent Preference Optimization" (arXiv:2411.09661): DPO on the marginal token probability,
the strategies summed out, against the policy it begins at (`asn_rl.ops.preference.latent_loss`). Deviations:
- pairs come from labelled candidates, each drawn by one heuristic; the paper samples from the gate at its start;
- any policy can be trained so, not a gate alone: the loss reads nothing but the probability of the text;
- groups of candidates, and which of equal rewards is taken, are drawn at random (`choose_pairs`).

An epoch is a function of (configuration, epoch number, policy), so an interrupted run continues bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asn_rl.checkpoint import save_policy
from asn_rl.config import OPERATIONAL
from asn_rl.errors import InvalidValue, TrainingError, check_at_least, check_positive
from asn_rl.metrics import MetricsLogger
from asn_rl.ops.divergences import kl
from asn_rl.ops.preference import Pairs, latent_loss, margins
from asn_rl.placement import device_of, place, trainable_parameters
from asn_rl.protocols import Policy, TrainablePolicy
from asn_rl.runs import console, progress
from asn_rl.training.checkpoints import load_training, save_training
from asn_rl.training.minibatches import held_out_prompts, tokens_of
from asn_rl.training.on_policy import step_seed
from asn_rl.training.policy_gradient import all_logprobs
from asn_rl.types import Trajectories
from asn_rl.unroll import unroll

_MEASURED = {
    "eval/preference": "loss/preference",
    "eval/pair_accuracy": "policy/pair_accuracy",
    "eval/margin": "policy/margin",
}


@dataclass(frozen=True)
class LPOConfig:
    """Latent preference optimisation on labelled candidates."""

    epochs: int = 20
    """passes over the pairs"""
    group_size: int | None = None
    """candidates of a prompt, drawn at random, that a pair is the best and the worst of; null: all of the prompt's"""
    beta: float = 0.1
    """how much a nat of margin over the reference counts; small values let the policy go further"""
    minibatch_pairs: int = 16
    """pairs in a gradient step"""
    learning_rate: float = 3e-3
    """AdamW step size"""
    weight_decay: float = 0.0
    """AdamW weight decay"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    holdout: float = 0.1
    """share of the prompts whose pairs are kept to measure on"""
    seed: int = 0
    """choice of the pairs and of the held-out prompts, order of the minibatches"""
    save_every: int = field(default=5, metadata=OPERATIONAL)
    """epochs between checkpoints"""
    keep_checkpoints: int = field(default=2, metadata=OPERATIONAL)
    """older ones are removed"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "epochs", "minibatch_pairs", "save_every", "keep_checkpoints")
        check_at_least(self, 0, "weight_decay")
        check_positive(self, "beta", "learning_rate", "max_grad_norm")
        if self.group_size is not None and self.group_size < 2:
            raise InvalidValue("group_size", self.group_size, ">= 2", "a pair takes two candidates; null: all")
        if not 0 <= self.holdout < 1:
            raise InvalidValue("holdout", self.holdout, "in [0, 1)")


def train(
    policy: TrainablePolicy,
    reference: Policy,
    trajectories: Trajectories,
    pairs: Pairs,
    config: LPOConfig,
    run: Path,
    *,
    metadata: dict[str, Any] | None = None,
    on_epoch: Callable[[int, Mapping[str, float]], None] | None = None,
) -> TrainablePolicy:
    """Train `policy` in place and save it to `run / "policy"`. Resumes from the newest checkpoint in `run`.

    Pairs of which the reference cannot draw both texts are left out and counted (`reward/pairs_impossible`).

    Args:
        reference: usually what the policy begins at; it reads nothing that the policy does not.
        trajectories: the completions of the pairs, replayed with what the policy reads.
        pairs: numbers of completions of `trajectories`.
        metadata: handed to `save_pretrained` (base model, fingerprint, sketch size).
        on_epoch: called with the epoch's number and its metrics.

    Raises:
        TrainingError: no pair is left, no trainable parameter received a gradient, or the loss is not finite.
    """
    Trainer(policy, reference, trajectories, pairs, config, run, metadata or {}).train(on_epoch)
    return policy


class Trainer:
    """A run of LPO: policy, optimiser, pairs and epoch number; see `train`."""

    def __init__(
        self,
        policy: TrainablePolicy,
        reference: Policy,
        trajectories: Trajectories,
        pairs: Pairs,
        config: LPOConfig,
        run: Path,
        metadata: dict[str, Any],
    ) -> None:
        self.policy, self.config, self.run, self.metadata = policy, config, run, metadata
        self.parameters = trainable_parameters(policy)
        device = device_of(policy)
        place(reference, device)
        self.lengths = trajectories.lengths
        self.trajectories = trajectories.to(device)
        self.ref_logprobs = all_logprobs(reference, self.trajectories)
        self.ref_at_points = self.ref_logprobs.gather(-1, self.trajectories.points.unsqueeze(-1)).squeeze(-1)
        self.ends = torch.stack([pairs.chosen, pairs.rejected], 1)
        possible = _drawable(self.ref_at_points.cpu(), trajectories)[self.ends].all(-1)
        if not possible.any():
            raise TrainingError(
                f"the reference gives no probability to the text of any of {len(self.ends)} pairs; begin at a policy "
                "that cuts less, such as one with a soft gate, or a mixture of all the heuristics"
            )
        self.counts = {
            "reward/pairs": float(possible.sum()),
            "reward/pairs_impossible": float((~possible).sum()),
            "reward/groups_skipped": (pairs.tied + pairs.masked) / (pairs.tied + pairs.masked + len(self.ends)),
        }
        self.ends = self.ends[possible]
        ids = [trajectories.prompts[i].id for i in self.ends[:, 0].tolist()]
        held = held_out_prompts(ids, config.holdout, config.seed)
        is_held = torch.tensor([key in held for key in ids])
        self.train_pairs, self.held_pairs = (part.nonzero().squeeze(-1) for part in (~is_held, is_held))
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.epoch = 0

    def train(self, on_epoch: Callable[[int, Mapping[str, float]], None] | None = None) -> None:
        """Resume from the newest checkpoint, do the epochs that remain, save the policy."""
        self.resume()
        with (
            MetricsLogger(self.run, resume_after=self.epoch) as log,
            progress("LPO", self.config.epochs, self.epoch) as advance,
        ):
            while self.epoch < self.config.epochs:
                metrics = self.train_epoch()
                log.log(self.epoch, metrics)
                if self.epoch % self.config.save_every == 0 or self.epoch == self.config.epochs:
                    self.save()
                seen = "eval" if len(self.held_pairs) else "policy"
                advance(1, f"loss {metrics['loss/preference']:.3f} accuracy {metrics[f'{seen}/pair_accuracy']:.3f}")
                if on_epoch is not None:
                    on_epoch(self.epoch, metrics)
        save_policy(self.run / "policy", self.policy, **self.metadata)

    def train_epoch(self) -> dict[str, float]:
        """One pass over the training pairs; metrics of a minibatch are taken before its update."""
        begin = time.perf_counter()
        generator = torch.Generator().manual_seed(step_seed(self.config.seed, self.epoch))
        order = self.train_pairs[torch.randperm(len(self.train_pairs), generator=generator)]
        totals: dict[str, float] = {}
        gradient_seen = False
        for part in order.split(self.config.minibatch_pairs):
            loss, metrics = self.loss(part)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss.item()} in epoch {self.epoch + 1}; lower learning_rate, and train no policy "
                    "that cuts what the candidates hold"
                )
            self.optimizer.zero_grad(set_to_none=True)
            if loss.requires_grad:
                loss.backward()
            gradient_seen |= any(p.grad is not None and bool((p.grad != 0).any()) for p in self.parameters)
            metrics["policy/grad_norm"] = float(nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
            self.optimizer.step()
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + value * len(part) / len(order)
        if not gradient_seen:
            raise TrainingError(
                f"no trainable parameter of {type(self.policy).__name__} received a gradient; check that its log-probs "
                "depend on its parameters (no detach, no inference mode), and that the texts of a pair differ"
            )
        self.epoch += 1
        return {**totals, **self.measure(), **self.counts, "time/update": time.perf_counter() - begin}

    def loss(self, part: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Mean loss of some pairs, and its metrics; margins are nats over the reference, ties count half."""
        which = self.ends[part].T.flatten()  # the chosen ones, then the rejected ones
        tokens, device = tokens_of(self.lengths, which), self.ref_logprobs.device
        rows = torch.arange(len(which)).repeat_interleave(self.lengths[which]).to(device)
        tokens, places = tokens.to(device), torch.arange(len(which), device=device).reshape(2, -1)
        output = unroll(self.policy, self.trajectories, tokens).logprobs
        logprobs = output.gather(-1, self.trajectories.points[tokens].unsqueeze(-1)).squeeze(-1)
        ref_logprobs, pairs = self.ref_at_points[tokens], Pairs(places[0], places[1], 0, 0)
        loss = latent_loss(logprobs, ref_logprobs, rows, pairs, self.config.beta).mean()
        with torch.no_grad():
            margin = margins(logprobs - ref_logprobs, rows, pairs)
            right = (margin > 0).float() + 0.5 * (margin == 0).float()
            divergence = kl(output, self.ref_logprobs[tokens]).mean()
        return loss, {
            "loss/preference": loss.item(),
            "policy/pair_accuracy": right.mean().item(),
            "policy/margin": margin.mean().item(),
            "kl/exact": divergence.item(),
        }

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Loss, accuracy and margin on the held-out pairs; nothing where none is held out."""
        totals = dict.fromkeys(_MEASURED if len(self.held_pairs) else (), 0.0)
        for part in self.held_pairs.split(self.config.minibatch_pairs) if totals else ():
            metrics = self.loss(part)[1]
            for name in totals:
                totals[name] += metrics[_MEASURED[name]] * len(part) / len(self.held_pairs)
        return totals

    def save(self) -> None:
        state = {"epoch": self.epoch, "optimizer": self.optimizer.state_dict()}
        keep, metadata = self.config.keep_checkpoints, self.metadata
        save_training(self.run, self.epoch, self.policy, state, keep=keep, metadata=metadata)

    def resume(self) -> None:
        found = load_training(self.run, self.policy)
        if found is not None:
            state, _ = found
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch = state["epoch"]
            console.print(f"resuming {self.run} after epoch {self.epoch}", highlight=False)


def _drawable(logprobs: Tensor, trajectories: Trajectories) -> Tensor:
    """(B,) bool, True where every token of a completion has a probability."""
    impossible = torch.zeros(len(trajectories), dtype=torch.long)
    impossible.index_add_(0, trajectories.rows, (logprobs == -torch.inf).long())
    return impossible == 0
