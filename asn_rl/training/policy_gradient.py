"""What GRPO and PPO share below their advantages: settings, and the loss of a token given its advantage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from asn_rl.config import OPERATIONAL
from asn_rl.errors import InvalidValue, check_at_least, check_positive
from asn_rl.ops import losses
from asn_rl.ops.divergences import k3, kl
from asn_rl.ops.logprobs import entropy, expectation
from asn_rl.protocols import Policy
from asn_rl.training.budget import BudgetConfig
from asn_rl.types import Trajectories
from asn_rl.unroll import unroll


@dataclass(frozen=True)
class PolicyGradientConfig:
    """Settings that both estimators have."""

    steps: int = 100
    """policy updates, each on fresh rollouts"""
    prompts_per_step: int = 24
    """prompts in a step, each with a group of completions"""
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
    early_stop_kl: float | None = None
    """nats a token; a step's epochs end when the policy is further than this from the one that sampled (k3 estimate)"""
    surrogate: Literal["clip", "sequence", "cispo", "clip_cov", "kl_cov", "reinforce"] = "clip"
    """clip: PPO's token ratio; sequence: GSPO's ratio of whole completions; cispo: clipped weights that keep their
    gradient; clip_cov, kl_cov: hold the tokens that lower the entropy most; reinforce: no ratio at all, one epoch"""
    epsilon: float = 0.2
    """lower clipping bound of the importance ratio; with surrogate sequence about 3e-4"""
    epsilon_high: float | None = None
    """upper clipping bound; null: the same as epsilon"""
    cov_fraction: float | None = None
    """share of a minibatch's tokens that clip_cov and kl_cov act on, at least one token; null: the paper's, 2e-4 and
    2e-3 (Cui et al. 2025, arXiv:2505.22617)"""
    cov_bounds: tuple[float, ...] = (1.0, 5.0)
    """covariances between which clip_cov draws its tokens"""
    cov_coef: float = 1.0
    """coefficient of kl_cov's penalty"""
    loss_type: Literal["token", "sequence", "constant"] = "token"
    """mean over tokens, over completions, or over the token budget"""
    beta: float = 0.02
    """coefficient of the KL penalty against the reference"""
    kl_target: float | None = None
    """nats a token; adapts beta to hold KL(policy || reference) there; null keeps beta fixed"""
    entropy_coef: float = 0.0
    """bonus for the policy's entropy, nats a token"""
    budget: BudgetConfig | None = None
    """what tokens cost: a price, or a limit on their mean number; null: nothing"""
    seed: int = 0
    """keys every random draw of the run"""
    save_every: int = field(default=10, metadata=OPERATIONAL)
    """steps between checkpoints"""
    keep_checkpoints: int = field(default=2, metadata=OPERATIONAL)
    """older ones are removed"""
    log_completions: int = field(default=6, metadata=OPERATIONAL)
    """completions shown in TensorBoard's text tab every checkpoint"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "steps", "prompts_per_step", "num_generations", "num_iterations", "minibatch_tokens")
        check_at_least(self, 1, "save_every", "keep_checkpoints")
        check_positive(self, "learning_rate", "max_grad_norm")
        if self.early_stop_kl is not None:
            check_positive(self, "early_stop_kl")
        if self.epsilon_high is not None and not self.epsilon_high > 0:
            raise InvalidValue("epsilon_high", self.epsilon_high, "> 0", "null: the same as epsilon")
        check_at_least(self, 0, "beta", "entropy_coef", "weight_decay", "log_completions", "cov_coef")
        if not 0 < self.epsilon < 1:
            raise InvalidValue("epsilon", self.epsilon, "in (0, 1)")
        if self.kl_target is not None and (self.kl_target <= 0 or self.beta == 0):
            raise InvalidValue("kl_target", self.kl_target, "> 0 with beta > 0", "beta is where adaptation starts")
        if self.cov_fraction is not None and not 0 < self.cov_fraction <= 1:
            raise InvalidValue("cov_fraction", self.cov_fraction, "in (0, 1]")
        if len(self.cov_bounds) != 2 or not self.cov_bounds[0] < self.cov_bounds[1]:
            raise InvalidValue("cov_bounds", self.cov_bounds, "two ascending numbers")
        if self.surrogate == "reinforce" and self.num_iterations != 1:
            advice = "without a ratio, later epochs would reuse completions of an older policy as its own"
            raise InvalidValue("num_iterations", self.num_iterations, "1 with surrogate reinforce", advice)

    @property
    def cov_share(self) -> float:
        """What `cov_fraction` is with this surrogate."""
        return self.cov_fraction or (2e-3 if self.surrogate == "kl_cov" else 2e-4)

    @property
    def upper(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def anchored(self) -> bool:
        """Whether every completion has a gradient, be its advantage 0."""
        return self.beta > 0 or self.entropy_coef > 0


IMPORTANCE = "importance"
"""extra of trajectories that somebody else sampled: (S,) what a token's policy gradient is multiplied by"""


@dataclass(frozen=True)
class Batch:
    """Per-token tensors of one step, (S, ...), on the policy's device."""

    trajectories: Trajectories
    advantages: Tensor
    """(S,) zero where a completion carries no signal"""
    ref_logprobs: Tensor
    """(S, N) of the reference over points"""
    rows: Tensor
    """(S,) completion of each token"""
    used: Tensor
    """(B',) int64, on the CPU: the completions that the update reads"""

    @property
    def weights(self) -> Tensor | None:
        """(S,) importance of each token; None where the policy itself drew them."""
        return self.trajectories.extras.get(IMPORTANCE)


@torch.no_grad()
def all_logprobs(policy: Policy, moved: Trajectories) -> Tensor:
    """(S, N) log-probs of a policy at every token of trajectories that are on its device."""
    return unroll(policy, moved, torch.arange(len(moved.points), device=moved.points.device)).logprobs


def policy_loss(
    output: Tensor, batch: Batch, part: Tensor, beta: float, config: PolicyGradientConfig, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """(S',) loss of some tokens: surrogate, entropy bonus and exact KL penalty; and its metrics.

    Args:
        output: (S', N) log-probs of the policy over points.
        part: (S',) indices of the tokens of whole completions.
        generator: for surrogates that draw.
    """
    trajectories = batch.trajectories
    sketch = trajectories.observations.sketch.index(part)
    at_point = trajectories.points[part].unsqueeze(-1)
    inner = trajectories.base_logprobs[part] - sketch.log_mass.gather(-1, at_point).squeeze(-1)
    logprobs = output.gather(-1, at_point).squeeze(-1) + inner
    old = trajectories.behaviour_logprobs[part]
    surrogate, clipped = _surrogate(config, logprobs, old, batch.advantages[part], batch.rows[part], generator)
    if batch.weights is not None:
        # Of the surrogate alone: entropy and divergence are exact sums over the tokens of a state, not over a draw.
        surrogate = batch.weights[part] * surrogate
    divergence = kl(output, batch.ref_logprobs[part])
    # Entropy over the vocabulary: over points, plus the base model's inside each.
    spread = entropy(output) + expectation(output, sketch.inner_entropy)
    per_token = surrogate - config.entropy_coef * spread
    if beta > 0:  # 0 times the infinite divergence from a reference that cuts would be NaN
        per_token = per_token + beta * divergence
    with torch.no_grad():
        metrics = {
            "loss/surrogate": surrogate.mean().item(),
            "policy/clipfrac": clipped.float().mean().item(),
            "policy/entropy": spread.mean().item(),
            "kl/exact": divergence.mean().item(),
            "kl/approx_old": k3(old, logprobs).mean().item(),
        }
    return per_token, metrics


def _surrogate(
    config: PolicyGradientConfig,
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    rows: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """(S,) loss, and (S,) bool: True where clipping removed the gradient."""
    bounds = (config.epsilon, config.upper)
    match config.surrogate:
        case "clip":
            return losses.clipped_surrogate(logprobs, old, advantages, *bounds)
        case "sequence":
            return losses.sequence_surrogate(logprobs, old, advantages, dense(rows), *bounds)
        case "clip_cov":
            share = {"fraction": config.cov_share, "bounds": config.cov_bounds, "generator": generator}
            return losses.clip_cov(logprobs, old, advantages, *bounds, **share)
        case "cispo":
            loss = losses.cispo(logprobs, old, advantages, config.upper)
        case "kl_cov":
            share = {"fraction": config.cov_share, "coefficient": config.cov_coef}
            loss = losses.kl_cov(logprobs, old, advantages, **share)
        case "reinforce":
            loss = -advantages * logprobs
    return loss, torch.zeros_like(loss, dtype=torch.bool)


def adapted_beta(beta: float, divergence: float, target: float) -> float:
    """Twice the coefficient when the divergence exceeds 1.5 times its target, half when it falls below target / 1.5
    (PPO's adaptive penalty, Schulman et al. 2017, arXiv:1707.06347, section 4); within [1e-6, 1e3]."""
    if divergence > 1.5 * target:
        return min(2 * beta, 1e3)
    return max(beta / 2, 1e-6) if divergence < target / 1.5 else beta


def dense(rows: Tensor) -> Tensor:
    """Row numbers 0, 1, 2, ... for the completions of a minibatch."""
    return torch.unique(rows, return_inverse=True)[1]
