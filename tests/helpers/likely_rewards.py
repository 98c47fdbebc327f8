"""A reward that a lower temperature raises: the base model's mean log-prob of a completion's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asn_rl.backends import BackendConfig, shared_backend
from asn_rl.backends.hf import HFBackend


def likely(
    prompts: Sequence[str], completions: Any, completion_ids: Sequence[Sequence[int]], *, model: str, **columns: Any
) -> list[float | None]:
    """Nats a token, under the model in a folder."""
    backend = shared_backend(BackendConfig(model=model, dtype="float32", chat_template=False))
    assert isinstance(backend, HFBackend)
    logprobs = backend.token_logprobs([backend.encode(prompt) for prompt in prompts], completion_ids)
    return [float(row.mean()) for row in logprobs]
