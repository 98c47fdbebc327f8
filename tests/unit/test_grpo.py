from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_rewards
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from asn_policies import LocalTransform, OrderStatisticsNetwork
from asn_policies.base import PolicyModule
from asn_rl.checkpoint import latest_checkpoint, load_policy
from asn_rl.errors import CheckpointError, InvalidValue, TrainingError
from asn_rl.metrics import MetricsLogger, read_metrics
from asn_rl.ops.divergences import k1, k2, k3, kl
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.training.grpo import GRPOConfig, Trainer, adapted_beta, make_batch, minibatch_loss, score, train
from asn_rl.types import Observation, Prompt

PROMPTS = [Prompt(f"p{i}", f"w{i}") for i in range(1, 9)]
ROLLOUT = RolloutConfig(max_new_tokens=8, head=32, tail=1)
CONFIG = GRPOConfig(steps=4, prompts_per_step=4, num_generations=4, save_every=2, learning_rate=1e-2)


def suite(name: str = "second_choice") -> RewardSuite:
    return RewardSuite([RewardConfig(f"toy_rewards:{name}")])


def run(folder: Path, config: GRPOConfig = CONFIG, policy: nn.Module | None = None, reward: str = "second_choice"):
    torch.manual_seed(0)
    policy = policy or OrderStatisticsNetwork(width=8, point_width=4)
    return train(policy, policy, toy_rewards.TOY, PROMPTS, suite(reward), ROLLOUT, config, folder)


def weights(policy: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


class TestResume:
    def test_eight_steps_equal_four_and_four_more_bit_for_bit(self, tmp_path: Path) -> None:
        eight = replace(CONFIG, steps=8, save_every=4, kl_target=0.05)
        whole = run(tmp_path / "whole", eight)
        run(tmp_path / "half", replace(eight, steps=4))
        (tmp_path / "half" / "policy").rename(tmp_path / "policy-at-four")
        resumed = run(tmp_path / "half", eight)
        assert torch.equal(weights(whole), weights(resumed))
        drop = "time/"
        first, second = (
            [{k: v for k, v in row.items() if not k.startswith(drop)} for row in read_metrics(tmp_path / name)]
            for name in ("whole", "half")
        )
        assert first == second

    def test_an_interrupted_run_continues_from_its_last_checkpoint(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        every = replace(CONFIG, save_every=1)
        monkeypatch.setattr(toy_rewards, "calls", 0)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", every, reward="interrupt")
        assert "interrupted during step 3; step-000002 is kept" in capsys.readouterr().out
        monkeypatch.setattr(toy_rewards, "calls", 0)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "early", replace(CONFIG, save_every=4), reward="interrupt")
        told = "interrupted during step 3; before the first checkpoint (grpo.save_every). The same command begins anew"
        assert told in " ".join(capsys.readouterr().out.split())
        resumed, whole = run(tmp_path / "broken", every), run(tmp_path / "whole", every)
        assert torch.equal(weights(whole), weights(resumed))
        assert [row["step"] for row in read_metrics(tmp_path / "broken")] == [1, 2, 3, 4]

    def test_a_truncated_checkpoint_is_refused_with_advice(self, tmp_path: Path) -> None:
        run(tmp_path)
        folder = latest_checkpoint(tmp_path)
        assert folder is not None
        weights_file = folder / "policy" / "model.safetensors"
        weights_file.write_bytes(weights_file.read_bytes()[:-8])
        with pytest.raises(CheckpointError, match="damaged"):
            run(tmp_path, replace(CONFIG, steps=8))

    def test_a_full_disk_keeps_the_checkpoint_before(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run(tmp_path, replace(CONFIG, steps=2))

        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("asn_rl.training.checkpoints.save_state", full)
        with pytest.raises(CheckpointError, match="No space left"):
            run(tmp_path)
        kept = latest_checkpoint(tmp_path)
        assert kept is not None
        assert kept.name == "step-000002"
        assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-000002"}


class TestOutputs:
    def test_a_run_folder_holds_what_a_user_looks_for(self, tmp_path: Path) -> None:
        policy = run(tmp_path)
        assert torch.equal(weights(load_policy(tmp_path / "policy")), weights(policy))
        rows = [json.loads(line) for line in (tmp_path / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
        assert len(rows) == CONFIG.prompts_per_step * CONFIG.num_generations
        assert {"prompt_id", "sample", "completion", "reward", "terminated", "schema"} <= set(rows[0])
        events = EventAccumulator(str(tmp_path / "events"))
        events.Reload()
        assert "kl/exact" in events.Tags()["scalars"]
        assert "completions/text_summary" in events.Tags()["tensors"]

    def test_metrics_have_their_documented_names(self, tmp_path: Path) -> None:
        run(tmp_path, replace(CONFIG, steps=1))
        (row,) = read_metrics(tmp_path)
        expected = {
            "loss/total", "loss/surrogate", "policy/entropy", "policy/clipfrac", "policy/grad_norm", "policy/length",
            "policy/truncated", "kl/exact", "kl/beta", "kl/approx_old", "reward/total", "reward/groups_skipped",
            "time/rollout", "time/reward", "time/update", "time/tokens_per_second",
        }  # fmt: skip
        assert expected <= set(row)


class Deaf(PolicyModule):
    """Has a parameter that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def shift(self, obs: Observation) -> Tensor:
        return torch.zeros_like(obs.sketch.log_mass)


class Detached(Deaf):
    def shift(self, obs: Observation) -> Tensor:
        return (self.unused * obs.sketch.log_count).detach()


class Poisoned(Deaf):
    def shift(self, obs: Observation) -> Tensor:
        return self.unused * float("nan") + torch.zeros_like(obs.sketch.log_mass)


class TestRefusals:
    @pytest.mark.parametrize("cls", [Deaf, Detached])
    def test_a_run_in_which_no_parameter_gets_a_gradient_fails(self, tmp_path: Path, cls: type[PolicyModule]) -> None:
        with pytest.raises(TrainingError, match="received a gradient"):
            run(tmp_path, policy=cls())

    def test_weights_of_sixteen_bits_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match=r"has weights in torch.bfloat16"):
            run(tmp_path, policy=LocalTransform(4).bfloat16())

    def test_heuristics_cannot_be_trained(self, tmp_path: Path) -> None:
        from asn_policies import Pipeline

        with pytest.raises(TrainingError, match="no trainable parameter"):
            run(tmp_path, policy=Pipeline([]))

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"num_generations": 1}, "num_generations"),
            ({"steps": 0}, "steps"),
            ({"epsilon": 1.0}, "epsilon"),
            ({"beta": -0.1}, "beta"),
            ({"kl_target": 0.1, "beta": 0.0}, "kl_target"),
            ({"advantage": "pass_at_k", "pass_k": (5,)}, "pass_k"),
            ({"surrogate": "reinforce"}, "num_iterations must be 1 with surrogate reinforce"),
        ],
    )
    def test_illegal_settings_are_named(self, change: dict[str, float], named: str) -> None:
        with pytest.raises(InvalidValue, match=named):
            replace(CONFIG, **change)  # type: ignore[arg-type]


class TestSkippedGroups:
    def test_groups_without_variance_carry_no_advantage_and_are_counted(self, tmp_path: Path) -> None:
        before = OrderStatisticsNetwork(width=8, point_width=4)
        after = copy.deepcopy(before)
        run(tmp_path, replace(CONFIG, steps=1, beta=0.0), policy=after, reward="constant")
        assert read_metrics(tmp_path)[0]["reward/groups_skipped"] == 1.0
        assert torch.equal(weights(before), weights(after))

    def test_a_step_without_signal_moves_nothing_in_spite_of_momentum(self, tmp_path: Path) -> None:
        policy = OrderStatisticsNetwork(width=8, point_width=4)
        free = replace(CONFIG, beta=0.0, weight_decay=0.1)
        trainer = Trainer(policy, policy, toy_rewards.TOY, PROMPTS, suite(), ROLLOUT, free, tmp_path, {})
        with MetricsLogger(tmp_path) as log:
            trainer.train_step(log)
            moved = weights(policy).clone()
            trainer.rewards = suite("constant")
            metrics = trainer.train_step(log)
        assert torch.equal(weights(policy), moved)
        assert metrics["policy/grad_norm"] == 0.0
        assert metrics["reward/groups_skipped"] == 1.0


def test_a_reference_that_cuts_is_no_obstacle_when_nothing_anchors_to_it(tmp_path: Path) -> None:
    from asn_policies import Pipeline

    policy = OrderStatisticsNetwork(width=8, point_width=4)
    greedy = Pipeline([{"name": "greedy"}])
    free = replace(CONFIG, steps=1, beta=0.0)
    train(policy, greedy, toy_rewards.TOY, PROMPTS, suite(), ROLLOUT, free, tmp_path / "free")
    assert all(torch.isfinite(p).all() for p in policy.parameters())
    with pytest.raises(TrainingError, match="forbids what the policy uses"):
        train(policy, greedy, toy_rewards.TOY, PROMPTS, suite(), ROLLOUT, replace(free, beta=0.1), tmp_path / "held")


def _batch():
    torch.manual_seed(1)
    policy, reference = (OrderStatisticsNetwork(width=8, point_width=4) for _ in range(2))
    for module in (policy, reference):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    trajectories = rollout(policy, toy_rewards.TOY, PROMPTS[:4], ROLLOUT, num_generations=4)
    totals = score(suite(), trajectories).total
    return policy, reference, make_batch(trajectories, totals, reference, CONFIG)[0]


class TestLoss:
    def test_gradient_on_policy_is_the_policy_gradient(self) -> None:
        """At ratio one the clipped surrogate has the gradient of -A log pi (the score function)."""
        policy, _, batch = _batch()
        part = torch.arange(len(batch.rows))
        loss, _ = minibatch_loss(policy, batch, part, 0.0, CONFIG, ROLLOUT)
        loss.backward()
        mine = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        policy.zero_grad()
        trajectories = batch.trajectories
        chosen = policy(trajectories.per_token()).logprobs.gather(-1, trajectories.points[:, None]).squeeze(-1)
        (-(batch.advantages * chosen).mean()).backward()
        theirs = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)

    @pytest.mark.parametrize("loss_type", ["token", "sequence", "constant"])
    def test_aggregations_weigh_tokens_as_documented(self, loss_type: str) -> None:
        policy, _, batch = _batch()
        config = replace(CONFIG, loss_type=loss_type)  # type: ignore[arg-type]
        loss, _ = minibatch_loss(policy, batch, torch.arange(len(batch.rows)), 0.0, config, ROLLOUT)
        per_token = -batch.advantages  # ratio one
        lengths = batch.trajectories.lengths
        by_row = torch.zeros(len(lengths)).index_add(0, batch.rows, per_token)
        expected = {
            "token": per_token.mean(),
            "sequence": (by_row / lengths).mean(),
            "constant": by_row.sum() / (len(lengths) * ROLLOUT.max_new_tokens),
        }[loss_type]
        torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=1e-4)

    def test_the_kl_penalty_is_the_exact_divergence_over_the_vocabulary(self) -> None:
        policy, reference, batch = _batch()
        trajectories = batch.trajectories
        _, metrics = minibatch_loss(policy, batch, torch.arange(len(batch.rows)), 0.1, CONFIG, ROLLOUT)
        # head = V: every token is its own point, so this is a sum over the vocabulary.
        obs = trajectories.per_token()
        p, q = (module(obs).logprobs.detach().double()[:, :32] for module in (policy, reference))
        assert metrics["kl/exact"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)

    def test_recorded_logprobs_make_the_first_ratio_one(self) -> None:
        policy, _, batch = _batch()
        _, metrics = minibatch_loss(policy, batch, torch.arange(len(batch.rows)), 0.0, CONFIG, ROLLOUT)
        assert metrics["kl/approx_old"] == pytest.approx(0.0, abs=1e-7)
        assert metrics["policy/clipfrac"] == 0.0


class TestReinforce:
    CONFIG = replace(CONFIG, advantage="whitened", surrogate="reinforce", num_iterations=1, beta=0.0)

    def test_its_gradient_is_the_score_times_whitened_rewards(self) -> None:
        policy, reference, batch = _batch()
        trajectories = batch.trajectories
        totals = score(suite(), trajectories).total
        batch, signal = make_batch(trajectories, totals, reference, self.CONFIG)
        loss, metrics = minibatch_loss(policy, batch, torch.arange(len(batch.rows)), 0.0, self.CONFIG, ROLLOUT)
        mine = torch.autograd.grad(loss, list(policy.parameters()))
        white = (totals - totals.mean()) / (totals.std() + 1e-4)
        chosen = policy(trajectories.per_token()).logprobs.gather(-1, trajectories.points[:, None]).squeeze(-1)
        theirs = torch.autograd.grad(-(white.float()[batch.rows] * chosen).mean(), list(policy.parameters()))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
        assert signal.tolist() == [True]
        assert metrics["policy/clipfrac"] == 0.0

    def test_groups_need_no_companions(self, tmp_path: Path) -> None:
        run(tmp_path, replace(self.CONFIG, num_generations=1, prompts_per_step=8, steps=1))
        assert read_metrics(tmp_path)[0]["reward/groups_skipped"] == 0.0


def test_pass_at_k_favours_the_rare_success() -> None:
    _, reference, batch = _batch()
    totals = torch.zeros(4, 4, dtype=torch.float64)
    totals[1, 0], totals[2, :3] = 1.0, 1.0
    config = replace(CONFIG, advantage="pass_at_k", pass_k=(2,))
    batch, signal = make_batch(batch.trajectories, totals.flatten(), reference, config)
    of_completion = [float(batch.advantages[batch.rows == i][0]) for i in range(16)]
    assert signal.tolist() == [False, True, False, False]  # any two of the third's four hold a success
    assert of_completion[4] == pytest.approx(1.0)  # rho = 1/2: (1 - 1/2) / (1/2)
    assert of_completion[8:12] == [0.0] * 4


class TestEstimators:
    def test_k1_and_k3_are_unbiased_and_k2_is_close(self) -> None:
        generator = torch.Generator().manual_seed(0)
        p = torch.log_softmax(torch.randn(12, generator=generator).double(), -1)
        q = torch.log_softmax(p + 0.3 * torch.randn(12, generator=generator).double(), -1)
        exact = kl(p, q)
        expected = {name: (p.exp() * f(p, q)).sum() for name, f in (("k1", k1), ("k2", k2), ("k3", k3))}
        torch.testing.assert_close(expected["k1"], exact)
        torch.testing.assert_close(expected["k3"], exact)
        torch.testing.assert_close(expected["k2"], exact, rtol=0.2, atol=0.0)
        assert (k3(p, q) >= 0).all()

    def test_kl_handles_cut_points(self) -> None:
        p = torch.tensor([0.5, 0.5, 0.0]).log()
        q = torch.tensor([0.25, 0.5, 0.25]).log()
        torch.testing.assert_close(kl(p, q), torch.tensor(0.5 * math.log(2)))
        assert kl(q, p) == math.inf


class TestAdaptiveBeta:
    def test_beta_rises_above_the_target_and_falls_below_it(self) -> None:
        assert adapted_beta(1.0, 0.2, 0.1) == 2.0
        assert adapted_beta(1.0, 0.05, 0.1) == 0.5
        assert adapted_beta(1.0, 0.11, 0.1) == 1.0

    def test_it_holds_the_divergence_near_the_target(self, tmp_path: Path) -> None:
        free = replace(CONFIG, steps=30, learning_rate=2e-2, beta=0.01)
        run(tmp_path / "free", free)
        run(tmp_path / "held", replace(free, kl_target=0.02))
        late = {name: read_metrics(tmp_path / name)[-5:] for name in ("free", "held")}
        divergence = {name: sum(row["kl/exact"] for row in rows) / 5 for name, rows in late.items()}
        assert divergence["held"] < 0.5 * divergence["free"]


def test_the_reference_is_a_copy_that_training_does_not_move(tmp_path: Path) -> None:
    policy = OrderStatisticsNetwork(width=8, point_width=4)
    trainer = Trainer(policy, policy, toy_rewards.TOY, PROMPTS, suite(), ROLLOUT, CONFIG, tmp_path, {})
    nn.init.ones_(policy.slope.bias)
    assert trainer.reference.slope.bias.item() == 0.0
