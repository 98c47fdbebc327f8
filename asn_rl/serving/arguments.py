"""What a request may ask for beside a policy: checked at the engine's door, where only that request fails.

Works on any object with the attributes of vLLM's `SamplingParams`; no engine is imported.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asn_rl.checkpoint import check_compatible
from asn_rl.errors import AsnError, ConfigError, InvalidValue, UnknownName
from asn_rl.serving.host import check_policy_name
from asn_rl.serving.settings import (
    BUDGET_ARGUMENT,
    POLICY_ARGUMENT,
    REQUEST_ARGUMENT,
    ServingSettings,
    settings_from_environment,
)
from asn_rl.serving.status import is_reporting

PREFIX = "asn_"
_KNOWN = (POLICY_ARGUMENT, BUDGET_ARGUMENT, REQUEST_ARGUMENT)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "temperature": (1.0,),
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "thinking_token_budget": (None,),
}
"""what changes the distribution after the policy, and the values that do not. Masks (banned and allowed tokens, a
grammar, biases) come before it: what they ban, the policy does not see"""
_RETRY_S = 0.02
"""a folder that is being replaced is away for less"""


@dataclass(frozen=True)
class Arguments:
    """What a request with a policy asks for."""

    policy: str
    budget: int
    label: str
    """name under which its failure is reported"""

    @classmethod
    def of(cls, params: Any) -> Arguments | None:
        """Arguments of a request that passed `check_params`; None: it has no policy."""
        extra = params.extra_args or {}
        if POLICY_ARGUMENT not in extra:
            return None
        budget = extra.get(BUDGET_ARGUMENT, params.max_tokens)
        return cls(extra[POLICY_ARGUMENT], budget, str(extra[REQUEST_ARGUMENT]))


def check_params(params: Any) -> None:
    """Refuse a request that its policy cannot serve.

    Raises:
        InvalidValue: another sampler beside the policy, or an argument that makes no sense.
        ConfigError: no such policy, a policy for another base model, an engine that serves none, or a request without
            a name (`asn_request`), whose client would not be told that the policy failed.
    """
    extra = params.extra_args or {}
    if unknown := sorted(name for name in extra if name.startswith(PREFIX) and name not in _KNOWN):
        raise _plain(UnknownName("argument", unknown[0], _KNOWN))
    if POLICY_ARGUMENT not in extra:
        if given := sorted(extra.keys() & set(_KNOWN)):
            raise ConfigError(f"{given[0]} is given without {POLICY_ARGUMENT}; name a policy, or leave it out")
        return
    if REQUEST_ARGUMENT not in extra:
        raise ConfigError(
            f"{REQUEST_ARGUMENT} is missing, so nobody would be told if the policy failed. The middleware "
            "asn_rl.serving.reports.PolicyReports names requests whose vllm_xargs name a policy: send it there, to a "
            "server started with python -m asn_rl.serving.vllm_server; without a server, give each request a name of "
            "its own and look for it among the reported failures"
        )
    _check_neutral(params)
    _check_budget(extra.get(BUDGET_ARGUMENT), params.max_tokens)
    try:
        _check_policy(settings_from_environment(), extra[POLICY_ARGUMENT])
    except AsnError as error:
        raise _plain(error) from error


def _check_neutral(params: Any) -> None:
    for name, allowed in NEUTRAL.items():
        value = getattr(params, name, allowed[0])
        if value not in allowed:
            advice = "the policy alone decides how to sample; a client's and a model's defaults count too, so send it"
            raise InvalidValue(name, value, f"{allowed[0]} beside a policy", advice)


def _check_budget(budget: Any, max_tokens: int | None) -> None:
    if budget is None:
        return
    if type(budget) is not int or budget < (max_tokens or 1):
        allowed = f"a whole number >= max_tokens ({max_tokens or 1})"
        raise InvalidValue(BUDGET_ARGUMENT, budget, allowed, "it is the number of tokens that the policy counts on")


def _check_policy(settings: ServingSettings, name: Any) -> None:
    if not is_reporting(settings.status):
        raise ConfigError(
            "no process of this engine serves policies: it was started without our logits processor, or does not use "
            "it (speculative decoding, pooling models). Start it with python -m asn_rl.serving.vllm_server"
        )
    try:
        _check_folder(settings, name)
    except AsnError:
        time.sleep(_RETRY_S)
        _check_folder(settings, name)


def _check_folder(settings: ServingSettings, name: Any) -> None:
    folder = check_policy_name(settings.policies, name)
    if settings.fingerprint is not None:
        check_compatible(folder, fingerprint=settings.fingerprint)


def _plain(error: AsnError) -> ConfigError:
    """As a ValueError, which engines turn into an answer to the client."""
    return error if isinstance(error, ConfigError) else ConfigError(str(error))
