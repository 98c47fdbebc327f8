"""Requests to inference servers, their answers, and which pipelines of heuristics a server can stand in for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from local_server import LocalServer, Reply
from torch import Tensor

from asn_policies import Pipeline
from asn_rl.backends.server_generation import (
    ORDERS,
    GenerationRequest,
    Kind,
    ServerCompletion,
    ServerGenerator,
    parse_completion,
    sampling_params,
)
from asn_rl.backends.servers import RequestFailure, ServersConfig
from asn_rl.errors import ConfigError, InvalidValue, UnknownName
from asn_rl.ops.context import context_vector
from asn_rl.ops.sketch import SketchSize, build_sketch, expand
from asn_rl.types import Observation

EOS = 2
URLS = ServersConfig(("http://127.0.0.1:1",))


def step(name: str, *value: float) -> dict[str, Any]:
    return {"name": name, "params": dict(zip([name], value, strict=False))}


# What servers do with their parameters, written from their sources, over the whole vocabulary in float64.


def cut(probs: Tensor, keep: Tensor) -> Tensor:
    kept = torch.where(keep, probs, 0.0)
    return kept / kept.sum()


def within_top_p(probs: Tensor, p: float) -> Tensor:
    """The most probable tokens before which less than p lies."""
    order = probs.argsort(descending=True)
    before = probs[order].cumsum(0) - probs[order]
    return torch.zeros_like(probs, dtype=torch.bool).scatter(0, order, before < p)


def within_top_k(probs: Tensor, k: int) -> Tensor:
    return probs >= probs.sort(descending=True).values[min(k, len(probs)) - 1]


def vllm(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """One after the other."""
    probs = torch.softmax(logits / temperature, 0)
    probs = cut(probs, probs >= min_p * probs.max())
    probs = cut(probs, within_top_k(probs, top_k)) if top_k > 0 else probs
    return cut(probs, within_top_p(probs, top_p))


def sglang_joint(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Its pytorch sampler: every rule looks at the same probabilities."""
    probs = torch.softmax(logits / temperature, 0)
    keep = within_top_p(probs, top_p) & (probs >= min_p * probs.max())
    return cut(probs, keep & within_top_k(probs, top_k) if top_k > 0 else keep)


def sglang_in_turn(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Its flashinfer sampler when a request of the batch uses min-p."""
    probs = torch.softmax(logits / temperature, 0)
    probs = cut(probs, within_top_k(probs, top_k)) if top_k > 0 else probs
    probs = cut(probs, within_top_p(probs, top_p))
    return cut(probs, probs >= min_p * probs.max())


SAMPLERS: dict[Kind, list[Callable[..., Tensor]]] = {"vllm": [vllm], "sglang": [sglang_joint, sglang_in_turn]}


def served(kind: Kind, logits: Tensor, params: dict[str, Any]) -> list[Tensor]:
    """(V,) probabilities of each of a server's samplers."""
    if params["temperature"] == 0:
        return [torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()]
    names = ("temperature", "top_k", "top_p", "min_p")
    return [sampler(logits, *(params[name] for name in names)) for sampler in SAMPLERS[kind]]


def in_process(logits: Tensor, processors: list[dict[str, Any]]) -> Tensor:
    """(V,) probabilities of the pipeline, every token a point of its own."""
    rows = logits.float()[None]
    sketch, points = build_sketch(rows, SketchSize(len(logits), 1))
    zeros = torch.zeros(1)
    obs = Observation(sketch, context_vector(sketch, zeros, zeros, zeros, zeros))
    shift = torch.where(sketch.mask, Pipeline(processors)(obs).logprobs - sketch.log_mass, 0.0)
    return torch.softmax(expand(rows, points, shift).double(), -1)[0]


VALUES = {
    "temperature": st.sampled_from([0.3, 0.7, 1.0, 1.5, 2.0]),
    "top_k": st.integers(1, 40),
    "top_p": st.sampled_from([0.13, 0.51, 0.83, 0.97, 1.0]),
    "min_p": st.sampled_from([0.0, 0.011, 0.13, 0.71]),
    "greedy": st.none(),
}


@st.composite
def pipelines(draw: st.DrawFn) -> list[dict[str, Any]]:
    names = draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=4, unique=True))
    return [step(name, *([] if name == "greedy" else [draw(VALUES[name])])) for name in names]


@settings(max_examples=150, deadline=None)
@given(processors=pipelines(), seed=st.integers(0, 99), kind=st.sampled_from(["vllm", "sglang"]))
def test_a_pipeline_is_refused_or_the_server_samples_the_same_distribution(
    processors: list[dict[str, Any]], seed: int, kind: Kind
) -> None:
    """On every sampler that a server may choose by itself."""
    logits = 3 * torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    try:
        params = sampling_params(kind, processors)
    except ConfigError:
        return
    for probs in served(kind, logits, params):
        torch.testing.assert_close(in_process(logits, processors), probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "first", "second"), [("vllm", "top_p", "top_k"), ("vllm", "top_p", "min_p")])
def test_refused_orders_are_other_distributions(kind: Kind, first: str, second: str) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = {"top_p": 0.83, "top_k": 15, "min_p": 0.1}
    in_order = [step(second, values[second]), step(first, values[first])]
    (probs,) = served(kind, logits, sampling_params(kind, in_order))
    assert (in_process(logits, in_order[::-1]) - probs).abs().max() > 0.01
    with pytest.raises(ConfigError, match=f"heuristic '{first}' before '{second}'"):
        sampling_params(kind, in_order[::-1])


def accepted(kind: Kind) -> set[str]:
    """Every pipeline of different heuristics that a kind takes, greedy left out."""
    values = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1}
    found = set()
    for n in range(5):
        for names in itertools.permutations(values, n):
            try:
                params = sampling_params(kind, [step(name, values[name]) for name in names])
            except ConfigError:
                continue
            assert {name: params[name] for name in names} == {name: values[name] for name in names}
            found.add(" ".join({"temperature": "T", "top_k": "k", "top_p": "p", "min_p": "m"}[name] for name in names))
    return found


def test_accepted_pipelines() -> None:
    heated = {"", "T", "p", "k", "m", "T p", "T k", "k T", "T m", "k m", "m k", "T k m", "T m k", "k T m"}
    assert accepted("openai") == {"", "T", "p", "T p"}
    assert accepted("sglang") == heated | {"p m", "T p m"}
    assert accepted("vllm") == heated | {
        "k p", "m p", "T k p", "k T p", "T m p", "m k p", "k m p", "T m k p", "T k m p", "k T m p",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ORDERS)
def test_greedy_wins_over_what_keeps_the_most_probable_token(kind: Kind) -> None:
    for processors in (
        [step("greedy")],
        [step("temperature", 1.5), step("greedy")],
        [step("greedy"), step("top_p", 0.5)],
    ):
        assert sampling_params(kind, processors)["temperature"] == 0.0
    with pytest.raises(ConfigError, match="'typical'"):
        sampling_params(kind, [{"name": "typical", "params": {"mass": 0.2}}, step("greedy")])


def test_all_settings_are_sent() -> None:
    penalties = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    neutral = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0} | penalties
    assert sampling_params("sglang", []) == neutral | {"top_k": -1}
    assert sampling_params("vllm", []) == neutral | {"top_k": 0}
    assert sampling_params("openai", []) == {"temperature": 1.0, "top_p": 1.0}
    assert sampling_params("vllm", [step("top_p", 1.0), step("min_p", 0)]) == sampling_params("vllm", [])


@pytest.mark.parametrize(
    ("kind", "processors", "message"),
    [
        ("sglang", [step("typical", 0.9)], r"kind 'sglang' cannot apply heuristic 'typical'. They can: greedy, or"),
        ("openai", [step("min_p", 0.1)], r"kind 'openai' cannot apply heuristic 'min_p'.*temperature, top_p. Generate"),
        ("openai", [step("top_p", 0.9), step("temperature", 0.7)], r"'top_p' before 'temperature' \(top_p -> temp"),
        ("sglang", [step("top_k", 5), step("top_p", 0.9)], r"'top_k' and 'top_p' together.*one of top_p and top_k"),
        ("vllm", [step("top_p", 0.9), step("top_p", 0.8)], r"heuristic 'top_p' twice"),
        ("vllm", [{"name": "top_p", "params": {"top_p": 0.9, "min_tokens_to_keep": 3}}], r"min_tokens_to_keep=3"),
        ("vllm", [{"name": "top_p", "params": {"p": 0.9}}], r"takes the parameters: top_p; got \{'p': 0.9\}"),
        ("vllm", [{"name": "top_p"}], r"takes the parameters: top_p; got \{\}"),
        ("vllm", [{"name": "greedy", "params": {"k": 1}}], r"takes the parameters: none"),
        ("vllm", [{"top_p": 0.9}], r"a pipeline step is \{name, params\}"),
        ("vllm", ["top_p"], r"a pipeline step is \{name, params\}"),
    ],
)
def test_refusals_name_the_heuristic_and_what_is_allowed(kind: Kind, processors: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sampling_params(kind, processors)


@pytest.mark.parametrize(
    ("kind", "name", "value", "allowed"),
    [
        (
            "vllm",
            "temperature",
            0.005,
            r"a finite number in \[0.01, 2\], got 0.005; .* 'vllm' apply no other",
        ),
        ("vllm", "temperature", 2.5, r"a finite number in \[0.01, 2\]"),
        ("openai", "temperature", 0, r"a finite number in .* got 0; .* for 0 use greedy"),
        ("sglang", "temperature", 1e-7, r"a finite number in \[1e-06, inf\]"),
        ("sglang", "temperature", math.inf, r"a finite number in"),
        ("sglang", "temperature", "hot", r"a finite number in"),
        ("sglang", "top_k", 0, r"an integer >= 1"),
        ("sglang", "top_k", 2.0, r"an integer >= 1"),
        ("sglang", "top_k", True, r"an integer >= 1"),
        ("sglang", "top_p", 0.0, r"a number in \(0, 1\]"),
        ("sglang", "min_p", 1.1, r"a number in \[0, 1\]"),
        ("sglang", "min_p", math.nan, r"a number in \[0, 1\]"),
    ],
)
def test_values_outside_a_server_s_range_are_named(kind: Kind, name: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidValue, match=rf"{name}.{name} must be {allowed}"):
        sampling_params(kind, [step(name, value)])


def encode(prompt: Any) -> list[int]:
    return [ord(letter) for letter in (prompt if isinstance(prompt, str) else prompt[-1]["content"])]


def decode(ids: Any) -> str:
    return "".join(chr(token) for token in ids if token != EOS)


def generator(kind: Kind, config: ServersConfig = URLS, **options: Any) -> ServerGenerator:
    if kind == "openai":
        return ServerGenerator(config, kind, **{"model": "m"} | options)
    codec = {"encode": encode, "decode": decode, "eos_token_ids": {EOS}}
    return ServerGenerator(config, kind, **codec | options)


REQUEST = GenerationRequest("hi", [step("temperature", 0.7), step("top_p", 0.9)], seed=7, max_new_tokens=5)


def test_payloads() -> None:
    common = sampling_params("sglang", REQUEST.processors)
    assert generator("sglang").payload(REQUEST) == {
        "input_ids": [104, 105],
        "sampling_params": common | {"max_new_tokens": 5, "sampling_seed": 7, "stop_token_ids": [EOS]},
        "return_logprob": False,
    }
    body = {"prompt": [104, 105], "max_tokens": 5, "seed": 7, "return_token_ids": True, "stop_token_ids": [EOS]}
    assert generator("vllm").payload(REQUEST) == body | common | {"top_k": 0}
    asked = generator("vllm", model="m", logprobs=True, extra={"vllm_xargs": {"a": 1}}).payload(REQUEST)
    assert asked == body | common | {"top_k": 0, "model": "m", "logprobs": 0, "vllm_xargs": {"a": 1}}
    chat = {"model": "m", "temperature": 0.7, "top_p": 0.9, "seed": 7, "max_tokens": 5}
    assert generator("openai").payload(REQUEST) == chat | {"messages": [{"role": "user", "content": "hi"}]}
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert generator("openai").payload(GenerationRequest(turns, [], 7, 5))["messages"] == turns


def answers(kind: Kind, ids: list[int], reason: str, logprobs: list[float] | None = None) -> dict[str, Any]:
    """What a server of a kind answers, other fields of its included."""
    text = decode(ids)
    if kind == "sglang":
        finish = {"type": reason} | ({"matched": EOS} if reason == "stop" else {"length": len(ids)})
        meta: dict[str, Any] = {"id": "x", "finish_reason": finish, "prompt_tokens": 2, "cached_tokens": 0}
        if logprobs is not None:
            meta["output_token_logprobs"] = [[value, token, None] for value, token in zip(logprobs, ids, strict=True)]
        return {"text": text, "output_ids": ids, "meta_info": meta}
    if kind == "vllm":
        table = None if logprobs is None else {"token_logprobs": logprobs, "tokens": [chr(i) for i in ids]}
        choice = {"index": 0, "text": text, "logprobs": table, "finish_reason": reason, "token_ids": ids}
        return {"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": {}}
    message = {"role": "assistant", "content": text}
    return {"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": reason}], "usage": {}}


LONG = {"text": "a", "token_ids": [72, 2**70], "finish_reason": "stop"}


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("logprobs", [None, [-0.5, -1.25, 0.0]])
def test_answers_are_read(kind: Kind, logprobs: list[float] | None) -> None:
    for reason, ids in (("stop", [72, 105, EOS]), ("length", [72, 105, 33])):
        completion = parse_completion(kind, answers(kind, ids, reason, logprobs))
        known = kind != "openai"
        expected = ServerCompletion(decode(ids), ids if known else None, reason == "stop", logprobs if known else None)
        assert completion == expected


@pytest.mark.parametrize(
    ("kind", "answer", "words"),
    [
        ("sglang", {}, "KeyError: 'meta_info'"),
        ("sglang", {"meta_info": []}, "TypeError"),
        ("sglang", {"meta_info": {"finish_reason": None}}, "TypeError"),
        ("sglang", answers("sglang", [72], "stop") | {"output_ids": "72"}, "token ids are no list of integers"),
        ("sglang", answers("sglang", [72], "stop") | {"output_ids": []}, "token ids are no list of integers"),
        ("sglang", answers("sglang", [72], "stop") | {"text": None}, "the text is a NoneType"),
        ("sglang", answers("sglang", [72], "abort"), "ended by 'abort'"),
        ("sglang", answers("sglang", [72], "stop", [-1.0]) | {"output_ids": [72, 3]}, "1 logprobs for 2 tokens"),
        ("vllm", {"choices": []}, "ValueError: not enough values"),
        ("vllm", {"choices": [{"text": "a", "finish_reason": "stop"}]}, "KeyError: 'token_ids'"),
        ("vllm", answers("vllm", [72, 73], "stop", [-1.0, None]), "1 logprobs for 2 tokens"),  # type: ignore[list-item]
        ("openai", {"choices": [{"message": {}, "finish_reason": "stop"}]}, "KeyError: 'content'"),
        ("openai", answers("openai", [72], "content_filter"), "ended by 'content_filter'"),
        ("openai", answers("openai", [72], "tool_calls"), "ended by 'tool_calls'"),
        ("openai", {"error": {"message": "overloaded"}}, "overloaded"),
        ("openai", answers("openai", [72, 0xD800], "stop"), "surrogates not allowed"),
        ("sglang", answers("sglang", [72], "stop") | {"text": "a\udfff"}, "surrogates not allowed"),
        ("vllm", answers("vllm", [72], "stop") | {"choices": [LONG]}, f"token id {2**70} is not below 2147483648"),
        ("sglang", answers("sglang", [72], "stop") | {"output_ids": [72, 2**31]}, "token id 2147483648 is not below"),
    ],
)
def test_answers_without_what_is_needed_are_malformed(kind: Kind, answer: dict[str, Any], words: str) -> None:
    failure = parse_completion(kind, answer)
    assert isinstance(failure, RequestFailure)
    assert failure.reason == "malformed"
    assert words in failure.detail


@pytest.mark.parametrize("kind", ORDERS)
def test_generate_over_http(kind: Kind) -> None:
    """A server that answers with the prompt, its letters one later, cut at the token limit."""

    def echo(payload: dict[str, Any]) -> Reply:
        limits = payload.get("sampling_params", payload)
        ids = payload.get("input_ids") or payload.get("prompt") or encode(payload["messages"])
        ids = [*(token + 1 for token in ids), EOS][: limits.get("max_new_tokens", limits.get("max_tokens"))]
        if ids[0] == ord("?") + 1:
            return 400, {"message": "no questions"}
        return 200, answers(kind, ids, "stop" if ids[-1] == EOS else "length", [-0.5] * len(ids))

    prompts = ["abc", "?", "HAL", "a"]
    with LocalServer(echo) as server, generator(kind, ServersConfig((server.url,), concurrency=2)) as subject:
        found = dict(subject.generate(GenerationRequest(prompt, [], i, 3) for i, prompt in enumerate(prompts)))
    assert sorted(found) == [0, 1, 2, 3]
    refused = found.pop(1)
    assert isinstance(refused, RequestFailure)
    assert "no questions" in refused.detail
    complete = {i: completion for i, completion in found.items() if isinstance(completion, ServerCompletion)}
    assert {i: (c.text, c.terminated) for i, c in complete.items()} == {
        0: ("bcd", False), 2: ("IBM", False), 3: ("b", True),
    }  # fmt: skip
    assert complete[3].token_ids == (None if kind == "openai" else [98, EOS])


def test_the_largest_token_id_and_whole_surrogate_pairs_are_read() -> None:
    answer = answers("sglang", [72], "stop") | {"text": "\U0001f600", "output_ids": [2**31 - 1]}
    assert parse_completion("sglang", answer) == ServerCompletion("\U0001f600", [2**31 - 1], True, None)


WRONG: dict[Kind, list[dict[str, Any]]] = {
    "sglang": [answers("sglang", [72], "abort"), {"text": "a"}, answers("sglang", [0xD800], "stop")],
    "vllm": [answers("vllm", [72], "error"), {"choices": []}, {"choices": [LONG]}],
    "openai": [{"error": "busy"}, {"choices": None}, answers("openai", [0xDC00], "stop")],
}


def one(server: LocalServer) -> ServersConfig:
    return ServersConfig((server.url,), retries=2, backoff_s=0.01)


@pytest.mark.parametrize(("kind", "wrong"), [(kind, answer) for kind, found in WRONG.items() for answer in found])
def test_an_answer_without_a_completion_is_tried_again_on_another_server(kind: Kind, wrong: dict[str, Any]) -> None:
    right = answers(kind, [72, 105, EOS], "stop")
    with LocalServer(lambda payload: (200, wrong)) as bad, LocalServer(lambda payload: (200, right)) as good:
        with generator(kind, ServersConfig((bad.url, good.url), concurrency=1, retries=1, backoff_s=0.01)) as subject:
            found = dict(subject.generate([REQUEST] * 4))
            stats = subject.pool.stats()
        assert sorted(found) == [0, 1, 2, 3]
        assert {getattr(answer, "text", answer) for answer in found.values()} == {"Hi"}
        assert stats[bad.url]["retried"] == len(bad.payloads) > 0
        assert stats[bad.url]["failed"] == 0


@pytest.mark.parametrize("kind", ORDERS)
def test_attempts_at_an_answer_are_bounded(kind: Kind) -> None:
    wrong = WRONG[kind][0]
    with LocalServer(lambda payload: (200, wrong)) as server, generator(kind, one(server)) as subject:
        ((_, failure),) = subject.generate([REQUEST])
        assert isinstance(failure, RequestFailure)
        assert (failure.reason, failure.final) == ("malformed", False)
        assert failure.detail.startswith(server.url)
        assert len(server.payloads) == 3


@pytest.mark.parametrize("content", ["H", "", None])
def test_a_content_filter_is_final_and_does_not_speak_against_the_server(content: str | None) -> None:
    message = {"role": "assistant", "content": content}
    filtered = {"choices": [{"index": 0, "message": message, "finish_reason": "content_filter"}]}
    with LocalServer(lambda payload: (200, filtered)) as server, generator("openai", one(server)) as subject:
        found = dict(subject.generate([REQUEST] * 5))
        assert subject.pool.stats()[server.url] == {"answered": 0, "retried": 0, "failed": 5, "alive": True}
    assert all(isinstance(f, RequestFailure) and f.final and "'content_filter'" in f.detail for f in found.values())


def test_text_is_decoded_here() -> None:
    """Servers differ in what they leave out of the text."""
    answer = answers("vllm", [72, 105, EOS], "stop")
    answer["choices"][0]["text"] = "Hi</s>"
    with LocalServer(lambda payload: (200, answer)) as server:
        with generator("vllm", ServersConfig((server.url,))) as subject:
            ((_, completion),) = subject.generate([REQUEST])
        assert completion == ServerCompletion("Hi", [72, 105, EOS], True, None)
        with generator("vllm", one(server), logprobs=True) as subject:
            ((_, completion),) = subject.generate([REQUEST])
        assert completion == RequestFailure("malformed", f"{server.url}: no logprobs came from a server of kind 'vllm'")


def test_a_refused_pipeline_stops_the_run() -> None:
    wrong = GenerationRequest("hi", [{"name": "eta", "params": {"epsilon": 1e-3}}], 0, 5)
    with LocalServer(lambda payload: (200, answers("vllm", [72], "length"))) as server:
        subject = generator("vllm", ServersConfig((server.url,)))
        with subject, pytest.raises(ConfigError, match="'eta'"):
            list(subject.generate([REQUEST, wrong]))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("openai", {"model": None}, "need the model's name"),
        ("openai", {"logprobs": True}, "logprobs come without token ids"),
        ("sglang", {"encode": None}, "give encode and decode"),
        ("vllm", {"decode": None}, "give encode and decode"),
    ],
)
def test_missing_settings_are_named(kind: Kind, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generator(kind, **options)


def test_other_bad_values_are_named() -> None:
    with pytest.raises(UnknownName, match=r"unknown kind of server 'vlm'. Did you mean 'vllm'"):
        sampling_params("vlm", [])  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="unknown kind of server 'tgi'"):
        ServerGenerator(URLS, "tgi")  # type: ignore[arg-type]
    with pytest.raises(UnknownName):
        parse_completion("tgi", {})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"extra sets \['seed'\]"):
        generator("openai", extra={"seed": 1}).payload(REQUEST)
    with pytest.raises(InvalidValue, match=r"seed must be in \[0, 2\^63\), got -1"):
        GenerationRequest("hi", [], -1, 5)
    with pytest.raises(InvalidValue, match="max_new_tokens must be >= 1, got 0"):
        GenerationRequest("hi", [], 0, 0)
