"""The room that GRPO and PPO share: rollout, reward, epochs over minibatches, checkpoints, metrics.

A trainer adds how rewards become a batch (`prepare`) and what a minibatch costs (`loss`).

A step is a function of (configuration, step number, policy): every random draw is keyed by the seed and the step, so
an interrupted run continues bit for bit from its last checkpoint.

Several processes (`asn_rl.training.parallel`) share the prompts of a step. Each samples and scores its own; advantages,
minibatches, losses and metrics are those of all completions together, so the policy is the one that a single process
would have trained, up to the rounding of sums. Only the main process writes.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from asn_rl.checkpoint import latest_checkpoint, rng_state, save_policy, set_rng_state
from asn_rl.data.sampler import PromptSampler
from asn_rl.errors import InvalidValue, TrainingError
from asn_rl.metrics import MetricsLogger
from asn_rl.placement import place, trainable_parameters
from asn_rl.protocols import LogitsBackend, Policy, TrainablePolicy
from asn_rl.rewards.compose import RewardSuite
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.runs import console, progress, write_jsonl
from asn_rl.training import parallel
from asn_rl.training.budget import Price, first_price, next_price
from asn_rl.training.checkpoints import load_training, save_training
from asn_rl.training.minibatches import Numbering, numbered, whole_completions
from asn_rl.training.policy_gradient import Batch, PolicyGradientConfig, adapted_beta
from asn_rl.training.records import mean_length, of_all, records, rollout_metrics, scored
from asn_rl.types import Prompt, Trajectories

C = TypeVar("C", bound=PolicyGradientConfig)
B = TypeVar("B", bound=Batch)


class Sampler(Protocol):
    """Where the completions of a step come from."""

    def __call__(
        self,
        policy: TrainablePolicy,
        prompts: Sequence[Prompt],
        *,
        num_generations: int,
        seed: int,
        capture: Collection[str],
        conditions: Tensor | None,
    ) -> tuple[Trajectories, dict[str, float]]:
        """Up to `num_generations` completions of each prompt under the policy, those of a prompt adjacent and ordered
        by sample, and metrics of the sampling: counts (int), and means over tokens (float). Each process asks for its
        own prompts.

        Args:
            capture: optional observation entries to record beside those the policy needs.
            conditions: (len(prompts), n) what the policy is conditioned on; None: nothing.
        """
        ...


def in_process(backend: LogitsBackend, config: RolloutConfig) -> Sampler:
    """Rollouts on the backend; nothing is measured beside what trajectories say."""

    def sample(policy: TrainablePolicy, prompts: Sequence[Prompt], **options: Any) -> tuple[Trajectories, dict]:
        return rollout(policy, backend, prompts, config, **options), {}

    return sample


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
        sample: Sampler | None = None,
    ) -> None:
        parallel.join()
        self.policy, self.backend, self.rewards = policy, backend, rewards
        self.reference = copy.deepcopy(reference)
        for module in (policy, self.reference):
            place(module, backend.device)
        if isinstance(self.reference, nn.Module):
            self.reference.eval()
        self.rollout_config, self.config, self.run, self.metadata = rollout_config, config, run, metadata
        self.sample = sample or in_process(backend, rollout_config)
        self.equip()
        self.sampler = PromptSampler(prompts, config.prompts_per_step, config.seed, config.balance)
        self.parameters = trainable_parameters(policy)
        self.optimizer = torch.optim.AdamW(
            self.parameter_groups(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        if config.budget is not None:
            config.budget.check_against(rollout_config.max_new_tokens)
        _check_shareable(config, parallel.size())
        self.step = 0
        self.beta = config.beta
        self.price = first_price(config.budget)

    def equip(self) -> None:
        """What a trainer has beside these, made before the optimiser."""

    def conditions(self, count: int) -> Tensor | None:
        """(count, n) what the policy is conditioned on, for each prompt of this step, those of all processes."""
        return None

    @abstractmethod
    def prepare(self, trajectories: Trajectories, totals: Tensor) -> tuple[B, Tensor, dict[str, float]]:
        """A batch from completions of this process and their (B,) rewards, NaN where masked; (...) bool, True where
        something is to be learned; and metrics of all processes."""

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
        parallel.check_agreement(self.step, self.parameters)
        logger = MetricsLogger(self.run, resume_after=self.step) if parallel.is_main() else nullcontext()
        try:
            with (
                logger as log,
                progress(self.name, self.config.steps, self.step) as advance,
            ):
                while self.step < self.config.steps:
                    metrics = self.train_step(log)
                    advance(1, f"reward {metrics['reward/total']:.3f} KL {metrics['kl/exact']:.3f}")
                    if on_step is not None and parallel.is_main():
                        on_step(self.step, metrics)
        except KeyboardInterrupt:
            saved = latest_checkpoint(self.run)
            kept = (
                f"{saved.name} is kept in {self.run}. The same command resumes from there"
                if saved
                else f"before the first checkpoint ({self.name.lower()}.save_every). The same command begins anew"
            )
            console.print(f"interrupted during step {self.step + 1}; {kept}", highlight=False)
            raise
        with parallel.main_first():
            if parallel.is_main():
                save_policy(self.run / "policy", self.policy, **self.metadata)

    def train_step(self, log: MetricsLogger | None) -> dict[str, float]:
        """One step; written to the run folder where `log` is given."""
        begin = time.perf_counter()
        seed = step_seed(self.config.seed, self.step)
        prompts = self.sampler.draw(self.step)
        conditions = self.conditions(len(prompts))
        with parallel.together():
            trajectories, sampled = self.sample(
                self.policy,
                parallel.shard(prompts),
                num_generations=self.config.num_generations,
                seed=seed,
                capture=self.capture,
                conditions=None if conditions is None else parallel.shard(conditions),
            )
        rolled = time.perf_counter()
        result = scored(self.rewards, trajectories)
        rated = time.perf_counter()
        batch, signal, prepared = self.prepare(trajectories, result.total)
        update = self.update(batch, signal, seed)
        done = time.perf_counter()
        self.step += 1
        completions = records(trajectories, result, self.step)
        metrics = {
            **rollout_metrics(trajectories, result),
            **of_all(sampled, len(trajectories.points)),
            **prepared,
            **update,
            **self._charge(trajectories),
            "time/rollout": rolled - begin,
            "time/reward": rated - rolled,
            "time/update": done - rated,
            "time/tokens_per_second": sum(record["tokens"] for record in completions) / (rolled - begin),
        }
        if log is not None:
            self._write(log, metrics, completions)
        return metrics

    def _write(self, log: MetricsLogger, metrics: dict[str, float], completions: list[dict[str, Any]]) -> None:
        log.log(self.step, metrics)
        write_jsonl(self.run / "rollouts" / f"step-{self.step:06d}.jsonl", completions)
        if self.step % self.config.save_every == 0 or self.step == self.config.steps:
            log.log_texts(self.step, "completions", completions[: self.config.log_completions])
            self.save()

    def update(self, batch: B, signal: Tensor, seed: int) -> dict[str, float]:
        """Some epochs of policy gradient on one batch."""
        numbers = numbered(batch.trajectories)
        used = numbers.as_drawn(parallel.gathered(batch.used + numbers.first_completion))
        if not len(used):
            return self._metrics_only(batch, numbers, seed)
        totals: dict[str, float] = {}
        generator = torch.Generator().manual_seed(seed)
        count, gradient_seen = 0, False
        stop = self.config.early_stop_kl
        groups = self.optimizer.param_groups
        trained = [parameter for group in groups for parameter in group["params"]]
        for part in self._minibatches(numbers.lengths, used, generator):
            loss, weight, metrics = self._shared_loss(batch, numbers, part, generator)
            if not math.isfinite(metrics["loss/total"]):
                raise TrainingError(
                    f"the loss is {metrics['loss/total']} at step {self.step + 1}; lower learning_rate, or look for a "
                    "reference that forbids what the policy uses (kl/exact would be infinite)"
                )
            if stop is not None and count and metrics["kl/approx_old"] > stop:
                break
            self.optimizer.zero_grad(set_to_none=True)
            if loss is not None and loss.requires_grad:
                loss.backward()
            parallel.sum_gradients(trained, weight)
            gradient_seen |= any(p.grad is not None and bool((p.grad != 0).any()) for p in self.parameters)
            norms = [nn.utils.clip_grad_norm_(group["params"], self.config.max_grad_norm) for group in groups]
            self.optimizer.step()
            metrics["policy/grad_norm"] = float(norms[0])
            totals = {name: totals.get(name, 0.0) + value for name, value in metrics.items()}
            count += 1
        if bool(parallel.gathered(signal.any().reshape(1)).any()) and not gradient_seen:
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

    def _minibatches(self, lengths: Tensor, used: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
        for _ in range(self.config.num_iterations):
            yield from whole_completions(lengths, used, self.config.minibatch_tokens, generator)

    def _shared_loss(
        self, batch: B, numbers: Numbering, part: Tensor, generator: torch.Generator
    ) -> tuple[Tensor | None, float, dict[str, float]]:
        """Of some tokens of all processes: the loss of this process's, if it has any, what that counts in the whole,
        and the metrics of all."""
        own = numbers.own(part)
        if not len(own):
            return None, 0.0, parallel.summed({})
        loss, metrics = self.loss(batch, own, generator)
        weight, of_tokens = (numbers.share(own, part, how) for how in (self.config.loss_type, "token"))
        scaled = {name: of_tokens * value for name, value in metrics.items()}
        return loss, weight, parallel.summed(scaled | {"loss/total": weight * loss.item()})

    @torch.no_grad()
    def _metrics_only(self, batch: B, numbers: Numbering, seed: int) -> dict[str, float]:
        """What `update` reports when nothing asks for a gradient; momentum must not move the policy either."""
        everything = torch.arange(int(numbers.lengths.sum()))
        _, _, metrics = self._shared_loss(batch, numbers, everything, torch.Generator().manual_seed(seed))
        return metrics | {"policy/grad_norm": 0.0, "kl/beta": self.beta}

    def _charge(self, trajectories: Trajectories) -> dict[str, float]:
        """Metrics of the budget, and the next step's price."""
        if self.config.budget is None:
            return {}
        tokens, paid = mean_length(trajectories), self.price
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


def _check_shareable(config: PolicyGradientConfig, processes: int) -> None:
    """`InvalidValue` for what several processes cannot share."""
    if config.prompts_per_step < processes:
        advice = "every process samples for at least one prompt; start fewer processes"
        raise InvalidValue("prompts_per_step", config.prompts_per_step, f">= {processes}, the processes", advice)
    if processes > 1 and config.surrogate in ("clip_cov", "kl_cov"):
        advice = "it ranks the tokens of a whole minibatch; take another surrogate, or one process"
        raise InvalidValue("surrogate", config.surrogate, "neither clip_cov nor kl_cov in several processes", advice)


def step_seed(seed: int, step: int) -> int:
    """An independent seed for every step of a run."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
