"""Stop strings: texts that end a completion as an end-of-sequence token does."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from asn_rl.protocols import LogitsBackend


def before_stop(text: str, stop: Collection[str]) -> str:
    """A text up to the first stop string in it."""
    return text[: min((at for string in stop if (at := text.find(string)) >= 0), default=len(text))]


def has_ended(backend: LogitsBackend, ids: Sequence[int], stop: Collection[str]) -> bool:
    """Whether the last token of a completion ends it: it ends the sequence, or completes a stop string."""
    return ids[-1] in backend.eos_token_ids or _holds_stop(backend, ids, stop)


class StopWatch:
    """Tells which rows of a batch end with the tokens just drawn.

    Args:
        rows: completions of the batch that was started.
    """

    def __init__(self, backend: LogitsBackend, rows: int, stop: Collection[str]) -> None:
        self.backend, self.stop = backend, stop
        self._eos = torch.tensor(sorted(backend.eos_token_ids), device=backend.device)
        self._ids: list[list[int]] = [[] for _ in range(rows)]

    def ended(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """(B',) bool, for the next tokens (B',) of the completions `rows` (B',)."""
        finished = torch.isin(tokens, self._eos)
        if not self.stop:
            return finished
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            self._ids[row].append(token)
        held = [_holds_stop(self.backend, self._ids[row], self.stop) for row in rows.tolist()]
        return finished | torch.tensor(held, device=finished.device)


def _holds_stop(backend: LogitsBackend, ids: Sequence[int], stop: Collection[str]) -> bool:
    # A token is at least a byte, so a string that the last token completes lies in as many tokens as it has bytes.
    tails = {string: ids[-len(string.encode()) :] for string in stop}
    return any(string in backend.decode(tail) for string, tail in tails.items())
