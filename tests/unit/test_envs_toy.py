"""The solvable environment: its closed-form returns are what it pays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from asn_envs.toy import (
    EOS,
    LENGTH,
    STATES,
    WORDS,
    RightWords,
    ToyDecodingEnv,
    base_return,
    expected_return,
    optimal_return,
    order_keeping_return,
    right_words,
    toy_table,
)


def brute_force(choice: Tensor, length: int) -> float:
    """Expected return as a sum over every completion."""
    reward, total = RightWords(length), 0.0
    starts = [WORDS.index(word) for word in STATES]
    for start, path in itertools.product(starts, itertools.product(range(len(WORDS)), repeat=length)):
        chance, last, said = 1.0 / len(starts), start, []
        for token in path:
            chance *= float(choice[last, token]) if last != EOS else float(token == EOS)
            last = token
            said += [WORDS[token]] if token != EOS else []
        if chance:
            (value,) = reward([WORDS[start]], [" ".join(said)])
            total += chance * (value or 0.0)
    return total


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_expected_return_equals_enumeration(temperature: float):
    choice = (toy_table().double() / temperature).softmax(-1)
    assert expected_return(choice, 3) == pytest.approx(brute_force(choice, 3), abs=1e-12)


def test_base_return_is_what_the_base_model_earns():
    env, rng, returns = ToyDecodingEnv(), np.random.default_rng(0), []
    obs, _ = env.reset(seed=0)
    while len(returns) < 200:
        probs = np.exp(obs["points"][:, 0].astype(np.float64)) * obs["points"][:, -1]
        obs, reward, terminated, truncated, _ = env.step(int(rng.choice(len(probs), p=probs / probs.sum())))
        if terminated or truncated:
            returns.append(reward)
            obs, _ = env.reset()
    error = np.std(returns) / np.sqrt(len(returns))
    assert np.mean(returns) == pytest.approx(base_return(), abs=4 * error)


@pytest.mark.parametrize("word", STATES)
def test_the_best_rule_reads_the_entropy_and_earns_the_optimum(word: str):
    env, terminated, truncated, reward = ToyDecodingEnv(), False, False, 0.0
    obs, info = env.reset(options={"prompt_id": word})
    while not (terminated or truncated):
        obs, reward, terminated, truncated, info = env.step(int(obs["context"][2] > 1.2))
    assert reward == optimal_return() == 1.0
    assert (terminated, truncated, info["length"]) == (False, True, LENGTH)


def test_no_rule_that_keeps_the_order_comes_near():
    bound, table = order_keeping_return(), toy_table().double()
    for temperature in (0.01, 0.2, 0.3, 0.5, 1.0, 2.0):
        assert expected_return((table / temperature).softmax(-1)) <= bound
    top_p = torch.where(table.exp() >= 0.25, 1.0, 0.0)  # one token after calm words, two after open ones
    assert 0.99 * bound < expected_return(top_p / top_p.sum(-1, keepdim=True)) < bound
    assert base_return() == pytest.approx(0.440, abs=1e-3)
    assert bound == pytest.approx(0.712, abs=1e-3)
    best = torch.zeros_like(table)
    for here, following in right_words().items():
        best[WORDS.index(here), WORDS.index(following)] = 1.0
    assert expected_return(best) == pytest.approx(optimal_return())


def test_end_of_sequence_ends_the_episode():
    env = ToyDecodingEnv()
    env.reset(options={"prompt_id": "sea"})
    env.step(0)
    _, reward, terminated, truncated, info = env.step(4)
    assert (reward, terminated, truncated) == (1 / LENGTH, True, False)
    assert info["completion"] == "storm"
