"""Train a recurrent policy to hold a requested mean surprise, on stored sketches, without the base model.

The surprise of a draw is -log p of the base model. Its mean and variance under the policy are closed forms over points,

    m = sum_j pi(j) s_j,    v = sum_j pi(j) (s_j - m)^2,    s_j = the point's expected surprise,

so a drawn surprise can be written m + sqrt(v) z, with z held fixed: a reparametrisation that lets the gradient through
the closed loop. Stored completions are walked again, their sketches taken as given: at every step the policy sees the
surprises of its own simulated draws in the context, and answers. What this leaves out is that other draws would have
led to other sketches; completions drawn by the policy itself mend that (DAgger, Ross et al. 2011, arXiv:1011.0686).

Loss of a completion of T tokens with requested surprise r, D_t the sum of (surprise - r) up to t, W the window:

    (D_T / T)^2 + mean_t ((D_{t+W} - D_t) / W)^2 + beta * mean_t KL(pi_t || base_t).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from asn_rl.errors import DataError, InvalidValue, TrainingError, check_at_least, check_positive
from asn_rl.ops.context import CONTEXT, mean_surprise
from asn_rl.ops.divergences import kl
from asn_rl.ops.draws import invert_cdf
from asn_rl.ops.logprobs import expectation, normalize
from asn_rl.placement import device_of
from asn_rl.protocols import Policy, TrainablePolicy
from asn_rl.rollout import checked_probs
from asn_rl.runs import progress
from asn_rl.types import Trajectories

_NAMES = [entry.name for entry in CONTEXT]
_LAST, _MEAN = _NAMES.index("last_surprise"), _NAMES.index("mean_surprise")
_HIGHEST = CONTEXT[_LAST].high


@dataclass(frozen=True)
class SurpriseControlConfig:
    """Closed-loop training on stored sketches."""

    steps: int = 60
    """gradient steps"""
    completions: int = 32
    """completions in a gradient step"""
    learning_rate: float = 1e-2
    """Adam step size at the start; falls to zero linearly"""
    max_grad_norm: float = 0.3
    """gradients are scaled down to this norm"""
    window: int = 50
    """tokens of the sliding windows whose mean surprise is held too; completions at most that long: one window"""
    beta: float = 0.05
    """weight of the divergence from the base model, nats^2 a nat"""
    seed: int = 0
    """order of the completions and the simulated draws"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "steps", "completions", "window")
        check_at_least(self, 0, "beta")
        check_positive(self, "learning_rate", "max_grad_norm")


@dataclass(frozen=True)
class Walk:
    """Simulated completions, padded to T steps."""

    surprises: Tensor
    """(T, B) nats, 0 behind the end; a gradient goes through their means, variances and the feedback"""
    divergences: Tensor
    """(T, B) KL(policy || base), nats, 0 behind the end"""
    lengths: Tensor
    """(B,)"""


def walk(policy: Policy, trajectories: Trajectories, generator: torch.Generator) -> Walk:
    """Draw new surprises along stored sketches; the policy sees them in `last_surprise` and `mean_surprise`.

    Args:
        trajectories: on the policy's device; `condition` is what the policy is conditioned on.
        generator: on the CPU.

    Raises:
        InvalidPolicyOutput: the policy's probabilities do not sum to 1; its weights may have diverged.
    """
    device = trajectories.points.device
    order = torch.argsort(trajectories.lengths, descending=True, stable=True)
    lengths = trajectories.lengths[order]
    starts = (trajectories.lengths.cumsum(0) - trajectories.lengths)[order]
    state = policy.initial_state(len(order), device)
    last = torch.zeros(len(order), device=device)
    total = torch.zeros(len(order), device=device)
    surprises, divergences = [], []
    for t in range(int(lengths[0])):
        active = int((lengths > t).sum())
        state = None if state is None else {name: part[:active] for name, part in state.items()}
        last, total = last[:active], total[:active]
        obs = trajectories.per_token((starts[:active] + t).to(device))
        context = obs.context.clone()
        context[:, _LAST], context[:, _MEAN] = last.clamp(0, _HIGHEST), (total / max(t, 1)).clamp(0, _HIGHEST)
        output = policy(replace(obs, context=context), state)
        state = output.state
        uniforms = torch.rand(active, generator=generator, dtype=torch.float64).to(device)
        points = invert_cdf(checked_probs(policy, output.logprobs.detach()), uniforms)
        last = _drawn(output.logprobs, mean_surprise(obs.sketch), points)
        total = total + last
        rest = (0, len(order) - active)
        surprises.append(nn.functional.pad(last, rest))
        divergences.append(nn.functional.pad(kl(output.logprobs, normalize(obs.sketch.log_mass)), rest))
    back = torch.argsort(order).to(device)
    return Walk(torch.stack(surprises)[:, back], torch.stack(divergences)[:, back], trajectories.lengths.to(device))


def _drawn(logprobs: Tensor, surprise: Tensor, points: Tensor) -> Tensor:
    """(B,) surprises of the drawn points (B,), as mean + deviation * z with z held fixed."""
    mean = expectation(logprobs, surprise)
    deviation = (expectation(logprobs, (surprise - mean.unsqueeze(-1)).square()) + 1e-6).sqrt()
    z = (surprise.gather(-1, points.unsqueeze(-1)).squeeze(-1) - mean.detach()) / deviation.detach()
    return mean + deviation * z


def control_loss(walked: Walk, requested: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """(B,) squared errors, nats^2: of the mean over the completion, and of sliding windows, averaged."""
    deviation = _sums(walked, requested)
    lengths = walked.lengths
    final = (deviation.gather(0, lengths.unsqueeze(0)).squeeze(0) / lengths).square()
    width = min(window, int(lengths.max()))
    begin = torch.arange(len(deviation) - width, device=lengths.device).unsqueeze(-1)
    inside = begin + width <= lengths
    means = ((deviation[width:] - deviation[:-width]) / width).square()
    windows = torch.where(inside, means, 0.0).sum(0) / inside.sum(0).clamp_min(1)
    return final, torch.where(inside.any(0), windows, final)  # shorter than a window: one window


def _sums(walked: Walk, requested: Tensor) -> Tensor:
    """(T + 1, B) running sums of surprise minus what was requested; constant behind the end."""
    steps = torch.arange(len(walked.surprises), device=requested.device).unsqueeze(-1)
    excess = torch.where(steps < walked.lengths, walked.surprises - requested, 0.0)
    return nn.functional.pad(excess.cumsum(0), (0, 0, 1, 0))


def train_surprise_control(
    policy: TrainablePolicy, trajectories: Trajectories, requested: Tensor, config: SurpriseControlConfig
) -> Mapping[str, float]:
    """Train `policy` in place on the sketches of `trajectories`.

    Args:
        requested: (B,) mean surprise to hold, nats a token; the policy reads it from the trajectories' condition.

    Returns:
        Of the last tenth of the steps: root of the mean squared error of the completions' means and of the windows'
        (nats), divergence from the base model (nats a token); and the seconds it took.

    Raises:
        InvalidValue: not one request a completion.
        DataError: no completion.
        TrainingError: the loss or a gradient is not finite.
    """
    begin = time.perf_counter()
    if requested.shape != (len(trajectories),):
        raise InvalidValue("requested shape", tuple(requested.shape), f"({len(trajectories)},), one a completion")
    if not len(trajectories):
        raise DataError("there is no completion to train on; draw some with a heuristic that holds a surprise")
    device = device_of(policy)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / config.steps)
    generator = torch.Generator().manual_seed(config.seed)
    history: list[tuple[float, float, float]] = []
    with progress("surprise control", config.steps) as advance:
        for _ in range(config.steps):
            rows = torch.randperm(len(trajectories), generator=generator)[: config.completions]
            walked = walk(policy, trajectories.select(rows.tolist()).to(device), generator)
            final, windows = control_loss(walked, requested[rows].to(device), config.window)
            divergence = (walked.divergences.sum(0) / walked.lengths).mean()
            optimizer.zero_grad(set_to_none=True)
            (final.mean() + windows.mean() + config.beta * divergence).backward()
            norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            if not torch.isfinite(norm):
                raise TrainingError(f"the gradient's norm is {norm.item()}; lower learning_rate or start afresh")
            optimizer.step()
            schedule.step()
            history.append((final.mean().item(), windows.mean().item(), divergence.item()))
            advance(1, f"error {history[-1][0] ** 0.5:.3f} nats")
    last = torch.tensor(history[-max(1, config.steps // 10) :]).mean(0)
    names = ("control/final_rmse", "control/window_rmse", "control/kl_base")
    values = (last[0].sqrt(), last[1].sqrt(), last[2])
    return dict(zip(names, map(float, values), strict=True)) | {"time/control": time.perf_counter() - begin}
