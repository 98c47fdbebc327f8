from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_rewards
from torch import Tensor, nn

from asn_policies import OrderStatisticsNetwork
from asn_policies.base import PolicyModule
from asn_policies.value import ValueNetwork
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.toy import ToyBackend
from asn_rl.checkpoint import latest_checkpoint, load_policy
from asn_rl.config import from_dict, to_dict
from asn_rl.errors import CheckpointError, ConfigError, InvalidValue, RewardError, TrainingError, UnknownName
from asn_rl.metrics import MetricsLogger, read_metrics
from asn_rl.ops.context import CONTEXT_SIZE
from asn_rl.ops.divergences import kl
from asn_rl.ops.logprobs import shifted
from asn_rl.ops.sketch import SketchSize, build_sketch
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.rollout import RolloutConfig, concatenate, rollout
from asn_rl.training.budget import BudgetConfig
from asn_rl.training.ppo import PPOConfig, Trainer, train
from asn_rl.types import Observation, PolicyOutput, Prompt, State, Trajectories

PROMPTS = [Prompt(f"p{i}", f"w{i}") for i in range(1, 9)]
ROLLOUT = RolloutConfig(max_new_tokens=8, head=32, tail=1)
CONFIG = PPOConfig(steps=4, prompts_per_step=4, num_generations=4, save_every=2, learning_rate=1e-2)


def suite(name: str = "second_choice") -> RewardSuite:
    return RewardSuite([RewardConfig(f"toy_rewards:{name}")])


def small() -> OrderStatisticsNetwork:
    torch.manual_seed(0)
    return OrderStatisticsNetwork(width=8, point_width=4)


def run(folder: Path, config: PPOConfig = CONFIG, policy: PolicyModule | None = None, reward: str = "second_choice"):
    policy = policy or small()
    return train(policy, policy, toy_rewards.TOY, PROMPTS, suite(reward), ROLLOUT, config, folder)


def trainer(folder: Path, config: PPOConfig = CONFIG, policy: PolicyModule | None = None) -> Trainer:
    policy = policy or small()
    return Trainer(policy, policy, toy_rewards.TOY, PROMPTS, suite(), ROLLOUT, config, folder, {})


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def early_words(trajectories: Trajectories) -> Tensor:
    """Shaping: a little for every token whose index is small."""
    ids = [token for completion in trajectories.completion_ids for token in completion]
    return torch.tensor([0.1 if token < 16 else 0.0 for token in ids])


def letters(completions: list[str], **columns: object) -> list[float | None]:
    return [sum(map(str.isalpha, text)) / 20 for text in completions]


def too_short(trajectories: Trajectories) -> Tensor:
    return torch.zeros(3)


class Counting(PolicyModule):
    """Carries the number of tokens drawn; gives values."""

    def __init__(self, values: bool = True) -> None:
        super().__init__()
        self.values = values
        self.slope, self.value = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def initial_state(self, batch_size: int, device: torch.device) -> State:
        return {"count": torch.zeros(batch_size, device=device)}

    def forward(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        assert state is not None
        count = state["count"]
        shift = self.slope * count.unsqueeze(-1) * obs.sketch.log_mass.clamp_min(-10)
        value = self.value * (1 + count) if self.values else None
        return PolicyOutput(shifted(obs.sketch.log_mass, shift), {"count": count + 1}, value)


class TestResume:
    def test_eight_steps_equal_four_and_four_more_bit_for_bit(self, tmp_path: Path) -> None:
        eight = replace(
            CONFIG,
            steps=8,
            save_every=4,
            kl_target=0.05,
            kl_in="reward",
            surrogate="clip_cov",
            value_clip=0.2,
            early_stop_kl=0.02,
            shaping=f"{__name__}:early_words",
            budget=BudgetConfig(max_mean_tokens=4.0),
        )
        whole = run(tmp_path / "whole", eight)
        run(tmp_path / "half", replace(eight, steps=4))
        (tmp_path / "half" / "policy").rename(tmp_path / "policy-at-four")
        resumed = run(tmp_path / "half", eight)
        assert torch.equal(weights(whole), weights(resumed))
        first, second = (
            [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(tmp_path / name)]
            for name in ("whole", "half")
        )
        assert first == second

    def test_the_critic_is_in_checkpoints_and_not_in_the_policy(self, tmp_path: Path) -> None:
        policy = run(tmp_path)
        assert torch.equal(weights(load_policy(tmp_path / "policy")), weights(policy))
        again = trainer(tmp_path)
        assert isinstance(again.critic, nn.Module)
        fresh = weights(again.critic).clone()
        again.resume()
        assert not torch.equal(weights(again.critic), fresh)

    def test_another_critic_is_refused(self, tmp_path: Path) -> None:
        run(tmp_path)
        with pytest.raises(CheckpointError, match="no critic that fits"):
            run(tmp_path, replace(CONFIG, steps=8, critic_arguments={"width": 4}))

    def test_a_checkpoint_without_a_critic_is_refused(self, tmp_path: Path) -> None:
        from asn_rl.training import grpo

        policy = small()
        config = grpo.GRPOConfig(steps=2, prompts_per_step=4, num_generations=4, save_every=2)
        grpo.train(policy, policy, toy_rewards.TOY, PROMPTS, suite(), ROLLOUT, config, tmp_path)
        with pytest.raises(CheckpointError, match="no critic that fits"):
            run(tmp_path)


class TestMetrics:
    def test_metrics_have_their_documented_names(self, tmp_path: Path) -> None:
        run(tmp_path, replace(CONFIG, steps=1, early_stop_kl=1.0, budget=BudgetConfig(price=0.01)))
        (row,) = read_metrics(tmp_path)
        expected = {
            "loss/total", "loss/surrogate", "loss/value", "loss/explained_variance", "policy/entropy",
            "policy/clipfrac", "policy/grad_norm", "policy/gradient_steps", "policy/length", "policy/truncated",
            "kl/exact", "kl/beta", "kl/approx_old", "reward/total", "budget/price", "budget/tokens", "time/rollout",
            "time/reward", "time/update", "time/tokens_per_second",
        }  # fmt: skip
        assert expected <= set(row)

    def test_a_fitted_critic_explains_the_returns(self, tmp_path: Path) -> None:
        """Of a policy that stands still."""
        config = replace(CONFIG, steps=10, learning_rate=1e-9, gae_lambda=1.0, num_generations=16)
        config = replace(config, critic_learning_rate=2e-2, shaping=f"{__name__}:early_words")
        run(tmp_path, config)
        rows = read_metrics(tmp_path)
        assert rows[0]["loss/explained_variance"] == pytest.approx(0, abs=1e-6)
        assert sum(row["loss/explained_variance"] for row in rows[-3:]) / 3 > 0.1


class TestEarlyStop:
    def test_epochs_end_when_the_policy_has_moved(self, tmp_path: Path) -> None:
        fast = replace(CONFIG, steps=3, learning_rate=0.1, num_iterations=10)
        run(tmp_path / "free", fast)
        run(tmp_path / "held", replace(fast, early_stop_kl=0.01))
        assert all(row["policy/gradient_steps"] < 10 for row in read_metrics(tmp_path / "held"))
        moved = {name: read_metrics(tmp_path / name)[-1]["kl/approx_old"] for name in ("free", "held")}
        assert moved["held"] < 0.5 * moved["free"]


class TestRewards:
    def test_masked_completions_are_left_out(self, tmp_path: Path) -> None:
        run_ = trainer(tmp_path)
        trajectories = rollout(run_.policy, toy_rewards.TOY, PROMPTS[:4], ROLLOUT, num_generations=2)
        totals = torch.arange(8.0).double()
        totals[3] = torch.nan
        batch, signal, _ = run_.prepare(trajectories, totals)
        assert 3 not in batch.used.tolist()
        assert len(batch.used) == 7
        assert (batch.advantages[batch.rows == 3] == 0).all()
        assert not signal[batch.rows == 3].any()
        others = [i for i in range(8) if i != 3]
        alone, _, _ = run_.prepare(trajectories.select(others), totals[others])
        torch.testing.assert_close(batch.advantages[batch.rows != 3], alone.advantages)

    def test_shaping_enters_the_returns(self, tmp_path: Path) -> None:
        exact = replace(CONFIG, gae_lambda=1.0)
        plain, shaped = trainer(tmp_path, exact), trainer(tmp_path, replace(exact, shaping=f"{__name__}:early_words"))
        trajectories = rollout(plain.policy, toy_rewards.TOY, PROMPTS[:4], ROLLOUT, num_generations=2)
        totals = torch.zeros(8).double()
        difference = shaped.prepare(trajectories, totals)[0].returns - plain.prepare(trajectories, totals)[0].returns
        parts = early_words(trajectories).split(trajectories.lengths.tolist())
        expected = torch.cat([part.flip(0).cumsum(0).flip(0) for part in parts])
        torch.testing.assert_close(difference, expected)

    def test_kl_in_the_reward_is_that_of_the_states_that_follow(self, tmp_path: Path) -> None:
        config = replace(CONFIG, kl_in="reward", beta=0.5, gamma=0.9, gae_lambda=1.0)
        policy, reference = small(), small()
        for module in (policy, reference):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.3)
        run_ = Trainer(policy, reference, toy_rewards.TOY, PROMPTS, suite(), ROLLOUT, config, tmp_path, {})
        trajectories = rollout(policy, toy_rewards.TOY, PROMPTS[:4], ROLLOUT, num_generations=2)
        found = run_.prepare(trajectories, torch.ones(8).double())[0].returns
        with torch.no_grad():
            obs = trajectories.per_token()
            penalties = kl(policy(obs).logprobs, reference(obs).logprobs)
        assert (penalties > 0.001).all()
        expected = []
        for part in penalties.split(trajectories.lengths.tolist()):
            last = len(part) - 1
            for t in range(len(part)):
                costs = sum(0.9 ** (i - t) * 0.5 * float(part[i]) for i in range(t + 1, len(part)))
                expected.append(0.9 ** (last - t) - costs)
        torch.testing.assert_close(found, torch.tensor(expected))


class Table(PolicyModule):
    """A free log-weight for every point after every word, told by its largest log-probability."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(0.3 * torch.randn(2, 4, generator=torch.Generator().manual_seed(1)))

    def shift(self, obs: Observation) -> Tensor:
        return self.table[(obs.sketch.log_mass[..., 0].exp() > 0.55).long()]


class TestGradient:
    """All completions of a small world, each with its probability: estimates become expectations."""

    BACKEND = ToyBackend(torch.tensor([[0.0, -99, -99], [0.1, 0.5, 0.4], [0.15, 0.25, 0.6]]).clamp_min(1e-9).log())
    LENGTH = 3
    BETA, PRICE = 0.7, 0.05

    def completions(self) -> list[list[int]]:
        words = itertools.chain.from_iterable(itertools.product((1, 2), repeat=n) for n in range(self.LENGTH))
        ended = [[*head, 0] for head in words]
        return ended + [list(rest) for rest in itertools.product((1, 2), repeat=self.LENGTH)]

    def replayed(self, policy: PolicyModule) -> Trajectories:
        from asn_rl.replay import replay

        config = RolloutConfig(max_new_tokens=self.LENGTH, head=3, tail=1)
        parts = [replay(policy, self.BACKEND, [Prompt("p", "w1")], [ids], config)[0] for ids in self.completions()]
        return concatenate(parts)

    @pytest.mark.parametrize("kl_in", ["loss", "reward"])
    def test_its_mean_is_the_gradient_of_the_objective(self, tmp_path: Path, kl_in: str) -> None:
        """With lambda = gamma = 1 and no whitening. In the reward the objective is E[R - price T - beta sum_t KL_t];
        in the loss, the visits to states count as given."""
        policy, reference = Table(), Table()
        nn.init.zeros_(reference.table)
        trajectories = self.replayed(policy)
        rewards = torch.tensor([float(ids.count(2) ** 2) for ids in self.completions()])
        rows, lengths = trajectories.rows, trajectories.lengths

        logprobs = policy(trajectories.per_token()).logprobs
        chosen = logprobs.gather(-1, trajectories.points[:, None]).squeeze(-1)
        divergence = kl(logprobs, reference(trajectories.per_token()).logprobs)
        of_row = torch.zeros(len(rewards)).index_add(0, rows, chosen).exp()
        assert float(of_row.detach().sum()) == pytest.approx(1, abs=1e-5)
        penalty = torch.zeros(len(rewards)).index_add(0, rows, divergence)
        if kl_in == "reward":
            objective = (of_row * (rewards - self.PRICE * lengths - self.BETA * penalty)).sum()
        else:
            objective = (of_row * (rewards - self.PRICE * lengths) - self.BETA * of_row.detach() * penalty).sum()
        expected = torch.autograd.grad(objective, policy.table)[0]

        config = PPOConfig(
            prompts_per_step=1, gae_lambda=1.0, whiten=False, kl_in=kl_in, beta=self.BETA, loss_type="constant",
            budget=BudgetConfig(price=self.PRICE),
        )  # fmt: skip
        size = RolloutConfig(max_new_tokens=self.LENGTH, head=3, tail=1)
        run_ = Trainer(policy, reference, self.BACKEND, [Prompt("p", "w1")], suite(), size, config, tmp_path, {})
        found = torch.zeros_like(policy.table)
        batch, _, _ = run_.prepare(trajectories, rewards.double())
        for row, share in enumerate(of_row.detach()):
            part = (rows == row).nonzero().squeeze(-1)
            loss, _ = run_.loss(batch, part, torch.Generator())
            found -= share * self.LENGTH * torch.autograd.grad(loss, policy.table)[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


class TestValues:
    def test_a_policy_with_state_and_values_of_its_own_trains(self, tmp_path: Path) -> None:
        policy = Counting()
        run(tmp_path, replace(CONFIG, critic=None), policy)
        assert policy.slope.item() != 0
        assert policy.value.item() != 0

    def test_without_values_it_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="gives no values; name a critic"):
            run(tmp_path, replace(CONFIG, critic=None), Counting(values=False))

    def test_the_first_ratio_of_a_policy_with_state_is_one(self, tmp_path: Path) -> None:
        policy = Counting()
        nn.init.constant_(policy.slope, 0.3)
        run(tmp_path, replace(CONFIG, steps=1, num_iterations=1), policy)
        (row,) = read_metrics(tmp_path)
        assert row["kl/approx_old"] == pytest.approx(0, abs=1e-6)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"gamma": 0.0}, "gamma"),
            ({"gae_lambda": 1.5}, "gae_lambda"),
            ({"value_clip": 0.0}, "value_clip"),
            ({"early_stop_kl": 0.0}, "early_stop_kl"),
            ({"critic_learning_rate": 0.0}, "critic_learning_rate"),
            ({"num_generations": 0}, "num_generations"),
            ({"cov_fraction": 0.0}, "cov_fraction"),
            ({"cov_bounds": (5.0, 1.0)}, "cov_bounds"),
            ({"surrogate": "reinforce"}, "num_iterations must be 1"),
        ],
    )
    def test_illegal_settings_are_named(self, change: dict[str, object], named: str) -> None:
        with pytest.raises(InvalidValue, match=named):
            replace(CONFIG, **change)  # type: ignore[arg-type]

    def test_critics_that_are_none(self, tmp_path: Path) -> None:
        with pytest.raises(UnknownName, match="ValueNetwork"):
            trainer(tmp_path, replace(CONFIG, critic="asn_policies.value:ValueNetwork2"))
        with pytest.raises(ConfigError, match="not an nn"):
            trainer(tmp_path, replace(CONFIG, critic="asn_rl.ops.returns:gae"))
        with pytest.raises(ConfigError, match=r"critic_arguments.*depth"):
            trainer(tmp_path, replace(CONFIG, critic_arguments={"depth": 3}))

    def test_shaping_of_another_shape(self, tmp_path: Path) -> None:
        with pytest.raises(RewardError, match=r"finite numbers of shape .* got \(3,\)"):
            run(tmp_path, replace(CONFIG, shaping=f"{__name__}:too_short"))

    def test_a_deaf_policy(self, tmp_path: Path) -> None:
        policy = Counting()
        policy.slope.requires_grad_(False)
        with pytest.raises(TrainingError, match="received a gradient"):
            run(tmp_path, replace(CONFIG, beta=0.0), policy)


def test_the_configuration_survives_yaml() -> None:
    config = replace(CONFIG, budget=BudgetConfig(max_mean_tokens=5.0), critic_arguments={"width": 8})
    assert from_dict(PPOConfig, to_dict(config)) == config


@pytest.mark.parametrize("surrogate", ["sequence", "cispo", "clip_cov", "kl_cov", "reinforce"])
def test_every_surrogate_raises_the_reward(tmp_path: Path, surrogate: str) -> None:
    config = replace(
        CONFIG,
        steps=8,
        num_generations=16,
        num_iterations=1 if surrogate == "reinforce" else 3,
        surrogate=surrogate,  # type: ignore[arg-type]
        epsilon=0.05 if surrogate == "sequence" else 0.2,
        learning_rate=6e-2 if surrogate == "reinforce" else 3e-2,
        beta=0.0,
    )
    run(tmp_path, config)
    reward = [row["reward/total"] for row in read_metrics(tmp_path)]
    assert sum(reward[-2:]) / 2 > reward[0] + 0.06


class TestValueNetwork:
    def observation(self, logits: Tensor, size: SketchSize) -> Observation:
        sketch, _ = build_sketch(logits, size)
        return Observation(sketch, torch.zeros(len(logits), CONTEXT_SIZE))

    def network(self) -> ValueNetwork:
        torch.manual_seed(0)
        network = ValueNetwork(width=8, point_width=4)
        nn.init.normal_(network.value.weight)
        return network

    def test_it_starts_at_zero(self) -> None:
        obs = self.observation(torch.randn(5, 40), SketchSize(8, 4))
        assert (ValueNetwork()(obs) == 0).all()

    def test_the_order_of_the_vocabulary_and_a_constant_do_not_matter(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = 3 * torch.randn(5, 40, generator=generator)
        order = torch.randperm(40, generator=generator)
        network, size = self.network(), SketchSize(8, 4)
        mine, permuted = (network(self.observation(x, size)) for x in (logits, logits[:, order] + 2.5))
        torch.testing.assert_close(mine, permuted, atol=1e-5, rtol=1e-5)
        assert mine.std() > 1e-3

    def test_empty_points_do_not_matter(self) -> None:
        logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
        network = self.network()
        few, many = (network(self.observation(logits, SketchSize(head, 2))) for head in (8, 20))
        torch.testing.assert_close(few, many, atol=1e-5, rtol=1e-5)

    def test_it_reads_what_it_is_asked_to(self) -> None:
        network = ValueNetwork(inputs=["hidden"], hidden_size=6)
        assert network.needs == {"hidden"}
        with pytest.raises(InvalidValue, match=r"observation\.hidden"):
            network(self.observation(torch.randn(5, 40), SketchSize(8, 4)))


def test_a_critic_on_the_hidden_state_of_the_real_model(smollm: HFBackend, tmp_path: Path) -> None:
    policy = small()
    before = copy.deepcopy(policy)
    config = PPOConfig(
        steps=1,
        prompts_per_step=2,
        num_generations=2,
        critic_arguments={"inputs": ["hidden"], "projection": 4},
        budget=BudgetConfig(price=0.01),
    )
    prompts = [Prompt("a", "Name an animal."), Prompt("b", "What is 3 + 4?")]
    rewards = RewardSuite([RewardConfig(f"{__name__}:letters")])
    train(policy, before, smollm, prompts, rewards, RolloutConfig(max_new_tokens=6), config, tmp_path)
    (row,) = read_metrics(tmp_path)
    assert not torch.equal(weights(policy), weights(before))
    assert row["loss/value"] > 0
    assert latest_checkpoint(tmp_path) is not None


def test_nothing_moves_when_every_reward_is_masked_but_one_step_goes_on(tmp_path: Path) -> None:
    run_ = trainer(tmp_path, replace(CONFIG, beta=0.0))
    trajectories = rollout(run_.policy, toy_rewards.TOY, PROMPTS[:4], ROLLOUT)
    before = weights(run_.policy).clone()
    batch, signal, _ = run_.prepare(trajectories, torch.full((4,), torch.nan).double())
    metrics = run_.update(batch, signal, 0)
    assert metrics["policy/grad_norm"] == 0.0
    assert torch.equal(weights(run_.policy), before)
    with MetricsLogger(tmp_path) as log:
        assert run_.train_step(log)["policy/grad_norm"] > 0
