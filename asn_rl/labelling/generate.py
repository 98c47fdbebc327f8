"""Candidate completions for every cell of a grid. Cells that are there are passed over."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from asn_rl.backends.server_generation import GenerationRequest, ServerGenerator
from asn_rl.backends.servers import RequestFailure
from asn_rl.data.benchmark_format import FOLLOW_UPS
from asn_rl.labelling.records import ShardWriter, candidate_record
from asn_rl.labelling.store import CandidateStore, read_candidates
from asn_rl.mixed_batch import MixedBatch
from asn_rl.protocols import LogitsBackend, Policy
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.runs import progress
from asn_rl.serving.client import derived_seed
from asn_rl.types import Candidate, Key, Messages, Prompt

Source = Callable[[Sequence[Key]], Iterator[list[Candidate]]]
"""cells -> their candidates, in portions as they are done; cells that could not be had are left out"""


def generate(store: CandidateStore, source: Source, folder: Path) -> int:
    """Generate what is missing in a store. A portion is on disk before the next one begins.

    Returns:
        The number of cells that the source left out.
    """
    missing = list(store.grid.keys(~store.present))
    if not missing:
        return 0
    total, written, tokens, begin = store.grid.size, 0, 0, time.monotonic()
    with ShardWriter(folder) as shard, progress("generate", total, total - len(missing)) as advance:
        for portion in source(missing):
            shard.write([candidate_record(candidate) for candidate in portion])
            written += len(portion)
            tokens += sum(len(candidate.completion_ids or ()) for candidate in portion)
            advance(len(portion), f"{tokens / (time.monotonic() - begin):.0f} tokens/s")
    return len(missing) - written


@dataclass(frozen=True)
class InProcess:
    """Candidates from a backend in this process. Cells of all heuristics and prompts share a batch.

    A cell's text is that of `rollout(policy, backend, [prompt], config, seed=seed)`.
    """

    backend: LogitsBackend
    policies: Mapping[str, Policy]
    """heuristics by name"""
    prompts: Mapping[str, Prompt]
    """prompts by id"""
    config: RolloutConfig
    deterministic: Collection[str] = ()
    """heuristics that give every seed the same text, which is then decoded once a prompt"""
    earlier: CandidateStore | None = None
    """candidates of the turn before: each cell's conversation goes on with its prompt's next follow-up"""

    def __call__(self, cells: Sequence[Key]) -> Iterator[list[Candidate]]:
        decoded = _by_text(cells, self.deterministic)
        batches = -(-len(decoded) // self.config.max_batch)
        size = -(-len(decoded) // max(batches, 1))
        for low in range(0, len(decoded), size):
            yield self._decode(decoded[low : low + size])

    def _decode(self, groups: Sequence[Sequence[Key]]) -> list[Candidate]:
        """Candidates of groups of cells, one completion a group."""
        names = list(self.policies)
        prompts = [asked(group[0], self.prompts, self.earlier) for group in groups]
        policy = MixedBatch(list(self.policies.values()), [names.index(group[0][1]) for group in groups])
        trajectories = rollout(
            policy,
            self.backend,
            prompts,
            self.config,
            seed=[group[0][2] for group in groups],
        )
        return [
            Candidate(
                *cell,
                completion=trajectories.completions[i],
                completion_ids=trajectories.completion_ids[i],
                terminated=bool(trajectories.terminated[i]),
                history=None if self.earlier is None else as_messages(prompts[i]),
            )
            for i, group in enumerate(groups)
            for cell in group
        ]


def asked(cell: Key, prompts: Mapping[str, Prompt], earlier: CandidateStore | None) -> Prompt:
    """What a cell answers: its prompt, or the next turn after its own answer in `earlier`."""
    prompt = prompts[cell[0]]
    if earlier is None:
        return prompt
    return next_turn(prompt, *read_candidates([earlier.location(earlier.grid.index(cell, "the turn before"))]))


def next_turn(prompt: Prompt, answer: Candidate) -> Prompt:
    """What is asked after an answer: the conversation so far, and the next entry of the column `follow_ups`. Its id is
    its own, so that its draws are, too."""
    before = answer.history or as_messages(prompt)
    turn = (len(before) - len(as_messages(prompt))) // 2
    said = {"role": "assistant", "content": answer.completion}
    asked = {"role": "user", "content": prompt.columns[FOLLOW_UPS][turn]}
    return replace(prompt, id=f"{prompt.id}, turn {turn + 2}", content=[*before, said, asked])


def as_messages(prompt: Prompt) -> Messages:
    return [{"role": "user", "content": prompt.content}] if isinstance(prompt.content, str) else prompt.content


@dataclass(frozen=True)
class FromServers:
    """Candidates from a pool of inference servers, each written as it arrives. What a server gave up on is left out
    and counted. Heuristics share their draws where a server heeds seeds; prompts do not."""

    generator: ServerGenerator
    processors: Mapping[str, Sequence[Mapping[str, Any]]]
    """steps {name, params} of the heuristics, by name, that the servers' own sampling expresses"""
    policies: Mapping[str, str]
    """names on the servers of the other heuristics, which they serve as policies"""
    prompts: Mapping[str, Prompt]
    """prompts by id"""
    max_new_tokens: int
    deterministic: Collection[str] = ()
    """heuristics that give every seed the same text, which is then asked for once a prompt"""
    earlier: CandidateStore | None = None
    """see `InProcess`"""
    failures: Counter[str] = field(default_factory=Counter)
    """cells that were left out, by reason (see `RequestFailure`)"""
    examples: dict[str, str] = field(default_factory=dict)
    """the first detail of each reason, which quotes the server"""

    def __call__(self, cells: Sequence[Key]) -> Iterator[list[Candidate]]:
        groups = _by_text(cells, self.deterministic)
        prompts = [asked(group[0], self.prompts, self.earlier) for group in groups]
        requests = (self._request(p, *group[0][1:]) for p, group in zip(prompts, groups, strict=True))
        for i, answer in self.generator.generate(requests):
            if isinstance(answer, RequestFailure):
                self.failures[answer.reason] += len(groups[i])
                self.examples.setdefault(answer.reason, answer.detail)
                continue
            text, ids, terminated = answer.text, answer.token_ids, answer.terminated
            history = None if self.earlier is None else as_messages(prompts[i])
            yield [
                Candidate(*cell, completion=text, completion_ids=ids, terminated=terminated, history=history)
                for cell in groups[i]
            ]

    def _request(self, prompt: Prompt, heuristic: str, seed: int) -> GenerationRequest:
        return GenerationRequest(
            prompt.content,
            self.processors.get(heuristic, ()),
            derived_seed(seed, prompt.id),
            self.max_new_tokens,
            self.policies.get(heuristic),
        )


def _by_text(cells: Sequence[Key], deterministic: Collection[str]) -> list[list[Key]]:
    """Cells grouped by the text they share: the seeds of a deterministic heuristic are neighbours in a grid."""
    return [list(g) for _, g in groupby(cells, key=lambda cell: cell[:2] if cell[1] in deterministic else cell)]
