"""A candidate takes the incumbent's place only on evidence from fresh prompts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from asn_policies import LocalTransform, Pipeline
from asn_rl.backends import BackendConfig
from asn_rl.backends.hf import HFBackend
from asn_rl.checkpoint import load_policy, save_policy
from asn_rl.data import DataConfig
from asn_rl.errors import AsnError, CheckpointError, ConfigError, DataError, InvalidValue, UnknownName
from asn_rl.evaluation.context_range import outside_share
from asn_rl.evaluation.promotion import Decision, PromotionConfig, minimum_detectable_effect, promotion_test
from asn_rl.job import HeuristicSpec, Job, JobConfig, guard, promotion
from asn_rl.job.config import GuardConfig
from asn_rl.job.promotion import decided_on, folder_digest, promote
from asn_rl.rewards.compose import RewardConfig
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Prompt

NAN = math.nan
BERNSTEIN = PromotionConfig(bound="bernstein", reward_range=(0.0, 1.0))
QUICK = PromotionConfig(resamples=400)


def decide(differences: np.ndarray, config: PromotionConfig = QUICK, strata: list[str] | None = None) -> Decision:
    """The decision on paired differences in [-1, 1], as rewards in [0, 1]."""
    candidate, incumbent = np.maximum(differences, 0), np.maximum(-differences, 0)
    return promotion_test(candidate[:, None], incumbent[:, None], strata or ["all"] * len(differences), config)


# The test


def alike(rng: np.random.Generator, prompts: int) -> np.ndarray:
    """Eight samples each of two equal policies on prompts of every difficulty."""
    chance = rng.beta(0.5, 0.5, prompts)
    return (rng.binomial(8, chance) - rng.binomial(8, chance)) / 8


def rare_disaster(rng: np.random.Generator, prompts: int) -> np.ndarray:
    """A little better on most prompts, much worse on one in twenty; no better on average."""
    return np.where(rng.random(prompts) < 0.05, -0.95, 0.05)


@pytest.mark.parametrize(
    ("draw", "prompts", "config", "slack"),
    [
        (alike, 40, QUICK, 0.01),
        (alike, 150, QUICK, 0.01),
        (rare_disaster, 60, QUICK, 0.0),
        (rare_disaster, 150, QUICK, 0.0),
        (alike, 150, BERNSTEIN, 0.0),
        (rare_disaster, 150, BERNSTEIN, 0.0),
    ],
)
def test_a_candidate_that_is_no_better_is_promoted_as_rarely_as_promised(
    draw: Callable, prompts: int, config: PromotionConfig, slack: float
):
    """`slack`: how far the bootstrap-t misses its level at this size. Percentile and normal intervals promote the rare
    disaster in 11 to 20 % of the cases."""
    rng, trials = np.random.default_rng(0), 800
    strata = ["a"] * (prompts // 3) + ["b"] * (prompts - prompts // 3)
    outcomes = [decide(draw(rng, prompts), config, strata).outcome for _ in range(trials)]
    promised = 1 - config.level
    noise = 3 * math.sqrt(promised * (1 - promised) / trials)
    assert outcomes.count("promoted") / trials <= promised + slack + noise


def test_a_gain_of_the_detectable_size_is_found_as_often_as_stated():
    rng, trials = np.random.default_rng(0), 300
    spread = np.clip(rng.normal(0, 0.2, 100), -0.7, 0.7)
    gain = minimum_detectable_effect(spread, ["all"] * 100, QUICK)
    found = [decide(np.clip(gain + rng.choice(spread - spread.mean(), 100), -1, 1)).outcome for _ in range(trials)]
    assert found.count("promoted") / trials == pytest.approx(QUICK.power, abs=3 * math.sqrt(0.8 * 0.2 / trials))


def test_the_studentized_bound_of_normal_differences_is_students():
    values = np.clip(np.random.default_rng(0).normal(0.05, 0.2, 200), -1, 1)
    found = decide(values, PromotionConfig(resamples=20_000))
    error = values.std(ddof=1) / math.sqrt(200)
    assert found.gain == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - stats.t.ppf(0.95, 199) * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + stats.t.ppf(0.95, 199) * error, abs=0.1 * error)


def test_strata_weigh_the_same_and_their_errors_add():
    rng = np.random.default_rng(0)
    many, few = rng.normal(0.0, 0.1, 600), rng.normal(0.3, 0.2, 100)
    values, strata = np.concatenate([many, few]), ["many"] * 600 + ["few"] * 100
    found = decide(values, PromotionConfig(resamples=8_000), strata)
    error = math.sqrt(many.var(ddof=1) / 600 + few.var(ddof=1) / 100) / 2
    assert found.gain == pytest.approx((many.mean() + few.mean()) / 2)
    assert found.low == pytest.approx(found.gain - 1.645 * error, abs=0.1 * error)
    expected = (stats.norm.ppf(0.95) + stats.norm.ppf(0.8)) * error
    assert found.detectable == pytest.approx(expected)


def test_the_bernstein_bound_by_hand():
    values = np.array([0.5, -0.25, 1.0, 0.25])
    log = math.log(2 / 0.05)
    margin = math.sqrt(2 * values.var(ddof=1) * log / 4) + 7 * 2 * log / (3 * 3)
    found = decide(values, BERNSTEIN)
    assert (found.low, found.high) == (pytest.approx(0.375 - margin), pytest.approx(0.375 + margin))


def test_the_three_outcomes_and_their_sentences():
    rng = np.random.default_rng(0)
    noise = np.clip(rng.normal(0, 0.2, 100), -0.6, 0.6)
    better, worse, neither = (decide(noise - noise.mean() + shift) for shift in (0.2, -0.2, 0.01))
    assert [d.outcome for d in (better, worse, neither)] == ["promoted", "kept", "not enough evidence"]
    assert better.sentence.startswith("Promoted: on 100 prompts the candidate's mean reward differs by +0.2000")
    assert worse.sentence.startswith("The incumbent is kept: on 100 prompts")
    assert f"gain of {neither.detectable:.4f} or more 80 times in 100" in neither.sentence


def test_differences_without_spread_prove_nothing_but_bounded_ones_may():
    equal = np.full(60, 0.7)
    found = decide(equal)
    assert (found.outcome, found.low, found.high) == ("not enough evidence", -math.inf, math.inf)
    assert math.isnan(found.detectable)
    assert "cannot be estimated" in found.sentence
    assert decide(equal, BERNSTEIN).outcome == "promoted"
    assert decide(np.zeros(60)).outcome == "not enough evidence"


def test_masked_prompts_count_nowhere_and_are_counted():
    rng = np.random.default_rng(0)
    candidate, incumbent = rng.random((50, 4)), rng.random((50, 4))
    strata = ["a", "b"] * 25
    plain = promotion_test(candidate, incumbent, strata, QUICK)
    more = [np.concatenate([r, np.full((2, 4), 0.5)]) for r in (candidate, incumbent)]
    more[0][50], more[1][51] = NAN, NAN
    masked = promotion_test(*more, [*strata, "a", "b"], QUICK)
    assert (masked.prompts, masked.masked) == (50, 2)
    assert (masked.gain, masked.low, masked.high) == (plain.gain, plain.low, plain.high)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-1, 1), min_size=4, max_size=20), st.sampled_from([QUICK, BERNSTEIN]))
def test_the_bounds_enclose_the_gain_and_swap_with_the_policies(values: list[float], config: PromotionConfig):
    found, swapped = decide(np.array(values), config), decide(-np.array(values), config)
    assert found.low <= found.gain <= found.high
    assert swapped.gain == pytest.approx(-found.gain)
    if config is BERNSTEIN:
        assert swapped.low == pytest.approx(-found.high)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromotionConfig(level=0.5), "level must be in"),
        (lambda: PromotionConfig(power=1.0), "power must be in"),
        (lambda: PromotionConfig(bound="wilson"), "bound must be"),  # type: ignore[arg-type]
        (lambda: PromotionConfig(bound="bernstein"), "reward_range must be"),
        (lambda: PromotionConfig(reward_range=(1.0, 1.0)), "reward_range must be"),
        (lambda: PromotionConfig(num_generations=0), "num_generations must be >= 1"),
        (lambda: promotion_test(np.zeros((3, 2)), np.zeros((3, 1)), ["a"] * 3), "reward shapes must be"),
        (lambda: decide(np.zeros(3), strata=["a", "a", "b"]), "prompts of stratum 'b' must be >= 2, got 1"),
        (lambda: promotion_test(np.full((3, 1), 1.5), np.zeros((3, 1)), ["a"] * 3, BERNSTEIN), "got 1.5; widen"),
    ],
)
def test_what_cannot_be_compared(make: Callable, message: str):
    with pytest.raises(InvalidValue, match=message):
        make()


# The stage


CONFIG = PromotionConfig(num_generations=4, resamples=400)
GREEDY: list[dict[str, Any]] = [{"name": "greedy"}]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """The second choice of the toy is wanted: greedy earns nothing, the base model something."""
    rows = [{"id": f"{i}-{j}", "prompt": f"w{i} w{j}"} for i in range(1, 11) for j in range(1, 21)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = JobConfig(
        backend=BackendConfig(kind="toy", model="random:32:0"),
        data=DataConfig("jsonl", {"path": str(tmp_path / "prompts.jsonl")}),
        rewards=(RewardConfig("toy_rewards:second_choice"),),
        rollout=RolloutConfig(max_new_tokens=6, head=32, tail=1),
        heuristics=(HeuristicSpec("top_k=2", [{"name": "top_k", "params": {"top_k": 2}}]),),
    )
    return Job(config, tmp_path / "run")


def saved(folder: Path, steps: list[dict[str, Any]], **metadata: Any) -> Path:
    save_policy(folder, Pipeline(steps), **metadata)
    return folder


def rules(folder: Path) -> list[dict[str, Any]]:
    policy = load_policy(folder)
    assert isinstance(policy, Pipeline)
    return policy.arguments["steps"]


def test_a_better_candidate_takes_the_incumbents_place(job: Job, tmp_path: Path):
    candidate, incumbent = saved(tmp_path / "new", []), saved(tmp_path / "live", GREEDY)
    (incumbent / "notes.txt").write_text("in use since May")
    record = promote(job, candidate, incumbent, config=CONFIG)
    assert record["outcome"] == "promoted"
    assert record["low"] > 0
    assert record["sentence"].startswith("Promoted: on 60 prompts")
    assert record["incumbent"]["reward"] < record["candidate"]["reward"]
    assert record["gain"] == pytest.approx(record["candidate"]["reward"] - record["incumbent"]["reward"])
    assert json.loads((job.run / "promotion" / "decision.json").read_text()) == record
    assert json.loads((incumbent / "decision.json").read_text()) == record
    assert (rules(incumbent), rules(tmp_path / "live.previous")) == ([], GREEDY)
    assert (tmp_path / "live.previous" / "notes.txt").exists()
    assert rules(candidate) == []
    assert not list(tmp_path.glob(".live*"))


def test_a_worse_or_equal_candidate_changes_nothing(job: Job, tmp_path: Path):
    live, worse, equal = (saved(tmp_path / name, steps) for name, steps in (("a", []), ("b", GREEDY), ("c", [])))
    before = sorted((path.name, path.read_bytes()) for path in live.iterdir())
    kept = promote(job, worse, live, config=CONFIG, output=tmp_path / "first")
    assert (kept["outcome"], kept["high"] < 0) == ("kept", True)
    tied = promote(job, equal, live, config=CONFIG, output=tmp_path / "second")
    assert (tied["outcome"], tied["gain"], tied["low"]) == ("not enough evidence", 0.0, None)
    assert sorted((path.name, path.read_bytes()) for path in live.iterdir()) == before
    assert not (tmp_path / "a.previous").exists()


def test_a_static_rule_as_incumbent(job: Job, tmp_path: Path):
    candidate = saved(tmp_path / "new", [{"name": "top_k", "params": {"top_k": 2}}])
    record = promote(job, candidate, "greedy", config=CONFIG, into=tmp_path / "live", output=tmp_path / "first")
    assert record["outcome"] == "promoted"
    assert rules(tmp_path / "live") == rules(candidate)
    assert promote(job, candidate, "top_k=2", config=CONFIG, output=tmp_path / "second")["gain"] == 0.0
    assert promote(job, candidate, "T=1", config=CONFIG, output=tmp_path / "third")["outcome"] == "promoted"


def test_a_guarded_candidate_is_the_rule_where_training_prompts_show_nothing(job: Job, tmp_path: Path):
    candidate = saved(tmp_path / "new", [], fingerprint=job.backend.fingerprint)
    made = guard(job, candidate=candidate, rule="greedy")
    policy = load_policy(job.run / "guarded")
    assert made["outside"] < 0.05
    assert (made["rule"], made["folder"]) == ("greedy", str(job.run / "guarded"))
    assert policy.arguments["limits"] == made["limits"]
    longer = dataclasses.replace(job.config.rollout, max_new_tokens=60)  # budgets that training never had
    prompts = job.prompts("test")
    found, greedy = (rollout(arm, job.backend, prompts, longer) for arm in (policy, Pipeline(GREEDY)))
    assert found.completion_ids == greedy.completion_ids
    inside = rollout(policy, job.backend, prompts, job.config.rollout, num_generations=4)
    assert outside_share(inside, made["limits"]) < 0.05
    record = promote(job, job.run / "guarded", "greedy", config=CONFIG, into=tmp_path / "live")
    assert record["outcome"] == "promoted"
    assert guard(job, candidate=candidate, output=tmp_path / "best")["rule"] == "top_k=2"  # of the selection split
    with pytest.raises(UnknownName, match="unknown static rule 'gredy'"):
        guard(job, candidate=candidate, rule="gredy")
    with pytest.raises(InvalidValue, match="another folder than the candidate's"):
        guard(job, candidate=candidate, rule="greedy", output=candidate)
    with pytest.raises(CheckpointError, match="holds no policy"):
        guard(job, rule="greedy")
    for output in (job.run, tmp_path):  # `save_policy` would replace them
        with pytest.raises(InvalidValue, match="a new folder, or one that holds a policy"):
            guard(job, candidate=candidate, rule="greedy", output=output)
    coarse = saved(tmp_path / "coarse", [], sketch={"head": 8, "tail": 4})
    with pytest.raises(CheckpointError, match="trained on sketches of"):
        guard(job, candidate=coarse, rule="greedy")
    with pytest.raises(InvalidValue, match=r"cut must be in \[0, 0.5\), got 0.7"):
        GuardConfig(cut=0.7)
    other = Job(dataclasses.replace(job.config, guard=GuardConfig("asn_policies:Pipeline")), tmp_path / "other")
    with pytest.raises(InvalidValue, match="a class with around"):
        guard(other, candidate=candidate, rule="greedy")


def test_the_forecast_is_written_before_the_candidate_generates(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    candidate, incumbent, output = saved(tmp_path / "new", GREEDY), saved(tmp_path / "live", []), tmp_path / "out"
    original = promotion.run_arm

    def cut_short(arm: Any, *arguments: Any) -> Any:
        if arm.name == "candidate":
            assert json.loads((output / "forecast.json").read_text())["detectable"] > 0
            raise KeyboardInterrupt
        return original(arm, *arguments)

    monkeypatch.setattr(promotion, "run_arm", cut_short)
    with pytest.raises(KeyboardInterrupt):
        promote(job, candidate, incumbent, config=CONFIG, output=output)
    generated: list[str] = []

    def counted(arm: Any, *arguments: Any) -> Any:
        generated.append(arm.name)
        return original(arm, *arguments)

    monkeypatch.setattr(promotion, "run_arm", counted)
    record = promote(job, candidate, incumbent, config=CONFIG, output=output)
    assert generated == ["candidate"]
    assert promote(job, candidate, incumbent, config=CONFIG, output=output) == record
    assert generated == ["candidate"]
    fresh = promote(job, candidate, incumbent, config=CONFIG, output=tmp_path / "again")
    assert fresh == record


@pytest.mark.parametrize("lost", [False, True])
def test_an_interrupted_promotion_is_completed(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool):
    candidate, incumbent = saved(tmp_path / "new", []), saved(tmp_path / "live", GREEDY)

    def cut_short(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(promotion, "_install", cut_short)
        with pytest.raises(KeyboardInterrupt):
            promote(job, candidate, incumbent, config=CONFIG)
    assert rules(incumbent) == GREEDY
    if lost:  # killed between the two renames of a replacement
        incumbent.rename(tmp_path / "live.previous")
    promote(job, candidate, incumbent, config=CONFIG)
    assert (rules(incumbent), rules(tmp_path / "live.previous")) == ([], GREEDY)
    digest = folder_digest(incumbent)
    promote(job, candidate, incumbent, config=CONFIG)
    assert folder_digest(incumbent) == digest
    assert rules(tmp_path / "live.previous") == GREEDY


def test_prompts_that_were_seen_are_refused(job: Job, tmp_path: Path):
    candidate = saved(tmp_path / "new", [])
    train, selection, test = (job.prompts(split) for split in ("train", "selection", "test"))
    for split in (train, selection):
        renamed = Prompt("another id", split[7].content)
        message = (
            rf"prompt 'another id' was seen in training, selection or an earlier decision \(there '{split[7].id}'\)"
        )
        with pytest.raises(DataError, match=message):
            promote(job, candidate, "greedy", config=CONFIG, prompts=[*test, renamed])
    with pytest.raises(DataError, match="was seen in training"):
        promote(job, candidate, "greedy", config=PromotionConfig(split="train"))
    with pytest.raises(DataError, match=f"prompt '{test[0].id}' was seen"):
        promote(job, candidate, "greedy", config=CONFIG, seen=test[:1])
    assert not (job.run / "promotion").exists()
    same_id = Prompt(train[0].id, "w1 w2 w3")
    promote(job, candidate, "greedy", config=CONFIG, prompts=[same_id, *test[:20]])
    other, next_candidate = saved(tmp_path / "newer", GREEDY), job.run / "second"
    with pytest.raises(DataError, match="earlier decision"):
        promote(job, other, "greedy", config=CONFIG, prompts=test, output=next_candidate)
    promote(job, other, "greedy", config=CONFIG, prompts=test[20:], output=next_candidate)
    assert {prompt.id for prompt in decided_on([next_candidate])} == {prompt.id for prompt in test[20:]}


def test_inputs_that_do_not_fit(job: Job, tmp_path: Path):
    candidate, incumbent = saved(tmp_path / "new", []), saved(tmp_path / "live", GREEDY)
    foreign = saved(tmp_path / "foreign", [], base_model="other", fingerprint="other-1")
    cases: list[tuple[type[AsnError], str, Callable]] = [
        (CheckpointError, "holds no policy", lambda: promote(job, tmp_path / "nothing", incumbent)),
        (CheckpointError, "trained on base model 'other'", lambda: promote(job, foreign, incumbent)),
        (CheckpointError, "trained on base model 'other'", lambda: promote(job, candidate, foreign)),
        (UnknownName, "unknown incumbent 'greedi'. Did you mean 'greedy'", lambda: promote(job, candidate, "greedi")),
        (InvalidValue, "candidate must be another folder", lambda: promote(job, candidate, candidate)),
        (InvalidValue, "into must be left out", lambda: promote(job, candidate, incumbent, into=tmp_path / "x")),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_what_changes_under_a_comparison_is_noticed(job: Job, tmp_path: Path):
    candidate, incumbent = saved(tmp_path / "new", GREEDY), saved(tmp_path / "live", [])
    promote(job, candidate, incumbent, config=CONFIG, output=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"other inputs \(config\)"):
        promote(job, candidate, incumbent, config=PromotionConfig(seed=1), output=tmp_path / "out")
    saved(incumbent, [{"name": "top_k", "params": {"top_k": 3}}])
    with pytest.raises(CheckpointError, match="has changed since the comparison"):
        promote(job, candidate, incumbent, config=CONFIG, output=tmp_path / "out")
    saved(candidate, [{"name": "top_k", "params": {"top_k": 4}}])
    with pytest.raises(ConfigError, match=r"other inputs \(candidate\)"):
        promote(job, candidate, incumbent, config=CONFIG, output=tmp_path / "out")


def test_on_the_real_model(smollm: HFBackend, tmp_path: Path):
    """An untrained policy is the base model: against greedy decoding of sums it may not be promoted."""
    config = JobConfig(
        backend=BackendConfig(dtype="float32"),
        data=DataConfig("arithmetic", limit=6),
        rewards=(RewardConfig("numeric_answer"),),
        rollout=RolloutConfig(max_new_tokens=10),
    )
    job = Job(config, tmp_path / "run")
    job.__dict__["backend"] = smollm  # loaded once for all tests
    save_policy(tmp_path / "new", LocalTransform(8), fingerprint=smollm.fingerprint)
    settings = PromotionConfig(num_generations=2, bound="bernstein", reward_range=(0.0, 1.0))
    record = promote(job, tmp_path / "new", "greedy", config=settings, into=tmp_path / "live")
    assert record["outcome"] == "not enough evidence"
    assert record["prompts"] == 6
    guarded = guard(job, candidate=tmp_path / "new", rule="greedy")
    seen = rollout(load_policy(guarded["folder"]), smollm, job.prompts("test"), job.config.rollout, seed=5)
    assert outside_share(seen, guarded["limits"]) < 0.3
    assert not (tmp_path / "live").exists()
