"""A decoding task small enough to solve by hand: five words, and a known best return that no static rule reaches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from asn_envs.decoding import DecodingEnv
from asn_envs.vector import DecodingVectorEnv
from asn_rl.backends.toy import ToyBackend
from asn_rl.types import Prompt

WORDS = ("<eos>", "sea", "lake", "storm", "gale")
CALM = (0.70, 0.15, 0.08, 0.05, 0.02)
"""next-token probabilities by rank after a calm word; entropy 0.97 nats"""
OPEN = (0.30, 0.26, 0.23, 0.19, 0.02)
"""the same after an open word; entropy 1.45 nats"""
STATES = {
    "sea": (CALM, 0, ("storm", "sea", "lake", "gale", "<eos>")),
    "lake": (CALM, 0, ("sea", "gale", "storm", "lake", "<eos>")),
    "storm": (OPEN, 1, ("sea", "gale", "lake", "storm", "<eos>")),
    "gale": (OPEN, 1, ("storm", "lake", "sea", "gale", "<eos>")),
}
"""word -> probabilities by rank, rank of the right next word, next words by rank"""
LENGTH = 8
SIZE = {"head": len(WORDS), "tail": 1}
EOS = WORDS.index("<eos>")


def toy_table() -> Tensor:
    """(V, V) next-token log-probabilities; row i follows word i. `<eos>` follows itself."""
    table = torch.full((len(WORDS), len(WORDS)), -torch.inf)
    table[EOS, EOS] = 0.0
    for word, (probs, _, ranked) in STATES.items():
        table[WORDS.index(word), [WORDS.index(other) for other in ranked]] = torch.tensor(probs).log()
    return table


def right_words() -> dict[str, str]:
    """word -> the right word after it: the most probable one after a calm word, the second one after an open word."""
    return {word: ranked[rank] for word, (_, rank, ranked) in STATES.items()}


class RightWords:
    """Reward: the number of words that are the right ones after the word before them, divided by `length`."""

    def __init__(self, length: int = LENGTH) -> None:
        self.length = length
        self.right = right_words()

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        return [self._share(f"{p} {c}".split()) for p, c in zip(prompts, completions, strict=True)]

    def _share(self, words: Sequence[str]) -> float:
        return sum(self.right[a] == b for a, b in pairwise(words)) / self.length


def expected_return(choice: Tensor, length: int = LENGTH) -> float:
    """Expected return of a memoryless rule, exactly, by dynamic programming over the words.

    Args:
        choice: (V, V) probability of each next token after each word; row `<eos>` is not read.
        length: token budget.
    """
    value = torch.zeros(len(WORDS), dtype=torch.float64)
    for _ in range(length):
        value = _ALIVE * (choice.double() * _worth(value, length)).sum(-1)
    return _from_start(value)


def base_return(length: int = LENGTH) -> float:
    """Expected return of the base model itself."""
    return expected_return(toy_table().double().softmax(-1), length)


def order_keeping_return(length: int = LENGTH) -> float:
    """Best return of rules that never make a less probable token more likely than a more probable one.

    Temperature, top-k, top-p, min-p and their like keep that order. Their distributions are mixtures of the uniform
    ones over the k most probable tokens, so the best of those at every word and time is the best of all.
    """
    ranked = toy_table().argsort(-1, descending=True)
    value = torch.zeros(len(WORDS), dtype=torch.float64)
    for _ in range(length):
        by_rank = _worth(value, length).gather(-1, ranked)
        uniform = by_rank.cumsum(-1) / torch.arange(1, len(WORDS) + 1)
        value = _ALIVE * uniform.amax(-1)
    return _from_start(value)


def optimal_return() -> float:
    """Best return there is: after every word the right one is a point of its own and never ends the sequence."""
    return 1.0


_ALIVE = torch.tensor([word in STATES for word in WORDS], dtype=torch.float64)


def _worth(value: Tensor, length: int) -> Tensor:
    """(V, V) reward and return to follow of each next token after each word, given the values (V,) after a step."""
    worth = value.repeat(len(WORDS), 1)
    for word, following in right_words().items():
        worth[WORDS.index(word), WORDS.index(following)] += 1.0 / length
    return worth


def _from_start(value: Tensor) -> float:
    return float(value[_ALIVE > 0].mean())  # prompts are uniform over the words


class ToyDecodingEnv(DecodingEnv):
    """Choose the most probable word where the model is sure, the second one where it is not.

    ## Description
    `DecodingEnv` on a base model of five words in which the next distribution depends on the last word alone. After
    a calm word (*sea*, *lake*: entropy 0.97 nats) the most probable word is right; after an open one (*storm*,
    *gale*: 1.45 nats) the second is. Right words lead to both kinds, so a rule that does not look at the distribution
    cannot do well; one that does is always right.

    ## Action Space
    `Discrete(6)`: the five words by descending probability, and an empty tail.

    ## Observation Space
    That of `DecodingEnv` with N = 6.

    ## Rewards
    At the end, the number of right words divided by the token budget. With the default budget the best return is 1
    (`optimal_return`), the base model's 0.440 (`base_return`), and no rule that keeps the base model's order of
    tokens, whatever it reads, exceeds 0.712 (`order_keeping_return`).

    ## Starting State
    One of the four words, uniformly.

    ## Episode End
    Termination with `<eos>` (never right), truncation at the token budget.

    ## Arguments
    * `max_new_tokens`: token budget.
    * `limit_terminates`, `render_mode`: as for `DecodingEnv`.

    ## Version History
    * v0: first version.
    """

    def __init__(self, *, max_new_tokens: int = LENGTH, **arguments: Any) -> None:
        super().__init__(**_toy_arguments(max_new_tokens), max_new_tokens=max_new_tokens, **arguments)


class ToyDecodingVectorEnv(DecodingVectorEnv):
    """`num_envs` copies of `ToyDecodingEnv`; further arguments as for `DecodingVectorEnv`."""

    def __init__(self, *, max_new_tokens: int = LENGTH, max_episode_steps: int | None = None, **arguments: Any) -> None:
        length = max_new_tokens if max_episode_steps is None else min(max_new_tokens, max_episode_steps)
        super().__init__(**_toy_arguments(length), max_new_tokens=length, **arguments)


def _toy_arguments(length: int) -> dict[str, Any]:
    return {
        "prompts": [Prompt(word, word) for word in STATES],
        "reward": RightWords(length),
        "backend": ToyBackend(toy_table(), WORDS),
        **SIZE,
    }
