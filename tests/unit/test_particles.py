from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pytest
import torch

from asn_policies import Pipeline
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import DataError, InvalidValue, RewardError
from asn_rl.ops.resampling import particle_weights
from asn_rl.particles import ParticleConfig, ParticleSet, particle_filter
from asn_rl.rewards.step_scorers import RIGHT, UNINFORMATIVE, WRONG, arithmetic_chain, corrupted
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Prompt

BASE, GREEDY = Pipeline([]), Pipeline([{"name": "greedy"}])
PROMPTS = [Prompt("a", "w1"), Prompt("b", "w2"), Prompt("c", "w3")]
SIZE = {"head": 4, "tail": 2}
ONE_TOKEN = ParticleConfig(delimiter="", step_tokens=1, max_steps=2, **SIZE)


def constant(prompts: Sequence[Prompt], partials: Sequence[str]) -> list[float]:
    return [0.3] * len(partials)


def by_odds(odds: Callable[[tuple[str, ...]], float]):
    """A scorer whose score has these odds."""
    return lambda prompts, partials: [(o := odds(tuple(text.split()))) / (1 + o) for text in partials]


@pytest.fixture
def endless() -> ToyBackend:
    """Four words; no sequence ends by itself."""
    table = ToyBackend.random(vocab=5, seed=3, scale=1.0).table.clone()
    table[:, 0] = -math.inf
    return ToyBackend(table)


# The filter, against enumeration


def distribution(sets: ParticleSet) -> dict[tuple[str, ...], float]:
    mass: Counter[tuple[str, ...]] = Counter()
    for text, weight in zip(sets.completions, sets.weights, strict=True):
        mass[tuple(text.split())] += float(weight)
    return mass


def enumerated(backend: ToyBackend, first: str, weight: Callable[[tuple[str, ...]], float]) -> dict:
    """p(two words | first) * weight, normalised."""
    probs = backend.table.double().softmax(-1)
    words = backend.words[1:]
    chance = {(x, y): float(probs[backend.ids[x], backend.ids[y]]) for x, y in product(words, words)}
    mass = {(x, y): chance[first, x] * chance[x, y] * weight((x, y)) for x, y in chance}
    return {pair: value / sum(mass.values()) for pair, value in mass.items()}


def close(found: dict, expected: dict, count: int) -> None:
    assert set(found) <= set(expected)
    for pair, share in expected.items():
        # Resampling at most doubles the variance of an independent sample here; weights do the rest.
        assert abs(found.get(pair, 0.0) - share) < 6 * math.sqrt(share * (1 - share) / count) + 1e-9, pair


def test_with_constant_scores_the_filter_samples_from_the_policy(endless: ToyBackend):
    n = 6000
    config = ParticleConfig(particles=n, delimiter="", step_tokens=1, max_steps=2, **SIZE)
    found = particle_filter(BASE, endless, PROMPTS[:1], constant, config)[0]
    assert found.effective_sizes == [pytest.approx(n)] * 2
    close(distribution(found), enumerated(endless, "w1", lambda pair: 1.0), n)


@pytest.mark.parametrize("entropic", [False, True])
def test_scores_tilt_the_distribution_by_the_product_of_their_odds(endless: ToyBackend, entropic: bool):
    n = 6000
    odds = {"w1": 0.5, "w2": 2.0, "w3": 1.0, "w4": 3.0}
    config = ParticleConfig(
        particles=n, delimiter="", step_tokens=1, max_steps=2, entropic=entropic, ess_share=0.0, temperature=2.0, **SIZE
    )
    found = particle_filter(BASE, endless, PROMPTS[:1], by_odds(lambda words: odds[words[-1]]), config)[0]
    expected = enumerated(endless, "w1", lambda pair: math.sqrt(odds[pair[0]] * odds[pair[1]]))
    close(distribution(found), expected, n)


def test_entropic_weights_are_annealed_before_they_are_resampled(endless: ToyBackend):
    """At the first of two steps the temperature is N over the effective sample size, known from the base model."""
    n = 6000
    odds = {"w1": 0.05, "w2": 1.0, "w3": 0.05, "w4": 6.0}
    config = ParticleConfig(
        particles=n, delimiter="", step_tokens=1, max_steps=2, entropic=True, ess_share=1.0, anneal_share=0.5, **SIZE
    )
    chance = endless.table[endless.ids["w1"]].double().softmax(-1)[1:].numpy()
    values = np.array([odds[word] for word in endless.words[1:]])
    heat = float(chance @ values**2 / (chance @ values) ** 2)
    assert heat > 1.5
    found = particle_filter(BASE, endless, PROMPTS[:1], by_odds(lambda words: odds[words[-1]]), config)[0]
    close(distribution(found), enumerated(endless, "w1", lambda pair: odds[pair[0]] ** (1 / heat) * odds[pair[1]]), n)


def test_an_exact_lookahead_score_gives_the_tilted_distribution_of_whole_completions(endless: ToyBackend):
    """Odds of a step = worth of the continuation after it over before it: their product is the worth of the end."""
    n = 6000
    probs = endless.table.double().softmax(-1)
    worth = {pair: 0.2 + 5.0 * (pair[1] == "w4") * (pair[0] != "w2") for pair in product(endless.words[1:], repeat=2)}

    def ahead(word: str) -> float:
        return sum(float(probs[endless.ids[word], endless.ids[y]]) * worth[word, y] for y in endless.words[1:])

    def odds(words: tuple[str, ...]) -> float:
        return ahead(words[0]) if len(words) == 1 else worth[words[0], words[1]] / ahead(words[0])

    config = ParticleConfig(particles=n, delimiter="", step_tokens=1, max_steps=2, **SIZE)
    found = particle_filter(BASE, endless, PROMPTS[:1], by_odds(odds), config)[0]
    close(distribution(found), enumerated(endless, "w1", lambda pair: worth[pair]), n)


def test_a_filter_that_moves_no_particle_draws_what_a_rollout_draws(toy: ToyBackend):
    """Systematic resampling of equal weights keeps every particle in its place."""
    config = ParticleConfig(particles=5, delimiter="", step_tokens=2, max_steps=4, entropic=True)
    found = particle_filter(BASE, toy, PROMPTS, constant, config, seed=7)
    plain = rollout(BASE, toy, PROMPTS, RolloutConfig(max_new_tokens=8), num_generations=5, seed=7)
    assert [ids for particles in found for ids in particles.completion_ids] == plain.completion_ids
    assert [done for particles in found for done in particles.terminated] == plain.terminated.tolist()
    assert sum(particles.tokens for particles in found) == len(plain.points)


def test_the_same_seed_gives_the_same_particles_whatever_shares_the_batch(toy: ToyBackend):
    config = ParticleConfig(particles=6, delimiter="w4", step_tokens=3, max_steps=5)
    scorer = by_odds(lambda words: 1.0 + len(set(words)))
    together = particle_filter(BASE, toy, PROMPTS, scorer, config, seed=1)
    alone = particle_filter(BASE, toy, PROMPTS[1:2], scorer, config, seed=1)[0]
    assert together[1].completion_ids == alone.completion_ids
    assert together[1].effective_sizes == alone.effective_sizes
    assert particle_filter(BASE, toy, PROMPTS, scorer, config, seed=2)[1].completion_ids != alone.completion_ids


# Steps


def test_steps_end_at_the_delimiter_or_at_their_length(endless: ToyBackend):
    seen: list[str] = []

    def watch(prompts: Sequence[Prompt], partials: Sequence[str]) -> list[float]:
        seen.extend(partials)
        return constant(prompts, partials)

    config = ParticleConfig(particles=200, delimiter="w3", step_tokens=4, max_steps=1, **SIZE)
    particle_filter(BASE, endless, PROMPTS[:1], watch, config)
    lengths = {len(text.split()) for text in seen}
    assert lengths == {1, 2, 3, 4}
    for text in seen:
        words = text.split()
        assert "w3" not in words[:-1]
        assert len(words) == 4 or words[-1] == "w3"


def test_finished_particles_keep_their_score_and_take_part_in_resampling(toy: ToyBackend):
    """Scores that favour short texts: the first particles to end take over, and only unfinished ones are scored."""
    scored: list[str] = []

    def short(prompts: Sequence[Prompt], partials: Sequence[str]) -> list[float]:
        scored.extend(partials)
        return [1 / (2 + 50 * len(text.split())) for text in partials]

    table = toy.table.clone()
    table[:, 0] = table[:, 1:].logsumexp(-1) - 1  # ends with probability 0.27
    config = ParticleConfig(particles=12, delimiter="", step_tokens=1, max_steps=6)
    found = particle_filter(BASE, ToyBackend(table), PROMPTS[:1], short, config)[0]
    ended_at_once = [text for text in found.completions if text == ""]
    assert len(ended_at_once) == 12, "all descend from the particles that ended at once"
    np.testing.assert_allclose(found.scores, 0.5)
    assert found.tokens == len(scored) < 12 * 6
    assert all(found.terminated)


def test_the_best_particle_is_the_first_with_the_highest_score(toy: ToyBackend):
    config = ParticleConfig(particles=8, delimiter="", step_tokens=2, max_steps=2)
    found = particle_filter(BASE, toy, PROMPTS[:1], by_odds(lambda words: float(1 + len(set(words)))), config)[0]
    assert found.scores[found.best] == found.scores.max()
    assert not (found.scores[: found.best] == found.scores.max()).any()
    np.testing.assert_allclose(found.weights, particle_weights(found.scores))


# Bad input


def test_policies_whose_state_would_not_follow_the_particles_are_refused(toy: ToyBackend):
    mirostat = Pipeline([{"name": "mirostat", "params": {"tau": 3.0}}])
    with pytest.raises(InvalidValue, match="policy must be stateless for a particle filter, got 'Pipeline'"):
        particle_filter(mirostat, toy, PROMPTS, constant, ONE_TOKEN)


def test_policies_that_read_what_a_filter_does_not_carry_are_refused(toy: ToyBackend):
    reader = Pipeline([])
    reader.needs = frozenset({"condition"})
    with pytest.raises(InvalidValue, match="needs of Pipeline must be a subset of"):
        particle_filter(reader, toy, PROMPTS, constant, ONE_TOKEN)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda n: [0.5] * (n - 1), "one score a partial"),
        (lambda n: torch.full((n,), 0.5), "got Tensor"),
        (lambda n: [0.0] * n, "strictly between 0 and 1, got 0.0"),
        (lambda n: [1.0] * n, "got 1.0"),
        (lambda n: [math.nan] * n, "got nan"),
        (lambda n: [None] * n, "got None"),
    ],
)
def test_scores_that_are_no_probabilities_are_refused(toy: ToyBackend, scores, message: str):
    with pytest.raises(RewardError, match=message):
        particle_filter(BASE, toy, PROMPTS, lambda prompts, partials: scores(len(partials)), ONE_TOKEN)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("particles", 0), ("step_tokens", 0), ("max_steps", 0), ("temperature", 0.0), ("temperature", math.nan)),
        *(("ess_share", 1.1), ("anneal_share", -0.1)),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: float):
    with pytest.raises(InvalidValue, match=f"{field} must be"):
        ParticleConfig(**{field: value})


def test_no_prompts_are_refused(toy: ToyBackend):
    with pytest.raises(DataError, match="prompt list is empty"):
        particle_filter(BASE, toy, [], constant, ONE_TOKEN)


# Step scorers

QUESTION = Prompt("q", "?")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("3 + 4 = 7", RIGHT),
        ("3 + 4 = 8", WRONG),
        ("3 + 4 = 7\n7 - 2 = 5.", RIGHT),
        ("3 + 4 = 7, 7 + 5 = 13", WRONG),
        ("3+4=8\n8 + 1 = 9", WRONG),
        ("First, 3 + 4 + 5 = 7 + 5 = 12.", RIGHT),
        ("2 + 3 * 4 = 14", RIGHT),
        ("12 / 3 / 2 = 2", RIGHT),
        ("3 x 4 = 12 apples", RIGHT),
        ("8 \u2212 3 = 5", RIGHT),
        ("3 \u00d7 4 = 13.", WRONG),
        ("5 - -3 = 8", RIGHT),
        ("1,000 + 1 = 1,001", RIGHT),
        ("7 = 3 + 4", RIGHT),
        ("10 / 3 = 3.33", RIGHT),
        ("10 / 3 = 3.34", UNINFORMATIVE),
        ("10 / 3 = 3.34\n", WRONG),
        ("10 / 3 = 3.", WRONG),
        ("0.1 + 0.2 = 0.3", RIGHT),
        ("3 + 9 = 1", UNINFORMATIVE),  # may become 12
        ("3 + 9 = 1\n", WRONG),
        ("3 + 9 = 2", WRONG),
        ("3 + 4 = 7\n9 + 9 = 1", RIGHT),
        ("3 + 4 =", UNINFORMATIVE),
        ("3 + = 4", UNINFORMATIVE),
        ("2 * (3 + 4) = 15", UNINFORMATIVE),
        ("x - 3 = 8", UNINFORMATIVE),
        ("2x + 3 = 8", UNINFORMATIVE),
        ("2^3 + 1 = 8", UNINFORMATIVE),
        ("3 + 4 = 8x", UNINFORMATIVE),
        ("10% + 5 = 8", UNINFORMATIVE),
        ("half of 50 = 25", UNINFORMATIVE),
        ("1 / 0 = 3", UNINFORMATIVE),
        ("no sums", UNINFORMATIVE),
        ("", UNINFORMATIVE),
        ("9" * 5000 + " + 1 = 3", UNINFORMATIVE),
    ],
)
def test_equations_are_checked_and_what_is_malformed_is_not_wrong(text: str, score: float):
    assert arithmetic_chain([QUESTION], [text]) == [score]


def test_every_small_equation_is_judged():
    for a, b, c in product(range(6), range(6), range(-6, 12)):
        for operation, value in (("+", a + b), ("-", a - b), ("*", a * b)):
            expected = RIGHT if c == value else WRONG
            assert arithmetic_chain([QUESTION], [f"{a} {operation} {b} = {c}\n"]) == [expected]


def test_corruption_turns_the_stated_share_of_scores_round():
    texts = [f"{a} + {b} = {a + b}\n" for a in range(50) for b in range(40)]
    prompts = [QUESTION] * len(texts)
    wrong = corrupted(arithmetic_chain, 0.3, seed=1)
    scores = wrong(prompts, texts)
    assert set(scores) == {RIGHT, 1 - RIGHT}
    turned = np.mean([score < 0.5 for score in scores])
    assert abs(turned - 0.3) < 4 * math.sqrt(0.3 * 0.7 / len(texts))
    assert scores == wrong(prompts, texts)
    assert scores != corrupted(arithmetic_chain, 0.3, seed=2)(prompts, texts)
    assert corrupted(arithmetic_chain, 0.0)(prompts, texts) == [RIGHT] * len(texts)
    with pytest.raises(InvalidValue, match=r"rate must be in \[0, 1\]"):
        corrupted(arithmetic_chain, 1.5)


# The embedded model


def test_restarting_the_base_model_changes_no_greedy_completion(smollm: HFBackend):
    prompts = [Prompt("sum", "What is 3 + 4?"), Prompt("list", "Name two animals, one a line.")]
    config = ParticleConfig(particles=2, delimiter=" ", step_tokens=5, max_steps=4)
    found = particle_filter(GREEDY, smollm, prompts, arithmetic_chain, config)
    plain = rollout(GREEDY, smollm, prompts, RolloutConfig(max_new_tokens=20))
    for particles, ids in zip(found, plain.completion_ids, strict=True):
        for own in particles.completion_ids:
            assert own == ids[: len(own)]
        assert len(particles.completion_ids[0]) >= 4
    assert all(RIGHT in particles.scores or UNINFORMATIVE in particles.scores for particles in found)
