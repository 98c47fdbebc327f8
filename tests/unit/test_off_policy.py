from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asn_policies.heuristics import Pipeline
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import DataError, InvalidValue
from asn_rl.evaluation.off_policy import (
    decision_terms,
    doubly_robust,
    effective_sample_size,
    ips,
    log_ratios,
    per_decision,
    self_normalised,
)
from asn_rl.evaluation.offline_tuning import best_setting, tuning_curve
from asn_rl.evaluation.reward_log import RewardLog
from asn_rl.evaluation.statistics import Resampling, bootstrap
from asn_rl.protocols import Policy
from asn_rl.replay import replay
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Prompt, Trajectories

HOW = Resampling(resamples=500)
TOY = ToyBackend.random(vocab=4, seed=0, scale=1.0)
CONFIG = RolloutConfig(max_new_tokens=3)
BASE = Pipeline([])


def rule(name: str, **params: float) -> dict[str, object]:
    return {"name": name, "params": params}


def temperature(value: float) -> Pipeline:
    return Pipeline([rule("temperature", temperature=value)])


# Bandits: every possible log of two prompts, three actions and one draw each

REWARDS = np.array([[0.1, 0.9, 0.4], [0.7, 0.2, 0.5]])
BEHAVIOUR = np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
TARGET = np.array([[0.7, 0.0, 0.3], [0.1, 0.8, 0.1]])
MODEL = np.array([[0.3, 0.2, 0.6], [0.5, 0.5, 0.0]])
TRUTH = float((TARGET * REWARDS).sum(-1).mean())


def drawn_log(actions: np.ndarray, rewards: np.ndarray, propensities: np.ndarray) -> RewardLog:
    """A log of (P, S) drawn actions; rewards (P, A) or (P, A, S)."""
    count, size = propensities.shape
    chosen = np.arange(size)[:, None] == actions[:, None]
    full = np.broadcast_to(rewards.reshape(count, size, -1), chosen.shape)
    return RewardLog(
        np.where(chosen, full, np.nan), chosen.astype(int), tuple("abc"[:size]), tuple(map(str, range(count))),
        ("all",) * count, np.zeros((count, 0)), propensities,
    )  # fmt: skip


def every_log() -> list[tuple[float, RewardLog]]:
    """(probability, log) of everything that could have been drawn."""
    draws = itertools.product(range(3), repeat=2)
    return [(BEHAVIOUR[0, a] * BEHAVIOUR[1, b], drawn_log(np.array([[a], [b]]), REWARDS, BEHAVIOUR)) for a, b in draws]


def test_ips_and_doubly_robust_are_unbiased_over_all_draws() -> None:
    estimators = (lambda log: ips(log, TARGET, HOW), lambda log: doubly_robust(log, TARGET, MODEL, HOW))
    for estimator in estimators:
        assert sum(p * estimator(log).reward.mean for p, log in every_log()) == pytest.approx(TRUTH, abs=1e-12)
    assert sum(p * ips(log, TARGET, HOW).mean_weight for p, log in every_log()) == pytest.approx(1)


def test_doubly_robust_is_exact_where_its_model_is() -> None:
    for _, log in every_log():
        assert doubly_robust(log, TARGET, REWARDS, HOW).reward.mean == pytest.approx(TRUTH)


def test_hand_worked_estimates() -> None:
    log = drawn_log(np.array([[0, 2], [1, 1]]), REWARDS, BEHAVIOUR)
    weights = np.array([[3.5, 1.0], [8 / 3, 8 / 3]])
    rewards = np.array([[0.1, 0.4], [0.2, 0.2]])
    assert ips(log, TARGET, HOW).reward.mean == pytest.approx((weights * rewards).mean())
    found = self_normalised(log, TARGET, HOW)
    assert found.reward.mean == pytest.approx((weights * rewards).sum() / weights.sum())
    assert found.ess == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
    assert found.mean_weight == pytest.approx(weights.mean())
    model = (TARGET * MODEL).sum(-1)[:, None] + weights * (rewards - np.array([[0.3, 0.6], [0.5, 0.5]]))
    assert doubly_robust(log, TARGET, MODEL, HOW).reward.mean == pytest.approx(model.mean())


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, covered, trials = np.random.default_rng(0), 0, 200
    for trial in range(trials):
        success = rng.beta(2, 2, (60, 3))
        actions = np.minimum((BEHAVIOUR[0].cumsum() < rng.random((60, 4, 1))).sum(-1), 2)
        rewards = rng.binomial(1, success[..., None], (60, 3, 4)).astype(float)
        log = drawn_log(actions, rewards, np.tile(BEHAVIOUR[0], (60, 1)))
        target = np.tile(TARGET[1], (60, 1))
        found = self_normalised(log, target, Resampling(resamples=300, level=0.9, seed=trial)).reward
        covered += found.low <= (TARGET[1] * 0.5).sum() <= found.high
    # Three standard deviations of the count, and two percent for the percentile method at 60 prompts.
    assert abs(covered / trials - 0.9) < 3 * math.sqrt(0.9 * 0.1 / trials) + 0.02


def test_copies_of_samples_narrow_nothing() -> None:
    """A prompt is the unit: five copies of each sample are no more evidence."""
    rng = np.random.default_rng(0)
    actions, rewards = rng.integers(0, 2, (30, 1)), rng.random((30, 2, 1))
    half = np.full((30, 2), 0.5)
    once = ips(drawn_log(actions, rewards, half), half, HOW)
    copies = ips(drawn_log(actions.repeat(5, 1), rewards.repeat(5, 2), half), half, HOW)
    assert copies.reward.low == pytest.approx(once.reward.low)
    assert copies.reward.high == pytest.approx(once.reward.high)


def test_masked_samples_are_left_out() -> None:
    log = drawn_log(np.array([[0, 2], [1, 1]]), REWARDS, BEHAVIOUR)
    rewards = np.where(np.arange(2) == 1, np.nan, log.rewards)
    masked = RewardLog(**{**vars(log), "rewards": rewards})
    alone = drawn_log(np.array([[0], [1]]), REWARDS, BEHAVIOUR)
    for estimator in (ips, self_normalised):
        assert estimator(masked, TARGET, HOW) == estimator(alone, TARGET, HOW)


def test_a_log_without_propensities_is_refused() -> None:
    log = RewardLog(
        REWARDS[..., None], np.ones((2, 3, 1), int), ("a", "b", "c"), ("0", "1"), ("all",) * 2, np.zeros((2, 0))
    )
    for estimate in (ips, self_normalised, lambda *given: doubly_robust(*given, MODEL)):
        with pytest.raises(InvalidValue, match=r"propensities must be the \(P, A\) .* got None; a log without"):
            estimate(log, TARGET)


def test_targets_and_models_that_do_not_fit_are_refused() -> None:
    _, log = every_log()[0]
    with pytest.raises(InvalidValue, match=r"target shape must be \(2, 3\)"):
        ips(log, TARGET[:1])
    with pytest.raises(InvalidValue, match="target of prompt 0 must be >= 0 with sum 1"):
        ips(log, TARGET * 2)
    with pytest.raises(InvalidValue, match="model must be finite predictions"):
        doubly_robust(log, TARGET, MODEL[:1])
    with pytest.raises(InvalidValue, match=r"level must be in \(0, 1\), got 1.5"):
        Resampling(level=1.5)
    with pytest.raises(InvalidValue, match="resamples must be >= 1"):
        Resampling(resamples=0)


# Token policies: every completion of a four-word toy language


def every_completion() -> list[list[int]]:
    """All token sequences of at most three tokens, ended by token 0 or by the limit."""
    found = []
    for ids in itertools.product(range(4), repeat=3):
        cut = list(ids[: ids.index(0) + 1]) if 0 in ids else list(ids)
        if cut not in found:
            found.append(cut)
    return found


def enumerated() -> Trajectories:
    """Each completion as a prompt of its own, replayed at T = 1."""
    ids = every_completion()
    out, _ = replay(BASE, TOY, [Prompt(f"{i:03d}", "w2") for i in range(len(ids))], ids, CONFIG)
    return out.with_logprobs(out.behaviour_logprobs)  # every completion there is, each with its exact probability


def probabilities(scale: float = 1.0, kept: int = 4) -> np.ndarray:
    """Probability of each completion at temperature 1 / scale among the `kept` most probable tokens, float64."""
    logits = TOY.table.double() * scale
    least = logits.topk(kept, -1).values[:, -1:]
    table = torch.where(logits >= least, logits, -math.inf).log_softmax(-1)
    pairs = [itertools.pairwise([2, *ids]) for ids in every_completion()]
    return np.array([math.exp(sum(float(table[a, b]) for a, b in steps)) for steps in pairs])


ALL = enumerated()
ENDS = np.random.default_rng(0).random(len(ALL))
STEPS = np.concatenate([np.arange(len(ids)) for ids in ALL.completion_ids])
# A reward of the step and the token: what comes later cannot change it.
PER_TOKEN = np.random.default_rng(1).random((3, 4))[STEPS, [token for ids in ALL.completion_ids for token in ids]]
TARGETS: list[tuple[Policy, np.ndarray]] = [
    (temperature(0.5), probabilities(2.0)),
    (temperature(1.7), probabilities(1 / 1.7)),
    (Pipeline([rule("top_k", top_k=2)]), probabilities(kept=2)),
    (Pipeline([rule("greedy")]), probabilities(kept=1)),
]  # fmt: skip


def test_the_enumeration_is_whole() -> None:
    assert probabilities().sum() == pytest.approx(1)
    np.testing.assert_allclose(np.exp(np.bincount(ALL.rows, ALL.behaviour_logprobs)), probabilities(), rtol=1e-5)


@pytest.mark.parametrize(("policy", "target"), TARGETS)
def test_log_ratios_are_those_of_the_whole_vocabulary(policy: Policy, target: np.ndarray) -> None:
    found = np.exp(np.bincount(ALL.rows, log_ratios(policy, ALL).numpy()))
    np.testing.assert_allclose(found, target / probabilities(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("policy", "target"), TARGETS)
def test_weighting_is_unbiased_over_all_completions(policy: Policy, target: np.ndarray) -> None:
    """Sum over completions of behaviour probability times weighted reward = sum of target probability times reward."""
    ratios = log_ratios(policy, ALL).numpy()
    terms = decision_terms(ratios, ALL, ENDS, normalise=False)
    assert probabilities() @ terms.numerators.sum(-1) == pytest.approx(target @ ENDS, rel=1e-5)
    terms = decision_terms(ratios, ALL, ENDS, token_rewards=PER_TOKEN, normalise=False)
    returns = ENDS + np.bincount(ALL.rows, PER_TOKEN)
    assert probabilities() @ terms.numerators.sum(-1) == pytest.approx(target @ returns, rel=1e-5)


def test_rewards_are_weighted_by_the_decisions_before_them_only() -> None:
    ratios = log_ratios(temperature(0.5), ALL).numpy()
    terms = decision_terms(ratios, ALL, np.zeros(len(ALL)), token_rewards=PER_TOKEN, normalise=False)
    starts = np.concatenate([[0], ALL.lengths.numpy().cumsum()[:-1]])
    expected = [
        sum(math.exp(ratios[low : low + t + 1].sum()) * PER_TOKEN[low + t] for t in range(length))
        for low, length in zip(starts, ALL.lengths.tolist(), strict=True)
    ]
    np.testing.assert_allclose(terms.numerators.sum(-1), expected)


def test_later_decisions_add_no_variance_to_earlier_rewards() -> None:
    first = np.where(STEPS == 0, PER_TOKEN, 0)
    ratios, chances = log_ratios(temperature(0.5), ALL).numpy(), probabilities()
    rewards = np.bincount(ALL.rows, first)
    whole = decision_terms(ratios, ALL, rewards, normalise=False)
    by_step = decision_terms(ratios, ALL, np.zeros(len(ALL)), token_rewards=first, normalise=False)
    means, variances = [], []
    for terms in (whole, by_step):
        gain = terms.numerators.sum(-1)
        means.append(chances @ gain)
        variances.append(chances @ gain**2 - means[-1] ** 2)
    assert means[0] == pytest.approx(means[1])
    assert variances[1] < variances[0]


def toy_log(policy: Policy, groups: int = 40, size: int = 25, seed: int = 1) -> tuple[Trajectories, np.ndarray]:
    """Completions of the toy language with the rewards that its enumeration has."""
    prompts = [Prompt(f"{i:03d}", "w2") for i in range(groups)]
    out = rollout(policy, TOY, prompts, CONFIG, num_generations=size, seed=seed)
    index = [every_completion().index(list(ids)) for ids in out.completion_ids]
    return out, ENDS[index]


@pytest.mark.parametrize("steps", [[], [rule("temperature", temperature=0.6)], [{"name": "mirostat"}]])
def test_a_policy_on_its_own_log_has_weight_one(steps: list[dict[str, object]]) -> None:
    policy = Pipeline(steps)
    log, rewards = toy_log(policy)
    assert log_ratios(policy, log).abs().max() < 1e-5
    found = per_decision(policy, log, rewards, how=HOW)
    assert found.ess == pytest.approx(len(log))
    assert found.mean_weight == pytest.approx(1)
    expected = bootstrap(rewards.reshape(40, 25).mean(-1), ["all"] * 40)
    assert found.reward.mean == pytest.approx(expected.mean)
    assert found.reward.low == pytest.approx(expected.low, abs=0.1 * (expected.high - expected.low))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("policy", "target"), TARGETS)
def test_estimates_from_a_sampled_log_hold_the_truth(policy: Policy, target: np.ndarray, normalise: bool) -> None:
    log, rewards = toy_log(BASE)
    found = per_decision(policy, log, rewards, normalise=normalise, how=Resampling(level=0.999, resamples=2000))
    assert found.reward.low < target @ ENDS < found.reward.high
    assert 1 < found.ess <= len(log)
    price = np.full(len(log.points), -0.1)
    priced = per_decision(policy, log, rewards, token_rewards=price, normalise=normalise, how=HOW)
    cost = target @ ALL.lengths.double().numpy()
    assert priced.reward.mean == pytest.approx(found.reward.mean - 0.1 * cost, abs=0.05)


def test_a_log_that_left_tokens_out_shows_in_the_mean_weight() -> None:
    log, rewards = toy_log(Pipeline([rule("top_k", top_k=2)]))
    assert per_decision(BASE, log, rewards, how=HOW).mean_weight < 0.8


def test_differences_to_fresh_values_of_the_same_prompts_are_paired() -> None:
    log, rewards = toy_log(BASE)
    shared = np.random.default_rng(0).normal(0, 5, 40)  # what the prompts have in common
    rewards = rewards + shared.repeat(25)
    terms = decision_terms(log_ratios(BASE, log).numpy(), log, rewards)
    gap = terms.minus(shared).interval(HOW)
    assert gap.mean == pytest.approx(rewards.mean() - shared.mean())
    assert gap.high - gap.low < 0.05 * (terms.interval(HOW).high - terms.interval(HOW).low)


def test_strata_weigh_the_same_and_masks_count_nowhere() -> None:
    log, rewards = toy_log(BASE, groups=4, size=10)
    strata = ["few"] * 10 + ["many"] * 30
    found = per_decision(BASE, log, rewards, strata, how=HOW)
    assert found.reward.mean == pytest.approx((rewards[:10].mean() + rewards[10:].mean()) / 2)
    masked = np.where(np.arange(40) < 10, rewards, np.nan)
    assert per_decision(BASE, log, masked, how=HOW).reward.mean == pytest.approx(rewards[:10].mean())


def test_no_weight_is_no_estimate() -> None:
    log, rewards = toy_log(BASE, groups=2, size=1)
    never = [i for i, ids in enumerate(log.completion_ids) if ids[0] != int(TOY.table[2].argmax())]
    part = log.select(never[:1])
    found = per_decision(Pipeline([rule("greedy")]), part, rewards[never[:1]], how=HOW)
    assert found.ess == 0
    assert math.isnan(found.reward.mean)
    assert math.isnan(found.reward.low)


@settings(deadline=None, max_examples=50)
@given(logs=st.lists(st.floats(-900, 5), min_size=1, max_size=30))
def test_the_effective_sample_size_is_at_most_that_of_kong(logs: list[float]) -> None:
    weights = np.exp(np.array(logs) - max(logs))
    kong = weights.sum() ** 2 / (weights**2).sum()
    found = effective_sample_size(np.array(logs))
    assert 0 < found <= kong + 1e-9
    assert kong <= len(logs) + 1e-9
    if np.exp(logs).sum() >= len(logs):
        assert found == pytest.approx(kong)


def test_effective_sample_sizes_in_closed_form() -> None:
    assert effective_sample_size(np.zeros(7)) == pytest.approx(7)
    assert effective_sample_size(np.log([1.0, 3.0])) == pytest.approx(16 / 10)
    assert effective_sample_size(np.array([-math.inf, 0.0])) == 1
    assert effective_sample_size(np.array([-math.inf])) == 0
    # A hundred equal weights of a half: as much again is missing, in one sample.
    assert effective_sample_size(np.log(np.full(100, 0.5))) == pytest.approx(100**2 / (100 / 4 + 50**2))


def test_mass_that_was_never_drawn_lowers_the_effective_sample_size() -> None:
    """Half of the time the target says what the log never drew; the weights that are there are even all the same."""
    never, size = 1e-9, 1000
    target, behaviour = np.array([0.5 - never, 0.5, never]), np.array([1 - 2 * never, never, never])
    log = drawn_log(np.zeros((size, 1), int), np.tile([0.2, 0.9, 0.0], (size, 1)), np.tile(behaviour, (size, 1)))
    found = ips(log, np.tile(target, (size, 1)), HOW)
    assert found.mean_weight == pytest.approx(0.5)
    assert found.ess == pytest.approx(4, rel=0.01)


def test_a_stratum_without_effective_samples_is_not_made_up_for_by_another() -> None:
    """The estimate is a mean over strata, and its variance that of the strata."""
    log, rewards = toy_log(BASE, groups=4, size=10)
    strata = ["a"] * 20 + ["b"] * 20
    assert per_decision(BASE, log, rewards, strata, how=HOW).ess == pytest.approx(40)
    ratios = np.where(log.rows.numpy() < 20, 0.0, -math.inf)
    ratios[(log.rows == 39).numpy()] = math.log(20) / int(log.lengths[39])
    terms = decision_terms(ratios, log, rewards, strata)
    assert terms.ess == pytest.approx(4 / (1 / 20 + 1 / 1))


class NeedsHidden(Pipeline):
    def __init__(self) -> None:
        super().__init__([])
        self.needs = frozenset({"hidden"})


def spoilt() -> Trajectories:
    logprobs = ALL.behaviour_logprobs.clone()
    logprobs[3] = math.nan
    return ALL.with_logprobs(logprobs)


def test_a_text_of_unknown_origin_is_no_log() -> None:
    log, rewards = toy_log(BASE, groups=2, size=1)
    ids, config = log.completion_ids, RolloutConfig(max_new_tokens=max(map(len, log.completion_ids)))
    replayed, _ = replay(BASE, TOY, log.prompts, ids, config)
    with pytest.raises(DataError, match="the log has no propensities"):
        tuning_curve({1.0: BASE}, replayed, rewards)
    logprobs = [part.tolist() for part in log.behaviour_logprobs.split(log.lengths.tolist())]
    given, _ = replay(BASE, TOY, log.prompts, ids, config, logprobs=logprobs)
    assert given.recorded


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: log_ratios(NeedsHidden(), ALL), DataError, r"did not record hidden.*capture=\['hidden'\]"),
        (lambda: log_ratios(BASE, replace(ALL, recorded=False)), DataError, "the log has no propensities"),
        (lambda: log_ratios(BASE, spoilt()), DataError, r"the log-prob of token 3 in the log is nan"),
        (lambda: per_decision(BASE, ALL, ENDS[1:]), InvalidValue, "rewards shape must be"),
        (lambda: per_decision(BASE, ALL, ENDS, token_rewards=ENDS), InvalidValue, "token_rewards shape must be"),
        (lambda: per_decision(BASE, ALL, ENDS, ["a"]), InvalidValue, "strata must be 40 labels, one a completion"),
        (lambda: per_decision(BASE, ALL, np.full(len(ALL), math.nan)), InvalidValue, "all are masked"),
        (
            lambda: per_decision(BASE, toy_log(BASE, 1, 2)[0], np.ones(2), ["a", "b"]),
            InvalidValue,
            "equal for all completions of a prompt",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# Tuning offline


def test_a_tuning_curve_holds_the_enumerated_values_and_marks_what_it_cannot_know() -> None:
    log, rewards = toy_log(BASE)
    values = (0.05, 0.5, 0.8, 1.0, 1.5)
    how = Resampling(level=0.999, resamples=2000)
    curve = tuning_curve({t: temperature(t) for t in values}, log, rewards, min_ess=600, how=how)
    assert [setting.value for setting in curve] == list(values)
    assert [setting.trusted for setting in curve] == [False, True, True, True, True]
    assert curve[3].estimate.ess == pytest.approx(len(log))
    for setting in curve[1:]:
        truth = probabilities(1 / setting.value) @ ENDS
        assert setting.estimate.reward.low < truth < setting.estimate.reward.high
    best = best_setting(curve)
    assert best.trusted
    assert best.estimate.reward.low == max(s.estimate.reward.low for s in curve[1:])
    with pytest.raises(DataError, match=r"can be trusted: the effective sample size is \d+ at most"):
        best_setting(curve[:1])


def test_logs_that_were_not_drawn_at_temperature_one_are_refused() -> None:
    log, rewards = toy_log(temperature(0.5))
    with pytest.raises(DataError, match="not drawn at T = 1"):
        tuning_curve({1.0: BASE}, log, rewards)
    with pytest.raises(InvalidValue, match="policies must be at least one value"):
        tuning_curve({}, log, rewards)
    with pytest.raises(InvalidValue, match="min_ess must be > 0"):
        tuning_curve({1.0: BASE}, log, rewards, min_ess=0)


# The real model


def test_ratios_on_the_real_model_are_those_of_its_vocabulary(smollm: HFBackend) -> None:
    prompts = [Prompt("a", "What is 3 + 4?"), Prompt("b", "Name an animal.")]
    log = rollout(BASE, smollm, prompts, RolloutConfig(max_new_tokens=8), num_generations=4, seed=3)
    assert log_ratios(BASE, log).abs().max() < 1e-4
    found = log_ratios(temperature(0.7), log)
    expected = torch.empty_like(found)
    starts = log.lengths.cumsum(0) - log.lengths
    for i, completion in enumerate(log.completion_ids):
        logits, ids = smollm.score(log.prompt_ids[i], completion)[0], torch.tensor(completion).unsqueeze(-1)
        warm, cold = (part.double().log_softmax(-1).gather(-1, ids).squeeze(-1) for part in (logits, logits / 0.7))
        expected[starts[i] : starts[i] + len(ids)] = cold - warm
    # The tail's tokens take the mean probability of their bin; DESIGN section 2.
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.02)
    assert (found - expected).abs().median() < 2e-3
