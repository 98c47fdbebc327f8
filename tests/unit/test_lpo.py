"""LPO: pairs are those of the definition, the preferred strategy is learned offline, runs continue bit for bit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asn_policies import OrderStatisticsNetwork, Pipeline, SequenceStrategy, TokenStrategy
from asn_rl.backends import BackendConfig
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.toy import ToyBackend
from asn_rl.data import DataConfig
from asn_rl.data.store import load_trajectories
from asn_rl.errors import DataError, InvalidValue, TrainingError
from asn_rl.job import GenerateConfig, HeuristicSpec, Job, JobConfig, reinforce
from asn_rl.job.config import PolicySpec
from asn_rl.metrics import read_metrics
from asn_rl.mixed_batch import MixedBatch
from asn_rl.ops.preference import Pairs, choose_pairs
from asn_rl.protocols import TrainablePolicy
from asn_rl.rewards.compose import RewardConfig
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.training.distill import DistillConfig
from asn_rl.training.lpo import LPOConfig, Trainer, train
from asn_rl.types import Prompt, Trajectories

NAN = math.nan
TOY = ToyBackend.random(vocab=16, seed=3)
ROLLOUT = RolloutConfig(max_new_tokens=6, head=16, tail=1)
STRATEGIES: list[dict[str, Any]] = [
    {"name": "hot", "processors": [{"name": "temperature", "params": {"temperature": 2.0}}]},
    {"name": "top_k", "processors": [{"name": "top_k", "params": {"top_k": 2}}]},
]
PIPELINES = [Pipeline(strategy["processors"]) for strategy in STRATEGIES]
FAST = LPOConfig(epochs=8, beta=1.0, learning_rate=0.05, holdout=0.3)


def candidates() -> tuple[Trajectories, Pairs]:
    """Four completions of 15 prompts by each strategy, better the more tokens are one of the two most probable."""
    prompts = [Prompt(f"p{i}", f"w{i}") for i in range(1, 16) for _ in range(8)]
    policy = MixedBatch(PIPELINES, [i % 2 for i in range(len(prompts))])
    run = rollout(policy, TOY, prompts, ROLLOUT, seed=list(range(len(prompts))), capture=["last_point"])
    hits = torch.bincount(run.rows, (run.points < 2).double(), minlength=len(run))
    return run, choose_pairs((hits / run.lengths).reshape(15, -1), 4)


def gate(**options: Any) -> TokenStrategy:
    torch.manual_seed(0)
    return TokenStrategy(STRATEGIES, width=8, **options)


# Pairs


def test_pairs_are_the_best_and_the_worst_of_disjoint_groups() -> None:
    rewards = torch.rand(5, 9, generator=torch.Generator().manual_seed(0))
    whole = choose_pairs(rewards)
    assert torch.equal(whole.chosen, rewards.argmax(-1) + 9 * torch.arange(5))
    assert torch.equal(whole.rejected, rewards.argmin(-1) + 9 * torch.arange(5))
    pairs, flat = choose_pairs(rewards, 2, seed=1), rewards.flatten()
    assert (len(pairs.chosen), pairs.tied, pairs.masked) == (20, 0, 0)
    assert (flat[pairs.chosen] > flat[pairs.rejected]).all()
    assert torch.equal(pairs.chosen // 9, pairs.rejected // 9)
    ends = torch.cat([pairs.chosen, pairs.rejected])
    assert len(ends.unique()) == len(ends)
    assert torch.equal(choose_pairs(rewards, 2, seed=1).chosen, pairs.chosen)


def test_of_equal_rewards_each_is_taken_alike() -> None:
    """With the first of equals a strategy would win by its place in the grid."""
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, NAN]).repeat(3000, 1)
    pairs = choose_pairs(rewards, seed=0)
    for ends, count in ((pairs.chosen % 6, 3), (pairs.rejected % 6, 2)):
        shares = ends.bincount(minlength=6).double().sort(descending=True).values / 3000
        torch.testing.assert_close(shares[:count], torch.full((count,), 1 / count).double(), atol=0.04, rtol=0)
        assert shares[count:].sum() == 0


@pytest.mark.parametrize("size", [1, 7])
def test_a_group_must_fit_the_candidates(size: int) -> None:
    with pytest.raises(InvalidValue, match=r"group_size must be in \[2, 6\]"):
        choose_pairs(torch.zeros(2, 6), size)


def test_rewards_that_prefer_nothing_are_an_error() -> None:
    with pytest.raises(DataError, match="in 1 groups all rewards are equal, in 1 fewer than two"):
        choose_pairs(torch.tensor([[0.5, 0.5], [NAN, 1.0]]))


# Training


@pytest.mark.parametrize("kind", [TokenStrategy, SequenceStrategy])
def test_the_preferred_strategy_is_learned_without_generating(tmp_path: Path, kind: Any) -> None:
    run, pairs = candidates()
    torch.manual_seed(0)
    policy, reference = kind(STRATEGIES, width=8), kind(STRATEGIES, width=8)
    train(policy, reference, run, pairs, FAST, tmp_path)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["eval/pair_accuracy"] > 0.85
    assert rows[-1]["eval/preference"] < 0.75 * math.log(2)
    assert rows[-1]["kl/exact"] > rows[0]["kl/exact"] >= 0
    share = policy.gate_probabilities(run.per_token())[:, 1].mean()
    assert share > 0.8
    assert (tmp_path / "policy" / "model.safetensors").exists()


def test_the_loss_is_that_of_dpo_on_the_text(tmp_path: Path) -> None:
    """Over tokens and over points: inside a point policy and reference are the base model."""
    prompts = [Prompt(f"p{i}", f"w{i}") for i in range(1, 4)]
    coarse = RolloutConfig(max_new_tokens=6, head=4, tail=2)
    policy, reference = (OrderStatisticsNetwork(8, 4) for _ in range(2))
    with torch.no_grad():
        policy.slope.bias.fill_(0.1)
        reference.slope.bias.fill_(-0.05)
    run = rollout(policy, TOY, prompts, coarse, num_generations=2)
    pairs = Pairs(torch.tensor([0, 3]), torch.tensor([1, 2]), 3, 1)
    trainer = Trainer(policy, reference, run, pairs, replace(FAST, beta=0.3, holdout=0.0), tmp_path, {})
    loss, metrics = trainer.loss(torch.tensor([0, 1]))

    def of_text(scale: Any) -> Tensor:
        shift = scale(run.per_token()).logprobs.gather(1, run.points[:, None])[:, 0]
        inner = run.base_logprobs - run.observations.sketch.log_mass.gather(1, run.points[:, None])[:, 0]
        return torch.zeros(6).index_add(0, run.rows, shift + inner)

    torch.testing.assert_close(of_text(policy), torch.zeros(6).index_add(0, run.rows, run.behaviour_logprobs))
    ratio = (of_text(policy) - of_text(reference)).tolist()
    first, second = ratio[0] - ratio[1], ratio[3] - ratio[2]
    expected = (math.log1p(math.exp(-0.3 * first)) + math.log1p(math.exp(-0.3 * second))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert metrics["policy/margin"] == pytest.approx((first + second) / 2, rel=1e-3)
    assert metrics["policy/pair_accuracy"] == ((first > 0) + (second > 0)) / 2
    assert trainer.counts["reward/groups_skipped"] == pytest.approx(4 / 6)


class Stop(Exception):
    pass


def test_an_interrupted_run_ends_at_the_same_weights(tmp_path: Path) -> None:
    run, pairs = candidates()
    config = replace(FAST, epochs=6, save_every=2)
    whole = train(gate(), gate(), run, pairs, config, tmp_path / "whole")

    def stop(epoch: int, metrics: Any) -> None:
        if epoch == 3:
            raise Stop

    with pytest.raises(Stop):
        train(gate(), gate(), run, pairs, config, tmp_path / "parts", on_epoch=stop)
    resumed = train(gate(), gate(), run, pairs, config, tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    untimed = [
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert untimed[0] == untimed[1]
    assert len(list((tmp_path / "parts" / "checkpoints").iterdir())) == 2


def test_pairs_that_the_reference_cannot_draw_are_left_out_and_counted(tmp_path: Path) -> None:
    run, pairs = candidates()
    cut = {"name": "top_k", "params": {"top_k": 10}}
    narrow = TokenStrategy([{"name": "narrow", "processors": [cut]}], context_free=True)
    config = replace(FAST, epochs=1, holdout=0.0)
    trainer = Trainer(gate(), narrow, run, pairs, config, tmp_path / "a", {})
    ends = torch.stack([pairs.chosen, pairs.rejected], 1)
    outside = torch.bincount(run.rows, (run.points >= 10).double(), minlength=len(run))[ends].sum(-1) > 0
    assert trainer.counts["reward/pairs_impossible"] == outside.sum() > 0
    assert trainer.counts["reward/pairs"] == (~outside).sum() > 0
    metrics = trainer.train_epoch()
    assert metrics.pop("kl/exact") == math.inf  # of what the reference forbids, not of what the pairs hold
    assert all(math.isfinite(value) for value in metrics.values())
    worst = Pairs(pairs.chosen[outside], pairs.rejected[outside], 0, 0)
    with pytest.raises(TrainingError, match="gives no probability to the text of any"):
        Trainer(gate(), narrow, run, worst, config, tmp_path / "b", {})


def test_what_cannot_learn_is_refused(tmp_path: Path) -> None:
    run, pairs = candidates()
    heuristic: Any = PIPELINES[0]
    with pytest.raises(TrainingError, match="no trainable parameter"):
        train(heuristic, heuristic, run, pairs, FAST, tmp_path / "a")
    with pytest.raises(TrainingError, match="received a gradient"):
        train(gate(argmax=True), gate(), run, Pairs(pairs.chosen, pairs.chosen, 0, 0), FAST, tmp_path / "b")
    cutting = OrderStatisticsNetwork(8, 4, hard_cut=True)
    torch.nn.init.constant_(cutting.margin.bias, -1.0)
    with pytest.raises(TrainingError, match=r"the loss is (inf|nan) in epoch 1"):
        train(cutting, gate(), run, pairs, FAST, tmp_path / "c")
    with pytest.raises(DataError, match=r"holdout 0\.99"):
        train(gate(), gate(), run, pairs, replace(FAST, holdout=0.99), tmp_path / "d")


@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", 0), ("beta", 0.0), ("group_size", 1), ("minibatch_pairs", 0), ("holdout", 1.0), ("save_every", 0)],
)
def test_illegal_settings_are_named(key: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=key):
        replace(FAST, **{key: value})


# As a stage of a job


def lpo_job(folder: Path, **options: Any) -> Job:
    rows = [{"prompt": f"w{i}", "id": f"p{i}"} for i in range(1, 25)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "backend": BackendConfig(kind="toy", model="random:32:0"),
        "data": DataConfig(source="jsonl", arguments={"path": str(folder / "prompts.jsonl")}),
        "rewards": (RewardConfig("toy_rewards:second_choice", normalize="group"),),
        "rollout": RolloutConfig(max_new_tokens=6, head=32, tail=1),
        "policy": PolicySpec("asn_policies:TokenStrategy", {"width": 8}),
        "warm_start": False,
        "heuristics": tuple(HeuristicSpec(s["name"], s["processors"]) for s in STRATEGIES),
        "generate": GenerateConfig(num_generations=4),
        "algorithm": "lpo",
        "lpo": replace(FAST, epochs=3, group_size=4),
        "threads": 1,
        **options,
    }
    return Job(JobConfig(**settings), folder / "run")


def test_a_job_prefers_among_its_labelled_candidates(tmp_path: Path) -> None:
    """Normalised over a prompt's candidates, rewards still say that the truncated strategy is better."""
    job = lpo_job(tmp_path)
    policy = reinforce(job)
    stored = load_trajectories(job.run / "pairs")
    shares = torch.tensor([sum(point == 1 for point in part) / len(part) for part in stored.points.split(
        stored.lengths.tolist()
    )])  # fmt: skip
    better, worse = shares.reshape(-1, 2).T
    assert (better > worse).all()
    rows = read_metrics(job.run)
    assert len(rows) == 3
    assert rows[-1]["reward/pairs"] == len(better)
    assert rows[-1]["policy/pair_accuracy"] > 0.6
    start = job.new_policy()
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), policy.parameters(), strict=True))
    again = reinforce(lpo_job(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), policy.parameters(), strict=True))


def test_a_job_distils_tokens_into_a_warp_and_prefers_from_there(tmp_path: Path) -> None:
    warp = PolicySpec("asn_policies:TemperatureTopP", {"width": 8})
    job = lpo_job(tmp_path, policy=warp, warm_start=True, distill=DistillConfig(target="tokens", epochs=2))
    reinforce(job)
    assert "the tokens of 12 candidates" in (job.run / "distilled" / "README.md").read_text()
    assert len(read_metrics(job.run)) == 3


def test_on_the_real_model(smollm: HFBackend, tmp_path: Path) -> None:
    """Of two answers the one that is less likely under the base model is preferred; a few epochs learn it."""
    prompts = [Prompt(f"p{i}", f"Name {thing}.") for i, thing in enumerate(("a bird", "a city", "a color"))]
    run = rollout(PIPELINES[0], smollm, prompts, RolloutConfig(max_new_tokens=12), num_generations=4)
    rewards = -run.base_logprobs.new_zeros(len(run)).index_add(0, run.rows, run.base_logprobs).reshape(3, 4)
    policy: TrainablePolicy = OrderStatisticsNetwork(8, 4)
    config = LPOConfig(epochs=16, learning_rate=1e-2, group_size=2, holdout=0.0)
    train(policy, OrderStatisticsNetwork(8, 4), run, choose_pairs(rewards, 2), config, tmp_path)
    rows = read_metrics(tmp_path)
    assert rows[0]["loss/preference"] == pytest.approx(math.log(2), rel=1e-3)
    assert rows[-1]["loss/preference"] < rows[0]["loss/preference"]
    assert rows[-1]["policy/pair_accuracy"] > 0.8
