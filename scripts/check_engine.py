"""Does an engine decode as this library does? Same policies, prompts and base model, in the server and in process.

    python -m asn_rl.serving.vllm_server --model smollm2-135m-instruct --policies served --port 8000 -- --dtype float32
    python scripts/check_engine.py --engine vllm --url http://127.0.0.1:8000 --policies served --dtype float32

Writes its policies into the folder that the server serves. Three checks: greedy completions are the same, or part where
two tokens are as probable as the arithmetic can tell; the served log-probs are those of a replay; tokens drawn at many
contexts are distributed over the points of the sketch as the policy says (chi-square, points with fewer than 5 expected
draws pooled, Bonferroni over the contexts). Bounds on log-probs: 1e-3 nats in float32. In bfloat16 engines round
differently; what they differ by was measured (RESULTS.md), and is held by the mean and by the largest difference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import chisquare
from torch import Tensor

from asn_policies import OrderStatisticsNetwork, Pipeline, RecurrentPolicy
from asn_rl.backends import BackendConfig, load_backend
from asn_rl.backends.servers import ServersConfig
from asn_rl.checkpoint import load_policy, save_policy
from asn_rl.errors import AsnError, BackendError
from asn_rl.ops.sketch import SketchSize, build_sketch, token_points
from asn_rl.protocols import LogitsBackend, Policy
from asn_rl.replay import replay
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.serving.client import PooledClient, Served, SGLangClient
from asn_rl.serving.decoder import PolicyDecoder, Row
from asn_rl.serving.vllm_client import VLLMClient
from asn_rl.types import Prompt

GREEDY, LEARNED, RECURRENT, REPETITION = "check-greedy", "check-learned", "check-recurrent", "check-repetition"
CLIENTS = {"vllm": VLLMClient, "sglang": SGLangClient}
QUESTIONS = (
    "What is the capital of France?", "Name an animal.", "What is 3 + 4?", "Tell me a story about a dragon.",
    "Why is the sky blue?", "Write a haiku about rain.", "How do I boil an egg?", "List three colours.",
    "What is a prime number?", "Who wrote Hamlet?", "Describe the sea.", "Give me advice on sleep.",
    "What does a compiler do?", "Translate 'good morning' into French.", "What is the largest planet?",
    "Explain gravity to a child.", "Invent a name for a cat.", "What is 12 times 12?", "How tall are giraffes?",
    "Say something surprising.",
)  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """Of |served - replayed| log-probs, nats a token."""

    mean: float
    largest: float


BOUNDS = {"float32": Bounds(1e-4, 1e-3), "bfloat16": Bounds(0.12, 1.3)}
"""bfloat16: twice what was measured, of vLLM 0.32 on a CPU without bf16 units against transformers there"""


def write_policies(folder: Path, backend: LogitsBackend, size: SketchSize) -> None:
    """The policies of the checks: greedy, a random network, one that carries state, one that looks at the text."""
    made = {
        GREEDY: Pipeline([{"name": "greedy"}]),
        LEARNED: randomised(OrderStatisticsNetwork()),
        RECURRENT: randomised(RecurrentPolicy()),
        REPETITION: Pipeline([{"name": "repetition_penalty", "params": {"penalty": 1.3}}]),
    }
    sketch = {"head": size.head, "tail": size.tail}
    for name, policy in made.items():
        save_policy(folder / name, policy, fingerprint=backend.fingerprint, sketch=sketch)


def randomised(policy: Any, scale: float = 0.05) -> Any:
    """Weights away from the base model's distribution, always the same."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(parameter + scale * torch.randn(parameter.shape, generator=generator))
    return policy


def served_or_raise(answers: Sequence[Served]) -> Sequence[Served]:
    failed = [answer.failed for answer in answers if answer.failed]
    if failed:
        raise BackendError(f"{len(failed)} of {len(answers)} requests failed, the first one so: {failed[0]}")
    return answers


def greedy_gaps(client: PooledClient, backend: LogitsBackend, prompts: Sequence[Prompt], tokens: int) -> list[float]:
    """For every prompt the nats by which the two greedy completions differ in process where they part; 0: nowhere."""
    config = RolloutConfig(tokens)
    here = rollout(Pipeline([{"name": "greedy"}]), backend, prompts, config).completion_ids
    ids = [backend.encode(prompt.content) for prompt in prompts]
    answers = served_or_raise(client.complete(ids, policy=GREEDY, max_new_tokens=tokens))
    gaps = []
    for prompt, ours, answer in zip(ids, here, answers, strict=True):
        theirs = answer.completion_ids
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if same is None:
            gaps.append(0.0 if len(ours) == len(theirs) else torch.inf)
            continue
        logits = next(iter(backend.score_many([prompt], [ours[: same + 1]]))).logits[-1].float()
        gaps.append(float(logits[ours[same]] - logits[theirs[same]]))
    return gaps


def logprob_differences(
    client: PooledClient, backend: LogitsBackend, folder: Path, name: str | None, prompts: Sequence[Prompt], tokens: int
) -> Tensor:
    """|served - replayed| log-probs of sampled completions, nats, one a token; name None: of the base model."""
    policy = Pipeline([]) if name is None else load_policy(folder / name)
    ids = [backend.encode(prompt.content) for prompt in prompts]
    seeds = list(range(len(prompts)))
    answers = served_or_raise(client.complete(ids, policy=name, max_new_tokens=tokens, seeds=seeds))
    completions = [answer.completion_ids for answer in answers]
    replayed, _ = replay(policy, backend, prompts, completions, RolloutConfig(tokens))
    served = torch.tensor([value for answer in answers for value in answer.logprobs])
    return (served - replayed.behaviour_logprobs).abs()


def contexts(backend: LogitsBackend, prompts: Sequence[Prompt], count: int) -> list[list[int]]:
    """Prompts with beginnings of the base model's completions, `count` in all."""
    each = -(-count // len(prompts))
    done = rollout(Pipeline([]), backend, prompts, RolloutConfig(each), seed=1)
    found = []
    for prompt, ids in zip(done.prompt_ids, done.completion_ids, strict=True):
        found += [[*prompt, *ids[:length]] for length in range(min(each, len(ids)))]
    return found[:count]


def point_pvalues(
    client: PooledClient, backend: LogitsBackend, policy: Policy, name: str, where: Sequence[Sequence[int]], draws: int
) -> list[float]:
    """Chi-square p-values, one a context, of first tokens drawn by the engine against the policy here."""
    answers = served_or_raise(
        client.complete(where, policy=name, max_new_tokens=1, num_generations=draws, seeds=list(range(len(where))))
    )
    values = []
    for i, ids in enumerate(where):
        drawn = [answer.completion_ids[0] for answer in answers[i * draws : (i + 1) * draws]]
        values.append(_pvalue(backend.start([ids]).logits, policy, torch.tensor(drawn)))
    return values


def _pvalue(logits: Tensor, policy: Policy, drawn: Tensor) -> float:
    """Of tokens drawn at next-token logits (1, V)."""
    size = RolloutConfig().size
    weights = PolicyDecoder(policy, size=size)(logits, [Row(0, [], 1)])
    points = token_points(logits, build_sketch(logits, size)[1])[0]
    possible = points >= 0
    expected = torch.zeros(size.points, dtype=torch.float64)
    expected.index_add_(0, points[possible], weights[0].double().softmax(-1)[possible])
    counts = torch.bincount(points[drawn], minlength=size.points).double()
    expected *= len(drawn)
    rare = expected < 5
    seen = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = wanted > 1e-6 * len(drawn)
    if seen[~keep].sum() > 0:
        return 0.0  # tokens that the policy never draws
    if keep.sum() < 2:
        return 1.0
    return float(chisquare(seen[keep].numpy(), (wanted[keep] * seen.sum() / wanted[keep].sum()).numpy()).pvalue)


def main() -> int:
    options = _options()
    try:
        with CLIENTS[options.engine](ServersConfig(tuple(options.url), concurrency=64)) as client:
            client.pool.check(wait_s=60)
            return _checked(client, options)
    except AsnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _checked(client: PooledClient, options: argparse.Namespace) -> int:
    backend = load_backend(BackendConfig(model=options.model, dtype=options.dtype, device=options.device))
    write_policies(options.policies, backend, RolloutConfig().size)
    bounds, prompts = BOUNDS[options.dtype], [Prompt(text, text) for text in QUESTIONS]
    wrong = 0
    gaps = greedy_gaps(client, backend, prompts, options.tokens)
    same, ok = sum(gap == 0 for gap in gaps), max(gaps) <= 2 * bounds.largest
    print(f"greedy: {same} of {len(gaps)} completions are the same, others part at {max(gaps):.2g} nats", _word(ok))
    wrong += not ok
    for name in (None, LEARNED, RECURRENT, REPETITION):
        found = logprob_differences(client, backend, options.policies, name, prompts, options.tokens)
        ok = bool(found.mean() <= bounds.mean and found.max() <= bounds.largest)
        says = f"log-probs differ by {found.mean():.2g}, at most {found.max():.2g}, {len(found)} tokens"
        print(f"{name or 'base model'}: {says}", _word(ok))
        wrong += not ok
    where = contexts(backend, prompts, options.contexts)
    values = point_pvalues(client, backend, load_policy(options.policies / LEARNED), LEARNED, where, options.draws)
    corrected = min(1.0, min(values) * len(values))
    print(f"chi-square: {len(values)} contexts, {options.draws} draws each, corrected p = {corrected:.3g}", end=" ")
    print(_word(corrected > 0.01))
    return int(wrong + (corrected <= 0.01) > 0)


def _word(ok: bool) -> str:
    return "ok" if ok else "WRONG"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, choices=sorted(CLIENTS))
    parser.add_argument("--url", required=True, action="append", help="server; may be repeated")
    parser.add_argument("--policies", required=True, type=Path, help="folder of policies that the server serves")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="base model (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=sorted(BOUNDS), help="the server's (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="for the base model here (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of each completion (default %(default)s)")
    parser.add_argument("--contexts", type=int, default=200, help="of the chi-square test (default %(default)s)")
    parser.add_argument("--draws", type=int, default=100, help="in each context (default %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
