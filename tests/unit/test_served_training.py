"""GRPO and PPO on completions of a small inference engine, over HTTP, with policies read by the real host."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_rewards
import yaml
from torch import Tensor, nn
from toy_engine import ToyEngine

from asn_policies import OrderStatisticsNetwork
from asn_rl.backends.servers import ServersConfig
from asn_rl.backends.toy import ToyBackend
from asn_rl.checkpoint import latest_checkpoint
from asn_rl.config import load_config
from asn_rl.errors import ConfigError, DataError, InvalidValue, TrainingError
from asn_rl.job import Job, JobConfig, reinforce
from asn_rl.metrics import read_metrics
from asn_rl.replay import replay
from asn_rl.rewards.compose import RewardConfig, RewardSuite, score
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.serving.client import SGLangClient
from asn_rl.serving.host import Failure, PolicyHost, ServedRequest
from asn_rl.serving.status import read_status
from asn_rl.training import grpo, ppo
from asn_rl.training.grpo import GRPOConfig, make_batch, minibatch_loss
from asn_rl.training.policy_gradient import IMPORTANCE, all_logprobs
from asn_rl.training.ppo import PPOConfig
from asn_rl.training.served import (
    SERVED_LOGPROBS,
    ServeConfig,
    ServedSampler,
    served_sampler,
    with_importance,
    without_forbidden,
)
from asn_rl.types import Prompt, Trajectories

TOY = toy_rewards.TOY
PROMPTS = [Prompt(f"p{i}", f"w{i}") for i in range(1, 9)]
ROLLOUT = RolloutConfig(max_new_tokens=6, head=32, tail=1)
CONFIG = GRPOConfig(steps=3, prompts_per_step=4, num_generations=4, save_every=1, learning_rate=1e-2, num_iterations=2)
METADATA = {"base_model": "toy", "fingerprint": TOY.fingerprint, "sketch": {"head": 32, "tail": 1}}


def small(spread: float = 0.3) -> OrderStatisticsNetwork:
    torch.manual_seed(0)
    policy = OrderStatisticsNetwork(width=8, point_width=4)
    for parameter in policy.parameters():
        nn.init.normal_(parameter, std=spread)
    return policy


def suite() -> RewardSuite:
    return RewardSuite([RewardConfig("toy_rewards:second_choice")])


def pool(*engines: ToyEngine, **options: Any) -> ServersConfig:
    return ServersConfig(
        tuple(e.url for e in engines),
        **{"concurrency": 32, "backoff_s": 0.01, "retries": 1, "no_server_s": 0.2} | options,
    )


@contextmanager
def sampler(
    folder: Path, *engines: ToyEngine, cap: float = 2.0, backend: ToyBackend = TOY, rollout_config: Any = ROLLOUT
) -> Iterator[ServedSampler]:
    config = ServeConfig("sglang", pool(*engines), str(folder / "policies"), importance_cap=cap)
    with served_sampler(config, backend, rollout_config, METADATA | {"fingerprint": backend.fingerprint}) as found:
        yield found


def weights(policy: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def assert_close_policies(one: Any, other: Any, seen: Trajectories) -> None:
    """In what they say, not in their weights: one of these has no gradient but rounding, which Adam makes a step of."""
    found, expected, start = (all_logprobs(policy, seen).exp() for policy in (one, other, small()))
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=0)
    assert (found - start).abs().max() > 1e-3


def run(folder: Path, sample: Any, config: GRPOConfig = CONFIG, on_step: Any = None) -> OrderStatisticsNetwork:
    policy = small()
    grpo.train(policy, policy, TOY, PROMPTS, suite(), ROLLOUT, config, folder, sample=sample, on_step=on_step)
    return policy


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[ToyEngine]:
    with ToyEngine(TOY, tmp_path / "policies") as found:
        yield found


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_on_a_faithful_server_the_update_is_that_of_the_rollout(
    tmp_path: Path, engine: ToyEngine, algorithm: str
) -> None:
    kept: list[Trajectories] = []
    steps: list[Trajectories] = []

    def again(policy: Any, prompts: Any, **options: Any) -> tuple[Trajectories, dict[str, float]]:
        return replace(steps.pop(0), extras={}), {}

    def train(folder: Path, sample: Any) -> OrderStatisticsNetwork:
        policy, arguments = small(), (TOY, PROMPTS, suite(), ROLLOUT)
        if algorithm == "grpo":
            grpo.train(policy, policy, *arguments, CONFIG, folder, sample=sample)
            return policy
        shared = {"steps": 3, "prompts_per_step": 4, "num_generations": 4, "num_iterations": 2}
        critic = {"inputs": ["hidden", "prompt_embedding"], "width": 4}  # read by the critic alone: replay captures it
        ppo.train(policy, policy, *arguments, PPOConfig(**shared, critic_arguments=critic), folder, sample=sample)  # type: ignore[arg-type]
        return policy

    with sampler(tmp_path, engine) as served:

        def keeping(*given: Any, **options: Any) -> tuple[Trajectories, dict[str, float]]:
            trajectories, metrics = served(*given, **options)
            kept.append(trajectories)
            return trajectories, metrics

        mine = train(tmp_path / "served", keeping)
    assert len(kept) == 3
    for trajectories in kept:
        importance = trajectories.extras[IMPORTANCE]
        torch.testing.assert_close(importance, torch.ones_like(importance), atol=1e-5, rtol=0)
    steps += kept
    theirs = train(tmp_path / "same", again)
    assert_close_policies(mine, theirs, kept[-1])
    rows = read_metrics(tmp_path / "served")
    assert [row["served/failed"] for row in rows] == [0.0] * 3
    # Each step was sampled from the policy of that step: the host read it again before the first request.
    assert max(row["served/mismatch_kl"] for row in rows) < 1e-6
    assert engine.host.status.policies["training"]["loads"] == 3


def test_weights_against_a_server_that_heats_have_closed_form_and_a_cap(tmp_path: Path) -> None:
    policy, cap = OrderStatisticsNetwork(width=8, point_width=4), 1.05  # starts as the base model
    with ToyEngine(TOY, tmp_path / "policies", temperature=1.1) as hot, sampler(tmp_path, hot, cap=cap) as served:
        found, metrics = served(policy, PROMPTS, num_generations=4, seed=1)
    tokens = [token for ids in found.completion_ids for token in ids]
    before = [
        token for row, ids in zip(found.prompt_ids, found.completion_ids, strict=True) for token in [row[-1], *ids[:-1]]
    ]
    table = TOY.table[before].double()
    ratio = (torch.log_softmax(table, -1) - torch.log_softmax(table / 1.1, -1)).exp()[range(len(tokens)), tokens]
    torch.testing.assert_close(found.extras[IMPORTANCE].double(), ratio.clamp(max=cap), atol=1e-5, rtol=0)
    assert metrics["served/truncated"] == pytest.approx(float((ratio > cap).double().mean()))
    assert 0 < metrics["served/truncated"] < 1
    assert metrics["served/weight_max"] == pytest.approx(float(ratio.max()), abs=1e-5)
    assert metrics["served/mismatch_kl"] == pytest.approx(float((ratio - 1 - ratio.log()).mean()), abs=1e-5)


@pytest.mark.parametrize("cap", [1e9, 1.2])
def test_weighted_gradients_have_the_mean_of_the_policys_own(cap: float) -> None:
    """Every token of one state, weighed by how often a hot server draws it; below the cap nothing is biased."""
    policy, everything = small(), [[token] for token in range(TOY.vocab_size)]
    one = replace(ROLLOUT, max_new_tokens=1)
    drawn, _ = replay(policy, TOY, [PROMPTS[0]] * 32, everything, one, sample=range(32))
    own = drawn.behaviour_logprobs
    served = torch.log_softmax(own / 1.5, -1)
    assert torch.logsumexp(own, -1).abs() < 1e-5
    config = GRPOConfig(num_generations=32, beta=0.0, loss_type="token", advantage="none")
    rewards = torch.randn(32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def gradient(trajectories: Trajectories, shares: Tensor) -> Tensor:
        """Of the expected loss, when tokens are drawn by these log-shares."""
        batch, _ = make_batch(trajectories, rewards, policy, config)
        total = torch.zeros(len(weights(policy)))
        for token in range(32):
            loss, _ = minibatch_loss(policy, batch, torch.tensor([token]), 0.0, config, one)
            parts = torch.autograd.grad(loss, list(policy.parameters()))
            total += shares[token].exp() * torch.cat([part.flatten() for part in parts])
        return total

    weighted, metrics = with_importance(replace(drawn, extras={SERVED_LOGPROBS: served}), cap)
    expected, found, uncorrected = gradient(drawn, own), gradient(weighted, served), gradient(drawn, served)
    error, without = (float((part - expected).norm() / expected.norm()) for part in (found, uncorrected))
    if metrics["served/truncated"] == 0:
        assert error < 1e-4
    assert (cap < metrics["served/weight_max"]) == (metrics["served/truncated"] > 0)
    assert error < 0.5 * without


def test_one_dead_server_of_two_is_survived_and_two_are_not(tmp_path: Path, engine: ToyEngine) -> None:
    with ToyEngine(TOY, tmp_path / "policies") as other, sampler(tmp_path, engine, other) as served:

        def kill(step: int, metrics: dict[str, float]) -> None:
            (engine if step == 1 else other).server.die()

        with pytest.raises(TrainingError, match="resumes from the last checkpoint"):
            run(tmp_path / "broken", served, on_step=kill)
        assert [row["served/failed"] for row in read_metrics(tmp_path / "broken")] == [0.0, 0.0]
    last = latest_checkpoint(tmp_path / "broken")
    assert last is not None
    assert last.name == "step-000002"
    with ToyEngine(TOY, tmp_path / "policies") as repaired, sampler(tmp_path, repaired) as served:
        resumed, whole = run(tmp_path / "broken", served), run(tmp_path / "whole", served)
    assert_close_policies(resumed, whole, rollout(small(), TOY, PROMPTS, ROLLOUT))


def test_what_a_server_fails_is_masked_and_counted_and_never_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = TOY.encode(PROMPTS[2].content)
    once = replace(CONFIG, steps=1, prompts_per_step=8)
    picky = ToyEngine(TOY, tmp_path / "policies", refuses=lambda ids: ids == refused)
    with picky, sampler(tmp_path, picky) as served:
        run(tmp_path / "run", served, once)
        (row,) = read_metrics(tmp_path / "run")
        assert row["served/failed"] == 4
        lines = (tmp_path / "run" / "rollouts" / "step-000001.jsonl").read_text().splitlines()
        assert len(lines) == 28
        assert not any('"p3"' in line for line in lines)
        assert "4 of 32 completions failed" in capsys.readouterr().out
        with pytest.raises(TrainingError, match="all 4 completions failed"):
            served(small(), [PROMPTS[2]], num_generations=4, seed=0)


class Losing:
    """A host that loses its place in every request once, after `tokens` of them."""

    def __init__(self, host: PolicyHost, tokens: int) -> None:
        self.host, self.tokens, self.lost = host, tokens, 0
        self.forget = host.forget

    def __call__(self, logits: Tensor, requests: Sequence[ServedRequest]) -> tuple[Tensor, list[Failure]]:
        if not self.lost:
            lost = [request.key for request in requests if len(request.tokens) == self.tokens]
            self.host.forget(lost)
            self.lost += len(lost)
        return self.host(logits, requests)


def test_completions_that_a_server_lost_are_sampled_again(tmp_path: Path, engine: ToyEngine) -> None:
    """Else long ones, which are lost more often, would be missing."""
    with sampler(tmp_path, engine) as served:
        whole, _ = served(small(), PROMPTS, num_generations=4, seed=2)
        losing = Losing(engine.host, 3)
        engine.host = losing  # type: ignore[assignment]
        again, metrics = served(small(), PROMPTS, num_generations=4, seed=2)
    assert losing.lost > 0
    assert metrics["served/failed"] == 0
    assert again.completion_ids == whole.completion_ids


def test_a_server_that_refuses_the_new_version_ends_the_run(
    tmp_path: Path, engine: ToyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would answer with the version before. What it refused earlier does not count, nor what a dead server says."""

    def health(client: SGLangClient) -> dict[str, dict[str, Any]]:
        return {engine.url: read_status(engine.host.settings.status), "http://dead": {"problem": "no answer"}}

    monkeypatch.setattr(SGLangClient, "health", health)
    with sampler(tmp_path, engine) as served:
        good = dict(served.metadata)
        served(small(), PROMPTS, num_generations=1, seed=0)
        served.metadata["fingerprint"] = "another"
        with pytest.raises(
            TrainingError, match=f"{engine.url} could not read the policy 'training' .*fingerprint another"
        ):
            served(small(), PROMPTS, num_generations=1, seed=0)
        served.metadata = good
        _, metrics = served(small(), PROMPTS, num_generations=1, seed=0)
    assert metrics["served/failed"] == 0
    assert engine.host.status.policies["training"]["refused_loads"] == 1


@pytest.mark.parametrize("advantage", ["group", "batch", "none", "leave_one_out", "whitened"])
def test_a_completion_that_is_not_there_counts_as_one_whose_reward_is_masked(advantage: Any) -> None:
    policy, config = small(), replace(CONFIG, advantage=advantage)
    whole = rollout(policy, TOY, PROMPTS[:3], ROLLOUT, num_generations=4)
    rewards = score(suite(), whole).total
    kept = [i for i in range(12) if i not in (0, 5, 7)]
    masked = torch.full_like(rewards, torch.nan)
    masked[kept] = rewards[kept]
    some, signal = make_batch(whole.select(kept), rewards[kept], policy, config)
    every, same = make_batch(whole, masked, policy, config)
    there = torch.isin(every.rows, torch.tensor(kept))
    assert torch.equal(some.advantages, every.advantages[there])
    assert torch.equal(signal, same)


def test_served_tokens_are_trained_on_as_they_are(tmp_path: Path) -> None:
    """A text that another token sequence spells as well: decoding and encoding would change what was drawn."""
    words = ["<eos>", *(f"w{i}" for i in range(1, 30)), "w1 w2", "w3 w4"]
    backend = ToyBackend(TOY.table, words)
    with ToyEngine(backend, tmp_path / "policies") as engine, sampler(tmp_path, engine, backend=backend) as served:
        drawn, _ = served(small(), PROMPTS, num_generations=4, seed=2)
        sent = engine.served
    ids = [list(row) for row in drawn.completion_ids]
    assert any(backend.encode(text) != [t for t in row if t] for text, row in zip(drawn.completions, ids, strict=True))
    assert sorted(ids) == sorted(sent)
    assert {tuple(request["input_ids"]) for request in engine.server.payloads} == {
        tuple(row) for row in drawn.prompt_ids
    }


def test_a_stop_string_ends_a_served_completion_where_it_ends_a_rollout(tmp_path: Path, engine: ToyEngine) -> None:
    stopping = replace(ROLLOUT, stop=("w7", "w9"))
    with sampler(tmp_path, engine, rollout_config=stopping) as served:
        drawn, metrics = served(small(), PROMPTS, num_generations=4, seed=2)
    assert metrics["served/failed"] == 0
    assert drawn.terminated.any()
    assert metrics["served/mismatch_kl"] < 1e-6
    for ids, ended in zip(drawn.completion_ids, drawn.terminated.tolist(), strict=True):
        ends = [token in (0, 7, 9) for token in ids]
        assert not any(ends[:-1])
        assert ends[-1] == ended
        assert ended or len(ids) == 6


def test_completions_without_a_ratio_are_left_out() -> None:
    drawn = rollout(small(), TOY, PROMPTS[:2], ROLLOUT, num_generations=2)
    forbidden = drawn.behaviour_logprobs.clone()
    forbidden[drawn.rows == 1] = -torch.inf
    assert without_forbidden(drawn) is drawn
    left = without_forbidden(drawn.with_logprobs(forbidden))
    assert [(p.id, g) for p, g in zip(left.prompts, left.sample, strict=True)] == [("p1", 0), ("p2", 0), ("p2", 1)]
    with pytest.raises(TrainingError, match="forbids when replayed"):
        without_forbidden(drawn.with_logprobs(torch.full_like(forbidden, -torch.inf)))


def test_given_prompt_ids_are_replayed_unread_and_must_fit() -> None:
    policy, silent = small(), Prompt("silent", "no word of the toy")
    drawn = rollout(policy, TOY, PROMPTS[:1], ROLLOUT)
    again, _ = replay(policy, TOY, [silent], drawn.completion_ids, ROLLOUT, prompt_ids=drawn.prompt_ids)
    torch.testing.assert_close(again.behaviour_logprobs, drawn.behaviour_logprobs, atol=1e-5, rtol=0)
    for ids in ([], [1] * (TOY.max_context - ROLLOUT.max_new_tokens + 1)):
        with pytest.raises(DataError, match=f"prompt 'silent' has {len(ids)} tokens; with max_new_tokens=6 it must"):
            replay(policy, TOY, [silent], drawn.completion_ids, ROLLOUT, prompt_ids=[ids])
    with pytest.raises(DataError, match=f"token {TOY.vocab_size} in prompt 'silent' is outside the base model's voc"):
        replay(policy, TOY, [silent], drawn.completion_ids, ROLLOUT, prompt_ids=[[1, TOY.vocab_size]])
    with pytest.raises(DataError, match="prompt_ids has 2 entries for 1 prompts"):
        replay(policy, TOY, [silent], drawn.completion_ids, ROLLOUT, prompt_ids=[[1], [2]])


def test_bad_settings_are_named(tmp_path: Path, engine: ToyEngine) -> None:
    with pytest.raises(InvalidValue, match=r"importance_cap must be >= 1, got 0\.5"):
        ServeConfig("sglang", pool(engine), "policies", importance_cap=0.5)
    with pytest.raises(InvalidValue, match="router must be false with engine vllm"):
        ServeConfig("vllm", pool(engine), "policies", router=True)
    reading = OrderStatisticsNetwork(width=8, inputs=["hidden"], hidden_size=32)
    with (
        sampler(tmp_path, engine) as served,
        pytest.raises(InvalidValue, match=r"where servers sample, got \['hidden'\]"),
    ):
        served(reading, PROMPTS, num_generations=2, seed=0)


def test_a_job_trains_on_servers_and_says_so_in_its_run_folder(tmp_path: Path, engine: ToyEngine) -> None:
    config = {
        "backend": {"kind": "toy", "model": "random:32:0"},
        "data": {"source": "jsonl", "arguments": {"path": str(tmp_path / "prompts.jsonl")}},
        "rewards": [{"function": "toy_rewards:second_choice"}],
        "rollout": {"max_new_tokens": 6, "head": 32, "tail": 1},
        "policy": {"name": "asn_policies:OrderStatisticsNetwork", "arguments": {"width": 8, "point_width": 4}},
        "warm_start": False,
        "grpo": {"steps": 2, "prompts_per_step": 4, "num_generations": 4},
        "serve": {"engine": "sglang", "policies": str(tmp_path / "policies"), "pool": {"urls": ["http://127.0.0.1:1"]}},
    }
    rows = [json.dumps({"prompt": prompt.content, "split": "train"}) for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    job = Job(load_config(JobConfig, path, [f"serve.pool.urls=[{engine.url}]"]), tmp_path / "run")
    reinforce(job)
    assert engine.server.payloads
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["serve"]
    assert saved["pool"]["urls"] == [engine.url]
    assert saved["importance_cap"] == 2.0
    assert {"served/mismatch_kl", "served/weight_max", "served/truncated"} <= set(read_metrics(tmp_path / "run")[0])
    with pytest.raises(ConfigError, match="null with algorithm lpo"):
        load_config(JobConfig, path, ["algorithm=lpo"])
    with pytest.raises(ConfigError, match="did you mean 'importance_cap'"):
        load_config(JobConfig, path, ["serve.importance_cup=3"])
