"""Particle filtering over completions: N particles a prompt are extended by a step, scored, and resampled.

Puri et al. 2025 (arXiv:2502.01618), and its entropic variant (arXiv:2510.05825). The weight of a particle is
softmax(logit(r) / T_s) over the particles of its prompt, r being the score of its *last* step, not a product of all.
Resampling at every step thus samples completions in proportion to p(completion) * prod_t odds(r_t)^(1 / T_s), up to
annealing; for a finished particle r_t stays as it is.

A finished particle keeps its score and takes part in every resampling. After a resampling the base model starts again
from prompt + partial completion: copies of a particle are prefilled once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from asn_rl.errors import DataError, InvalidValue, RewardError
from asn_rl.ops.context import context_vector
from asn_rl.ops.draws import invert_cdf
from asn_rl.ops.resampling import (
    annealing_temperature,
    effective_sample_size,
    multinomial,
    particle_weights,
    systematic,
    tempered,
)
from asn_rl.ops.sketch import SketchSize, build_sketch, choose_tokens
from asn_rl.placement import place
from asn_rl.protocols import LogitsBackend, Policy
from asn_rl.rewards.step_scorers import StepScorer
from asn_rl.rollout import checked_probs, encoded_prompts, uniform_stream
from asn_rl.types import Observation, Prompt

SUPPORTED_NEEDS = frozenset({"hidden"})


@dataclass(frozen=True)
class ParticleConfig:
    """How a particle filter runs."""

    particles: int = 8
    """N, completions of a prompt that are alive at a time"""
    delimiter: str = "\n"
    """a step ends with the token whose text completes this; "": only after `step_tokens`"""
    step_tokens: int = 24
    """a step ends after so many tokens in any case"""
    max_steps: int = 8
    """a particle that has not ended after so many steps is truncated"""
    temperature: float = 1.0
    """T_s: weights are softmax(logit(score) / T_s)"""
    entropic: bool = False
    """systematic resampling, with weights that are annealed while few particles hold most of the weight"""
    ess_share: float = 0.5
    """entropic: anneal where the effective sample size is below this share of N"""
    anneal_share: float = 0.5
    """entropic: anneal during this share of the steps, from the first"""
    head: int = 64
    """most probable tokens that are sketch points of their own"""
    tail: int = 32
    """bins of probability below the head, one sketch point each"""

    def __post_init__(self) -> None:
        for name in ("particles", "step_tokens", "max_steps"):
            if getattr(self, name) < 1:
                raise InvalidValue(name, getattr(self, name), ">= 1")
        if not 0 < self.temperature < math.inf:
            raise InvalidValue("temperature", self.temperature, "in (0, inf)", "small values keep the best particles")
        for name in ("ess_share", "anneal_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidValue(name, getattr(self, name), "in [0, 1]")
        SketchSize(self.head, self.tail)

    @property
    def budget(self) -> int:
        """Most tokens of a completion."""
        return self.max_steps * self.step_tokens


@dataclass(frozen=True)
class ParticleSet:
    """The particles of one prompt at the end: N of each."""

    prompt: Prompt
    completions: list[str]
    completion_ids: list[list[int]]
    terminated: list[bool]
    """True: ended by an end-of-sequence token; False: truncated by the steps"""
    scores: np.ndarray
    """(N,) score of the last step"""
    weights: np.ndarray
    """(N,) softmax(logit(score) / T_s); no resampling follows the last step"""
    effective_sizes: list[float]
    """effective sample size after each step, before annealing"""
    tokens: int
    """tokens drawn, those of particles that were given up included"""

    @property
    def best(self) -> int:
        """The particle with the highest score; the first of equal ones."""
        return int(self.scores.argmax())


@dataclass
class _Particle:
    ids: list[int]
    finished: bool = False
    score: float = 0.5
    last_surprise: float = 0.0
    """of the last token, nats"""
    total_surprise: float = 0.0


@torch.no_grad()
def particle_filter(
    policy: Policy,
    backend: LogitsBackend,
    prompts: Sequence[Prompt],
    scorer: StepScorer,
    config: ParticleConfig,
    *,
    seed: int = 0,
) -> list[ParticleSet]:
    """Run a filter for every prompt; all prompts' particles share the batches.

    A particle's place has its draws, keyed as in `rollout` by (seed, prompt id, place), so that a filter that never
    moves a particle draws what `rollout` draws.

    Raises:
        InvalidValue: a policy with state (it would belong to another particle after a resampling) or one that reads
            optional entries other than `hidden`.
        DataError: no prompts, an empty prompt, or a prompt that leaves no room in the context.
        RewardError: the scorer returned something else than one number in (0, 1) a particle.
    """
    if not prompts:
        raise DataError("the prompt list is empty; check the data source and its split")
    _check_policy(policy, backend)
    ids = encoded_prompts(backend, prompts, config.budget)
    place(policy, backend.device)
    count, n = len(prompts), config.particles
    streams = np.stack([[uniform_stream(seed, prompt.id, i, config.budget) for i in range(n)] for prompt in prompts])
    drawn = np.zeros((count, n), dtype=np.int64)
    sets = [[_Particle([]) for _ in range(n)] for _ in prompts]
    sizes: list[list[float]] = [[] for _ in prompts]
    for step in range(config.max_steps):
        places = [(p, i) for p in range(count) for i in range(n) if not sets[p][i].finished]
        moving = [sets[p][i] for p, i in places]
        uniforms = [streams[p, i, drawn[p, i] :] for p, i in places]
        lengths = _extend(policy, backend, [ids[p] for p, _ in places], moving, uniforms, config)
        for (p, i), length in zip(places, lengths, strict=True):
            drawn[p, i] += length
        texts = [backend.decode(particle.ids) for particle in moving]
        scores = _checked_scores(scorer([prompts[p] for p, _ in places], texts), len(texts))
        for particle, score in zip(moving, scores, strict=True):
            particle.score = score
        for p in sorted({p for p, _ in places}):
            weights = particle_weights(_scores(sets[p]), config.temperature)
            sizes[p].append(effective_sample_size(weights))
            if step + 1 == config.max_steps or all(particle.finished for particle in sets[p]):
                continue
            draws = uniform_stream(seed, prompts[p].id, -1 - step, n)[:, 0]  # places of particles are 0 or more
            survivors = _survivors(weights, draws, config, step)
            sets[p] = [replace(sets[p][i], ids=list(sets[p][i].ids)) for i in survivors]
        if all(particle.finished for particles in sets for particle in particles):
            break
    return [
        _result(backend, prompt, particles, config, size, int(spent.sum()))
        for prompt, particles, size, spent in zip(prompts, sets, sizes, drawn, strict=True)
    ]


def _extend(
    policy: Policy,
    backend: LogitsBackend,
    prompt_ids: Sequence[Sequence[int]],
    particles: Sequence[_Particle],
    uniforms: Sequence[np.ndarray],
    config: ParticleConfig,
) -> list[int]:
    """Draw one step of every particle in place; returns the tokens each one drew."""
    device, size = backend.device, SketchSize(config.head, config.tail)
    starts = [len(particle.ids) for particle in particles]
    sequences = [[*prompt, *particle.ids] for prompt, particle in zip(prompt_ids, particles, strict=True)]
    session = backend.start(sequences, hidden="hidden" in policy.needs)
    rows = list(range(len(particles)))
    for t in range(config.step_tokens):
        sketch, point_map = build_sketch(session.logits, size)
        position = _column([len(particles[r].ids) for r in rows], device)
        last = _column([particles[r].last_surprise for r in rows], device)
        total = _column([particles[r].total_surprise for r in rows], device)
        context = context_vector(sketch, position, config.budget - position, last, total)
        obs = Observation(sketch, context, hidden=session.hidden if "hidden" in policy.needs else None)
        probs = checked_probs(policy, policy(obs, None).logprobs)
        draws = torch.from_numpy(np.stack([uniforms[r][t] for r in rows])).to(device)
        tokens = choose_tokens(session.logits, point_map, invert_cdf(probs, draws[:, 0]), draws[:, 1])
        base = (session.logits.gather(-1, tokens[:, None]).float() - point_map.log_normalizer).squeeze(-1)
        for r, token, logprob in zip(rows, tokens.tolist(), base.tolist(), strict=True):
            particle = particles[r]
            particle.ids.append(token)
            particle.finished = token in backend.eos_token_ids
            particle.last_surprise, particle.total_surprise = -logprob, particle.total_surprise - logprob
        paused = torch.tensor([_step_ended(backend, particles[r], starts[r], config) for r in rows], device=device)
        if paused.all() or t + 1 == config.step_tokens:
            break
        if paused.any():
            order = session.drop(paused)
            rows, tokens = [rows[i] for i in order.tolist()], tokens[order]
        session.step(tokens)
    return [len(particle.ids) - start for particle, start in zip(particles, starts, strict=True)]


def _step_ended(backend: LogitsBackend, particle: _Particle, start: int, config: ParticleConfig) -> bool:
    if particle.finished or not config.delimiter:
        return particle.finished
    return config.delimiter in backend.decode(particle.ids[start:])


def _survivors(weights: np.ndarray, uniforms: np.ndarray, config: ParticleConfig, step: int) -> np.ndarray:
    """(N,) particles that go on; annealed first where the filter is entropic."""
    if not config.entropic:
        return multinomial(weights, uniforms)
    heat = annealing_temperature(weights, step / config.max_steps, config.ess_share, config.anneal_share)
    return systematic(tempered(weights, heat), float(uniforms[0]))


def _scores(particles: Sequence[_Particle]) -> np.ndarray:
    return np.array([particle.score for particle in particles])


def _column(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _result(
    backend: LogitsBackend,
    prompt: Prompt,
    particles: list[_Particle],
    config: ParticleConfig,
    sizes: list[float],
    tokens: int,
) -> ParticleSet:
    scores = _scores(particles)
    return ParticleSet(
        prompt=prompt,
        completions=[backend.decode(particle.ids) for particle in particles],
        completion_ids=[particle.ids for particle in particles],
        terminated=[particle.finished for particle in particles],
        scores=scores,
        weights=particle_weights(scores, config.temperature),
        effective_sizes=sizes,
        tokens=tokens,
    )


def _check_policy(policy: Policy, backend: LogitsBackend) -> None:
    name = type(policy).__name__
    if policy.initial_state(1, backend.device) is not None:
        raise InvalidValue(
            "policy", name, "stateless for a particle filter", "its state would not follow the particles; use rollout"
        )
    if set(policy.needs) - SUPPORTED_NEEDS:
        raise InvalidValue(
            f"needs of {name}", sorted(policy.needs), f"a subset of {sorted(SUPPORTED_NEEDS)} for a particle filter",
            "use a policy of sketch, context and hidden state",
        )  # fmt: skip


def _checked_scores(scores: list[float], count: int) -> list[float]:
    """Raises `RewardError` unless there is one number strictly between 0 and 1 for each particle."""
    if not isinstance(scores, list) or len(scores) != count:
        got = f"{len(scores)} values" if isinstance(scores, list) else type(scores).__name__
        raise RewardError(f"a step scorer must return a list of one score a partial completion ({count}), got {got}")
    for i, score in enumerate(scores):
        if not (isinstance(score, float | int) and 0 < score < 1):
            raise RewardError(
                f"a step scorer must return numbers strictly between 0 and 1, got {score!r} for partial completion "
                f"{i}; clip a probability model to [1e-4, 1 - 1e-4], return 0.5 for what it cannot judge"
            )
    return scores
