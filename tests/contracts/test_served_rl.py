"""RL on completions of a real engine: the embedded base model behind SGLang, and behind vLLM."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from engine_servers import MODEL, Running

from asn_policies import OrderStatisticsNetwork
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.servers import ServersConfig
from asn_rl.metrics import read_metrics
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.rollout import RolloutConfig
from asn_rl.training import grpo
from asn_rl.training.grpo import GRPOConfig
from asn_rl.training.served import SERVED_LOGPROBS, ServeConfig, served_sampler
from asn_rl.types import Prompt, Trajectories

PROMPTS = [Prompt("a", "Name an animal."), Prompt("c", "Name a colour."), Prompt("s", "Say something.")]
ROLLOUT = RolloutConfig(max_new_tokens=6)
CONFIG = GRPOConfig(steps=3, prompts_per_step=3, num_generations=4, learning_rate=0.05, num_iterations=1, save_every=3)
BOUND = 1e-3
"""nats between a served and a replayed log-prob in float32"""


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_three_steps_of_grpo_are_sampled_from_the_policy_of_each_step(
    smollm: HFBackend, tmp_path: Path, request: pytest.FixtureRequest, engine: Literal["sglang", "vllm"]
) -> None:
    server: Running = request.getfixturevalue(f"{engine}_server")
    torch.manual_seed(0)
    policy = OrderStatisticsNetwork(width=8, point_width=4)
    steps: list[tuple[Trajectories, torch.Tensor]] = []
    metadata = {"base_model": MODEL, "fingerprint": smollm.fingerprint, "sketch": {"head": 64, "tail": 32}}
    serve = ServeConfig(engine, ServersConfig((server.url,), concurrency=16), str(server.policies))
    with served_sampler(serve, smollm, ROLLOUT, metadata) as served:

        def keeping(*given: Any, **options: Any) -> tuple[Trajectories, dict[str, float]]:
            weights = torch.cat([p.detach().flatten().clone() for p in policy.parameters()])
            trajectories, metrics = served(*given, **options)
            steps.append((trajectories, weights))
            return trajectories, metrics

        rewards = RewardSuite([RewardConfig("deadly_rewards:length")])  # characters
        grpo.train(
            policy, policy, smollm, PROMPTS, rewards, ROLLOUT, CONFIG, tmp_path, metadata=metadata, sample=keeping
        )
    rows = read_metrics(tmp_path)
    assert [row["served/failed"] for row in rows] == [0.0] * 3
    assert all(len(trajectories) == 12 for trajectories, _ in steps)
    # An engine that still had the version before would be as far from the replay as two steps of 0.05 are apart.
    assert all(not torch.equal(one, other) for (_, one), (_, other) in pairwise(steps))
    for trajectories, _ in steps:
        gap = (trajectories.extras[SERVED_LOGPROBS] - trajectories.behaviour_logprobs).abs().max()
        assert float(gap) < BOUND
    assert max(row["served/weight_max"] for row in rows) < math.exp(BOUND)
    assert [row["served/truncated"] for row in rows] == [0.0] * 3
