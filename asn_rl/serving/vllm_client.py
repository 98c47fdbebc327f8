"""Completions from vLLM servers that decode with our policies; see `asn_rl.serving.client`."""

from __future__ import annotations

from typing import Any

from asn_rl.backends.server_generation import PATHS, Kind, sampling_params
from asn_rl.serving.client import PooledClient, in_vllm


class VLLMClient(PooledClient):
    """Completions from vLLM servers that `asn_rl.serving.vllm_server` started.

    A request whose policy failed comes back as failed, with the reason.
    """

    kind: Kind = "vllm"
    path = PATHS["vllm"]

    def payload(
        self, prompt_ids: list[int], policy: str | None, max_new_tokens: int, seed: int | None, stop: list[int]
    ) -> dict[str, Any]:
        """The body of a request to `/v1/completions`."""
        body = {"prompt": prompt_ids, "max_tokens": max_new_tokens, "stop_token_ids": stop, "logprobs": 0}
        body |= sampling_params("vllm", []) | {"return_token_ids": True}
        if seed is not None:
            body["seed"] = seed
        return body if policy is None else in_vllm(body, policy, max_new_tokens)
