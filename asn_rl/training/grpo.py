"""GRPO on stored sketches: group-relative policy gradient with an exact KL penalty against an older checkpoint.

After Shao et al. 2024 (arXiv:2402.03300). Deviations from that paper, all options of `GRPOConfig`:
- the update reads only what the rollout recorded: no base-model forward, no vocabulary-sized tensor;
- KL(policy || reference) is exact per state, not the k3 estimate, and its coefficient may adapt to a target;
- clipping has an upper bound of its own (DAPO), aggregation is by token, sequence or a constant (Dr. GRPO);
- groups whose rewards are all equal are skipped, and counted.

With `advantage: whitened`, `surrogate: reinforce` and one epoch it is REINFORCE with batch-whitened advantages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from asn_rl.errors import ConfigError, InvalidValue
from asn_rl.ops.advantages import group_advantages, has_signal, leave_one_out_advantages, pass_at_k_advantages
from asn_rl.ops.losses import aggregate
from asn_rl.placement import device_of
from asn_rl.protocols import LogitsBackend, Policy, TrainablePolicy
from asn_rl.rewards.compose import RewardSuite, score
from asn_rl.rollout import RolloutConfig
from asn_rl.training import parallel
from asn_rl.training.on_policy import OnPolicyTrainer, Sampler, step_seed
from asn_rl.training.policy_gradient import (
    Batch,
    PolicyGradientConfig,
    adapted_beta,
    all_logprobs,
    dense,
    policy_loss,
)
from asn_rl.types import Prompt, Trajectories
from asn_rl.unroll import unroll

__all__ = ["Batch", "GRPOConfig", "Trainer", "adapted_beta", "make_batch", "minibatch_loss", "score", "train"]


@dataclass(frozen=True)
class GRPOConfig(PolicyGradientConfig):
    """Group-relative policy optimisation of a decoding policy."""

    advantage: Literal["group", "batch", "none", "leave_one_out", "whitened", "pass_at_k"] = "group"
    """reward minus its group's mean, over the standard deviation of the group, that of the batch, or none; minus the
    mean of the other completions (leave_one_out); minus the mean of the batch, over its standard deviation (whitened);
    or what raises pass@k, for rewards of 0 and 1 (pass_at_k)"""
    pass_k: tuple[int, ...] = (4,)
    """k of pass_at_k. Of several, every prompt of a step gets one, and the policy reads log2(k) as its condition: the
    parallel-sample budget of arXiv:2603.09065"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations < 2 and self.advantage != "whitened":
            raise InvalidValue("num_generations", self.num_generations, ">= 2", "a group needs companions to compare")
        if not self.pass_k or len(set(self.pass_k)) < len(self.pass_k):
            raise InvalidValue("pass_k", list(self.pass_k), "different numbers, at least one")
        if self.advantage == "pass_at_k" and not all(1 <= k < self.num_generations for k in self.pass_k):
            allowed = f"in [1, {self.num_generations - 1}], below num_generations"
            raise InvalidValue("pass_k", list(self.pass_k), allowed, "all of a group are one subset, as good as itself")
        if self.advantage != "pass_at_k" and len(self.pass_k) > 1:
            raise InvalidValue("advantage", self.advantage, "pass_at_k with several pass_k")
        if self.advantage == "group" and self.budget is not None:
            raise ConfigError(
                "advantage group divides each group by its standard deviation, so that among equally good completions "
                "any price of a token, however small, counts in full; with a budget set advantage: batch or none"
            )
        if self.advantage == "pass_at_k" and self.budget is not None:
            raise InvalidValue("budget", self.budget, "null with advantage pass_at_k", "it takes rewards of 0 and 1")


def train(
    policy: TrainablePolicy,
    reference: Policy,
    backend: LogitsBackend,
    prompts: Sequence[Prompt],
    rewards: RewardSuite,
    rollout_config: RolloutConfig,
    config: GRPOConfig,
    run: Path,
    *,
    metadata: dict[str, Any] | None = None,
    sample: Sampler | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> TrainablePolicy:
    """Train `policy` in place and save it to `run / "policy"`. Resumes from the newest checkpoint in `run`.

    Args:
        reference: the older checkpoint of the KL penalty; it reads nothing that the policy does not.
        metadata: handed to `save_pretrained` (base model, fingerprint, sketch size).
        sample: where completions come from, for example a `ServedSampler`; default: rollouts on `backend`.
        on_step: called with the step number and its metrics.

    Raises:
        TrainingError: a step with reward differences gave no trainable parameter a gradient, or the loss is not finite.
    """
    trainer = Trainer(policy, reference, backend, prompts, rewards, rollout_config, config, run, metadata or {}, sample)
    trainer.train(on_step)
    return policy


class Trainer(OnPolicyTrainer[GRPOConfig, Batch]):
    """A run of GRPO; see `train`."""

    name = "GRPO"

    def equip(self) -> None:
        if len(self.config.pass_k) > 1 and "condition" not in self.policy.needs:
            raise InvalidValue(
                "pass_k", list(self.config.pass_k), "one number for a policy that reads no condition",
                "it could not tell them apart; give it inputs [condition] and condition_size 1",
            )  # fmt: skip

    def conditions(self, count: int) -> Tensor | None:
        """(count, 1) log2 of the parallel samples of each prompt, in equal shares and random order."""
        budgets = self.config.pass_k
        if len(budgets) == 1:
            return None
        order = np.random.default_rng([step_seed(self.config.seed, self.step), len(budgets)]).permutation(count)
        return torch.tensor(budgets, dtype=torch.float32).log2()[torch.from_numpy(order) % len(budgets)].unsqueeze(-1)

    def prepare(self, trajectories: Trajectories, totals: Tensor) -> tuple[Batch, Tensor, dict[str, float]]:
        charged = totals - self.price.token * trajectories.lengths
        batch, signal = make_batch(trajectories, charged, self.reference, self.config)
        return batch, signal, {"reward/groups_skipped": float((~signal).float().mean())}

    def loss(self, batch: Batch, part: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return minibatch_loss(self.policy, batch, part, self.beta, self.config, self.rollout_config, generator)


def make_batch(
    trajectories: Trajectories, rewards: Tensor, reference: Policy, config: GRPOConfig
) -> tuple[Batch, Tensor]:
    """Advantages and reference log-probs of a step; also (G,) which groups, those of all processes, carry signal.

    Completions that a group lacks are masked, as are those whose reward is NaN.
    """
    places = _places(trajectories, config.num_generations)
    groups = rewards.new_full((int(places[-1]) // config.num_generations + 1, config.num_generations), torch.nan)
    groups.view(-1)[places] = rewards
    budgets = parallel.gathered(_parallel_samples(trajectories, places, len(groups), config))
    first = parallel.before(groups.numel())
    groups = parallel.gathered(groups)
    if config.advantage == "whitened":  # batch-whitened advantages are those of a single group
        groups = groups.reshape(1, -1)
    signal = has_signal(groups)
    if config.advantage == "leave_one_out":
        advantages = leave_one_out_advantages(groups)
    elif config.advantage == "pass_at_k":
        advantages = pass_at_k_advantages(groups, budgets)
    elif config.advantage == "whitened":
        advantages = group_advantages(groups)
    else:
        advantages = group_advantages(groups, scale=config.advantage)
    advantages = torch.where(signal.unsqueeze(-1), advantages, 0.0)
    signal = (advantages != 0).any(-1)  # any k of a group that has fewer than k wrong ones hold a right one
    advantages = advantages.flatten()[first + places].float()
    # Completions without advantage count only where a penalty or bonus gives them a gradient.
    used = torch.ones_like(advantages, dtype=torch.bool) if config.anchored else advantages != 0
    device, rows = device_of(reference), trajectories.rows
    moved = trajectories.to(device)
    per_token = advantages[rows].to(device)
    batch = Batch(moved, per_token, all_logprobs(reference, moved), rows.to(device), used.nonzero().squeeze(-1))
    return batch, signal


def _places(trajectories: Trajectories, size: int) -> Tensor:
    """(B,) int64 place of each completion among groups of `size`, one group after the other."""
    before: tuple[str, int] | None = None
    group, places = -1, []
    for prompt, sample in zip(trajectories.prompts, trajectories.sample, strict=True):
        if before is None or prompt.id != before[0] or sample <= before[1]:
            group += 1
        places.append(group * size + sample)
        before = (prompt.id, sample)
    return torch.tensor(places)


def _parallel_samples(trajectories: Trajectories, places: Tensor, groups: int, config: GRPOConfig) -> Tensor:
    """(groups,) int64 k of pass@k: what the policy was told, or the only one there is."""
    budgets = torch.full((groups,), config.pass_k[0])
    told = trajectories.observations.condition
    if len(config.pass_k) > 1 and told is not None:
        budgets[places // config.num_generations] = told[:, 0].exp2().round().long().cpu()
    return budgets


def minibatch_loss(
    policy: TrainablePolicy,
    batch: Batch,
    part: Tensor,
    beta: float,
    config: GRPOConfig,
    rollout_config: RolloutConfig,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Loss of some tokens (indices `part`), and its metrics.

    Args:
        generator: for surrogates that draw; default one with seed 0.
    """
    output = unroll(policy, batch.trajectories, part.to(batch.rows.device)).logprobs
    draws = generator or torch.Generator().manual_seed(0)
    per_token, metrics = policy_loss(output, batch, part, beta, config, draws)
    rows = dense(batch.rows[part])
    completions = int(rows.max()) + 1
    loss = aggregate(per_token, rows, completions, config.loss_type, rollout_config.max_new_tokens)
    return loss, {"loss/total": loss.item()} | metrics
