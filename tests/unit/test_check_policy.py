"""`check_policy` passes what keeps the contract and names what breaks it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from asn_policies import OrderStatisticsNetwork, Pipeline, PolicyModule, SamplingNetwork
from asn_rl.errors import InvalidPolicyOutput
from asn_rl.testing import check_policy
from asn_rl.types import Observation, PolicyOutput, State


class Unnormalised(PolicyModule):
    def forward(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        return PolicyOutput(obs.sketch.log_mass + 0.5)


class FillsEmptyPoints(PolicyModule):
    def forward(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        return PolicyOutput(torch.log_softmax(torch.zeros_like(obs.sketch.log_mass), -1))


class Dice(PolicyModule):
    def shift(self, obs: Observation) -> Tensor:
        return torch.randn_like(obs.sketch.log_mass)


class ComparesRows(PolicyModule):
    def shift(self, obs: Observation) -> Tensor:
        return obs.sketch.log_count * obs.context[..., 2].mean()


class SumsOverTime(PolicyModule):
    def shift(self, obs: Observation) -> Tensor:
        total = obs.context[..., 2] if obs.context.ndim == 2 else obs.context[..., 2].sum(1, keepdim=True)
        return obs.sketch.log_count * total[..., None]


class WrongState(PolicyModule):
    def forward(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        return PolicyOutput(obs.sketch.log_mass, {"h": torch.zeros(1)})


@pytest.mark.parametrize(
    "policy",
    [
        OrderStatisticsNetwork(),
        SamplingNetwork(16, 24, 2, 2),
        Pipeline(
            [{"name": "temperature", "params": {"temperature": 0.7}}, {"name": "top_p", "params": {"top_p": 0.9}}]
        ),
        Pipeline([{"name": "mirostat", "params": {"tau": 2.0}}]),
    ],
    ids=["order statistics", "attention", "pipeline", "stateful"],
)
def test_our_policies_pass(policy: PolicyModule) -> None:
    check_policy(policy)


def test_optional_inputs_are_given() -> None:
    inputs = ["hidden", "prompt_embedding", "condition"]
    policy = OrderStatisticsNetwork(inputs=inputs, hidden_size=12, condition_size=3)
    check_policy(policy, hidden_size=12, condition_size=3)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Unnormalised(), "sum to 1.64872, not to 1"),
        (FillsEmptyPoints(), "-inf where a point is empty"),
        (Dice(), "answers the same observation differently"),
        (ComparesRows(), "differently beside others"),
        (SumsOverTime(), "leading axes"),
        (WrongState(), r"state 'h' of WrongState has 1 rows for 4 completions"),
    ],
)
def test_broken_contracts_are_named(policy: PolicyModule, message: str) -> None:
    with pytest.raises(InvalidPolicyOutput, match=message):
        check_policy(policy)
