"""Answers along stored trajectories equal those that were given while they were sampled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from asn_policies import OrderStatisticsNetwork, Pipeline
from asn_policies.base import PolicyModule
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import InvalidValue
from asn_rl.ops.logprobs import shifted
from asn_rl.replay import replay
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import OPTIONAL_INPUTS, Observation, PolicyOutput, Prompt, State
from asn_rl.unroll import recorded_logprobs, unroll

BACKEND = ToyBackend.random(24, seed=3, scale=1.5)
PROMPTS = [Prompt(str(i), f"w{i}") for i in range(1, 6)]
CONFIG = RolloutConfig(max_new_tokens=9, head=8, tail=4, tracked=4)


class Leaky(PolicyModule):
    """A temperature that follows a leaky, learned sum of the surprises, and shuns what was said."""

    needs = frozenset({"last_point", "history"})

    def __init__(self) -> None:
        super().__init__()
        self.leak, self.gain = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.3))

    def initial_state(self, batch_size: int, device: torch.device) -> State:
        return {"sum": torch.zeros(batch_size, device=device)}

    def forward(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        assert state is not None
        assert obs.history is not None
        assert obs.last_point is not None
        total = self.leak * state["sum"] + obs.context[..., 6] + 0.1 * obs.last_point
        values = torch.where(obs.sketch.mask, obs.sketch.logprobs, 0.0)
        shift = self.gain * torch.tanh(total).unsqueeze(-1) * values - obs.history.sum(-1)
        return PolicyOutput(shifted(obs.sketch.log_mass, shift), {"sum": total}, total)


def chosen(logprobs: Tensor, run) -> Tensor:
    at = run.points.unsqueeze(-1)
    inner = run.base_logprobs - run.observations.sketch.log_mass.gather(-1, at).squeeze(-1)
    return logprobs.gather(-1, at).squeeze(-1) + inner


@pytest.mark.parametrize(
    "policy",
    [Leaky(), Pipeline([{"name": "mirostat", "params": {"tau": 2.0}}]), OrderStatisticsNetwork()],
    ids=["learned state", "mirostat", "stateless"],
)
def test_a_stored_trajectory_replays_to_the_recorded_logprobs(policy: PolicyModule) -> None:
    run = rollout(policy, BACKEND, PROMPTS, CONFIG, num_generations=6, seed=5)
    assert len(set(run.lengths.tolist())) > 2, "rows end at different times"
    torch.testing.assert_close(chosen(recorded_logprobs(policy, run), run), run.behaviour_logprobs)

    rows = torch.tensor([7, 2, 11])  # some completions, in another order
    starts = run.lengths.cumsum(0) - run.lengths
    tokens = torch.cat([torch.arange(int(starts[i]), int(starts[i] + run.lengths[i])) for i in rows])
    part = unroll(policy, run, tokens)
    torch.testing.assert_close(part.logprobs, recorded_logprobs(policy, run)[tokens])
    if part.value is not None:
        assert part.value.shape == tokens.shape

    again, _ = replay(policy, BACKEND, run.prompts, run.completion_ids, CONFIG)
    torch.testing.assert_close(again.behaviour_logprobs, run.behaviour_logprobs)
    for name in policy.needs & OPTIONAL_INPUTS:
        torch.testing.assert_close(getattr(again.observations, name), getattr(run.observations, name))


def test_gradients_go_through_the_state() -> None:
    policy = Leaky()
    run = rollout(policy, BACKEND, PROMPTS, CONFIG, num_generations=2)
    last = run.lengths.cumsum(0) - 1
    chosen(unroll(policy, run, torch.arange(len(run.points))).logprobs, run)[last].sum().backward()
    assert policy.leak.grad is not None
    assert policy.leak.grad != 0


def test_state_begins_at_the_first_token() -> None:
    run = rollout(Leaky(), BACKEND, PROMPTS, CONFIG, num_generations=2)
    for tokens in (torch.arange(1, len(run.points)), torch.arange(len(run.points)).flip(0)):
        with pytest.raises(InvalidValue, match="whole completions"):
            unroll(Leaky(), run, tokens)
