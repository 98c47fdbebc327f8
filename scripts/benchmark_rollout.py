"""Rollout tokens a second with a policy, against `transformers.generate` sampling at T = 1.

The same 64 chat prompts, all different (short questions and longer requests in turn), natural lengths: until the end
of the turn or the token limit. The policy is fresh, that is: the base model, so both sides sample from the same
distribution; end-of-turn tokens are the same, too. `generate` runs on the model as transformers loads it.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from asn_rl.threads import limit_spinning, set_threads

limit_spinning()

import torch
from _benchmark import finish, options
from transformers import AutoModelForCausalLM

from asn_policies import OrderStatisticsNetwork
from asn_rl.backends import BackendConfig, load_backend
from asn_rl.backends.embedded import resolve_model
from asn_rl.backends.hf import HFBackend
from asn_rl.data import DataConfig, load_prompts
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Prompt

GOAL = 2.0
_SIDES = ("rollout", "generate")
_TOPICS = (
    "the sea", "a small town in winter", "the history of bread", "how bicycles stay upright", "a lost letter",
    "old maps", "bees", "the night sky",
)  # fmt: skip
_TASKS = (
    "Name three facts about {}.",
    "Write one sentence about {} for a child who has never heard of it before.",
    "I am preparing a short talk about {}. My listeners are curious, but they have no background at all, and I have "
    "only two minutes. Which single point should I make, and how should I open? Please answer briefly and plainly.",
    "What is {} to you?",
)


def main() -> int:
    arguments = options(
        __doc__ or "", "python scripts/benchmark_rollout.py --prompts 64 --tokens 256", prompts=64, tokens=256
    )
    set_threads(arguments.threads)
    tokens = min(arguments.tokens, 72) if arguments.quick else arguments.tokens
    count = min(arguments.prompts, 16) if arguments.quick else arguments.prompts
    backend = load_backend(BackendConfig())
    assert isinstance(backend, HFBackend)
    short = [prompt.content for prompt in load_prompts(DataConfig(), "train")]
    longer = [task.format(topic) for topic in _TOPICS for task in _TASKS]
    contents = [content for pair in zip(short, longer, strict=False) for content in pair][:count]
    assert len(set(map(str, contents))) == count
    prompts = [Prompt(str(i), content) for i, content in enumerate(contents)]
    rounds = 1 if arguments.quick else 2
    peer = AutoModelForCausalLM.from_pretrained(resolve_model(BackendConfig().model), dtype=backend.model.dtype)
    ours, theirs = [], []
    for seed in range(rounds):
        sides = [_ours(backend, prompts, tokens, seed), _theirs(peer, backend, prompts, tokens, seed)]
        for rates, (rate, _) in zip((ours, theirs), sides, strict=True):
            rates.append(rate)
        said = [
            f"{name} {rate:.0f} tokens/s, {ended:.0%} ended" for name, (rate, ended) in zip(_SIDES, sides, strict=True)
        ]
        print(f"round {seed}: " + "; ".join(said))
    lengths = [len(backend.encode(prompt.content)) for prompt in prompts]
    print(f"{len(prompts)} prompts of {min(lengths)}-{max(lengths)} tokens, limit {tokens}, {backend.model.dtype}")
    return finish("benchmark_rollout", sum(ours) / sum(theirs), GOAL, at_least=True)


def _ours(backend: HFBackend, prompts: list[Prompt], tokens: int, seed: int) -> tuple[float, float]:
    """Tokens a second, and the share of completions that ended by themselves."""
    begin = time.perf_counter()
    trajectories = rollout(OrderStatisticsNetwork(), backend, prompts, RolloutConfig(max_new_tokens=tokens), seed=seed)
    return len(trajectories.points) / (time.perf_counter() - begin), float(trajectories.terminated.float().mean())


@torch.inference_mode()
def _theirs(model: Any, backend: HFBackend, prompts: list[Prompt], tokens: int, seed: int) -> tuple[float, float]:
    torch.manual_seed(seed)
    eos = sorted(backend.eos_token_ids)
    begin = time.perf_counter()
    texts = [str(backend.tokenizer.decode(backend.encode(prompt.content))) for prompt in prompts]
    batch = backend.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    output = model.generate(
        **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, eos_token_id=eos,
        pad_token_id=eos[0],
    )[:, batch["input_ids"].shape[1] :]  # fmt: skip
    ended = torch.isin(output, torch.tensor(eos))
    generated = torch.where(ended.any(1), ended.int().argmax(1) + 1, output.shape[1])
    return int(generated.sum()) / (time.perf_counter() - begin), float(ended.any(1).float().mean())


if __name__ == "__main__":
    sys.exit(main())
