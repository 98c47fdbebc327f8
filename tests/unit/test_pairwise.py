from __future__ import annotations

import itertools
import math

import choix
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from asn_rl.errors import InvalidValue
from asn_rl.ops.pairwise import Pairing, bradley_terry, swiss_pairs, swiss_rounds


def random_wins(players: int, games: int, seed: int) -> np.ndarray:
    """Whole numbers of wins between random players."""
    generator = np.random.default_rng(seed)
    wins = np.zeros((players, players))
    for _ in range(games):
        i, j = generator.choice(players, 2, replace=False)
        wins[i, j] += 1
    return wins


def penalised_loss(strength: np.ndarray, wins: np.ndarray, prior: float) -> float:
    difference = strength[:, None] - strength[None, :]
    return float((wins * np.logaddexp(0, -difference)).sum() + 0.5 * (strength**2).sum() / prior**2)


@pytest.mark.parametrize(("players", "games", "prior"), [(2, 3, 1.0), (5, 40, 1.0), (12, 30, 0.5), (30, 400, 3.0)])
def test_equals_choix_on_hard_outcomes(players: int, games: int, prior: float) -> None:
    wins = random_wins(players, games, seed=players)
    data = [(i, j) for i, j in itertools.permutations(range(players), 2) for _ in range(int(wins[i, j]))]
    expected = choix.opt_pairwise(players, data, alpha=0.5 / prior**2, method="Newton-CG", tol=1e-12)
    np.testing.assert_allclose(bradley_terry(wins, prior).strength, expected, atol=1e-6)


def test_two_players_in_closed_form() -> None:
    wins = np.array([[0.0, 3.0], [1.0, 0.0]])
    # A prior too wide to matter leaves the maximum-likelihood answer: the log odds of the wins.
    wide = bradley_terry(wins, prior=1e4)
    assert wide.strength == pytest.approx([math.log(3) / 2, -math.log(3) / 2], abs=1e-6)
    # With one: the difference d solves 4 (3/4 - sigmoid(d)) = d / (2 prior^2).
    found = bradley_terry(wins, prior=1.0)
    d = found.strength[0] - found.strength[1]
    assert 4 * (0.75 - 1 / (1 + math.exp(-d))) == pytest.approx(d / 2, abs=1e-9)
    p = 1 / (1 + math.exp(-d))
    curvature = np.array([[1, -1], [-1, 1]]) * 4 * p * (1 - p) + np.eye(2)
    assert found.stderr == pytest.approx(np.sqrt(np.diag(np.linalg.inv(curvature))), rel=1e-9)


def test_soft_outcomes_and_ties() -> None:
    tie = bradley_terry(np.array([[0, 0.5], [0.5, 0]]))
    assert tie.strength == pytest.approx([0, 0], abs=1e-12)
    soft = bradley_terry(np.array([[0, 0.8], [0.2, 0]]), prior=1e5)
    assert soft.strength[0] - soft.strength[1] == pytest.approx(math.log(4), abs=1e-6)


def test_players_who_never_met() -> None:
    wins = np.zeros((5, 5))
    wins[0, 1] = wins[2, 3] = 2
    found = bradley_terry(wins, prior=0.7)
    pair = bradley_terry(wins[:2, :2], prior=0.7)
    assert found.strength == pytest.approx([*pair.strength, *pair.strength, 0], abs=1e-12)
    assert found.stderr == pytest.approx([*pair.stderr, *pair.stderr, 0.7])
    assert (found.stderr[:4] < 0.7).all()


def test_nobody_and_one() -> None:
    assert bradley_terry(np.zeros((0, 0))).strength.shape == (0,)
    alone = bradley_terry(np.zeros((1, 1)), prior=2.0)
    assert (alone.strength.tolist(), alone.stderr.tolist()) == ([0.0], [2.0])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8),
    st.integers(0, 10**6),
    st.sampled_from([0.01, 0.3, 1.0, 10.0, 1000.0]),
    st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_top_of_the_posterior(players: int, seed: int, prior: float, weight: float) -> None:
    generator = np.random.default_rng(seed)
    wins = weight * generator.random((players, players)) * (generator.random((players, players)) < 0.5)
    np.fill_diagonal(wins, 0)
    found = bradley_terry(wins, prior)
    odds = 1 / (1 + np.exp(found.strength[None, :] - found.strength[:, None]))
    gradient = (wins * odds.T).sum(1) - (wins.T * odds).sum(1) - found.strength / prior**2
    assert np.abs(gradient).max() < 1e-7 * (1 + wins.sum())
    assert abs(found.strength.sum()) < 1e-9
    assert (found.stderr <= prior * (1 + 1e-9)).all()
    permutation = generator.permutation(players)
    again = bradley_terry(wins[np.ix_(permutation, permutation)], prior)
    np.testing.assert_allclose(again.strength, found.strength[permutation], atol=1e-6)


def test_general_optimiser_agrees() -> None:
    wins = np.random.default_rng(3).random((9, 9)) * (np.random.default_rng(4).random((9, 9)) < 0.4)
    np.fill_diagonal(wins, 0)
    expected = minimize(penalised_loss, np.zeros(9), args=(wins, 1.3), method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(bradley_terry(wins, 1.3).strength, expected.x, atol=1e-6)


def test_uncertainty_covers_the_truth() -> None:
    """Strengths drawn from the prior lie inside the 90 % band about nine times in ten."""
    generator = np.random.default_rng(0)
    inside = []
    for _ in range(40):
        truth = generator.standard_normal(20)
        wins = np.zeros((20, 20))
        for i, j in itertools.combinations(range(20), 2):
            won = generator.random() < 1 / (1 + np.exp(truth[j] - truth[i]))
            wins[(i, j) if won else (j, i)] += 1
        found = bradley_terry(wins, 1.0)
        inside.append(np.abs(found.strength - truth) < 1.645 * found.stderr)
    assert 0.86 < np.mean(inside) < 0.94


@pytest.mark.parametrize(
    "wins", [np.ones((2, 3)), np.ones((2, 2)), np.array([[0, -1.0], [0, 0]]), np.array([[0, np.nan], [0, 0]]), 3.0]
)
def test_wins_that_are_none(wins: np.ndarray) -> None:
    with pytest.raises(InvalidValue, match="wins"):
        bradley_terry(wins)


@pytest.mark.parametrize("prior", [0.0, -1.0, math.inf, math.nan])
def test_priors_that_are_none(prior: float) -> None:
    with pytest.raises(InvalidValue, match="prior must be a finite number > 0"):
        bradley_terry(np.zeros((2, 2)), prior)


@pytest.mark.parametrize(
    ("players", "rounds"), [(0, 0), (1, 0), (2, 1), (3, 3), (4, 3), (5, 4), (8, 4), (9, 5), (128, 8), (143, 9)]
)
def test_number_of_rounds(players: int, rounds: int) -> None:
    assert swiss_rounds(players) == rounds


def play(players: int, rounds: int, seed: int) -> tuple[list[Pairing], np.ndarray]:
    """A tournament in which scores are drawn, and how often each two met."""
    generator = np.random.default_rng(seed)
    scores, played = np.zeros(players), np.zeros((players, players), dtype=int)
    pairings = []
    for number in range(rounds):
        pairing = swiss_pairs(scores, played, number, seed)
        for i, j in pairing.pairs:
            share = generator.random()
            scores[i] += share
            scores[j] += 1 - share
            played[[i, j], [j, i]] += 1
        pairings.append(pairing)
    return pairings, played


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 24), st.integers(1, 14), st.integers(0, 10**6))
def test_every_round_is_a_pairing(players: int, rounds: int, seed: int) -> None:
    pairings, played = play(players, rounds, seed)
    byes = [pairing.bye for pairing in pairings]
    for number, pairing in enumerate(pairings):
        seats = [player for pair in pairing.pairs for player in pair]
        assert sorted([*seats, *([] if pairing.bye is None else [pairing.bye])]) == list(range(players))
        before = [byes[:number].count(player) for player in range(players)]
        if pairing.bye is not None:
            assert before[pairing.bye] == min(before)  # nobody sits out twice before everyone did once
    if rounds <= (players - players % 2) / 2:
        assert played.max() <= 1  # no rematch in the first half


@pytest.mark.parametrize("players", [2, 4, 6, 8])
def test_few_players_meet_everybody_before_a_rematch_where_that_is_possible(players: int) -> None:
    for seed in range(20):
        pairings, played = play(players, players - 1, seed)
        met = np.zeros_like(played)
        for pairing in pairings:
            rematches = sum(met[i, j] for i, j in pairing.pairs)
            assert rematches == fewest_rematches(met)
            for i, j in pairing.pairs:
                met[[i, j], [j, i]] += 1


def fewest_rematches(met: np.ndarray) -> int:
    """Over all pairings, by enumeration."""

    def fewest(left: tuple[int, ...]) -> int:
        if not left:
            return 0
        return min(met[left[0], j] + fewest(tuple(k for k in left[1:] if k != j)) for j in left[1:])

    return fewest(tuple(range(len(met))))


def test_equals_meet() -> None:
    scores = np.array([0.0, 3.0, 1.0, 3.0, 1.0, 0.0])
    pairing = swiss_pairs(scores, np.zeros((6, 6), dtype=int), 2, seed=0)
    assert {frozenset(pair) for pair in pairing.pairs} == {frozenset(p) for p in [(1, 3), (2, 4), (0, 5)]}
    played = np.zeros((6, 6), dtype=int)
    played[1, 3] = played[3, 1] = 1
    following = swiss_pairs(scores, played, 2, seed=0)
    assert {frozenset(pair) for pair in following.pairs} >= {frozenset(p) for p in [(0, 5)]}
    assert frozenset((1, 3)) not in {frozenset(pair) for pair in following.pairs}


def test_first_round_is_random_and_repeats() -> None:
    nobody, none = np.zeros(20), np.zeros((20, 20), dtype=int)
    draws = [swiss_pairs(nobody, none, 0, seed).pairs for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_large_field_has_no_rematch() -> None:
    pairings, played = play(143, 9, 0)
    assert played.max() == 1
    assert len({pairing.bye for pairing in pairings}) == 9
    assert played.sum() == 9 * 142


@pytest.mark.parametrize(
    ("played", "number", "match"),
    [
        (np.zeros((2, 2)), 0, "played shape"),
        (np.triu(np.ones((3, 3)), 1), 1, "symmetric"),
        (np.eye(3), 1, "symmetric"),
        (np.ones((3, 3)) - np.eye(3), 1, "round_number must be >= 2"),
    ],
)
def test_histories_that_are_none(played: np.ndarray, number: int, match: str) -> None:
    with pytest.raises(InvalidValue, match=match):
        swiss_pairs(np.zeros(3), played, number, 0)
