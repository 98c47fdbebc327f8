"""The shuffled context: every row sees another one's, and nothing else changes."""

from __future__ import annotations

import torch

from asn_policies import OrderStatisticsNetwork, Pipeline
from asn_rl.backends.toy import ToyBackend
from asn_rl.evaluation.controls import ShuffledContext, mixed_order
from asn_rl.ops.context import CONTEXT_SIZE
from asn_rl.ops.sketch import SketchSize, build_sketch
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Observation, PolicyOutput, Prompt, State


class Recorder(OrderStatisticsNetwork):
    needs = frozenset({"prompt_embedding"})
    seen: list[Observation]

    def forward(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        self.seen.append(obs)
        return PolicyOutput(obs.sketch.log_mass)


def observation(rows: int) -> Observation:
    sketch, _ = build_sketch(torch.randn(rows, 30, generator=torch.Generator().manual_seed(0)), SketchSize(8, 4))
    number = torch.arange(rows, dtype=torch.float32).unsqueeze(-1)
    return Observation(sketch, number.expand(-1, CONTEXT_SIZE), prompt_embedding=number)


def test_every_row_sees_the_whole_context_of_another_one() -> None:
    policy = Recorder(width=4, point_width=4)
    policy.seen = []
    control, obs = ShuffledContext(policy, seed=3), observation(7)
    for _ in range(5):
        control(obs)
        seen = policy.seen[-1]
        assert torch.equal(seen.sketch.log_mass, obs.sketch.log_mass)
        assert seen.prompt_embedding is not None
        others = seen.prompt_embedding.squeeze(-1)
        assert torch.equal(seen.context[:, 0], others)
        assert (others != torch.arange(7)).all()
        assert others.sort().values.tolist() == list(range(7))
    control(observation(1))
    assert policy.seen[-1].context[0, 0] == 0


def test_a_policy_that_reads_no_context_is_the_same_when_it_is_shuffled() -> None:
    backend, config = ToyBackend.random(20), RolloutConfig(max_new_tokens=6, head=8, tail=4)
    prompts = [Prompt(f"p{i}", f"w{i}") for i in range(1, 5)]
    rule = Pipeline([{"name": "top_p", "params": {"top_p": 0.8}}, {"name": "mirostat", "params": {"tau": 50.0}}])
    plain = rollout(rule, backend, prompts, config)
    assert rollout(ShuffledContext(rule), backend, prompts, config).completions == plain.completions


def test_prompts_are_mixed_before_contexts_are_exchanged() -> None:
    """Prompts of two kinds, kind by kind, in batches of one kind each: in a mixed order half of the contexts are of the
    other kind, and nothing else changes."""
    order = mixed_order(40, seed=1)
    assert sorted(order) == list(range(40))
    kinds = [[index < 20 for index in order[low : low + 10]] for low in range(0, 40, 10)]
    assert all(0 < sum(batch) < 10 for batch in kinds)
    assert mixed_order(40, seed=1) == order != mixed_order(40, seed=2)
