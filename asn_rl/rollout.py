"""Policy x backend -> trajectories. Sketches are captured as the tokens are drawn.

Every completion has a random stream of its own, keyed by (seed, prompt id, sample index): the draws do not depend on
which other completions share its batch, nor on the policy, so that policies are compared on common draws. On a
backend that is `batch_invariant` the completions do not depend on the batch either; on others (transformers) the same
call on the same machine repeats bit for bit, while another batch size may round a logit differently and, rarely, tip
a draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asn_rl.errors import DataError, InvalidPolicyOutput, InvalidValue
from asn_rl.observing import checked_entries, checked_needs, history_entry, layer_entry
from asn_rl.ops.context import context_vector
from asn_rl.ops.draws import invert_cdf
from asn_rl.ops.history import empty_history, remember
from asn_rl.ops.sketch import PointMap, Sketch, SketchSize, build_sketch, choose_tokens
from asn_rl.placement import place
from asn_rl.protocols import LogitsBackend, Policy
from asn_rl.stopping import StopWatch, before_stop
from asn_rl.types import OPTIONAL_INPUTS, PER_TOKEN, Observation, Prompt, Trajectories

Probe = Callable[[Tensor, Sketch, PointMap], Tensor]
"""(logits (B, V), sketch, point map) -> (B, ...): something to record at every token"""


@dataclass(frozen=True)
class RolloutConfig:
    """How completions are drawn."""

    max_new_tokens: int = 28
    """token budget of a completion, the end-of-sequence token included"""
    head: int = 64
    """most probable tokens that are sketch points of their own"""
    tail: int = 32
    """bins of probability below the head, one sketch point each"""
    max_batch: int = 256
    """completions decoded at a time, but all of a prompt; memory and speed, not results, depend on it"""
    tracked: int = 32
    """generated tokens, the latest distinct ones, that are sketch points of their own where a policy reads `history`"""
    layers: tuple[int, ...] = ()
    """earlier layers, counted from 1, whose log-probs are captured where a policy reads `layer_logprobs`"""
    stop: tuple[str, ...] = ()
    """texts that end a completion as an end-of-sequence token does; its text is what comes before"""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidValue("max_new_tokens", self.max_new_tokens, ">= 1", "a completion needs at least one token")
        if self.max_batch < 1:
            raise InvalidValue("max_batch", self.max_batch, ">= 1")
        if self.tracked < 1:
            raise InvalidValue("tracked", self.tracked, ">= 1", "it acts only where a policy reads `history`")
        if any(layer < 1 for layer in self.layers) or len(set(self.layers)) != len(self.layers):
            raise InvalidValue("layers", list(self.layers), "different numbers >= 1, counted from the first layer")
        if "" in self.stop:
            raise InvalidValue("stop", list(self.stop), "texts of at least one character", "[] stops at none")
        SketchSize(self.head, self.tail)

    @property
    def size(self) -> SketchSize:
        return SketchSize(self.head, self.tail)


@torch.no_grad()
def rollout(
    policy: Policy,
    backend: LogitsBackend,
    prompts: Sequence[Prompt],
    config: RolloutConfig,
    *,
    num_generations: int = 1,
    seed: int | Sequence[int] = 0,
    conditions: Tensor | None = None,
    capture: Collection[str] = (),
    probes: Mapping[str, Probe] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Trajectories:
    """Sample `num_generations` completions of every prompt; completions of a prompt are adjacent.

    The policy is moved to the base model's device; the trajectories come back on the CPU.

    Args:
        seed: keys the draws; or one seed a prompt.
        conditions: (len(prompts), n) what the policy is conditioned on, one row a prompt.
        capture: optional observation entries to record beside those the policy needs, for another policy to read.
        probes: tensors to record beside the observations, by name; they end up in `Trajectories.extras`.
        on_token: called with the number of tokens drawn, after each step.

    Raises:
        DataError: no prompts, an empty prompt, or a prompt that leaves no room in the context.
    """
    if not prompts:
        raise DataError("the prompt list is empty; check the data source and its split")
    if num_generations < 1:
        raise InvalidValue("num_generations", num_generations, ">= 1")
    if conditions is not None and len(conditions) != len(prompts):
        raise InvalidValue("conditions", tuple(conditions.shape), f"of {len(prompts)} rows, one a prompt")
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise InvalidValue("seed", seeds, f"one seed, or {len(prompts)}, one a prompt")
    ids = encoded_prompts(backend, prompts, config.max_new_tokens)
    place(policy, backend.device)
    # Whole prompts to a batch, so that a prompt is prefilled once for all its completions; batches of equal size, as
    # a step with few rows costs almost as much as one with many.
    batches = -(-len(prompts) // max(1, config.max_batch // num_generations))
    per_batch = -(-len(prompts) // batches)
    parts = []
    for low in range(0, len(prompts), per_batch):
        part = slice(low, low + per_batch)
        parts.append(
            _rollout_batch(
                policy,
                backend,
                prompts[part],
                ids[part],
                config,
                num_generations,
                seeds[part],
                None if conditions is None else conditions[part],
                checked_entries("capture", capture) | checked_needs(policy),
                probes or {},
                on_token,
            )
        )
    return concatenate(parts)


def _rollout_batch(
    policy: Policy,
    backend: LogitsBackend,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    config: RolloutConfig,
    repeats: int,
    seeds: Sequence[int],
    conditions: Tensor | None,
    needs: frozenset[str],
    probes: Mapping[str, Probe],
    on_token: Callable[[int], None] | None,
) -> Trajectories:
    device, budget = backend.device, config.max_new_tokens
    keys = [(seed, prompt.id, g) for prompt, seed in zip(prompts, seeds, strict=True) for g in range(repeats)]
    batch = len(keys)
    uniforms = torch.from_numpy(np.stack([uniform_stream(*key, budget) for key in keys])).to(device)
    layers = captured_layers(needs, config)
    session = backend.start(ids, repeats=repeats, hidden=bool(needs & {"hidden", "prompt_embedding"}), layers=layers)
    embedding = session.hidden.clone() if "prompt_embedding" in needs and session.hidden is not None else None
    condition = None if conditions is None else conditions.repeat_interleave(repeats, 0).to(device)
    state = policy.initial_state(batch, device)
    watch = StopWatch(backend, batch, config.stop)

    rows = torch.arange(batch, device=device)
    last, total = torch.zeros(batch, device=device), torch.zeros(batch, device=device)
    last_point = torch.full((batch,), -1, device=device)
    history = empty_history(batch, config.tracked, device) if "history" in needs else None
    record = _Record(batch)
    for t in range(budget):
        sketch, point_map = build_sketch(session.logits, config.size, None if history is None else history.tokens)
        position, seen = torch.full_like(last, t), (session.logits, sketch, point_map)
        obs = Observation(
            sketch,
            context_vector(sketch, position, budget - position, last, total),
            hidden=session.hidden if "hidden" in needs else None,
            prompt_embedding=None if embedding is None else embedding[rows],
            condition=None if condition is None else condition[rows],
            last_point=last_point if "last_point" in needs else None,
            history=None if history is None else history_entry(*seen, history, t),
            layer_logprobs=None if session.layer_logits is None else layer_entry(*seen, session.layer_logits),
        )
        output = policy(obs, state)
        points = invert_cdf(checked_probs(policy, output.logprobs), uniforms[rows, t, 0])
        tokens = choose_tokens(session.logits, point_map, points, uniforms[rows, t, 1])
        base = session.logits.gather(-1, tokens[:, None]).float() - point_map.log_normalizer
        at_point = points[:, None]
        logprobs = output.logprobs.gather(-1, at_point) + base - sketch.log_mass.gather(-1, at_point)
        recorded = {name: probe(session.logits, sketch, point_map) for name, probe in probes.items()}
        record.add(rows, t, obs, tokens, points, logprobs.squeeze(-1), base.squeeze(-1), recorded)
        if on_token is not None:
            on_token(len(rows))

        finished = watch.ended(rows, tokens)
        record.terminated[rows[finished].cpu()] = True
        if finished.all() or t + 1 == budget:
            break
        state, last, total, last_point = output.state, -base.squeeze(-1), total - base.squeeze(-1), points
        history = None if history is None else remember(history, tokens, t)
        if finished.any():
            order = session.drop(finished)
            rows, last, total, tokens, last_point = (part[order] for part in (rows, last, total, tokens, last_point))
            history = None if history is None else history.index(order)
            state = None if state is None else {name: value[order] for name, value in state.items()}
        session.step(tokens)
    everyone = [prompt for prompt in prompts for _ in range(repeats)]
    samples = [g for _, _, g in keys]
    return record.trajectories(backend, config.stop, everyone, samples, ids, repeats, embedding, condition)


class _Record:
    """Per-step tensors of the active rows, put into completion order at the end."""

    def __init__(self, batch: int) -> None:
        self.terminated = torch.zeros(batch, dtype=torch.bool)
        self.steps: list[dict[str, Tensor]] = []

    def add(
        self,
        rows: Tensor,
        t: int,
        obs: Observation,
        tokens: Tensor,
        points: Tensor,
        logprobs: Tensor,
        base: Tensor,
        extras: Mapping[str, Tensor],
    ) -> None:
        entry = {
            "row": rows,
            "time": torch.full_like(rows, t),
            "token": tokens,
            "points": points,
            "logprobs": logprobs,
            "base": base,
            "log_mass": obs.sketch.log_mass,
            "log_count": obs.sketch.log_count,
            "inner_entropy": obs.sketch.inner_entropy,
            "context": obs.context,
            **{f"extra/{name}": value for name, value in extras.items()},
        }
        entry |= {name: part for name in PER_TOKEN if (part := getattr(obs, name)) is not None}
        self.steps.append({name: value.cpu() for name, value in entry.items()})

    def trajectories(
        self,
        backend: LogitsBackend,
        stop: Sequence[str],
        prompts: Sequence[Prompt],
        samples: Sequence[int],
        ids: Sequence[Sequence[int]],
        repeats: int,
        embedding: Tensor | None,
        condition: Tensor | None,
    ) -> Trajectories:
        flat = {name: torch.cat([step[name] for step in self.steps]) for name in self.steps[0]}
        order = torch.argsort(flat["row"] * (len(self.steps) + 1) + flat["time"])
        flat = {name: value[order] for name, value in flat.items()}
        lengths = torch.bincount(flat["row"], minlength=len(samples)).tolist()
        completion_ids = [part.tolist() for part in flat["token"].split(lengths)]
        return Trajectories(
            prompts=prompts,
            sample=samples,
            prompt_ids=[prompt for prompt in ids for _ in range(repeats)],
            completion_ids=completion_ids,
            completions=[before_stop(backend.decode(part), stop) for part in completion_ids],
            terminated=self.terminated,
            observations=Observation(
                Sketch(flat["log_mass"], flat["log_count"], flat["inner_entropy"]),
                flat["context"],
                prompt_embedding=None if embedding is None else embedding.cpu(),
                condition=None if condition is None else condition.cpu(),
                **{name: flat.get(name) for name in PER_TOKEN},
            ),
            points=flat["points"],
            behaviour_logprobs=flat["logprobs"],
            base_logprobs=flat["base"],
            extras={name.removeprefix("extra/"): flat[name] for name in flat if name.startswith("extra/")},
        )


def concatenate(parts: Sequence[Trajectories]) -> Trajectories:
    """Trajectories of several batches as one."""
    if len(parts) == 1:
        return parts[0]

    def join(pick: Callable[[Trajectories], Tensor | None]) -> Tensor | None:
        tensors = [tensor for part in parts if (tensor := pick(part)) is not None]
        if tensors and len(tensors) != len(parts):
            raise DataError("only some of the trajectories recorded an optional observation; record it in all of them")
        return torch.cat(tensors) if tensors else None

    def must(pick: Callable[[Trajectories], Tensor]) -> Tensor:
        return torch.cat([pick(part) for part in parts])

    return Trajectories(
        prompts=[p for part in parts for p in part.prompts],
        sample=[g for part in parts for g in part.sample],
        prompt_ids=[ids for part in parts for ids in part.prompt_ids],
        completion_ids=[ids for part in parts for ids in part.completion_ids],
        completions=[text for part in parts for text in part.completions],
        terminated=must(lambda part: part.terminated),
        observations=Observation(
            Sketch(
                must(lambda part: part.observations.sketch.log_mass),
                must(lambda part: part.observations.sketch.log_count),
                must(lambda part: part.observations.sketch.inner_entropy),
            ),
            must(lambda part: part.observations.context),
            **{name: join(lambda part, name=name: getattr(part.observations, name)) for name in OPTIONAL_INPUTS},
        ),
        points=must(lambda part: part.points),
        behaviour_logprobs=must(lambda part: part.behaviour_logprobs),
        base_logprobs=must(lambda part: part.base_logprobs),
        extras={name: must(lambda part, name=name: part.extras[name]) for name in parts[0].extras},
        recorded=all(part.recorded for part in parts),
    )


def uniform_stream(seed: int, prompt_id: str, sample: int, length: int) -> np.ndarray:
    """(length, 2) float64 draws in [0, 1) that belong to one completion: point and token for each step."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{sample}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random((length, 2))


def checked_probs(policy: Policy, logprobs: Tensor) -> Tensor:
    """(..., N) float64 probabilities of a policy's answer, which must be normalised: they are drawn from as they are,
    and recorded as they are."""
    probs = logprobs.double().exp()
    wrong = ~((probs.sum(-1) - 1).abs() < 1e-3)  # NaN is wrong too
    if wrong.any():
        raise InvalidPolicyOutput(
            f"the probabilities of {type(policy).__name__} over points sum to {float(probs.sum(-1)[wrong][0]):g}, not "
            "to 1. NaN: its weights may have diverged, go back to an older checkpoint; otherwise it must normalise "
            "its log-probs"
        )
    return probs


def captured_layers(needs: frozenset[str], config: RolloutConfig) -> tuple[int, ...]:
    """Earlier layers that the base model is asked for.

    Raises:
        InvalidValue: a policy reads them and none is named.
    """
    if "layer_logprobs" not in needs:
        return ()
    if not config.layers:
        raise InvalidValue("rollout.layers", [], "at least one layer", "the policy reads `layer_logprobs`")
    return config.layers


def encoded_prompts(backend: LogitsBackend, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
    """Token ids of each prompt; one that occurs several times is encoded once.

    Raises:
        DataError: a prompt is empty or leaves no room for its completion.
    """
    distinct = {id(prompt): prompt for prompt in prompts}
    encoded = {key: _checked_ids(backend, prompt, max_new_tokens) for key, prompt in distinct.items()}
    return [encoded[id(prompt)] for prompt in prompts]


def _checked_ids(backend: LogitsBackend, prompt: Prompt, max_new_tokens: int) -> list[int]:
    ids = backend.encode(prompt.content)
    if not ids:
        raise DataError(f"prompt {prompt.id!r} is empty; a completion needs at least one prompt token to follow")
    if len(ids) + max_new_tokens > backend.max_context:
        raise DataError(
            f"prompt {prompt.id!r} has {len(ids)} tokens; with max_new_tokens={max_new_tokens} that exceeds the base "
            f"model's context of {backend.max_context}. Shorten the prompt or lower max_new_tokens"
        )
    return ids
