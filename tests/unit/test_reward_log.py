from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from asn_rl.backends import BackendConfig
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.toy import ToyBackend
from asn_rl.data import DataConfig
from asn_rl.errors import CheckpointError, DataError, InvalidValue, UnknownName
from asn_rl.evaluation.reward_log import RewardLog, draw_actions, load_reward_log, save_reward_log
from asn_rl.job import GenerateConfig, HeuristicSpec, Job, JobConfig
from asn_rl.job.logs import embeddings, headroom, prompt_embeddings, reward_log
from asn_rl.labelling.records import CANDIDATE, read_records
from asn_rl.rewards.compose import RewardConfig
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Observation, PolicyOutput, Prompt, State

NAN = math.nan
RNG = np.random.default_rng(0)


def a_log(**changes: object) -> RewardLog:
    """Four prompts, three actions, two samples."""
    log = RewardLog(
        rewards=RNG.random((4, 3, 2)),
        tokens=np.full((4, 3, 2), 5),
        actions=("a", "b", "c"),
        prompt_ids=("p", "q", "r", "s"),
        strata=("x", "x", "y", "y"),
        features=RNG.random((4, 2)),
    )
    return replace(log, **changes)


def at(array: np.ndarray, index: tuple[int, ...], value: float) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


FULL = a_log()


def test_a_log_is_saved_and_loaded_without_a_change(tmp_path: Path) -> None:
    masked = a_log(rewards=at(FULL.rewards, (1, 2, 0), NAN))
    for i, log in enumerate((masked, draw_actions(masked, np.full((4, 3), 1 / 3), 0))):
        save_reward_log(tmp_path / str(i), log)
        again = load_reward_log(tmp_path / str(i))
        for name, value in vars(log).items():
            np.testing.assert_array_equal(getattr(again, name), value)
            assert type(getattr(again, name)) is type(value)
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == ["state.json", "state.safetensors"]
    with pytest.raises(CheckpointError, match="damaged or missing"):
        load_reward_log(tmp_path / "none")


def test_means_leave_out_what_is_masked() -> None:
    rewards = np.array([[[1.0, NAN], [NAN, NAN]]])
    log = RewardLog(rewards, np.ones((1, 2, 2), int), ("a", "b"), ("p",), ("x",), np.zeros((1, 0)))
    np.testing.assert_array_equal(log.means, [[1.0, NAN]])


def test_actions_are_drawn_as_often_as_the_propensities_say() -> None:
    count = 20_000
    log = RewardLog(
        rewards=np.ones((2, 3, count)),
        tokens=np.ones((2, 3, count), int),
        actions=("a", "b", "c"),
        prompt_ids=("p", "q"),
        strata=("x", "x"),
        features=np.zeros((2, 0)),
    )
    shares = np.array([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
    drawn = draw_actions(log, shares, seed=1)
    assert (drawn.present.sum(1) == 1).all()
    np.testing.assert_allclose(drawn.present.mean(-1), shares, atol=4 * math.sqrt(0.25 / count))
    np.testing.assert_array_equal(np.isnan(drawn.rewards), ~drawn.present)
    np.testing.assert_array_equal(draw_actions(log, shares, seed=1).tokens, drawn.tokens)


DRAWN = draw_actions(FULL, np.full((4, 3), 1 / 3), 0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: a_log(prompt_ids=("p",)), InvalidValue, r"rewards shape must be \(1 prompt ids, 3 actions"),
        (lambda: a_log(tokens=np.ones((4, 3))), InvalidValue, r"tokens must be integer \(4, 3, 2\), got 'float64"),
        (lambda: a_log(features=np.zeros(4)), InvalidValue, "features must be floating point"),
        (lambda: a_log(features=np.zeros((3, 2))), InvalidValue, r"features must be floating point \(4, 2\)"),
        (lambda: a_log(actions=("a", "b", "a")), InvalidValue, "actions must be names that differ, got 'a'"),
        (lambda: a_log(strata=("x",)), InvalidValue, "strata must be 4 labels"),
        (lambda: a_log(rewards=at(FULL.rewards, (0, 0, 0), math.inf)), InvalidValue, "infinite"),
        (lambda: a_log(tokens=at(FULL.tokens, (0, 0, 0), 0)), DataError, "a reward where tokens says"),
        (
            lambda: a_log(tokens=at(FULL.tokens, (0, 0, 0), 0), rewards=at(FULL.rewards, (0, 0, 0), NAN)),
            DataError,
            r"1 of 24 cells hold no completion; run every action .* or give the propensities",
        ),
        (lambda: a_log(propensities=np.full((4, 3), 1 / 3)), DataError, "'p' holds 3 actions.*one drawn action"),
        (lambda: replace(DRAWN, propensities=np.full((4, 3), 0.3)), InvalidValue, "propensities of prompt 0 must be"),
        (
            lambda: replace(DRAWN, propensities=np.full((4, 2), 0.5)),
            InvalidValue,
            r"propensities shape must be \(4, 3\)",
        ),
        (
            lambda: replace(DRAWN, propensities=np.eye(3)[[0, 0, 0, 0]]),
            InvalidValue,
            "> 0, got 0.0; it was drawn there",
        ),
        (lambda: draw_actions(DRAWN, np.full((4, 3), 1 / 3), 0), InvalidValue, "a log in which every action was run"),
    ],
)
def test_logs_that_contradict_themselves_are_refused(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# Of a job


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two rules on twelve prompts of the toy model."""
    folder = tmp_path_factory.mktemp("toy")
    lines = [f'{{"prompt": "w{i}", "id": "p{i}", "kind": "{"ab"[i % 2]}"}}' for i in range(1, 25)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    config = JobConfig(
        backend=BackendConfig(kind="toy", model="random:32:0"),
        data=DataConfig("jsonl", {"path": str(folder / "prompts.jsonl")}),
        rewards=(RewardConfig("toy_rewards:second_choice"), RewardConfig("length_budget", arguments={"budget": 3})),
        rollout=RolloutConfig(max_new_tokens=6),
        heuristics=(HeuristicSpec("T=1"), HeuristicSpec("cold", [{"name": "top_k", "params": {"top_k": 2}}])),
        generate=GenerateConfig(num_generations=4),
        threads=1,
    )
    return Job(config, folder / "run")


def test_the_log_of_a_job_holds_the_rewards_of_its_candidates(job: Job) -> None:
    log = reward_log(job, "train")
    count = len(job.prompts("train"))
    assert log.rewards.shape == (count, 2, 4)
    assert log.actions == ("T=1", "cold")
    records = [record for _, record in read_records(job.run / "candidates" / "train", CANDIDATE)]
    assert len(records) == log.rewards.size
    for record in records:
        cell = (
            log.prompt_ids.index(record["prompt_id"]),
            log.actions.index(record["heuristic"]),
            record["seed"] - 1000,
        )
        prompt = next(p for p in job.prompts("train") if p.id == record["prompt_id"])
        arguments = ([prompt.content], [record["completion"]], [record["completion_ids"]])
        expected = sum(
            job.rewards([prompt], *arguments[1:], terminated=[record["terminated"]]).components[name].item()
            for name in ("toy_rewards:second_choice", "length_budget")
        )
        assert log.rewards[cell] == pytest.approx(expected)
        assert log.tokens[cell] == len(record["completion_ids"])
    again = reward_log(job, "train")
    np.testing.assert_array_equal(again.rewards, log.rewards)


def test_the_features_are_what_a_rollout_records_as_prompt_embedding(job: Job) -> None:
    prompts = job.prompts("selection")
    recorded = rollout(Base(), job.backend, prompts, RolloutConfig(max_new_tokens=1), capture=["prompt_embedding"])
    expected = recorded.observations.prompt_embedding
    assert expected is not None
    torch.testing.assert_close(prompt_embeddings(job.backend, prompts, batch=2), expected)
    np.testing.assert_array_equal(reward_log(job, "selection").features, expected.numpy())


def test_the_headroom_of_a_job_is_written_down(job: Job) -> None:
    report = headroom(job)
    assert report.rewards["oracle"].mean >= report.rewards["static"].low
    written = (job.run / "headroom.json").read_text()
    assert '"split": "train"' in written
    assert report.verdict[:20] in written


def test_embeddings_of_other_prompts_are_refused(job: Job, tmp_path: Path) -> None:
    folder = job.run / "embeddings" / "train"
    reward_log(job, "train")
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace("p1", "x1"))
    try:
        with pytest.raises(DataError, match="embeddings of other prompts; remove that folder"):
            embeddings(job, "train")
    finally:
        (folder / "state.json").write_text(text)
    with pytest.raises(UnknownName, match="unknown split of candidates 'test'"):
        reward_log(job, "test")


class Base:
    """The base model."""

    needs: frozenset[str] = frozenset()

    def initial_state(self, batch_size: int, device: torch.device) -> State | None:
        return None

    def __call__(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        return PolicyOutput(obs.sketch.log_mass - torch.logsumexp(obs.sketch.log_mass, -1, keepdim=True))


def test_embeddings_of_the_real_model_are_those_of_a_rollout(smollm: HFBackend) -> None:
    prompts = [Prompt("a", "What is 3 + 4?"), Prompt("b", "Name an animal, any animal you like.")]
    recorded = rollout(Base(), smollm, prompts, RolloutConfig(max_new_tokens=1), capture=["prompt_embedding"])
    expected = recorded.observations.prompt_embedding
    assert expected is not None
    found = prompt_embeddings(smollm, prompts, batch=1)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    assert (found[0] - found[1]).norm() > 1


def test_the_toy_model_embeds_the_last_token() -> None:
    toy = ToyBackend.random(vocab=8, seed=0)
    found = prompt_embeddings(toy, [Prompt("a", "w3 w5")], batch=4)
    assert found.argmax().item() == 5
