"""Variance of the policy gradient of a strategy gate: marginal token probability against drawn strategy.

Completions of the demo's prompts under a gate over the four strategies of arXiv:2603.09065 (greedy, T = 0.5, 1, 1.25),
group advantages of the demo's rewards. Both estimators see the same tokens and advantages:

- marginal: A * grad log sum_a gate_a pi_a(y), what the library trains with;
- drawn: A * grad log gate_a, the paper's, with a drawn from its posterior given y. That gives (a, y) the joint law they
  have when the strategy is drawn first and the token from it.

A batch is one group of 8 completions (n groups divide both variances by n); the figure is the trace of the covariance
of the gate's gradient over groups that carry signal, marginal over drawn. Two gates: equal shares as at the start of
training, and random weights. The last line is the worse of the two.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path

from asn_rl.threads import limit_spinning, set_threads

limit_spinning()

import torch
from _benchmark import finish, options
from torch import Tensor

from asn_policies.strategy import TokenStrategy, at_points, mixture
from asn_rl.backends import load_backend
from asn_rl.config import load_config
from asn_rl.data import load_prompts
from asn_rl.data.sampler import PromptSampler
from asn_rl.job import JobConfig
from asn_rl.ops.advantages import group_advantages, has_signal
from asn_rl.protocols import LogitsBackend
from asn_rl.rewards.compose import RewardSuite, score
from asn_rl.rollout import rollout
from asn_rl.types import Prompt, Trajectories

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
GROUP, DRAWS, GOAL = 8, 16, 0.5
STRATEGIES = [
    {"name": "greedy", "processors": [{"name": "greedy"}]},
    {"name": "T=0.5", "processors": [{"name": "temperature", "params": {"temperature": 0.5}}]},
    {"name": "T=1"},
    {"name": "T=1.25", "processors": [{"name": "temperature", "params": {"temperature": 1.25}}]},
]


@dataclass(frozen=True)
class Measured:
    """Gradients of the gate's D parameters on G groups, and how alike the strategies are."""

    marginal: Tensor
    """(G, D)"""
    drawn: Tensor
    """(DRAWS, G, D), each with one strategy drawn a token"""
    expected: Tensor
    """(G, D) exact mean of the drawn one over its strategies"""
    apart: Tensor
    """(S,) largest total variation between two strategies at each token"""
    moved: Tensor
    """(S,) total variation between gate and posterior: how much the drawn token says of the strategy"""


def main() -> int:
    arguments = options(
        __doc__ or "", "python scripts/benchmark_marginal_gradient.py --prompts 64 --rounds 4", prompts=48, rounds=2
    )
    set_threads(arguments.threads)
    config = load_config(JobConfig, CONFIG)
    backend, rewards = load_backend(config.backend), RewardSuite(config.rewards)
    rounds, count = (1, min(arguments.prompts, 20)) if arguments.quick else (arguments.rounds, arguments.prompts)
    prompts = PromptSampler(load_prompts(config.data, "train"), count, 0, config.grpo.balance).draw(0)
    ratios, same = [], True
    for title, policy in (("equal shares", _gate(0.0)), ("random weights", _gate(0.5))):
        parts = [_measure(policy, backend, prompts, rewards, config, seed) for seed in range(rounds)]
        found = Measured(
            *(torch.cat([getattr(part, f.name) for part in parts], int(f.name == "drawn")) for f in fields(Measured))
        )
        ratio, low, high = _variance_ratio(found)
        print(
            f"{title}: {len(found.marginal)} groups with signal, {len(found.apart)} tokens; trace of covariance "
            f"{_trace(found.marginal):.3g} marginal, {_trace(found.drawn):.3g} drawn, ratio {ratio:.3f} "
            f"[{low:.3f}, {high:.3f}]"
        )
        for what, values in (
            ("the two strategies furthest apart", found.apart),
            ("gate and posterior", found.moved),
        ):
            shares = ", ".join(f"{(values < bound).float().mean():.0%} below {bound}" for bound in (0.01, 0.05, 0.2))
            print(f"{title}: total variation between {what}: tokens {shares}")
        same &= _same_mean(title, found)
        ratios.append(ratio)
    return max(finish("benchmark_marginal_gradient", max(ratios), GOAL, at_least=False), int(not same))


def _gate(scale: float) -> TokenStrategy:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    policy = TokenStrategy(STRATEGIES)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return policy


def _measure(
    policy: TokenStrategy,
    backend: LogitsBackend,
    prompts: list[Prompt],
    rewards: RewardSuite,
    config: JobConfig,
    seed: int,
) -> Measured:
    out = rollout(policy, backend, prompts, config.rollout, num_generations=GROUP, seed=seed)
    totals = score(rewards, out).total.reshape(-1, GROUP)
    advantages, generator = group_advantages(totals).float(), torch.Generator().manual_seed(seed)
    signal = has_signal(totals).nonzero().squeeze(-1).tolist()
    found = [_group_gradients(policy, out, group, advantages[group], generator) for group in signal]
    marginal, drawn, expected = zip(*found, strict=True)
    apart, moved = _disagreement(policy, out)
    return Measured(torch.stack(marginal), torch.stack(drawn, 1), torch.stack(expected), apart, moved)


def _group_gradients(
    policy: TokenStrategy, out: Trajectories, group: int, advantages: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    part = out.select(range(group * GROUP, (group + 1) * GROUP))
    obs, weight = part.per_token(), advantages[part.rows] / GROUP
    gate = policy.gate_logprobs(obs)
    answers, _ = policy.strategy_logprobs(obs)
    posterior = torch.softmax(gate + at_points(answers, part.points), -1).detach()
    own = mixture(gate, answers).gather(-1, part.points[:, None]).squeeze(-1)
    drawn = [torch.multinomial(posterior, 1, generator=generator) for _ in range(DRAWS)]
    return (
        _gradient(policy, (weight * own).sum()),
        torch.stack([_gradient(policy, (weight * gate.gather(-1, a).squeeze(-1)).sum()) for a in drawn]),
        _gradient(policy, (weight * (posterior * gate).sum(-1)).sum()),
    )


def _gradient(policy: TokenStrategy, objective: Tensor) -> Tensor:
    parts = torch.autograd.grad(objective, list(policy.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts]).double()


@torch.no_grad()
def _disagreement(policy: TokenStrategy, out: Trajectories) -> tuple[Tensor, Tensor]:
    obs = out.per_token()
    probs = policy.strategy_logprobs(obs)[0].exp()
    apart = 0.5 * (probs.unsqueeze(-2) - probs.unsqueeze(-3)).abs().sum(-1).flatten(1).amax(-1)
    moved = policy.posterior(obs, out.points) - policy.gate_probabilities(obs)
    return apart, 0.5 * moved.abs().sum(-1)


def _trace(gradients: Tensor) -> float:
    """Trace of the covariance over groups (..., G, D), averaged over what comes before."""
    return float(gradients.var(-2).sum(-1).mean())


def _variance_ratio(found: Measured, resamples: int = 2000) -> tuple[float, float, float]:
    """Marginal over drawn, with a 95 % bootstrap interval over groups."""
    groups = len(found.marginal)
    draws = torch.randint(groups, (resamples, groups), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(resamples, groups, dtype=torch.float64).scatter_add_(1, draws, torch.ones_like(draws).double())

    def traces(gradients: Tensor) -> Tensor:
        """(resamples,) of (G, D), up to a factor: sum_i n_i |g_i|^2 - |sum_i n_i g_i|^2 / G."""
        gram = gradients @ gradients.T
        return counts @ gram.diagonal() - torch.einsum("ri,ij,rj->r", counts, gram, counts) / groups

    resampled = traces(found.marginal) / torch.stack([traces(part) for part in found.drawn]).mean(0)
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return _trace(found.marginal) / _trace(found.drawn), low, high


def _same_mean(title: str, found: Measured) -> bool:
    """The drawn estimator's exact mean over strategies is the marginal one; its draws are compatible with that."""
    exact = float((found.expected - found.marginal).abs().max() / found.marginal.abs().max())
    difference = found.drawn.mean(0) - found.marginal
    squares = len(difference) * float(difference.mean(0).square().sum()) / _trace(difference)
    print(
        f"{title}: the two means differ by {exact:.1e} (relative) when drawn strategies are summed over, and by "
        f"{squares**0.5:.2f} standard errors as drawn"
    )
    return exact < 1e-4 and squares < 10


if __name__ == "__main__":
    sys.exit(main())
