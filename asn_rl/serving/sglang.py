"""A policy inside SGLang (written for 0.5.23): one logits processor for all requests of a server.

    {"input_ids": [...], "return_logprob": true, "custom_logit_processor": PROCESSOR,
     "sampling_params": {"temperature": 1, "max_new_tokens": 64, "custom_params": {"asn_policy": "math"}}}

Every request carries the same string, so SGLang calls the processor once a step for all of them; what differs, the
policy's name and the token budget `asn_budget` (default: max_new_tokens), is in `custom_params`. Policies are read by
the server from its folder of policies, and read again when they change (`asn_rl.serving.host`).

What a request asks for is what it gets, or it fails: with status 400 if it asks for another sampler beside the policy
(temperature, top-p, penalties, ...), with status 422 and the reason if its policy cannot answer, with 503 if the server
lost its place and the request may be sent again. Other requests go on.
Masks (a grammar, a bias, min_new_tokens) are no samplers: what they ban, the policy does not see.

Security. With SGLang's flag --enable-custom-logit-processor a request can carry a pickled class, which the server
unpickles: whoever reaches the port runs code there. `secure` closes that: processors are known by name, every other
string is refused with status 400, and none is unpickled in any process of the server. Our launcher calls it; for a
server that is started otherwise `plugin` does, where ASN_RL_POLICIES is set (`asn_rl.serving.settings`). Only the
folder that the server was started with holds policies, and requests name its subfolders, not paths. What remains is
SGLang's own: whoever reaches the port can also replace the model's weights. Bind it to a private address, or set
--api-key and --admin-api-key.

The scheduler must not overlap steps (--disable-overlap-schedule), as a policy sees the tokens so far, and speculative
decoding, which draws several at a time, is refused. Seeds: SGLang heeds `sampling_seed` only with
--enable-deterministic-inference, which wants a GPU's attention kernels; on a CPU the same request gives other tokens.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import torch
from torch import Tensor

from asn_rl.errors import InvalidValue, ServingError
from asn_rl.serving.host import PolicyHost, ServedRequest, process_host
from asn_rl.serving.settings import BUDGET_ARGUMENT, POLICIES, POLICY_ARGUMENT

LOG = logging.getLogger("asn_rl.serving")
# The class by reference, in pickle's protocol 0: a server without `secure` can read it too.
_CALLABLE = f"c{__name__}\nPolicyProcessor\n.".encode().hex()
PROCESSOR = json.dumps({"callable": _CALLABLE})
"""the string that asks for a policy"""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "temperature": (1.0,), "top_p": (1.0,), "top_k": (-1, 1 << 30), "min_p": (0.0,),
    "frequency_penalty": (0.0,), "presence_penalty": (0.0,), "repetition_penalty": (1.0,), "beam_width": (None, 1),
}  # fmt: skip
"""values of SGLang's sampling parameters that leave a distribution as it is"""


class PolicyProcessor:
    """What SGLang calls with the logits of the requests that have a policy; made anew for every batch it prefills."""

    def __call__(self, logits: Tensor, custom_param_list: Sequence[Any] | None = None) -> Tensor:
        """(B, V) log-weights for next-token logits (B, V). Never raises: that would end the server for everybody."""
        parameters = list(custom_param_list or [None] * len(logits))
        try:
            return _process_requests()(logits, parameters)
        except Exception as error:
            LOG.exception("the requests of a batch fail: their policies cannot be asked")
            return _all_fail(logits, parameters, f"{type(error).__name__}: {error}")


class RefusedProcessor:
    """Stands for a processor that a request brought along: that request fails, unread."""

    def __call__(self, logits: Tensor, custom_param_list: Sequence[Any] | None = None) -> Tensor:
        return _all_fail(logits, list(custom_param_list or [None] * len(logits)), _REFUSAL)


_REFUSAL = (
    "custom_logit_processor holds code, and this server runs none from requests; name a policy of the server in "
    f"custom_params, {{{POLICY_ARGUMENT!r}: ...}}, and leave the processor out"
)


class EngineRequests:
    """The requests of one scheduler process, between SGLang and the host of the policies."""

    def __init__(self, host: PolicyHost) -> None:
        self.host = host
        self._live: dict[str, Any] = {}  # weak references by id, as SGLang hands them out

    def __call__(self, logits: Tensor, parameters: Sequence[Any]) -> Tensor:
        """(B, V) log-weights for next-token logits (B, V); SGLang ends requests that fail after this step."""
        rows, asked, lost = [], [], [i for i, own in enumerate(parameters) if not _is_known(own)]
        for i, own in enumerate(parameters):
            if not _draws(own):
                continue
            request = own[_REQUEST]
            if not request.output_ids and (problem := other_sampler(request.sampling_params)):
                _fail(request, problem)
                lost.append(i)
                continue
            budget = own.get(BUDGET_ARGUMENT) or request.sampling_params.max_new_tokens
            rows.append(i)
            asked.append(ServedRequest(request.rid, request.output_ids, budget, own.get(POLICY_ARGUMENT, "")))
            self._live[request.rid] = request
        whole = len(rows) == len(parameters)
        weights, failures = self.host(logits if whole else logits[rows], asked)
        for failure in failures:
            _fail(self._live[str(failure.key)], failure.reason, transient=failure.transient)
        self._forget_ended({request.key for request in asked})
        failed = {failure.key for failure in failures}
        lost += [row for row, request in zip(rows, asked, strict=True) if request.key in failed]
        result = weights if whole else logits.clone()
        if not whole:
            result[rows] = weights.to(result.dtype)
        if lost:
            result[lost] = _nothing(result[lost])
        return result

    def _forget_ended(self, present: Collection[Any]) -> None:
        ended = [key for key, request in self._live.items() if key not in present and _has_ended(request)]
        for key in ended:
            del self._live[key]
        if ended:
            self.host.forget(ended)


_REQUEST = "__req__"
"""where SGLang puts the request among its custom_params, if they are a dictionary"""


@functools.cache
def _process_requests() -> EngineRequests:
    return EngineRequests(process_host())


def _is_known(own: Any) -> bool:
    return isinstance(own, dict) and own.get(_REQUEST) is not None


def _draws(own: Any) -> bool:
    """Whether a token of the row will be used: not in the middle of a prompt that is prefilled in chunks, nor for the
    request without tokens by which SGLang prefills the prompt of several completions (`n`)."""
    if not _is_known(own):
        return False
    request = own[_REQUEST]
    return request.inflight_middle_chunks <= 0 and request.sampling_params.max_new_tokens > 0


def _has_ended(request: Any) -> bool:
    try:
        return request.finished()
    except ReferenceError:
        return True


def _fail(request: Any, reason: str, *, transient: bool = False) -> None:
    """Have SGLang end a request with an error after this step."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT  # type: ignore[import-not-found]

    status = HTTPStatus.SERVICE_UNAVAILABLE if transient else HTTPStatus.UNPROCESSABLE_ENTITY
    request.to_finish = FINISH_ABORT(reason, status, "PolicyFailure")


def _all_fail(logits: Tensor, parameters: Sequence[Any], reason: str) -> Tensor:
    for own in parameters:
        with contextlib.suppress(Exception):  # what is left is in the log, and visible in the text
            if _draws(own):
                _fail(own[_REQUEST], reason)
    return _nothing(logits)


def _nothing(logits: Tensor) -> Tensor:
    """Token 0 and no other, for rows that fail. SGLang draws from a row once more before it ends the request, also
    where the base model's logits are NaN; a row whose request it does not tell us can only be seen to have failed."""
    result = torch.full_like(logits, -torch.inf)
    result[:, 0] = 0.0
    return result


def other_sampler(sampling: Any) -> str:
    """What SGLang's `SamplingParams` ask for beside the policy, as an error; empty: nothing."""
    asked = {name: getattr(sampling, name, neutral[0]) for name, neutral in NEUTRAL.items()}
    other = [f"{name}={value!r}" for name, value in asked.items() if value not in NEUTRAL[name]]
    if not other:
        return ""
    return (
        f"the request asks for {', '.join(other)} beside its policy, which alone decides how to sample; leave them out "
        "(for 0 use a greedy policy), or put the step into the policy's own pipeline"
    )


def processor_with(arguments: Mapping[str, Any]) -> str:
    """A processor's string that carries a request's `custom_params`, for routers that drop these."""
    return json.dumps({"callable": _CALLABLE, **arguments})


def arguments_of(processor: Any) -> dict[str, Any] | None:
    """What `processor_with` put into a string; None: it is not ours."""
    try:
        found = json.loads(processor)
    except (TypeError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.pop("callable", None) != _CALLABLE:
        return None
    return found


def admit(request: Any) -> None:
    """Bring SGLang's `GenerateReqInput` into the one form that the scheduler is to see.

    Raises:
        InvalidValue: it brings a processor of its own, or its arguments make no sense. SGLang answers with status 400.
    """
    sampling = dict(getattr(request, "sampling_params", None) or {})
    own = sampling.get("custom_params")
    own = dict(own) if isinstance(own, dict) else {}
    processor = getattr(request, "custom_logit_processor", None)
    if processor is None and POLICY_ARGUMENT not in own:
        return
    if processor is not None:
        carried = arguments_of(processor)
        if carried is None:
            raise InvalidValue("custom_logit_processor", str(processor)[:40], "left out or asn_rl's own", _REFUSAL)
        own = carried | own
    policy, budget, tokens = own.get(POLICY_ARGUMENT), own.get(BUDGET_ARGUMENT), sampling.get("max_new_tokens")
    tokens = tokens if type(tokens) is int else 0  # if it is neither a number nor left out, SGLang refuses it
    if not isinstance(policy, str) or not policy:
        raise InvalidValue(f"custom_params.{POLICY_ARGUMENT}", policy, "the name of a policy of the server")
    if budget is not None and (type(budget) is not int or budget < max(1, tokens)):
        raise InvalidValue(f"custom_params.{BUDGET_ARGUMENT}", budget, f"an integer >= max_new_tokens={tokens}")
    request.custom_logit_processor = PROCESSOR
    request.sampling_params = sampling | {"custom_params": own}


def secure() -> None:
    """Have SGLang run no code that a request carries, in this process; see the module's docstring.

    Raises:
        ServingError: this SGLang is built otherwise.
    """
    from sglang.srt.managers.tokenizer_manager import TokenizerManager  # type: ignore[import-not-found]
    from sglang.srt.sampling import custom_logit_processor as processors  # type: ignore[import-not-found]

    if getattr(processors, "_cache_from_str", None) is _known_class:
        return
    if not hasattr(processors, "_cache_from_str") or not hasattr(TokenizerManager, "_create_tokenized_object"):
        raise ServingError(
            "this version of SGLang turns requests into processors in another way, so nothing keeps it from running "
            "code that a request carries; install sglang==0.5.23, for which asn_rl.serving.sglang was written"
        )
    processors._cache_from_str = _known_class
    TokenizerManager._create_tokenized_object = _admitting(TokenizerManager._create_tokenized_object)


def plugin() -> None:
    """What SGLang calls in each of its processes (entry point group `sglang.srt.plugins`): `secure`, where the
    environment names a folder of policies; servers that have nothing to do with policies stay as they are."""
    if os.environ.get(POLICIES):
        secure()


def _known_class(processor: str) -> type:
    """Instead of unpickling: the class that a string names."""
    return RefusedProcessor if arguments_of(processor) is None else PolicyProcessor


def _admitting(create: Callable[..., Any]) -> Callable[..., Any]:
    """SGLang's last step before a request goes to the scheduler, after our checks of it."""

    @functools.wraps(create)
    def checked(self: Any, request: Any, *arguments: Any, **options: Any) -> Any:
        admit(request)
        made = create(self, request, *arguments, **options)
        if getattr(made, "custom_logit_processor", None) is not None:
            problem = other_sampler(made.sampling_params)
            if problem:
                raise ValueError(problem)
        return made

    return checked
