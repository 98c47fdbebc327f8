"""The whole job on the embedded model, small: nothing in it is a stand-in."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from run_script import ROOT, script

from asn_rl.analysis.report import verdict, write_report
from asn_rl.backends.hf import HFBackend
from asn_rl.checkpoint import check_compatible, load_policy
from asn_rl.config import load_config
from asn_rl.data.store import load_trajectories
from asn_rl.job import Job, JobConfig, compare, distil, reinforce, select
from asn_rl.job.labelling import stores
from asn_rl.labelling.grid import Grid
from asn_rl.labelling.labels import label, read_labels
from asn_rl.labelling.records import ShardWriter, candidate_record
from asn_rl.labelling.selected import read_targets
from asn_rl.labelling.store import CandidateStore
from asn_rl.metrics import read_metrics
from asn_rl.replay import replay
from asn_rl.rewards.compose import RewardConfig, RewardSuite, score
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Candidate

SMALL = [
    "backend.dtype=float32",
    "data.limit=8",
    "rollout.max_new_tokens=10",
    "rollout.max_batch=16",
    "heuristics=[{name: greedy, processors: [{name: greedy}]}, {name: T=1}]",
    "generate.num_generations=2",
    "generate.train_prompts=4",
    "distill.epochs=2",
    "grpo.steps=2",
    "grpo.prompts_per_step=4",
    "grpo.num_generations=4",
    "grpo.save_every=1",
    "compare.num_generations=2",
    "compare.resamples=200",
    "threads=1",
]


@pytest.fixture(scope="module")
def job(smollm: HFBackend, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The demo's configuration on a few prompts, run to its end."""
    config = load_config(JobConfig, ROOT / "configs" / "demo.yaml", SMALL)
    job = Job(config, tmp_path_factory.mktemp("demo"))
    compare(job)
    write_report(job)
    return job


def test_selection_names_a_target_for_every_labelled_prompt(job: Job) -> None:
    selection, targets = select(job), read_targets(job.run / "selected")
    assert list(targets) == [prompt.id for prompt in job.prompts_to_label("train")]
    assert len(targets) == 4
    assert {name for shares in targets.values() for name in shares} <= {"greedy", "T=1"}
    assert set(selection["selection"]["greedy"]) == {"arithmetic", "open"}


def test_labels_of_candidates_are_the_rewards_of_the_same_rollout(job: Job) -> None:
    """The two paths of one implementation, on the real model: rollout -> reward, and candidate -> label."""
    candidates = stores(job)["train"]
    prompts = [prompt for prompt in job.prompts_to_label("train") for _ in candidates.grid.seeds]
    config, seeds = job.config.rollout, list(candidates.grid.seeds) * 4
    run = rollout(job.arms[1].policy, job.backend, prompts, config, seed=seeds)
    direct = score(job.rewards, run)
    for name, expected in direct.components.items():
        labels = read_labels(job.run / "labels" / "train" / name, name, candidates)
        np.testing.assert_array_equal(labels.scores[:, 1].reshape(-1), expected.numpy())


def test_greedy_completions_of_a_prompt_are_alike_and_short_answers(job: Job) -> None:
    out = load_trajectories(job.run / "comparison" / "greedy")
    texts = [out.completions[i : i + 2] for i in range(0, len(out), 2)]
    assert all(a == b for a, b in texts)
    assert any(text.strip() for text, _ in texts)


def test_grpo_moved_the_policy_and_left_its_reference(job: Job) -> None:
    start, end = distil(job), reinforce(job)
    moved = [not torch.equal(a, b) for a, b in zip(start.parameters(), end.parameters(), strict=True)]
    assert any(moved)
    rows = read_metrics(job.run)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["kl/exact"] >= 0 for row in rows)


def test_a_comparison_over_seeds_adds_up_to_that_of_each_run(job: Job, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(job.run, twin)
    done = script("compare_seeds.py", str(job.run), str(twin), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in compare(job)["rows"]}
    for name, line in zip(("distilled", "rl"), done.stdout.splitlines(), strict=True):
        mean = f"{rows[name]['difference']['mean']:+.3f}"
        assert line.startswith(f"{name} minus best static: by seed {mean} {mean}, mean {mean},")
    (twin / "comparison.json").unlink()
    done = script("compare_seeds.py", str(job.run), str(twin), cwd=tmp_path)
    assert done.returncode == 2
    assert "finish the run first" in done.stderr


def test_the_policies_are_tied_to_their_base_model(job: Job) -> None:
    spec = check_compatible(job.run / "policy", fingerprint=job.backend.fingerprint)
    assert spec.base_model == "smollm2-135m-instruct"
    assert spec.arguments["hidden_size"] == 576
    assert "frozen" not in (job.run / "policy" / "README.md").read_text()


def test_a_recorded_rollout_replays_to_its_logprobs(job: Job) -> None:
    """Teacher forcing the sampled text gives back what was recorded, up to the rounding of another batch shape."""
    out = load_trajectories(job.run / "comparison" / "rl").select(range(4))
    config = RolloutConfig(max_new_tokens=10)
    again, mismatch = replay(load_policy(job.run / "policy"), job.backend, out.prompts, out.completion_ids, config)
    assert mismatch is None
    torch.testing.assert_close(again.base_logprobs, out.base_logprobs, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(again.behaviour_logprobs, out.behaviour_logprobs, atol=2e-2, rtol=1e-2)


def test_model_labellers_are_the_rewards_of_a_rollout(job: Job, tmp_path: Path) -> None:
    """One implementation, two paths, for labellers that are models: scored as in RL, and as labelled candidates."""
    models = [
        RewardConfig("log_likelihood", arguments={"model": "smollm2-135m-instruct"}),
        RewardConfig("vendi_diversity"),
        RewardConfig("pairwise_judge", arguments={"model": "smollm2-135m-instruct", "minimum_share": 0.0}),
    ]
    count = job.config.compare.num_generations
    run = load_trajectories(job.run / "comparison" / "rl").select(range(4 * count))
    direct = score(RewardSuite(models), run)
    by_id = {prompt.id: prompt for prompt in run.prompts}
    with ShardWriter(tmp_path / "candidates") as shard:
        rows = zip(run.prompts, run.sample, run.completions, run.completion_ids, run.terminated.tolist(), strict=True)
        shard.write([candidate_record(Candidate(p.id, "rl", sample, *rest)) for p, sample, *rest in rows])
    store = CandidateStore(Grid(tuple(by_id), ("rl",), tuple(range(count))), tmp_path / "candidates")
    label(models, store, by_id, tmp_path / "labels")
    for name, expected in direct.components.items():
        found = read_labels(tmp_path / "labels" / name, name, store).scores.reshape(-1)
        assert len(np.unique(found)) > 1, f"{name} tells nothing apart"
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-3)


def test_comparison_and_report_tell_the_same(job: Job) -> None:
    comparison = compare(job)
    page = (job.run / "report.html").read_text()
    assert verdict(comparison).split(":")[0] in page
    for row in comparison["rows"]:
        assert f"{row['reward']['mean']:.3f}" in page
        mean = sum(row["by_stratum"].values()) / len(row["by_stratum"])
        assert row["reward"]["mean"] == pytest.approx(mean)


def test_the_run_can_be_repeated_from_its_folder(job: Job, tmp_path: Path) -> None:
    config = load_config(JobConfig, job.run / "config.yaml")
    assert config == job.config
    again = Job(replace(config, heuristics=config.heuristics), tmp_path / "again")
    select(again)
    first, second = (json.loads((j.run / "selection.json").read_text()) for j in (job, again))
    assert first == second
    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())["grpo"]["steps"] == 2
