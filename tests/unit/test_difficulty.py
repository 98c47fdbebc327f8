from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from asn_policies import Pipeline
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import InvalidValue
from asn_rl.evaluation.difficulty import (
    LEVELS,
    SETTINGS,
    LevelSettings,
    ProbeConfig,
    Thresholds,
    cross_validated,
    difficulty_levels,
    fit_probe,
    folds,
    mean_entropies,
    predicted_curves,
)
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Prompt

QUICK = ProbeConfig(width=16, epochs=60, learning_rate=1e-2)


def clusters(count: int, distance: float, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Three Gaussian clusters of prompts in 8 dimensions, with their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = np.arange(count) % 3
    centres = distance * torch.eye(3, 8)
    return centres[labels] + torch.randn(count, 8, generator=generator), labels


# Levels


def test_levels_at_hand_values():
    accuracy, entropy = np.array([0.9, 0.9, 0.5, 0.1, 0.1]), np.array([0.2, 0.8, 0.2, 0.2, 0.8])
    found = difficulty_levels(accuracy, entropy, Thresholds(entropy=0.5))
    assert [LEVELS[i] for i in found] == ["normal", "easy", "easy", "hard", "hard"]


def test_thresholds_belong_to_the_level_the_paper_puts_them_in():
    at_the_edge = difficulty_levels(np.array([0.7, 0.3]), np.array([0.5, 0.5]), Thresholds(entropy=0.5))
    assert [LEVELS[i] for i in at_the_edge] == ["normal", "easy"]


def test_levels_without_values_are_refused():
    with pytest.raises(InvalidValue, match="as many finite numbers"):
        difficulty_levels(np.array([math.nan]), np.array([0.1]), Thresholds(entropy=0.5))
    with pytest.raises(InvalidValue, match="as many finite numbers"):
        difficulty_levels(np.array([0.5]), np.array([0.1, 0.2]), Thresholds(entropy=0.5))


@pytest.mark.parametrize("values", [{"hard_accuracy": 0.8}, {"normal_accuracy": 1.2}, {"hard_accuracy": -0.1}])
def test_thresholds_out_of_order_are_refused(values: dict[str, float]):
    with pytest.raises(InvalidValue, match="hard_accuracy <= normal_accuracy"):
        Thresholds(entropy=0.5, **values)


def test_a_negative_entropy_threshold_is_refused():
    with pytest.raises(InvalidValue, match="entropy must be >= 0"):
        Thresholds(entropy=-1.0)


def test_settings_of_the_levels():
    assert {name: (s.temperature, s.max_new_tokens(100)) for name, s in SETTINGS.items()} == {
        "easy": (0.5, 40),
        "normal": (0.8, 100),
        "hard": (0.4, 50),
    }
    assert LevelSettings(1.0, 0.01).max_new_tokens(10) == 1


def test_mean_entropies_are_those_of_the_full_distributions(toy: ToyBackend):
    prompts = [Prompt("a", "w1"), Prompt("b", "w2")]
    run = rollout(Pipeline([]), toy, prompts, RolloutConfig(max_new_tokens=6), num_generations=3)
    exact = torch.distributions.Categorical(logits=toy.table.double()).entropy()
    expected = []
    for prompt, ids in zip(run.prompt_ids, run.completion_ids, strict=True):
        before = [prompt[-1], *ids[:-1]]
        expected.append(float(exact[before].mean()))
    np.testing.assert_allclose(mean_entropies(run), expected, atol=1e-4)


# The probe


@pytest.mark.parametrize("width", [0, 16])
def test_a_probe_tells_apart_what_is_apart_and_admits_what_is_not(width: int):
    config = ProbeConfig(width=width, epochs=100, learning_rate=1e-2)
    train, labels = clusters(150, distance=5.0)
    test, truth = clusters(150, distance=5.0, seed=1)
    found = fit_probe(train, labels, 3, config).probabilities(test)
    np.testing.assert_allclose(found.sum(1), 1)
    assert (found.argmax(1) == truth).mean() > 0.95
    blurred, _ = clusters(150, distance=0.0)
    held_out = cross_validated(blurred, labels, 3, config, folds(range(150), 5))
    assert (held_out.argmax(1) == labels).mean() < 0.5, "out of fold nothing is learned from noise"


def test_a_linear_probe_reaches_the_weighted_optimum():
    """Against Newton's method on the same loss in float64, one input, two classes."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=200)
    labels = (x + generator.normal(size=200) > 0.8).astype(int)
    config = ProbeConfig(width=0, epochs=1500, learning_rate=0.02, weight_decay=0.0)
    found = fit_probe(torch.tensor(x[:, None], dtype=torch.float32), labels, 2, config)
    odds = np.log(np.divide(*found.probabilities(torch.tensor([[0.5], [-0.5]])).T[::-1]))
    weight = 200 / (2 * np.bincount(labels))[labels]
    inputs, beta = np.stack([np.ones(200), x], 1), np.zeros(2)
    for _ in range(30):
        p = 1 / (1 + np.exp(-inputs @ beta))
        step = np.linalg.solve(
            (inputs * (weight * p * (1 - p))[:, None]).T @ inputs, inputs.T @ (weight * (labels - p))
        )
        beta += step
    np.testing.assert_allclose(odds, beta @ np.array([[1, 1], [0.5, -0.5]]), atol=0.02)


def test_the_same_seed_gives_the_same_probe_and_leaves_the_global_generator_alone():
    data, labels = clusters(30, 2.0)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = fit_probe(data, labels, 3, QUICK).probabilities(data)
    assert torch.rand(1) == expected
    np.testing.assert_array_equal(first, fit_probe(data, labels, 3, QUICK).probabilities(data))


def test_a_constant_feature_and_an_absent_class_do_no_harm():
    data, labels = clusters(30, 4.0)
    data[:, 7] = 3.0
    found = fit_probe(data, labels % 2, 3, QUICK).probabilities(data)
    assert np.isfinite(found).all()
    assert found[:, 2].mean() < 0.2


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 3], [0, 1, -1]])
def test_labels_that_do_not_fit_are_refused(labels: list[int]):
    with pytest.raises(InvalidValue, match=r"labels must be one in \[0, 3\)"):
        fit_probe(torch.zeros(3, 2), labels, 3, QUICK)


@pytest.mark.parametrize(
    ("name", "value"), [("width", -1), ("epochs", 0), ("learning_rate", 0.0), ("weight_decay", -1)]
)
def test_probe_settings_out_of_range_are_refused(name: str, value: float):
    with pytest.raises(InvalidValue, match=name):
        ProbeConfig(**{name: value})


# Folds


def test_groups_stay_together_and_folds_have_equal_numbers_of_them():
    groups = [i // 2 for i in range(24)]
    found = folds(groups, 4)
    assert (found[::2] == found[1::2]).all()
    assert np.bincount(found).tolist() == [6] * 4
    assert (found != folds(groups, 4, seed=1)).any()


@pytest.mark.parametrize("count", [1, 4])
def test_more_folds_than_groups_or_one_are_refused(count: int):
    with pytest.raises(InvalidValue, match=r"folds must be in \[2, 3\]"):
        folds(["a", "a", "b", "c"], count)


def test_a_prompt_says_nothing_about_its_own_prediction():
    data, labels = clusters(30, 3.0)
    fold = folds(range(30), 5)
    before = cross_validated(data, labels, 3, QUICK, fold)
    changed = labels.copy()
    changed[fold == 2] = (changed[fold == 2] + 1) % 3
    after = cross_validated(data, changed, 3, QUICK, fold)
    np.testing.assert_array_equal(before[fold == 2], after[fold == 2])
    assert (before[fold != 2] != after[fold != 2]).any()


def test_predicted_curves_are_those_of_the_level_that_the_probe_sees():
    data, labels = clusters(120, 6.0)
    shape = np.array([[0.0, 0.9, 1.0], [0.0, 0.5, 0.6], [0.0, 0.1, 0.1]])
    fold = folds(range(120), 4)
    found = predicted_curves(data, shape[labels], labels, 3, QUICK, fold)
    assert np.abs(found - shape[labels]).mean() < 0.1
    untold = predicted_curves(torch.zeros(120, 8), shape[labels], labels, 3, QUICK, fold)
    np.testing.assert_allclose(untold, np.tile(shape.mean(0), (120, 1)), atol=0.05)


# The embedded model


def test_a_probe_on_real_embeddings_tells_long_sums_from_short_ones(smollm: HFBackend):
    prompts = [Prompt(f"{a}+{b}", f"What is {a} + {b}?") for a in (2, 4, 7) for b in (3, 5, 6)]
    prompts += [Prompt(f"{a}*{b}", f"What is {a} * {b} - 17 + {a}?") for a in (21, 43, 72) for b in (31, 54, 66)]
    run = rollout(Pipeline([]), smollm, prompts, RolloutConfig(max_new_tokens=1), capture={"prompt_embedding"})
    embedding = run.observations.prompt_embedding
    assert embedding is not None
    labels = np.repeat([0, 1], 9)
    found = cross_validated(embedding, labels, 2, ProbeConfig(width=0), folds(range(18), 3))
    assert (found.argmax(1) == labels).mean() > 0.9
    assert (mean_entropies(run) > 0).all()
