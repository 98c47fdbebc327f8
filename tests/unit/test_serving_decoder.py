"""A policy behind somebody else's loop gives the log-probs of a rollout, whatever the batch does meanwhile."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asn_policies import OrderStatisticsNetwork, Pipeline, RecurrentPolicy, TokenFeatureNetwork
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import InvalidLogits, InvalidValue, ServingError
from asn_rl.ops.sketch import SketchSize
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.serving import PolicyDecoder, Row
from asn_rl.types import Prompt, Trajectories

CONFIG = RolloutConfig(12, head=6, tail=4, tracked=3)
SIZE = SketchSize(6, 4)
PROMPTS = [Prompt(str(i), f"w{i + 1}") for i in range(7)]


def randomised(policy: Any, scale: float = 0.3) -> Any:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return policy


POLICIES = {
    "min_p, T=2": Pipeline(
        [{"name": "min_p", "params": {"min_p": 0.1}}, {"name": "temperature", "params": {"temperature": 2.0}}]
    ),
    "mirostat": Pipeline([{"name": "mirostat", "params": {"version": 2, "tau": 2.0}}]),
    "repetition": Pipeline([{"name": "repetition_penalty", "params": {"penalty": 1.5}}]),
    "order statistics": randomised(OrderStatisticsNetwork()),
    "recurrent": randomised(RecurrentPolicy()),
    "token features": randomised(TokenFeatureNetwork()),
}


@pytest.fixture(params=POLICIES)
def drawn(request: pytest.FixtureRequest, toy: ToyBackend) -> tuple[Any, Trajectories]:
    policy = POLICIES[request.param]
    return policy, rollout(policy, toy, PROMPTS, CONFIG, num_generations=2, seed=3)


def test_recorded_logprobs_come_back_in_any_batching(drawn: tuple[Any, Trajectories], toy: ToyBackend) -> None:
    policy, trajectories = drawn
    decoder = PolicyDecoder(policy, size=SIZE, tracked=CONFIG.tracked)
    found: list[list[float]] = [[] for _ in range(len(trajectories))]
    shuffle = random.Random(0)
    while waiting := [i for i, row in enumerate(found) if len(row) < len(trajectories.completion_ids[i])]:
        chosen = shuffle.sample(waiting, shuffle.randint(1, len(waiting)))  # rows join late, pause and leave
        logprobs = decoder(_logits(toy, trajectories, found, chosen), [_row(trajectories, found, i) for i in chosen])
        for i, row in zip(chosen, logprobs.log_softmax(-1), strict=True):
            found[i].append(float(row[trajectories.completion_ids[i][len(found[i])]]))
        decoder.forget([i for i in chosen if len(found[i]) == len(trajectories.completion_ids[i])])
    assert decoder.requests == []
    flat = torch.tensor([value for row in found for value in row])
    torch.testing.assert_close(flat, trajectories.behaviour_logprobs, atol=2e-5, rtol=1e-5)


def _row(trajectories: Trajectories, found: list[list[float]], i: int) -> Row:
    return Row(i, list(trajectories.completion_ids[i][: len(found[i])]), CONFIG.max_new_tokens)


def _logits(toy: ToyBackend, trajectories: Trajectories, found: list[list[float]], chosen: list[int]) -> Tensor:
    texts = [[*trajectories.prompt_ids[i], *trajectories.completion_ids[i][: len(found[i])]] for i in chosen]
    return toy.table[torch.tensor([ids[-1] for ids in texts])]


def test_greedy_leaves_one_token(toy: ToyBackend) -> None:
    logits = PolicyDecoder(Pipeline([{"name": "greedy"}]), size=SIZE)(toy.table[:5], [Row(i, [], 4) for i in range(5)])
    assert torch.equal(logits.argmax(-1), toy.table[:5].argmax(-1))
    assert (logits > -torch.inf).sum(-1).tolist() == [1] * 5


def test_a_request_that_was_not_followed_is_refused_and_others_go_on(toy: ToyBackend) -> None:
    decoder, logits = PolicyDecoder(Pipeline([]), size=SIZE), toy.table[1:2]
    with pytest.raises(ServingError, match="was not seen from its first token"):
        decoder(logits, [Row("a", [3], 8)])
    decoder(logits, [Row("a", [], 8)])
    with pytest.raises(ServingError, match="2 generated tokens and should have 1"):
        decoder(logits, [Row("a", [3, 4], 8)])
    with pytest.raises(ServingError, match="same key"):
        decoder(toy.table[1:3], [Row("b", [], 8), Row("b", [], 8)])
    decoder(logits, [Row("a", [3], 8)])
    decoder(logits, [Row("a", [], 8)])  # a key may begin anew


def test_bad_logits_leave_what_is_remembered_as_it_was(toy: ToyBackend) -> None:
    policy = POLICIES["recurrent"]
    decoder, again = (PolicyDecoder(policy, size=SIZE) for _ in range(2))
    logits = toy.table[1:2]
    for each in (decoder, again):
        each(logits, [Row("a", [], 8)])
    with pytest.raises(InvalidLogits):
        decoder(torch.full_like(logits, torch.nan), [Row("a", [3], 8)])
    assert torch.equal(decoder(logits, [Row("a", [3], 8)]), again(logits, [Row("a", [3], 8)]))


def test_a_spent_budget_and_policies_that_read_more_are_refused(toy: ToyBackend, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="budget of request 'a'"):
        PolicyDecoder(Pipeline([]))(toy.table[:1], [Row("a", [], 0)])
    with pytest.raises(InvalidValue, match="hand logits and tokens"):
        PolicyDecoder(OrderStatisticsNetwork(inputs=["prompt_embedding"], hidden_size=8))
