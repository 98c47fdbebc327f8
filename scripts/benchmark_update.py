"""Cost of a GRPO update (four epochs) as a share of the rollout that fed it, and its growth with the vocabulary.

The second figure feeds the update with trajectories of a random table language model, V = 32,768 against V = 262,144;
the update reads points, so the ratio should be one.
"""

from __future__ import annotations

import sys
import time
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

from asn_rl.threads import limit_spinning, set_threads

limit_spinning()

import torch
from _benchmark import finish, options, seconds

from asn_policies import OrderStatisticsNetwork
from asn_rl.backends import BackendConfig, load_backend
from asn_rl.backends.toy import ToyBackend
from asn_rl.data import DataConfig, load_prompts
from asn_rl.ops.context import context_vector
from asn_rl.ops.sketch import Sketch, SketchSize, build_sketch
from asn_rl.protocols import LogitsBackend
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.training.grpo import GRPOConfig, Trainer, make_batch, score
from asn_rl.types import Observation, Prompt, Trajectories

SHARE_GOAL, GROWTH_GOAL = 0.10, 1.1


def main() -> int:
    arguments = options(__doc__ or "", "python scripts/benchmark_update.py --groups 24", groups=24, tokens=2048)
    set_threads(arguments.threads)
    quick = arguments.quick
    growth = _growth(512 if quick else arguments.tokens, 3 if quick else 9)
    share = _share(4 if quick else arguments.groups)
    # Two goals, one last line: that of the figure that is worse against its goal.
    figures = [("benchmark_update", share, SHARE_GOAL), ("benchmark_update_growth", growth, GROWTH_GOAL)]
    return max(
        finish(name, ratio, goal, at_least=False)
        for name, ratio, goal in sorted(figures, key=lambda figure: figure[1] / figure[2])
    )


def _share(groups: int) -> float:
    backend, rewards = load_backend(BackendConfig()), RewardSuite([RewardConfig("numeric_answer")])
    prompts = load_prompts(DataConfig(source="arithmetic"), "train")[:groups]
    policy, config = OrderStatisticsNetwork(), RolloutConfig(max_new_tokens=32)
    rollout(policy, backend, prompts[:1], config, num_generations=2)
    begin = time.perf_counter()
    trajectories = rollout(policy, backend, prompts, config, num_generations=8)
    rolled = time.perf_counter() - begin
    totals = score(rewards, trajectories).total
    updated = _update_seconds(trajectories, totals, prompts, config, backend, rewards, repeats=3)
    tokens = len(trajectories.points)
    print(
        f"{tokens} tokens: rollout {rolled:.2f} s, update of four epochs {updated:.3f} s, share {updated / rolled:.1%}"
    )
    return updated / rolled


def _growth(tokens: int, repeats: int) -> float:
    times = {}
    for vocab in (32_768, 262_144):
        trajectories = _synthetic(vocab, tokens)
        prompts = list({prompt.id: prompt for prompt in trajectories.prompts}.values())
        totals = torch.rand(len(trajectories), dtype=torch.float64)
        backend = ToyBackend.random(4)
        rewards = RewardSuite([RewardConfig("numeric_answer")])
        config = RolloutConfig(max_new_tokens=16)
        times[vocab] = _update_seconds(trajectories, totals, prompts, config, backend, rewards, repeats)
        print(f"update on {tokens} tokens, V = {vocab}: {times[vocab]:.3f} s")
    return times[262_144] / times[32_768]


def _update_seconds(
    trajectories: Trajectories,
    totals: torch.Tensor,
    prompts: list[Prompt],
    config: RolloutConfig,
    backend: LogitsBackend,
    rewards: RewardSuite,
    repeats: int,
) -> float:
    """Reference log-probs, advantages and four epochs."""
    grpo = GRPOConfig(prompts_per_step=len(prompts), num_generations=8)
    policy, reference = OrderStatisticsNetwork(), OrderStatisticsNetwork()
    with TemporaryDirectory() as folder:
        trainer = Trainer(policy, reference, backend, prompts, rewards, config, grpo, Path(folder), {})

        def update() -> None:
            batch, signal = make_batch(trajectories, totals, reference, grpo)
            trainer.update(batch, signal, seed=0)

        return seconds(update, repeats)


def _synthetic(vocab: int, tokens: int, length: int = 16) -> Trajectories:
    """Completions of `length` tokens with the sketches of Gaussian logits."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        build_sketch(3 * torch.randn(32, vocab, generator=generator), SketchSize())[0] for _ in range(tokens // 32)
    ]
    sketch = Sketch(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Sketch)))
    count = tokens // length
    zero = torch.zeros(tokens)
    logprobs = sketch.log_mass[:, 0]  # every token is taken to be the most probable one
    return Trajectories(
        prompts=[Prompt(str(i // 8), "?") for i in range(count)],
        sample=[i % 8 for i in range(count)],
        prompt_ids=[[1]] * count,
        completion_ids=[[1] * length] * count,
        completions=[""] * count,
        terminated=torch.ones(count, dtype=torch.bool),
        observations=Observation(sketch, context_vector(sketch, zero, zero, zero, zero)),
        points=torch.zeros(tokens, dtype=torch.long),
        behaviour_logprobs=logprobs,
        base_logprobs=logprobs,
    )


if __name__ == "__main__":
    sys.exit(main())
