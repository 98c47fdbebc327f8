"""`asn-rl eval` on an open benchmark of two turns: every arm goes on after its own answers, and a judge compares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asn_rl.analysis.evaluation_page import write_evaluation_page
from asn_rl.backends.toy import ToyBackend
from asn_rl.config import from_dict
from asn_rl.data.benchmark import benchmark_prompts, load_benchmark
from asn_rl.errors import ConfigError, DataError, UnknownName
from asn_rl.evaluation.leaderboard import merge_records
from asn_rl.job import Job, JobConfig, evaluate
from asn_rl.job.evaluation import _position_bias
from asn_rl.labelling.grid import Grid
from asn_rl.labelling.records import CANDIDATE, as_candidate, candidate_record, read_records
from asn_rl.labelling.store import CandidateStore
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Candidate, Key, Prompt

BENCHMARK = """
schema: asn_rl.benchmark/1
name: talk
version: 1
title: two turns
paper: none
licence: none
files: {test: {path: talk.jsonl}}
shares: {train: 0, selection: 0.4, test: 0.6}
prompt: {system: w31, text: "{{turns.0}}", follow_ups: ["{{turns.1}}"]}
metrics: [distinct_1]
max_new_tokens: 4
stop: [w9]
"""
SEEDS = (3000, 3001, 3002)


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    rows = [json.dumps({"turns": [f"w{i + 1}", f"w{i + 8} w{i + 2}"]}) + "\n" for i in range(10)]
    (tmp_path / "talk.jsonl").write_text("".join(rows))
    (tmp_path / "talk.yaml").write_text(BENCHMARK)
    return tmp_path / "talk.yaml"


def job(talk: Path, run: str, **settings: Any) -> Job:
    hot = [{"name": "temperature", "params": {"temperature": 2.0}}]
    section = {"tasks": [str(talk)], "data": str(talk.parent), "num_generations": 3, "resamples": 200} | settings
    config = {
        "backend": {"kind": "toy", "model": "random:32:0"},
        "rollout": {"head": 6, "tail": 5},
        "heuristics": [{"name": "T=2", "processors": hot}, {"name": "cold", "processors": [{"name": "greedy"}]}],
        "evaluate": section,
    }
    return Job(from_dict(JobConfig, config), talk.parent / run)


def candidates(job: Job, task: str) -> dict[Key, Candidate]:
    records = read_records(job.run / "evaluation" / task / "test" / "candidates", CANDIDATE)
    return {candidate.key: candidate for candidate in (as_candidate(r, where) for where, r in records)}


def test_the_second_turn_follows_the_arms_own_answer(talk: Path):
    made = job(talk, "run")
    record = evaluate(made)
    assert list(record["tasks"]) == ["talk", "talk turn 2"]
    first, second = candidates(made, "talk"), candidates(made, "talk turn 2")
    assert set(first) == set(second)
    prompts = {prompt.id: prompt for prompt in benchmark_prompts(load_benchmark(talk), "test", talk.parent)}
    for key, candidate in second.items():
        opening, follow_up = prompts[key[0]].content, prompts[key[0]].columns["follow_ups"][0]
        answer = {"role": "assistant", "content": first[key].completion}
        assert candidate.history == [*opening, answer, {"role": "user", "content": follow_up}]
    arm = next(arm for arm in made.arms if arm.name == "T=2")
    limits = RolloutConfig(4, 6, 5, stop=("w9",))
    for (name, rule, seed), candidate in second.items():
        if rule == "T=2":
            asked = Prompt(f"{name}, turn 2", candidate.history)
            assert rollout(arm.policy, made.backend, [asked], limits, seed=[seed]).completions == [candidate.completion]
    tokens = [len(c.completion_ids or ()) for c in second.values() if c.heuristic == "T=2"]
    found = record["tasks"]["talk turn 2"]["arms"]["T=2"]["metrics"]
    assert found["tokens"]["mean"] == pytest.approx(np.mean(tokens))
    assert record["tasks"]["talk turn 2"]["family"] == "talk"
    assert record["tasks"]["talk"]["detectable"]["prompts"] == len(prompts)
    assert record["tasks"]["talk"]["arms"]["T=2"]["masked"] == 0  # nothing verifies, so nothing is masked


def test_win_rates_are_those_of_the_completions(talk: Path):
    made = job(talk, "run", judge={"function": "toy_rewards:more_words"}, reference="greedy")
    record = evaluate(made)
    for name, task in record["tasks"].items():
        assert task["primary"] == "win_rate"
        assert task["judge"] == {"function": "toy_rewards:more_words", "arguments": {}, "reference": "greedy"}
        found = candidates(made, name)
        for arm in ("T=1", "T=2", "cold"):
            for i, prompt in enumerate(task["prompts"]):
                pairs = [
                    (len(found[prompt, arm, mine].completion), len(found[prompt, "greedy", theirs].completion))
                    for mine, theirs in zip(SEEDS, (*SEEDS[1:], SEEDS[0]), strict=True)
                ]
                expected = np.mean([0.5 + 0.5 * np.sign(mine - theirs) for mine, theirs in pairs])
                assert task["arms"][arm]["values"][i] == pytest.approx(expected)
        assert set(task["arms"]["greedy"]["values"]) == set(task["arms"]["cold"]["values"]) == {0.5}
        # The rule chosen on the selection split is the baseline; all arms, the reference too, are compared with it.
        assert task["baseline"] in ("T=2", "cold")
    assert "against greedy, by toy_rewards:more_words" in write_evaluation_page(record, talk.parent / "p").read_text()
    assert evaluate(job(talk, "run", judge={"function": "toy_rewards:more_words"}, reference="greedy")) == record


def test_without_a_named_reference_it_is_the_baseline(talk: Path):
    task = evaluate(job(talk, "run", judge={"function": "toy_rewards:more_words"}))["tasks"]["talk"]
    assert task["judge"]["reference"] == task["baseline"]
    assert set(task["arms"][task["baseline"]]["values"]) == {0.5}
    assert (task["family"], task["detectable"]["base_rate"]) == ("talk", 0.5)
    for arm in task["arms"].values():
        if arm["difference"]:
            assert arm["difference"]["mean"] == pytest.approx(arm["metrics"]["win_rate"]["mean"] - 0.5)
    stopped = job(talk, "early", judge={"function": "toy_rewards:more_words"}, stop_early=3)
    assert set(evaluate(stopped)["tasks"]) == {"talk", "talk turn 2"}


def test_win_rates_against_different_references_are_not_merged(talk: Path):
    judge = {"function": "toy_rewards:more_words"}
    runs = {name: evaluate(job(talk, name, judge=judge, reference=name)) for name in ("T=1", "cold")}
    with pytest.raises(DataError, match=r"judge .*'reference': 'T=1'.* against .*'reference': 'cold'"):
        merge_records(runs)
    merged = merge_records({"a": runs["cold"], "b": runs["cold"]})
    assert merged["tasks"]["talk"]["judge"]["reference"] == "cold"


def test_position_bias_is_said():
    counts = {"answers": 42, "first_preferred": 30, "neither": 2, "pairs": 20, "disagreed": 10}
    said = _position_bias({f"win_rate: {name}": count for name, count in counts.items()} | {"exact: masked": 3})
    assert said is not None
    assert "75% of 40" in said
    assert "50% of 20 pairs" in said
    assert _position_bias({"win_rate: answers": 2, "win_rate: neither": 2}) is None


def test_bad_settings_are_refused(talk: Path):
    with pytest.raises(ConfigError, match=r"evaluate\.reference must be null"):
        job(talk, "a", reference="greedy")
    with pytest.raises(UnknownName, match="colt"):
        evaluate(job(talk, "b", reference="colt", judge={"function": "toy_rewards:more_words"}))
    for line, words in (
        ("verifiers: [{name: v, function: exact_answer}]", "follow_ups and verifiers"),
        ("columns: [{name: follow_ups, field: turns}]", "column name"),
    ):
        talk.write_text(BENCHMARK + line)
        with pytest.raises(ConfigError, match=words):
            load_benchmark(talk)
    talk.write_text(BENCHMARK.replace("system: w31,", "form: raw,"))
    with pytest.raises(ConfigError, match="a conversation needs a chat"):
        load_benchmark(talk)


def test_answers_that_could_fill_the_context_show_before_anything_is_generated(
    talk: Path, monkeypatch: pytest.MonkeyPatch
):
    made = job(talk, "run")
    monkeypatch.setattr(ToyBackend, "max_context", 11)  # two turns of 2 words and 4 tokens are 12
    with pytest.raises(DataError, match="turn 2' has 4 tokens; with max_new_tokens=8"):
        evaluate(made)
    assert not (made.run / "evaluation").exists()


def test_a_damaged_history_is_named(tmp_path: Path):
    record = candidate_record(Candidate("p", "h", 1, "x", None, terminated=True))
    assert "history" not in record
    with pytest.raises(DataError, match="field 'history'"):
        as_candidate({**record, "history": ["w1"]}, "here")
    assert CandidateStore(Grid(("p",), ("h",), (1,)), tmp_path).without(0).present.sum() == 0
