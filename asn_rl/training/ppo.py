"""PPO on stored sketches: a permutation-invariant critic, GAE, and an exact KL penalty against an older checkpoint.

After Schulman et al. 2017 (arXiv:1707.06347), read beside `grpo.py`. What differs from the customary code:
- the update reads only what the rollout recorded: no base-model forward, no vocabulary-sized tensor;
- KL(policy || reference) is exact per state. In the reward, too: a token is charged for the state it leads to, and the
  loss holds the gradient in the state itself. Together that is the gradient of E[rewards - beta * sum_t KL_t] with
  every expectation over tokens taken exactly; charging log pi - log pi_ref of the drawn token (Ziegler et al. 2019,
  arXiv:1909.08593, eq. 2) has the same mean and more variance;
- nothing is bootstrapped at the token limit, which the policy observes;
- minibatches are whole completions, advantages are whitened once over the step, the critic's gradients are scaled
  down on their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from asn_rl.errors import CheckpointError, InvalidValue, RewardError, TrainingError, check_positive
from asn_rl.ops.divergences import kl
from asn_rl.ops.losses import aggregate, value_loss
from asn_rl.ops.returns import gae, token_rewards, whitened
from asn_rl.protocols import LogitsBackend, Policy, TrainablePolicy
from asn_rl.registry import load_attribute
from asn_rl.rewards.compose import RewardSuite
from asn_rl.rollout import RolloutConfig
from asn_rl.training import parallel
from asn_rl.training.critic import new_critic
from asn_rl.training.on_policy import OnPolicyTrainer, Sampler
from asn_rl.training.policy_gradient import Batch, PolicyGradientConfig, all_logprobs, dense, policy_loss
from asn_rl.types import Observation, PolicyOutput, Prompt, Trajectories
from asn_rl.unroll import unroll

Shaping = Callable[[Trajectories], Tensor]
"""(S,) reward of every token, beside that of its completion"""


@dataclass(frozen=True)
class PPOConfig(PolicyGradientConfig):
    """Proximal policy optimisation of a decoding policy."""

    critic: str | None = "asn_policies.value:ValueNetwork"
    """class of the critic as module:attribute; null: the policy gives values itself"""
    critic_arguments: dict[str, Any] = field(default_factory=dict)
    """its constructor arguments; hidden_size is filled in from the base model where the class takes it"""
    critic_learning_rate: float = 3e-3
    """the critic's AdamW step size"""
    value_coef: float = 0.5
    """weight of the critic's loss; matters where policy and critic share parameters"""
    value_clip: float | None = None
    """bound on what a step moves a value by, in units of the reward; null: none"""
    gamma: float = 1.0
    """discount a token"""
    gae_lambda: float = 0.95
    """1: returns as sampled, unbiased; 0: one token and the critic's word for the rest"""
    whiten: bool = True
    """bring the advantages of a step to mean 0 and standard deviation 1 over its tokens"""
    kl_in: Literal["loss", "reward"] = "loss"
    """loss: pulls towards the reference in the states visited; reward: also away from states where they differ"""
    shaping: str | None = None
    """module:function that gives a reward to every token, trajectories -> (S,)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "critic_learning_rate", "value_coef")
        if self.value_clip is not None:
            check_positive(self, "value_clip")
        if not 0 < self.gamma <= 1:
            raise InvalidValue("gamma", self.gamma, "in (0, 1]")
        if not 0 <= self.gae_lambda <= 1:
            raise InvalidValue("gae_lambda", self.gae_lambda, "in [0, 1]")


@dataclass(frozen=True)
class ValueBatch(Batch):
    """A batch with a critic's targets."""

    values: Tensor
    """(S,) before the update"""
    returns: Tensor
    """(S,) what the critic is fitted to"""
    scale: float
    """what whitening multiplied the advantages by"""


def train(
    policy: TrainablePolicy,
    reference: Policy,
    backend: LogitsBackend,
    prompts: Sequence[Prompt],
    rewards: RewardSuite,
    rollout_config: RolloutConfig,
    config: PPOConfig,
    run: Path,
    *,
    metadata: dict[str, Any] | None = None,
    sample: Sampler | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> TrainablePolicy:
    """Train `policy` in place and save it to `run / "policy"`. Resumes from the newest checkpoint in `run`.

    The critic is part of the checkpoints, not of the saved policy. Arguments as for `asn_rl.training.grpo.train`.

    Raises:
        TrainingError: a step with advantages gave no trainable parameter a gradient, the loss is not finite, or
            nobody gives values.
        RewardError: the shaping function broke its contract.
    """
    trainer = Trainer(policy, reference, backend, prompts, rewards, rollout_config, config, run, metadata or {}, sample)
    trainer.train(on_step)
    return policy


class Trainer(OnPolicyTrainer[PPOConfig, ValueBatch]):
    """A run of PPO; see `train`."""

    name = "PPO"

    def equip(self) -> None:
        config = self.config
        self.critic = (
            None
            if config.critic is None
            else new_critic(config.critic, config.critic_arguments, self.backend, config.seed)
        )
        self.capture = frozenset() if self.critic is None else self.critic.needs
        self.shaping: Shaping | None = None if config.shaping is None else load_attribute(config.shaping)

    def parameter_groups(self) -> list[dict[str, Any]]:
        if not isinstance(self.critic, nn.Module):
            return super().parameter_groups()
        own = {"params": list(self.critic.parameters()), "lr": self.config.critic_learning_rate}
        return [*super().parameter_groups(), own]

    @torch.no_grad()
    def prepare(self, trajectories: Trajectories, totals: Tensor) -> tuple[ValueBatch, Tensor, dict[str, float]]:
        """Completions whose reward is masked are left out."""
        config, device = self.config, self.backend.device
        lengths, rows = trajectories.lengths, trajectories.rows
        moved = trajectories.to(device)
        everything = torch.arange(len(rows), device=device)
        output = unroll(self.policy, moved, everything)
        values, ref_logprobs = self.values(output, moved.per_token()), all_logprobs(self.reference, moved)
        following = None
        if config.kl_in == "reward" and self.beta > 0:
            following = config.gamma * self.beta * kl(output.logprobs, ref_logprobs)
        shaping = None if self.shaping is None else checked_shaping(self.shaping, trajectories).to(device)
        rewards = token_rewards(
            totals.to(device), lengths, price=self.price.token, shaping=shaping, following=following
        )
        advantages = gae(rewards, values, lengths, gamma=config.gamma, gae_lambda=config.gae_lambda)
        returns, scale = advantages + values, 1.0
        counted = ~totals.isnan()
        among = counted[rows].to(device)
        first = parallel.before(len(rows))
        counting = parallel.gathered(among)
        if config.whiten:
            whole, scale = whitened(parallel.gathered(advantages), counting)
            advantages = whole[first : first + len(rows)]
        used = counted.nonzero().squeeze(-1)
        batch = ValueBatch(moved, advantages, ref_logprobs, rows.to(device), used, values, returns, scale)
        explained = _explained(parallel.gathered(values)[counting], parallel.gathered(returns)[counting])
        return batch, (advantages != 0) & among, {"loss/explained_variance": explained}

    def loss(self, batch: ValueBatch, part: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        trajectories, config = batch.trajectories, self.config
        output = unroll(self.policy, trajectories, part.to(batch.rows.device))
        # A penalty in the reward has the reward's units; whitening has changed those of the advantages.
        beta = self.beta * (batch.scale if config.kl_in == "reward" else 1.0)
        per_token, metrics = policy_loss(output.logprobs, batch, part, beta, config, generator)
        values = self.values(output, trajectories.per_token(part))
        errors = value_loss(values, batch.values[part], batch.returns[part], config.value_clip)
        rows = dense(batch.rows[part])
        budget = self.rollout_config.max_new_tokens
        loss = aggregate(per_token + config.value_coef * errors, rows, int(rows.max()) + 1, config.loss_type, budget)
        return loss, {"loss/total": loss.item(), "loss/value": errors.mean().item()} | metrics

    def values(self, output: PolicyOutput, obs: Observation) -> Tensor:
        """(S,) of the critic, or of the policy itself."""
        values = output.value if self.critic is None else self.critic(obs)
        if values is None:
            raise TrainingError(f"{type(self.policy).__name__} gives no values; name a critic")
        return values

    def state(self) -> dict[str, Any]:
        critic = self.critic.state_dict() if isinstance(self.critic, nn.Module) else {}
        return super().state() | {"critic": critic}

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        try:
            if isinstance(self.critic, nn.Module):
                self.critic.load_state_dict(state["critic"])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder} holds no critic that fits {self.config.critic} with {self.config.critic_arguments}: "
                f"{error}. Resume with the settings of the run, or start in a new folder"
            ) from error
        super().restore(state, folder)


def checked_shaping(shaping: Shaping, trajectories: Trajectories) -> Tensor:
    """(S,) fp32; `RewardError` unless it is one finite number a token."""
    rewards = shaping(trajectories)
    shape = trajectories.points.shape
    if not isinstance(rewards, Tensor) or rewards.shape != shape or not bool(rewards.isfinite().all()):
        got = tuple(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
        raise RewardError(f"the shaping function must return finite numbers of shape {tuple(shape)}, got {got}")
    return rewards.float()


def _explained(values: Tensor, returns: Tensor) -> float:
    """Share of the returns' variance that the critic foresaw; NaN where they have none."""
    if not len(returns) or not (variance := returns.var(correction=0)) > 0:
        return math.nan
    return float(1 - (returns - values).var(correction=0) / variance)
