"""A fixed-table language model: next-token logits depend on the last token alone. For tests and solvable examples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from asn_rl.errors import DataError, InvalidValue
from asn_rl.protocols import Scored
from asn_rl.types import Messages

if TYPE_CHECKING:
    from asn_rl.backends import BackendConfig


class ToyBackend:
    """A Markov chain over words; token 0 ends the sequence.

    Args:
        table: (V, V) logits; row i is the next-token distribution after token i.
        words: V words, one a token; default "<eos>", "w1", "w2", ...
    """

    batch_invariant = True
    max_context = 1 << 20

    def __init__(self, table: Tensor, words: Sequence[str] | None = None) -> None:
        if table.ndim != 2 or table.shape[0] != table.shape[1]:
            raise InvalidValue("toy table shape", tuple(table.shape), "square (V, V)")
        self.table = table.float()
        self.vocab_size = self.hidden_size = len(table)
        self.words = list(words) if words else ["<eos>", *(f"w{i}" for i in range(1, len(table)))]
        if len(set(self.words)) != len(self.words) or len(self.words) != len(table):
            raise InvalidValue("toy words", self.words, f"{len(table)} different words, one a token")
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.eos_token_ids = frozenset({0})
        self.device = table.device
        digest = hashlib.sha256(self.table.cpu().numpy().tobytes() + repr(self.words).encode())
        self.fingerprint = "toy-" + digest.hexdigest()[:12]

    @classmethod
    def random(cls, vocab: int = 32, seed: int = 0, scale: float = 2.0) -> ToyBackend:
        """A table of Gaussian logits with standard deviation `scale`."""
        generator = torch.Generator().manual_seed(seed)
        return cls(scale * torch.randn(vocab, vocab, generator=generator))

    @classmethod
    def from_config(cls, config: BackendConfig) -> ToyBackend:
        """`model: "random:VOCAB:SEED"`."""
        kind, _, rest = config.model.partition(":")
        vocab, _, seed = rest.partition(":")
        if kind != "random" or not (vocab.isdigit() and seed.isdigit()):
            raise InvalidValue("backend.model", config.model, "'random:VOCAB:SEED' for the toy backend")
        return cls.random(int(vocab), int(seed))

    def encode(self, content: str | Messages) -> list[int]:
        text = content if isinstance(content, str) else " ".join(message["content"] for message in content)
        unknown = [word for word in text.split() if word not in self.ids]
        if unknown:
            raise DataError(f"word {unknown[0]!r} is not in the toy vocabulary {self.words[:8]}...; use its words")
        return [self.ids[word] for word in text.split()]

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in token_ids if i not in self.eos_token_ids)

    def start(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        repeats: int = 1,
        hidden: bool = False,
        layers: Sequence[int] = (),
    ) -> ToySession:
        self._check_layers(layers)
        last = torch.tensor([ids[-1] for ids in prompt_ids], device=self.device)
        return ToySession(self, last.repeat_interleave(repeats), hidden)

    def score_many(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        *,
        hidden: bool = False,
        layers: Sequence[int] = (),
    ) -> Iterator[Scored]:
        self._check_layers(layers)
        for i, (prompt, row) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
            if row:
                before = torch.tensor([prompt[-1], *row[:-1]], device=self.device)
                yield Scored(i, self.table[before], self.embed(before) if hidden else None, None)

    def _check_layers(self, layers: Sequence[int]) -> None:
        if layers:
            raise InvalidValue("layers", list(layers), "none", "the toy backend is a table without layers")

    def embed(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(tokens, self.vocab_size).float()


class ToySession:
    def __init__(self, backend: ToyBackend, last: Tensor, hidden: bool) -> None:
        self.backend = backend
        self.want_hidden = hidden
        self.layer_logits: Tensor | None = None
        self.step(last)

    def step(self, tokens: Tensor) -> None:
        self.logits = self.backend.table[tokens]
        self.hidden = self.backend.embed(tokens) if self.want_hidden else None

    def drop(self, finished: Tensor) -> Tensor:
        order = (~finished).nonzero().squeeze(-1)
        self.logits = self.logits[order]
        self.hidden = None if self.hidden is None else self.hidden[order]
        return order
