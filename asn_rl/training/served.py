"""RL on completions that inference servers sample: tokens in, tokens out, sketches by `replay`.

Before a step the policy is written to the folder in which the servers look for policies; they read it again when the
next request begins. What comes back is token ids with the log-probs they were drawn with, and neither is ever turned
into text and back. One teacher-forced pass of the training backend gives everything else.

A server that cannot read what was written goes on with the version before; where it reports that, the run ends.

An engine computes in other arithmetic than the backend, and after a write may still answer with the version before.
So the update has two ratios (truncated importance sampling, Yao et al. 2025, "Your efficient RL framework secretly
brings you off-policy RL training"): PPO's between the new policy and the replayed one, which is clipped, and the
importance min(pi_replayed / pi_served, cap) of each token, which multiplies its surrogate and has no gradient. Without
the cap a token's weighted gradient has the mean of the replayed policy's; the cap bounds its variance and costs bias.
How often each token's *state* is visited is not corrected: that ratio is a product along the completion.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from asn_rl.backends.servers import ServersConfig
from asn_rl.checkpoint import save_policy
from asn_rl.config import OPERATIONAL
from asn_rl.errors import BackendError, InvalidValue, TrainingError
from asn_rl.observing import checked_needs
from asn_rl.ops.divergences import k3
from asn_rl.protocols import LogitsBackend, TrainablePolicy
from asn_rl.replay import replay
from asn_rl.rollout import RolloutConfig, encoded_prompts
from asn_rl.runs import console
from asn_rl.serving.client import EngineClient, Served, SGLangClient, derived_seed
from asn_rl.serving.decoder import SERVED_INPUTS
from asn_rl.stopping import has_ended
from asn_rl.training import parallel
from asn_rl.training.policy_gradient import IMPORTANCE
from asn_rl.types import Prompt, Trajectories

SERVED_LOGPROBS = "served_logprobs"
"""extra of the trajectories: (S,) log-probs of the tokens as the servers drew them"""


@dataclass(frozen=True)
class ServeConfig:
    """Inference servers that sample the completions of RL, started with our launcher on the folder `policies`."""

    engine: Literal["sglang", "vllm"]
    """what they run"""
    pool: ServersConfig = field(metadata=OPERATIONAL)
    """their addresses, and how they are asked"""
    policies: str
    """folder of policies that they were started with; the policy is written there before every step"""
    name: str = "training"
    """the policy's name there; runs that share servers need different ones"""
    router: bool = False
    """the addresses are those of SGLang's router"""
    importance_cap: float = 2.0
    """bound of a token's importance, its replayed over its served probability"""

    def __post_init__(self) -> None:
        if not self.importance_cap >= 1:
            raise InvalidValue("importance_cap", self.importance_cap, ">= 1", "equal log-probs have importance 1")
        if self.router and self.engine != "sglang":
            raise InvalidValue("router", self.router, "false with engine vllm", "give the servers' own addresses")


@contextmanager
def served_sampler(
    config: ServeConfig, backend: LogitsBackend, rollout_config: RolloutConfig, metadata: dict[str, Any]
) -> Iterator[ServedSampler]:
    """The sampler that a configuration describes; arguments as for `ServedSampler`."""
    if config.engine == "vllm":
        from asn_rl.serving.vllm_client import VLLMClient

        client = VLLMClient(config.pool)
    else:
        client = SGLangClient(config.pool, router=config.router)
    with client:
        yield ServedSampler(client, backend, rollout_config, config, metadata)


class ServedSampler:
    """The sampler of a trainer whose completions come from inference servers.

    Args:
        client: asks the servers.
        backend: of the base model that they serve.
        rollout_config: as the trainer's.
        metadata: handed to `save_pretrained` (base model, fingerprint, sketch size), for the servers to check.
    """

    def __init__(
        self,
        client: EngineClient,
        backend: LogitsBackend,
        rollout_config: RolloutConfig,
        config: ServeConfig,
        metadata: dict[str, Any],
    ) -> None:
        self.client, self.backend, self.rollout_config = client, backend, rollout_config
        self.config, self.metadata = config, metadata

    def __call__(
        self,
        policy: TrainablePolicy,
        prompts: Sequence[Prompt],
        *,
        num_generations: int,
        seed: int,
        capture: Collection[str] = (),
        conditions: Tensor | None = None,
    ) -> tuple[Trajectories, dict[str, float]]:
        """Completions that the servers finished, and metrics named `served/...`.

        Args:
            conditions: only for policies that read a condition, which no engine hands over: such a policy is refused.

        Raises:
            InvalidValue: the policy reads what no engine hands over.
            TrainingError: no server answered, one could not read the policy, or none of the completions can be used.
        """
        if beyond := checked_needs(policy) - SERVED_INPUTS:
            allowed = f"some of {sorted(SERVED_INPUTS)} where servers sample"
            raise InvalidValue("policy.needs", sorted(beyond), allowed, "leave `serve` out: sample in this process")
        refused: dict[str, tuple[int, str]] = {}
        with parallel.main_first():
            if parallel.is_main():
                save_policy(Path(self.config.policies) / self.config.name, policy, **self.metadata)
                refused = self._refused_loads()  # after the write: a request amid it may have met half a folder
        prompt_ids = encoded_prompts(self.backend, prompts, self.rollout_config.max_new_tokens)
        seeds = [derived_seed(seed, prompt.id) for prompt in prompts]
        answers = self._ask(prompt_ids, num_generations, seeds)
        if parallel.is_main():
            self._check_read(refused)
        places = [(i, g) for i in range(len(prompts)) for g in range(num_generations)]
        found = [(i, g, answer) for (i, g), answer in zip(places, answers, strict=True) if answer.failed is None]
        _report(answers)
        drawn, _ = replay(
            policy,
            self.backend,
            [prompts[i] for i, _, _ in found],
            [answer.completion_ids for _, _, answer in found],
            self.rollout_config,
            sample=[g for _, g, _ in found],
            prompt_ids=[prompt_ids[i] for i, _, _ in found],
            capture=capture,
        )
        served = torch.tensor([value for _, _, answer in found for value in answer.logprobs])
        drawn = replace(drawn, extras={SERVED_LOGPROBS: served})
        possible = without_forbidden(drawn)
        weighted, metrics = with_importance(possible, self.config.importance_cap)
        counts = {"served/failed": len(answers) - len(found), "served/forbidden": len(drawn) - len(possible)}
        return weighted, {**metrics, **counts}

    def _ask(self, prompt_ids: Sequence[Sequence[int]], num_generations: int, seeds: Sequence[int]) -> list[Served]:
        """One answer a completion, those of a prompt adjacent; what is not whole is failed.

        Raises:
            TrainingError: no server was healthy for as long as `pool.no_server_s` says.
        """
        end = time.monotonic() + self.config.pool.no_server_s
        while True:
            try:
                answers = self.client.complete(
                    prompt_ids,
                    policy=self.config.name,
                    max_new_tokens=self.rollout_config.max_new_tokens,
                    num_generations=num_generations,
                    seeds=seeds,
                    stop_token_ids=sorted(self.backend.eos_token_ids),
                )
            except BackendError as error:
                if time.monotonic() > end:
                    raise TrainingError(f"no completion could be sampled: {error}. {_ADVICE}") from error
                time.sleep(self.config.pool.backoff_s)
                continue
            return [self._whole(answer) for answer in answers]

    def _refused_loads(self) -> dict[str, tuple[int, str]]:
        """By address: how many versions of the policy a server could not read, and what was wrong with the last.
        Without servers that do not tell (dead ones, a router)."""
        told = {url: found["policies"] for url, found in self.client.health().items() if "policies" in found}
        entries = {url: policies.get(self.config.name, {}) for url, policies in told.items()}
        return {url: (entry.get("refused_loads", 0), entry.get("error", "")) for url, entry in entries.items()}

    def _check_read(self, before: dict[str, tuple[int, str]]) -> None:
        """`TrainingError` where a server has refused a version since: it answers with an older one, or not at all."""
        for url, (count, reason) in self._refused_loads().items():
            if url in before and count > before[url][0]:
                raise TrainingError(
                    f"{url} could not read the policy {self.config.name!r} of this step: {reason}. {_ADVICE}"
                )

    def _whole(self, answer: Served) -> Served:
        """The completion up to its first end; failed where it neither ends nor fills the token budget."""
        if answer.failed is not None:
            return answer
        ids, stop = answer.completion_ids, self.rollout_config.stop
        # Servers are told no stop strings: the text up to where one completes is distributed as if they had been.
        first = len(ids) if not stop else 1
        ends = [n for n in range(first, len(ids) + 1) if has_ended(self.backend, ids[:n], stop)]
        if ends:
            return replace(answer, completion_ids=ids[: ends[0]], logprobs=answer.logprobs[: ends[0]])
        budget = self.rollout_config.max_new_tokens
        if len(ids) == budget:
            return answer
        reason = f"it has {len(ids)} of {budget} tokens and none that ends it (finish reason {answer.finish_reason!r})"
        return replace(answer, failed=reason)


def with_importance(trajectories: Trajectories, cap: float) -> tuple[Trajectories, dict[str, float]]:
    """The same trajectories with the importance of their tokens; and how far served and replayed log-probs are apart.

    Metrics: `served/mismatch_kl`, KL(served || replayed) in nats a token (k3); `served/weight_max`, the largest ratio
    before the cap; `served/truncated`, the share of tokens above the cap.
    """
    served = trajectories.extras[SERVED_LOGPROBS]
    ratio = (trajectories.behaviour_logprobs - served).exp()
    metrics = {
        "served/mismatch_kl": k3(served, trajectories.behaviour_logprobs).mean().item(),
        "served/weight_max": ratio.max().item(),
        "served/truncated": (ratio > cap).float().mean().item(),
    }
    return replace(trajectories, extras={**trajectories.extras, IMPORTANCE: ratio.clamp(max=cap)}), metrics


def without_forbidden(trajectories: Trajectories) -> Trajectories:
    """The completions all of whose tokens the replayed policy allows: others have no ratio to a newer policy.

    Raises:
        TrainingError: there are none.
    """
    impossible = trajectories.behaviour_logprobs.isneginf()
    if not bool(impossible.any()):
        return trajectories
    lost = set(trajectories.rows[impossible].tolist())
    if len(lost) == len(trajectories):
        raise TrainingError(
            f"each of {len(lost)} served completions has a token that the policy forbids when replayed; do the servers "
            "sample from this policy, and from the base model of this run?"
        )
    return trajectories.select([i for i in range(len(trajectories)) if i not in lost])


_ADVICE = "Start or repair the servers, then run the same command again: it resumes from the last checkpoint"


def _report(answers: Sequence[Served]) -> None:
    """`TrainingError` if every completion failed; a line if some did."""
    reasons = [answer.failed for answer in answers if answer.failed is not None]
    if not reasons:
        return
    if len(reasons) == len(answers):
        raise TrainingError(f"all {len(answers)} completions failed on the servers, the first: {reasons[0]}. {_ADVICE}")
    console.print(f"{len(reasons)} of {len(answers)} completions failed, the first: {reasons[0]}", highlight=False)
