"""The room that GRPO and PPO share: rollout, reward, epochs over minibatches, checkpoints, metrics.

A trainer adds how rewards become a batch (`prepare`) and what a minibatch costs (`loss`).

A step is a function of (configuration, step number, policy): every random draw is keyed by the seed and the step, so
an interrupted run continues bit for bit from its last checkpoint.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from asn_rl.checkpoint import latest_checkpoint, rng_state, save_policy, set_rng_state
from asn_rl.data.sampler import PromptSampler
from asn_rl.errors import TrainingError
from asn_rl.metrics import MetricsLogger
from asn_rl.placement import place
from asn_rl.protocols import LogitsBackend, Policy, TrainablePolicy
from asn_rl.rewards.compose import RewardSuite, score
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.runs import console, progress, write_jsonl
from asn_rl.training.budget import Price, first_price, next_price
from asn_rl.training.checkpoints import load_training, save_training
from asn_rl.training.minibatches import whole_completions
from asn_rl.training.policy_gradient import Batch, PolicyGradientConfig, adapted_beta
from asn_rl.training.records import records, rollout_metrics
from asn_rl.types import Prompt, Trajectories

C = TypeVar("C", bound=PolicyGradientConfig)
B = TypeVar("B", bound=Batch)


class OnPolicyTrainer(ABC, Generic[C, B]):
    """The state of a run: policy, reference, optimiser, KL coefficient, price of a token and step number."""

    name: ClassVar[str]
    capture: Collection[str] = ()
    """optional observation entries to record beside those the policy reads"""

    def __init__(
        self,
        policy: TrainablePolicy,
        reference: Policy,
        backend: LogitsBackend,
        prompts: Sequence[Prompt],
        rewards: RewardSuite,
        rollout_config: RolloutConfig,
        config: C,
        run: Path,
        metadata: dict[str, Any],
    ) -> None:
        self.policy, self.backend, self.rewards = policy, backend, rewards
        self.reference = copy.deepcopy(reference)
        for module in (policy, self.reference):
            place(module, backend.device)
        if isinstance(self.reference, nn.Module):
            self.reference.eval()
        self.rollout_config, self.config, self.run, self.metadata = rollout_config, config, run, metadata
        self.equip()
        self.sampler = PromptSampler(prompts, config.prompts_per_step, config.seed, config.balance)
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        if not self.parameters:
            raise TrainingError(f"{type(policy).__name__} has no trainable parameter; heuristics cannot be trained")
        self.optimizer = torch.optim.AdamW(
            self.parameter_groups(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        if config.budget is not None:
            config.budget.check_against(rollout_config.max_new_tokens)
        self.step = 0
        self.beta = config.beta
        self.price = first_price(config.budget)

    def equip(self) -> None:
        """What a trainer has beside these, made before the optimiser."""

    @abstractmethod
    def prepare(self, trajectories: Trajectories, totals: Tensor) -> tuple[B, Tensor, dict[str, float]]:
        """A batch from completions and their (B,) rewards, NaN where masked; (...) bool, True where something is to be
        learned; and metrics."""

    @abstractmethod
    def loss(self, batch: B, part: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of some tokens (indices `part`, those of whole completions), and its metrics, among them `kl/exact`
        and `kl/approx_old`."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimiser's, the policy's first. Each group's gradients are scaled down on their own."""
        return [{"params": self.parameters}]

    def train(self, on_step: Callable[[int, dict[str, float]], None] | None = None) -> None:
        """Resume from the newest checkpoint, do the steps that remain, save the policy."""
        self.resume()
        try:
            with (
                MetricsLogger(self.run, resume_after=self.step) as log,
                progress(self.name, self.config.steps, self.step) as advance,
            ):
                while self.step < self.config.steps:
                    metrics = self.train_step(log)
                    advance(1, f"reward {metrics['reward/total']:.3f} KL {metrics['kl/exact']:.3f}")
                    if on_step is not None:
                        on_step(self.step, metrics)
        except KeyboardInterrupt:
            saved = latest_checkpoint(self.run)
            console.print(
                f"interrupted during step {self.step + 1}; {saved.name if saved else 'no checkpoint yet'} is kept in "
                f"{self.run}. The same command resumes from there",
                highlight=False,
            )
            raise
        save_policy(self.run / "policy", self.policy, **self.metadata)

    def train_step(self, log: MetricsLogger) -> dict[str, float]:
        begin = time.perf_counter()
        seed = step_seed(self.config.seed, self.step)
        trajectories = rollout(
            self.policy,
            self.backend,
            self.sampler.draw(self.step),
            self.rollout_config,
            num_generations=self.config.num_generations,
            seed=seed,
            capture=self.capture,
        )
        rolled = time.perf_counter()
        result = score(self.rewards, trajectories)
        scored = time.perf_counter()
        batch, signal, prepared = self.prepare(trajectories, result.total)
        update = self.update(batch, signal, seed)
        done = time.perf_counter()
        self.step += 1
        metrics = {
            **rollout_metrics(trajectories, result),
            **prepared,
            **update,
            **self._charge(trajectories),
            "time/rollout": rolled - begin,
            "time/reward": scored - rolled,
            "time/update": done - scored,
            "time/tokens_per_second": len(trajectories.points) / (rolled - begin),
        }
        log.log(self.step, metrics)
        completions = records(trajectories, result, self.step)
        write_jsonl(self.run / "rollouts" / f"step-{self.step:06d}.jsonl", completions)
        if self.step % self.config.save_every == 0 or self.step == self.config.steps:
            log.log_texts(self.step, "completions", completions[: self.config.log_completions])
            self.save()
        return metrics

    def update(self, batch: B, signal: Tensor, seed: int) -> dict[str, float]:
        """Some epochs of policy gradient on one batch."""
        if not len(batch.used):
            return self._metrics_only(batch, seed)
        totals: dict[str, float] = {}
        generator = torch.Generator().manual_seed(seed)
        count, gradient_seen = 0, False
        stop = self.config.early_stop_kl
        for part in self._minibatches(batch, generator):
            loss, metrics = self.loss(batch, part, generator)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss.item()} at step {self.step + 1}; lower learning_rate, or look for a "
                    "reference that forbids what the policy uses (kl/exact would be infinite)"
                )
            if stop is not None and count and metrics["kl/approx_old"] > stop:
                break
            self.optimizer.zero_grad(set_to_none=True)
            if loss.requires_grad:
                loss.backward()
            gradient_seen |= any(p.grad is not None and bool((p.grad != 0).any()) for p in self.parameters)
            groups = self.optimizer.param_groups
            norms = [nn.utils.clip_grad_norm_(group["params"], self.config.max_grad_norm) for group in groups]
            self.optimizer.step()
            metrics["policy/grad_norm"] = float(norms[0])
            totals = {name: totals.get(name, 0.0) + value for name, value in metrics.items()}
            count += 1
        if bool(signal.any()) and not gradient_seen:
            raise TrainingError(
                f"no trainable parameter of {type(self.policy).__name__} received a gradient at step {self.step + 1}, "
                "although completions were better and worse than expected; check that its log-probs depend on its "
                "parameters (no detach, no inference mode)"
            )
        means = {name: value / count for name, value in totals.items()}
        means["kl/beta"] = self.beta
        if stop is not None:
            means["policy/gradient_steps"] = count
        if self.config.kl_target is not None:
            self.beta = adapted_beta(self.beta, means["kl/exact"], self.config.kl_target)
        return means

    def _minibatches(self, batch: B, generator: torch.Generator) -> Iterator[Tensor]:
        lengths = batch.trajectories.lengths
        for _ in range(self.config.num_iterations):
            yield from whole_completions(lengths, batch.used, self.config.minibatch_tokens, generator)

    @torch.no_grad()
    def _metrics_only(self, batch: B, seed: int) -> dict[str, float]:
        """What `update` reports when nothing asks for a gradient; momentum must not move the policy either."""
        everything = torch.arange(len(batch.rows))
        _, metrics = self.loss(batch, everything, torch.Generator().manual_seed(seed))
        return metrics | {"policy/grad_norm": 0.0, "kl/beta": self.beta}

    def _charge(self, trajectories: Trajectories) -> dict[str, float]:
        """Metrics of the budget, and the next step's price."""
        if self.config.budget is None:
            return {}
        tokens, paid = float(trajectories.lengths.float().mean()), self.price
        self.price = next_price(self.config.budget, paid, tokens)
        return {"budget/price": paid.token, "budget/multiplier": paid.multiplier, "budget/tokens": tokens}

    def save(self) -> None:
        keep, metadata = self.config.keep_checkpoints, self.metadata
        save_training(self.run, self.step, self.policy, self.state(), keep=keep, metadata=metadata)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the policy."""
        return {
            "step": self.step,
            "beta": self.beta,
            "price": vars(self.price),
            "optimizer": self.optimizer.state_dict(),
            "rng": rng_state(),
        }

    def resume(self) -> None:
        found = load_training(self.run, self.policy)
        if found is not None:
            self.restore(*found)
            console.print(f"resuming {self.run} after step {self.step}", highlight=False)

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Take over what `state` gave; `folder` is for messages."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.beta = state["step"], state["beta"]
        self.price = Price(**state["price"])
        set_rng_state(state["rng"])


def step_seed(seed: int, step: int) -> int:
    """An independent seed for every step of a run."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
