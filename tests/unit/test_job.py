"""Settings of a job and what it scores candidates by; its stages are run in `tests/recipes`."""

from __future__ import annotations

from pathlib import Path

import pytest

from asn_rl.errors import ConfigError, InvalidValue
from asn_rl.job import CompareConfig, GenerateConfig, HeuristicSpec, Job, JobConfig
from asn_rl.job.config import HeuristicGrid
from asn_rl.job.labelling import prompts
from asn_rl.rewards.compose import RewardConfig

NUMERIC = RewardConfig("numeric_answer")


def test_rewards_that_are_no_labellers_are_scored_as_well_and_none_twice(tmp_path: Path) -> None:
    brief, briefer = (RewardConfig("length_budget", arguments={"budget": n}) for n in (9, 3))
    heavier = RewardConfig("numeric_answer", weight=2.0)
    assert Job(JobConfig(rewards=(NUMERIC, brief)), tmp_path / "a").scorers == [NUMERIC, brief]
    job = Job(JobConfig(rewards=(NUMERIC, brief), labellers=(briefer, heavier)), tmp_path / "b")
    assert job.scorers == [briefer, heavier, brief]


def test_a_grid_comes_after_the_heuristics_and_may_not_repeat_their_names(tmp_path: Path) -> None:
    grid = HeuristicGrid(arguments={"kind": "filtered"})
    job = Job(JobConfig(rewards=(NUMERIC,), heuristics=(HeuristicSpec("base"),), grid=grid), tmp_path / "a")
    assert [arm.name for arm in job.arms][:2] == ["base", "temp 0.3"]
    assert len(job.arms) == 144
    twice = JobConfig(rewards=(NUMERIC,), heuristics=(HeuristicSpec("temp 0.3"),), grid=grid)
    with pytest.raises(InvalidValue, match="names that differ"):
        _ = Job(twice, tmp_path / "b").arms


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: GenerateConfig(num_generations=1), "num_generations"),
        (lambda: GenerateConfig(train_prompts=0), "train_prompts"),
        (lambda: GenerateConfig(selection_prompts=0), "selection_prompts"),
        (lambda: CompareConfig(num_generations=0), "num_generations"),
        (lambda: CompareConfig(level=1.0), "level"),
        (lambda: JobConfig(rewards=(NUMERIC,), threads=0), "threads"),
        (lambda: JobConfig(rewards=(NUMERIC,), heuristics=(HeuristicSpec("rl"),)), "learned"),
        (lambda: JobConfig(rewards=(NUMERIC,), heuristics=(HeuristicSpec("a/b"),)), "name"),
    ],
)
def test_illegal_settings_are_named(make, named: str) -> None:
    with pytest.raises((InvalidValue, ConfigError), match=named):
        make()


def test_stages_that_need_rewards_say_so_before_anything_is_generated(tmp_path: Path) -> None:
    job = Job(JobConfig(threads=1), tmp_path / "run")
    for stage in (lambda: job.rewards, lambda: prompts(job)):
        with pytest.raises(ConfigError, match="rewards is empty"):
            stage()
    assert not (job.run / "prompts.jsonl").exists()
