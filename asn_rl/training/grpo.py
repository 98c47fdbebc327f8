"""GRPO on stored sketches: group-relative policy gradient with an exact KL penalty against an older checkpoint.

After Shao et al. 2024 (arXiv:2402.03300). Deviations from that paper, all options of `GRPOConfig`:
- the update reads only what the rollout recorded: no base-model forward, no vocabulary-sized tensor;
- KL(policy || reference) is exact per state, not the k3 estimate, and its coefficient may adapt to a target;
- clipping has an upper bound of its own (DAPO), aggregation is by token, sequence or a constant (Dr. GRPO);
- groups whose rewards are all equal are skipped, and counted.

A step is a function of (configuration, step number, policy): every random draw is keyed by the seed and the step, so
an interrupted run continues bit for bit from its last checkpoint.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from asn_rl.checkpoint import (
    atomic_folder,
    checkpoint_folder,
    latest_checkpoint,
    load_state,
    load_weights,
    remove_old_checkpoints,
    remove_unfinished_checkpoints,
    rng_state,
    save_policy,
    save_state,
    set_rng_state,
)
from asn_rl.data.sampler import PromptSampler
from asn_rl.errors import InvalidValue, TrainingError, check_at_least, check_positive
from asn_rl.metrics import MetricsLogger
from asn_rl.ops.advantages import group_advantages, has_signal, leave_one_out_advantages
from asn_rl.ops.divergences import k3, kl
from asn_rl.ops.logprobs import entropy, expectation
from asn_rl.ops.losses import aggregate, clipped_surrogate
from asn_rl.placement import device_of, place
from asn_rl.protocols import LogitsBackend, Policy, TrainablePolicy
from asn_rl.rewards.compose import RewardResult, RewardSuite, score
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.runs import console, progress, write_jsonl
from asn_rl.types import Prompt, Trajectories


@dataclass(frozen=True)
class GRPOConfig:
    """Group-relative policy optimisation of a decoding policy."""

    steps: int = 100
    """policy updates, each on fresh rollouts"""
    prompts_per_step: int = 24
    """groups in a step"""
    num_generations: int = 8
    """completions in a group"""
    balance: str | None = None
    """prompt column whose values get equal shares of every step; null draws all prompts alike"""
    learning_rate: float = 3e-3
    """AdamW step size"""
    weight_decay: float = 0.0
    """AdamW weight decay"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    num_iterations: int = 4
    """epochs over the rollouts of a step"""
    minibatch_tokens: int = 8192
    """tokens in a gradient step at most; memory grows with it"""
    epsilon: float = 0.2
    """lower clipping bound of the importance ratio"""
    epsilon_high: float | None = None
    """upper clipping bound; null: the same as epsilon"""
    advantage: Literal["group", "batch", "none", "leave_one_out"] = "group"
    """scale of the group-relative advantage: by the group's standard deviation, the batch's, none; or leave-one-out"""
    loss_type: Literal["token", "sequence", "constant"] = "token"
    """mean over tokens, over completions, or over the token budget"""
    beta: float = 0.02
    """coefficient of the KL penalty against the reference"""
    kl_target: float | None = None
    """nats a token; adapts beta to hold KL(policy || reference) there; null keeps beta fixed"""
    entropy_coef: float = 0.0
    """bonus for the policy's entropy, nats a token"""
    seed: int = 0
    """keys every random draw of the run"""
    save_every: int = 10
    """steps between checkpoints"""
    keep_checkpoints: int = 2
    """older ones are removed"""
    log_completions: int = 6
    """completions shown in TensorBoard's text tab every checkpoint"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "steps", "prompts_per_step", "num_iterations", "minibatch_tokens")
        check_at_least(self, 1, "save_every", "keep_checkpoints")
        if self.num_generations < 2:
            raise InvalidValue("num_generations", self.num_generations, ">= 2", "a group needs companions to compare")
        check_positive(self, "learning_rate", "max_grad_norm")
        if self.epsilon_high is not None and not self.epsilon_high > 0:
            raise InvalidValue("epsilon_high", self.epsilon_high, "> 0", "null: the same as epsilon")
        check_at_least(self, 0, "beta", "entropy_coef", "weight_decay", "log_completions")
        if not 0 < self.epsilon < 1:
            raise InvalidValue("epsilon", self.epsilon, "in (0, 1)")
        if self.kl_target is not None and (self.kl_target <= 0 or self.beta == 0):
            raise InvalidValue("kl_target", self.kl_target, "> 0 with beta > 0", "beta is where adaptation starts")

    @property
    def upper(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


@dataclass(frozen=True)
class Batch:
    """Per-token tensors of one step, (S, ...), and what each completion contributes."""

    trajectories: Trajectories
    advantages: Tensor
    """(B,) zero where a completion carries no signal"""
    ref_logprobs: Tensor
    """(S, N) of the reference over points"""
    rows: Tensor
    """(S,) completion of each token"""


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
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> TrainablePolicy:
    """Train `policy` in place and save it to `run / "policy"`. Resumes from the newest checkpoint in `run`.

    Args:
        reference: the older checkpoint of the KL penalty; it reads nothing that the policy does not.
        metadata: handed to `save_pretrained` (base model, fingerprint, sketch size).
        on_step: called with the step number and its metrics.

    Raises:
        TrainingError: a step with reward differences gave no trainable parameter a gradient, or the loss is not finite.
    """
    trainer = Trainer(policy, reference, backend, prompts, rewards, rollout_config, config, run, metadata or {})
    trainer.resume()
    try:
        with (
            MetricsLogger(run, resume_after=trainer.step) as log,
            progress("GRPO", config.steps, trainer.step) as advance,
        ):
            while trainer.step < config.steps:
                metrics = trainer.train_step(log)
                advance(1, f"reward {metrics['reward/total']:.3f} KL {metrics['kl/exact']:.3f}")
                if on_step is not None:
                    on_step(trainer.step, metrics)
    except KeyboardInterrupt:
        saved = latest_checkpoint(run)
        console.print(
            f"interrupted during step {trainer.step + 1}; {saved.name if saved else 'no checkpoint yet'} is kept in "
            f"{run}. The same command resumes from there",
            highlight=False,
        )
        raise
    save_policy(run / "policy", policy, **(metadata or {}))
    return policy


class Trainer:
    """The state of a run: policy, reference, optimiser, KL coefficient and step number; see `train`."""

    def __init__(
        self,
        policy: TrainablePolicy,
        reference: Policy,
        backend: LogitsBackend,
        prompts: Sequence[Prompt],
        rewards: RewardSuite,
        rollout_config: RolloutConfig,
        config: GRPOConfig,
        run: Path,
        metadata: dict[str, Any],
    ) -> None:
        self.policy, self.backend, self.rewards = policy, backend, rewards
        self.reference = copy.deepcopy(reference)
        for module in (policy, self.reference):
            if module.initial_state(1, torch.device("cpu")) is not None:
                raise TrainingError(
                    f"{type(module).__name__} carries state from token to token, which the update does not replay; "
                    "train a stateless policy"
                )
            place(module, backend.device)
        if isinstance(self.reference, nn.Module):
            self.reference.eval()
        self.rollout_config, self.config, self.run, self.metadata = rollout_config, config, run, metadata
        self.sampler = PromptSampler(prompts, config.prompts_per_step, config.seed, config.balance)
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        if not self.parameters:
            raise TrainingError(f"{type(policy).__name__} has no trainable parameter; heuristics cannot be trained")
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.step = 0
        self.beta = config.beta

    def train_step(self, log: MetricsLogger) -> dict[str, float]:
        begin = time.perf_counter()
        seed = step_seed(self.config.seed, self.step)
        trajectories = rollout(
            self.policy,
            self.backend,
            self.sampler.draw(self.step),
            self.rollout_config,
            num_generations=self.config.num_generations,
            seed=seed,
        )
        rolled = time.perf_counter()
        result = score(self.rewards, trajectories)
        scored = time.perf_counter()
        batch, signal = make_batch(trajectories, result.total, self.reference, self.config)
        update = self.update(batch, signal, seed)
        done = time.perf_counter()
        self.step += 1
        metrics = {
            **rollout_metrics(trajectories, result, signal),
            **update,
            "time/rollout": rolled - begin,
            "time/reward": scored - rolled,
            "time/update": done - scored,
            "time/tokens_per_second": len(trajectories.points) / (rolled - begin),
        }
        log.log(self.step, metrics)
        completions = records(trajectories, result, self.step)
        write_jsonl(self.run / "rollouts" / f"step-{self.step:06d}.jsonl", completions)
        if self.step % self.config.save_every == 0 or self.step == self.config.steps:
            log.log_texts(self.step, "completions", completions[: self.config.log_completions])
            self.save()
        return metrics

    def update(self, batch: Batch, signal: Tensor, seed: int) -> dict[str, float]:
        """Some epochs of clipped policy gradient on one batch."""
        totals: dict[str, float] = {}
        generator = torch.Generator().manual_seed(seed)
        count, gradient_seen = 0, False
        anchored = self.beta > 0 or self.config.entropy_coef > 0
        used = torch.ones(len(batch.advantages), dtype=torch.bool) if anchored else (batch.advantages != 0).cpu()
        if not used.any():
            return self._metrics_only(batch)
        for _ in range(self.config.num_iterations):
            for part in _minibatches(batch, used, self.config.minibatch_tokens, generator):
                loss, metrics = minibatch_loss(self.policy, batch, part, self.beta, self.config, self.rollout_config)
                if not torch.isfinite(loss):
                    raise TrainingError(
                        f"the loss is {loss.item()} at step {self.step + 1}; lower learning_rate, or look for a "
                        "reference that forbids what the policy uses (kl/exact would be infinite)"
                    )
                self.optimizer.zero_grad(set_to_none=True)
                if loss.requires_grad:
                    loss.backward()
                gradient_seen |= any(p.grad is not None and bool((p.grad != 0).any()) for p in self.parameters)
                norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
                self.optimizer.step()
                metrics["policy/grad_norm"] = float(norm)
                totals = {name: totals.get(name, 0.0) + value for name, value in metrics.items()}
                count += 1
        if bool(signal.any()) and not gradient_seen:
            raise TrainingError(
                f"no trainable parameter of {type(self.policy).__name__} received a gradient at step {self.step + 1}, "
                "although rewards differed within groups; check that its log-probs depend on its parameters "
                "(no detach, no inference mode)"
            )
        means = {name: value / max(count, 1) for name, value in totals.items()}
        means["kl/beta"] = self.beta
        if self.config.kl_target is not None:
            self.beta = adapted_beta(self.beta, means["kl/exact"], self.config.kl_target)
        return means

    @torch.no_grad()
    def _metrics_only(self, batch: Batch) -> dict[str, float]:
        """What `update` reports when nothing asks for a gradient; momentum must not move the policy either."""
        everything = torch.arange(len(batch.rows))
        _, metrics = minibatch_loss(self.policy, batch, everything, self.beta, self.config, self.rollout_config)
        return metrics | {"policy/grad_norm": 0.0, "kl/beta": self.beta}

    def save(self) -> None:
        folder = checkpoint_folder(self.run, self.step)
        with atomic_folder(folder) as scratch:
            self.policy.save_pretrained(scratch / "policy", **self.metadata)
            state = {"step": self.step, "beta": self.beta, "optimizer": self.optimizer.state_dict(), "rng": rng_state()}
            save_state(scratch, state)
        remove_old_checkpoints(self.run, self.config.keep_checkpoints)

    def resume(self) -> None:
        remove_unfinished_checkpoints(self.run)
        folder = latest_checkpoint(self.run)
        if folder is None:
            return
        state = load_state(folder)
        load_weights(self.policy, folder / "policy")
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.beta = state["step"], state["beta"]
        set_rng_state(state["rng"])
        console.print(f"resuming {self.run} after step {self.step}", highlight=False)


def make_batch(
    trajectories: Trajectories, rewards: Tensor, reference: Policy, config: GRPOConfig
) -> tuple[Batch, Tensor]:
    """Advantages and reference log-probs of a step; also (G,) which groups carry signal."""
    groups = rewards.reshape(-1, config.num_generations)
    signal = has_signal(groups)
    if config.advantage == "leave_one_out":
        advantages = leave_one_out_advantages(groups)
    else:
        advantages = group_advantages(groups, scale=config.advantage)
    advantages = torch.where(signal.unsqueeze(-1), advantages, 0.0).flatten().float()
    device = device_of(reference)
    moved = trajectories.to(device)
    with torch.no_grad():
        ref_logprobs = reference(moved.per_token()).logprobs
    return Batch(moved, advantages.to(device), ref_logprobs, trajectories.rows.to(device)), signal


def minibatch_loss(
    policy: TrainablePolicy, batch: Batch, part: Tensor, beta: float, config: GRPOConfig, rollout_config: RolloutConfig
) -> tuple[Tensor, dict[str, float]]:
    """Loss of some tokens (indices `part`), and its metrics."""
    trajectories = batch.trajectories
    obs = trajectories.per_token(part)
    output = policy(obs).logprobs
    at_point = trajectories.points[part].unsqueeze(-1)
    inner = trajectories.base_logprobs[part] - obs.sketch.log_mass.gather(-1, at_point).squeeze(-1)
    logprobs = output.gather(-1, at_point).squeeze(-1) + inner
    old, rows = trajectories.behaviour_logprobs[part], batch.rows[part]
    surrogate, clipped = clipped_surrogate(logprobs, old, batch.advantages[rows], config.epsilon, config.upper)
    divergence = kl(output, batch.ref_logprobs[part])
    # Entropy over the vocabulary: over points, plus the base model's inside each.
    spread = entropy(output) + expectation(output, obs.sketch.inner_entropy)
    per_token = surrogate - config.entropy_coef * spread
    if beta > 0:  # 0 times the infinite divergence from a reference that cuts would be NaN
        per_token = per_token + beta * divergence
    completions = int(torch.unique(rows).numel())
    loss = aggregate(per_token, _dense(rows), completions, config.loss_type, rollout_config.max_new_tokens)
    with torch.no_grad():
        metrics = {
            "loss/total": loss.item(),
            "loss/surrogate": surrogate.mean().item(),
            "policy/clipfrac": clipped.float().mean().item(),
            "policy/entropy": spread.mean().item(),
            "kl/exact": divergence.mean().item(),
            "kl/approx_old": k3(old, logprobs).mean().item(),
        }
    return loss, metrics


def adapted_beta(beta: float, divergence: float, target: float) -> float:
    """Twice the coefficient when the divergence exceeds 1.5 times its target, half when it falls below target / 1.5
    (PPO's adaptive penalty, Schulman et al. 2017, arXiv:1707.06347, section 4); within [1e-6, 1e3]."""
    if divergence > 1.5 * target:
        return min(2 * beta, 1e3)
    return max(beta / 2, 1e-6) if divergence < target / 1.5 else beta


def rollout_metrics(trajectories: Trajectories, result: RewardResult, signal: Tensor) -> dict[str, float]:
    """What a batch of completions looks like, beside its gradient."""
    lengths = trajectories.lengths.float()
    metrics = {
        "reward/total": float(np.nanmean(result.total.numpy())),
        "reward/groups_skipped": float((~signal).float().mean()),
        "policy/length": float(lengths.mean()),
        "policy/truncated": float((~trajectories.terminated).float().mean()),
        "policy/surprise": float(-trajectories.base_logprobs.mean()),
    }
    for name, values in result.components.items():
        if not values.isnan().all():
            metrics[f"reward/{name}"] = float(np.nanmean(values.numpy()))
    return metrics | {f"reward/{name}": float(count) for name, count in result.counts.items()}


def records(trajectories: Trajectories, result: RewardResult, step: int) -> list[dict[str, Any]]:
    """Completions as JSONL records, keyed by (step, prompt_id, sample)."""
    return [
        {
            "schema": "asn_rl/rollout-1",
            "step": step,
            "prompt_id": prompt.id,
            "sample": trajectories.sample[i],
            "completion": trajectories.completions[i],
            "reward": None if result.total[i].isnan() else round(result.total[i].item(), 6),
            "tokens": len(trajectories.completion_ids[i]),
            "terminated": bool(trajectories.terminated[i]),
        }
        for i, prompt in enumerate(trajectories.prompts)
    ]


def step_seed(seed: int, step: int) -> int:
    """An independent seed for every step of a run."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def _minibatches(batch: Batch, used: Tensor, tokens: int, generator: torch.Generator) -> list[Tensor]:
    """Token indices of whole completions, in random order, cut at about `tokens` each.

    Args:
        used: (B,) bool. Completions without advantage count only where a penalty or bonus gives them a gradient.
    """
    kept = used.nonzero().squeeze(-1)
    order = kept[torch.randperm(len(kept), generator=generator)]
    lengths = batch.trajectories.lengths
    starts = lengths.cumsum(0) - lengths
    parts: list[list[Tensor]] = [[]]
    size = 0
    for i in order.tolist():
        if size and size + int(lengths[i]) > tokens:
            parts.append([])
            size = 0
        parts[-1].append(torch.arange(int(starts[i]), int(starts[i] + lengths[i])))
        size += int(lengths[i])
    return [torch.cat(part) for part in parts if part]


def _dense(rows: Tensor) -> Tensor:
    """Row numbers 0, 1, 2, ... for the completions of a minibatch."""
    return torch.unique(rows, return_inverse=True)[1]
