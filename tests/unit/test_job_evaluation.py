"""`asn-rl eval` and `asn-rl compare` on the toy backend: what the record says is what a rollout gives."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asn_policies import OrderStatisticsNetwork, Pipeline
from asn_rl.analysis.evaluation_page import claims
from asn_rl.backends.toy import ToyBackend
from asn_rl.checkpoint import save_policy
from asn_rl.cli import main
from asn_rl.config import from_dict
from asn_rl.data.benchmark import benchmark_prompts, load_benchmark
from asn_rl.errors import CheckpointError, ConfigError, DataError
from asn_rl.evaluation.benchmarking import metric_names
from asn_rl.evaluation.record import read_record
from asn_rl.job import Job, JobConfig, evaluate
from asn_rl.rewards import math as rewards_math
from asn_rl.rewards.numeric import exact_answer
from asn_rl.rollout import RolloutConfig, rollout

ROWS = 20
BENCHMARK = """
schema: asn_rl.benchmark/1
name: words
version: 1
title: the word that follows
paper: none
licence: none
files: {test: {path: words.jsonl}}
shares: {train: 0, selection: 0.3, test: 0.7}
prompt: {text: "{{question}}"}
columns: [{name: answer, field: answer}, {name: parts, field: parts}]
verifiers:
  - {name: exact, function: exact_answer}
  - {name: parts, function: "toy_rewards:constant", entries: parts}
answers: text
metrics: [accuracy, pass, maj, distinct_2]
max_new_tokens: 3
stop: [w9]
"""
HOT = [{"name": "temperature", "params": {"temperature": 2.0}}]
BASE: dict[str, Any] = {
    "backend": {"kind": "toy", "model": "random:32:0"},
    "rollout": {"head": 6, "tail": 5},
    "heuristics": [{"name": "greedy", "processors": [{"name": "greedy"}]}, {"name": "T=2", "processors": HOT}],
}


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    greedy = Pipeline([{"name": "greedy"}])
    toy = ToyBackend.random(32, 0)
    path = tmp_path / "words.yaml"
    path.write_text(BENCHMARK)
    with (tmp_path / "words.jsonl").open("w") as lines:
        for i in range(ROWS):
            # Greedy decoding is right on every second prompt.
            text = rollout(greedy, toy, benchmark_prompt(i), RolloutConfig(3, 6, 5, stop=("w9",))).completions[0]
            row = {"question": f"w{i + 1}", "answer": text if i % 2 else "w1 w1 w1", "parts": ["a"] * (1 + i % 3)}
            lines.write(json.dumps(row) + "\n")
    return path


def benchmark_prompt(i: int) -> list[Any]:
    from asn_rl.types import Prompt

    return [Prompt(str(i), f"w{i + 1}")]


def config(benchmark: Path, **settings: Any) -> JobConfig:
    section = {"tasks": [str(benchmark)], "data": str(benchmark.parent), "num_generations": 3, "resamples": 200}
    return from_dict(JobConfig, {**BASE, "evaluate": section | settings})


def policy_folder(folder: Path, head: int = 6) -> Path:
    toy = ToyBackend.random(32, 0)
    save_policy(folder, OrderStatisticsNetwork(), fingerprint=toy.fingerprint, sketch={"head": head, "tail": 5})
    return folder


def test_the_record_says_what_rollouts_give(benchmark: Path, tmp_path: Path) -> None:
    policies = {"own": [str(policy_folder(tmp_path / f"policy{i}")) for i in range(2)]}
    job = Job(config(benchmark, policies=policies), tmp_path / "run")
    record = evaluate(job)
    task = record["tasks"]["words"]
    assert set(task["arms"]) == {"greedy", "T=1", "T=2", "own 0", "own 1"}
    assert {name: arm["kind"] for name, arm in task["arms"].items()}["own 0"] == "policy"
    prompts = benchmark_prompts(load_benchmark(benchmark), "test", tmp_path)
    assert task["prompts"] == [prompt.id for prompt in prompts]
    limits = RolloutConfig(3, 6, 5, stop=("w9",))
    for name, rule in (("greedy", [{"name": "greedy"}]), ("T=2", HOT)):
        scores = []
        for seed in (3000, 3001, 3002):
            out = rollout(Pipeline(rule), job.backend, prompts, limits, seed=seed)
            answers = [prompt.columns["answer"] for prompt in prompts]
            scores.append(exact_answer([], list(out.completions), answer=answers, terminated=out.terminated.tolist()))
        assert task["arms"][name]["values"] == pytest.approx(np.mean(scores, 0).tolist())
    # An untrained policy is the base model, and a mean over entries weighs prompts by their number.
    assert task["arms"]["own 0"]["values"] == task["arms"]["T=1"]["values"] == task["arms"]["own 1"]["values"]
    assert task["arms"]["own 0"]["seeds"]["spread"] == 0
    assert {"accuracy", "pass@3", "maj@3", "distinct_2", "score:parts", "tokens"} <= set(task["metrics"])
    assert task["arms"]["greedy"]["metrics"]["maj@3"]["mean"] == task["arms"]["greedy"]["metrics"]["accuracy"]["mean"]
    assert task["detectable"]["prompts"] == len(prompts)
    selection = benchmark_prompts(load_benchmark(benchmark), "selection", tmp_path)
    assert not {p.id for p in selection} & set(task["prompts"])


def test_the_best_static_rule_is_chosen_on_the_selection_split(benchmark: Path, tmp_path: Path) -> None:
    assert evaluate(Job(config(benchmark), tmp_path / "run"))["tasks"]["words"]["baseline"] == "greedy"


def test_what_is_there_is_not_made_again(benchmark: Path, tmp_path: Path) -> None:
    job = Job(config(benchmark), tmp_path / "run")
    first = evaluate(job)
    assert evaluate(job) == first
    (job.run / "evaluation.json").unlink()
    shards = sorted((job.run / "evaluation").rglob("candidates/shard-*.jsonl"))
    torn = shards[0].read_text().splitlines(keepends=True)
    shards[0].write_text("".join(torn[:-2]) + torn[-1][:20])  # killed while it wrote
    before = {path: path.read_bytes() for path in shards[1:]}
    assert evaluate(job) == first
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_benchmark_that_cannot_be_run_is_named_and_the_others_go_on(
    benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(BENCHMARK.replace("words.jsonl", "missing.jsonl").replace("name: words", "name: broken"))
    settings = tmp_path / "config.yaml"
    settings.write_text(json.dumps({**BASE, "evaluate": {"num_generations": 2, "resamples": 200}}))
    common = ["--config", str(settings), "--data", str(tmp_path)]
    run = tmp_path / "run"
    assert main(["eval", *common, "--run", str(run), "--tasks", f"{benchmark},{broken}"]) == 1
    assert "missing.jsonl" in json.loads((run / "evaluation.json").read_text())["left_out"][str(broken)]
    assert "missing.jsonl" in (run / "evaluation.html").read_text()
    policy = policy_folder(tmp_path / "policy")
    other = tmp_path / "other"
    command = ["eval", *common, "--run", str(other), "--tasks", str(benchmark), "--policy", f"own={policy}"]
    assert main(command) == 0
    page = tmp_path / "board.html"
    assert main(["compare", str(run), str(other), "--output", str(page)]) == 0
    assert "own" in page.read_text()
    assert "own" in capsys.readouterr().out
    assert main(["eval", *common, "--run", str(tmp_path / "bad"), "--tasks", str(broken)]) == 2


def test_an_evaluation_may_stop_early(benchmark: Path, tmp_path: Path) -> None:
    policies = {"own": [str(policy_folder(tmp_path / "policy"))]}
    job = Job(config(benchmark, policies=policies, stop_early=5), tmp_path / "run")
    task = evaluate(job)["tasks"]["words"]
    whole = benchmark_prompts(load_benchmark(benchmark), "test", tmp_path)
    assert set(task["prompts"]) <= {prompt.id for prompt in whole}
    assert any("what holds under such looking: own" in note for note in task["notes"])


def test_an_undecided_policy_is_not_claimed_to_be_anything(benchmark: Path, tmp_path: Path) -> None:
    policies = {"own": [str(policy_folder(tmp_path / "policy"))]}
    job = Job(config(benchmark, policies=policies, stop_early=5), tmp_path / "run")
    task = evaluate(job)["tasks"]["words"]
    assert task["stop_early"] == 5
    assert task["arms"]["own"]["sequential"]["outcome"] == "undecided"
    assert "sequential" not in task["arms"]["greedy"]
    assert [line.partition(":")[0] for line in claims(task)] == ["Undecided"]
    assert "stop_early" not in evaluate(Job(config(benchmark, stop_early=5), tmp_path / "static"))["tasks"]["words"]


def other(benchmark: Path, name: str, **changes: str) -> str:
    """Another benchmark with the same data; `changes` replace text of its file."""
    text = BENCHMARK.replace("name: words", f"name: {name}")
    for old, new in changes.items():
        text = text.replace(old, new)
    path = benchmark.with_name(f"{name}.yaml")
    path.write_text(text)
    return str(path)


def test_what_is_not_installed_is_known_before_anything_is_generated(
    benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find(name))
    rewards_math.shared_verifier.cache_clear()
    task = other(benchmark, "formulas", exact_answer="math_answer")
    job = Job(config(benchmark, tasks=[task, str(benchmark)]), tmp_path / "run")
    record = evaluate(job)
    assert "pip install 'asn_rl[math]'" in record["left_out"][task]
    assert list(record["tasks"]) == ["words"]
    assert not (job.run / "evaluation" / "formulas").exists()
    monkeypatch.undo()
    assert list(evaluate(job)["tasks"]) == ["words", "formulas"], "what was left out is tried again"
    assert read_record(job.run / "evaluation.json")["left_out"] == {}


def test_a_task_that_cannot_be_scored_is_left_out_and_the_others_run(benchmark: Path, tmp_path: Path) -> None:
    task = other(benchmark, "numbers", exact_answer="numeric_answer")  # whose answers are words
    job = Job(config(benchmark, tasks=[task, str(benchmark)]), tmp_path / "run")
    record = evaluate(job)
    assert list(record["tasks"]) == ["words"]
    assert "needs a number in the column 'answer'" in record["left_out"]["numbers"]
    with pytest.raises(DataError, match="no benchmark can be run: numbers: numeric_answer needs a number"):
        evaluate(Job(config(benchmark, tasks=[task]), tmp_path / "alone"))


@pytest.mark.filterwarnings("ignore:.*crash_on. failed")
def test_completions_without_a_score_are_named_with_the_reason(benchmark: Path, tmp_path: Path) -> None:
    bad = benchmark_prompts(load_benchmark(benchmark), "test", tmp_path)[2]
    scorers = [{"function": "toy_rewards:crash_on", "arguments": {"prompt": bad.content}}]
    task = evaluate(Job(config(benchmark, scorers=scorers), tmp_path / "run"))["tasks"]["words"]
    named = "; ".join(f"{bad.id}, greedy, {seed}" for seed in (3000, 3001, 3002))
    found = [note for note in task["notes"] if note.startswith("no score by toy_rewards:crash_on: error, ZeroDivision")]
    assert len(found) == 1
    assert found[0].endswith(f"({3 * len(task['arms'])} completions; first: {named})")


def test_more_metrics_and_a_price(benchmark: Path, tmp_path: Path) -> None:
    job = Job(config(benchmark, metrics=["self_bleu", "cost"], price=0.5), tmp_path / "run")
    task = evaluate(job)["tasks"]["words"]
    found = task["arms"]["T=2"]["metrics"]
    assert found["cost"]["mean"] == pytest.approx(0.5 * 3 * found["tokens"]["mean"])
    assert found["self_bleu"]["mean"] is not None
    with pytest.raises(ConfigError, match=r"unknown metric in evaluate\.metrics 'vendy'\. Did you mean 'vendi'"):
        config(benchmark, metrics=["vendy"])
    with pytest.raises(ConfigError, match="price must be >= 0"):
        config(benchmark, price=-1)


def test_several_verifiers_are_reported_by_name(benchmark: Path) -> None:
    names = metric_names(load_benchmark("ifeval"), [4], ["length_budget"])
    for level in ("prompt_level_strict", "prompt_level_loose", "inst_level_strict", "inst_level_loose"):
        assert f"score:{level}_acc" in names
    assert [name for name in metric_names(load_benchmark("svamp"), [4], []) if name.startswith("score:")] == []


def test_bad_settings_and_policies_are_refused(benchmark: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluate\.ks"):
        config(benchmark, ks=[4])
    with pytest.raises(ConfigError, match="at least one policy folder"):
        config(benchmark, policies={"own": []})
    with pytest.raises(ConfigError, match=r"evaluate\.tasks is empty"):
        evaluate(Job(config(benchmark, tasks=[]), tmp_path / "a"))
    copy = tmp_path / "copy.yaml"
    copy.write_text(BENCHMARK)
    record = evaluate(Job(config(benchmark, tasks=[str(benchmark), str(copy)]), tmp_path / "twice"))
    assert "called 'words'" in record["left_out"][str(copy)]
    with pytest.raises(DataError, match="no benchmark can be run"):
        evaluate(Job(config(tmp_path / "nothing.yaml"), tmp_path / "b"))
    wrong = policy_folder(tmp_path / "wide", head=7)
    with pytest.raises(CheckpointError, match=r"rollout\.head"):
        evaluate(Job(config(benchmark, policies={"own": [str(wrong)]}), tmp_path / "c"))
