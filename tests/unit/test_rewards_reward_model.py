from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, tiny_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from asn_rl.errors import BackendError, InvalidValue, RewardError
from asn_rl.rewards.reward_model import Kind, reward_model, served_reward_model
from asn_rl.testing import check_reward

TEMPLATE = "{% for m in messages %}w2 {{ 'w3' if m['role'] == 'user' else 'w4' }} {{ m['content'] }} w5 {% endfor %}"
PROMPTS = ["w6 w7", "w8", "w9 w10 w11 w12 w13 w14", "w6 w7"]
COMPLETIONS = ["w20", "w21 w22 w23 w24 w25", "w26 w27", "w28 w29 w30"]


def llama_config(**settings: Any) -> LlamaConfig:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    return LlamaConfig(**{**sizes, **heads, **ids, "num_labels": 1, **settings})


def save(folder: Path, model: PreTrainedModel, template: str | None = TEMPLATE) -> str:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("classifier"), LlamaForSequenceClassification(llama_config()))


def by_hand(folder: str, texts: list[str]) -> list[float]:
    """Scores of texts that are rendered already, one at a time, straight through transformers."""
    model, tokenizer = LlamaForSequenceClassification.from_pretrained(folder).eval(), tiny_tokenizer()
    with torch.no_grad():
        return [float(model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, 0]) for text in texts]


def rendered(prompt: str, completion: str) -> str:
    return f"w2 w3 {prompt} w5 w2 w4 {completion} w5"


def test_scores_are_the_logit_of_the_templated_conversation(folder: str) -> None:
    expected = by_hand(folder, [rendered(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    assert reward_model(PROMPTS, COMPLETIONS, model=folder) == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in expected}) == 4


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_scores_do_not_depend_on_the_batch(folder: str, batch_size: int) -> None:
    together = reward_model(PROMPTS, COMPLETIONS, model=folder, batch_size=16)
    assert reward_model(PROMPTS, COMPLETIONS, model=folder, batch_size=batch_size) == pytest.approx(together, abs=1e-5)


def test_messages(folder: str) -> None:
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    completions = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    assert reward_model(prompts, completions, model=folder) == reward_model(PROMPTS, COMPLETIONS, model=folder)


def test_contract(folder: str) -> None:
    check_reward(bound(reward_model, model=folder), PROMPTS, COMPLETIONS, terminated=[True] * 4)


def bound(function: Callable[..., Any], **arguments: Any) -> Callable[..., Any]:
    def score(prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> list[float | None]:
        return function(prompts, completions, completion_ids, **arguments, **columns)

    return score


def test_truncation_keeps_the_end_and_is_counted(folder: str) -> None:
    long = " ".join(["w7"] * 100)
    counts = reward_model.__dict__["counts"]
    counts.clear()
    found = reward_model([long, "w8"], ["w20 w21", "w9"], model=folder, max_length=10)
    expected = by_hand(folder, ["w7 w7 w7 w7 w5 w2 w4 w20 w21 w5", rendered("w8", "w9")])
    assert found == pytest.approx(expected, abs=1e-5)
    assert counts["truncated"] == 1
    reward_model([long], ["w20"], model=folder)
    assert counts["truncated"] == 2  # the model itself reads 64 tokens


def test_truncation_keeps_the_beginning_of_sequence_token(tmp_path: Path) -> None:
    folder = save(tmp_path, LlamaForSequenceClassification(llama_config()), "<eos> " + TEMPLATE)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.bos_token = "<eos> " + TEMPLATE, "<eos>"
    tokenizer.save_pretrained(folder)
    found = reward_model(["w7 " * 30], ["w20"], model=folder, max_length=6)
    assert found == pytest.approx(by_hand(folder, ["<eos> w5 w2 w4 w20 w5"]), abs=1e-5)


def test_model_without_a_padding_token(tmp_path: Path) -> None:
    folder = save(tmp_path, LlamaForSequenceClassification(llama_config(pad_token_id=None)))
    expected = by_hand(folder, [rendered(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    assert reward_model(PROMPTS, COMPLETIONS, model=folder, batch_size=4) == pytest.approx(expected, abs=1e-5)


def test_encoder_reads_a_text_pair(tmp_path: Path) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest: dict[str, Any] = {"intermediate_size": 48, "max_position_embeddings": 16, "num_labels": 1, "pad_token_id": 1}
    config = BertConfig(**sizes, **rest)
    folder = save(tmp_path, BertForSequenceClassification(config), template=None)
    model, tokenizer = BertForSequenceClassification.from_pretrained(folder).eval(), tiny_tokenizer()
    expected = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        with torch.no_grad():
            expected.append(float(model(**tokenizer(prompt, completion, return_tensors="pt")).logits[0, 0]))
    assert reward_model(PROMPTS, COMPLETIONS, model=folder) == pytest.approx(expected, abs=1e-5)
    counts = reward_model.__dict__["counts"]
    counts.clear()
    assert reward_model(["w6 " * 40], ["w20 w21"], model=folder)[0] is not None
    assert counts["truncated"] == 1


def test_scores_that_are_not_finite_are_masked(tmp_path: Path) -> None:
    folder = save(tmp_path, LlamaForSequenceClassification(llama_config()))
    model = LlamaForSequenceClassification.from_pretrained(folder)
    model.model.embed_tokens.weight.data[20] = torch.inf
    model.save_pretrained(folder)
    counts = reward_model.__dict__["counts"]
    counts.clear()
    scores = reward_model(PROMPTS[:2], COMPLETIONS[:2], model=folder)
    assert scores[0] is None
    assert scores[1] is not None
    assert counts["not_finite"] == 1


@pytest.mark.parametrize("labels", [2, 3])
def test_several_labels_are_refused(tmp_path: Path, labels: int) -> None:
    folder = save(tmp_path, LlamaForSequenceClassification(llama_config(num_labels=labels)))
    with pytest.raises(RewardError, match=f"has {labels} labels"):
        reward_model(PROMPTS, COMPLETIONS, model=folder)


def test_language_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="num_labels 1"):
        reward_model(["w6"], ["w7"], model=save(tmp_path / "a", LlamaForCausalLM(llama_config(num_labels=2))))
    # One that claims a single label has no head either.
    with pytest.raises(RewardError, match=r"lacks trained weights of score\.weight"):
        reward_model(["w6"], ["w7"], model=save(tmp_path / "b", LlamaForCausalLM(llama_config())))


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="cannot load the reward model"):
        reward_model(["w6"], ["w7"], model=str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("options", "match"),
    [({"max_length": 0}, "max_length"), ({"batch_size": 0}, "batch_size"), ({"dtype": "int8"}, "dtype")],
)
def test_options_out_of_range(folder: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidValue, match=match):
        reward_model(["w6"], ["w7"], **{"model": folder, **options})


# Servers: the same classifier behind HTTP, in the two servers' formats


@contextmanager
def serving(answer: Callable[[dict[str, Any]], tuple[int, Any]]) -> Iterator[str]:
    """A server on this machine whose `/classify` answers with (status, JSON)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, {})

        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(*(answer(payload) if self.path == "/classify" else (404, {})))

        def reply(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sglang_format(score: Callable[[list[int]], float]) -> Callable[[dict[str, Any]], tuple[int, Any]]:
    return lambda payload: (200, {"embedding": [score(payload["input_ids"])], "meta_info": {"prompt_tokens": 1}})


def vllm_format(score: Callable[[list[int]], float]) -> Callable[[dict[str, Any]], tuple[int, Any]]:
    def answer(payload: dict[str, Any]) -> tuple[int, Any]:
        assert payload["use_activation"] is False
        found = {"index": 0, "label": "LABEL_0", "probs": [score(payload["input"])], "num_classes": 1}
        return 200, {"object": "list", "data": [found]}

    return answer


@pytest.mark.parametrize(("kind", "form"), [("sglang", sglang_format), ("vllm", vllm_format)])
def test_served_scores_equal_local_ones(folder: str, kind: str, form: Callable[..., Any]) -> None:
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    lock = threading.Lock()

    def score(ids: list[int]) -> float:
        with lock, torch.no_grad():
            return float(model(torch.tensor([ids])).logits[0, 0])

    with serving(form(score)) as first, serving(form(score)) as second:
        served = bound(served_reward_model, urls=[first, second], kind=kind, model=folder)
        scores = check_reward(served, PROMPTS, COMPLETIONS)
    assert scores == pytest.approx(reward_model(PROMPTS, COMPLETIONS, model=folder), abs=1e-4)


def test_failures_mask_their_own_completion_only(folder: str) -> None:
    def answer(payload: dict[str, Any]) -> tuple[int, Any]:
        ids = payload["input_ids"]
        if 20 in ids:
            return 400, {"error": "too long"}
        if 21 in ids:
            return 200, {"error": {"message": "no score"}}
        if 26 in ids:
            return 200, {"embedding": [float("nan")]}
        return 200, {"embedding": [1.5]}

    counts = served_reward_model.__dict__["counts"]
    counts.clear()
    with serving(answer) as url:
        scores = served_reward_model(PROMPTS, COMPLETIONS, urls=url, kind="sglang", model=folder, max_length=6)
    assert scores == [None, None, None, 1.5]
    assert {event: n for event, n in counts.items() if n} == {
        "failed/status": 1, "unreadable": 1, "not_finite": 1, "truncated": 4,
    }  # fmt: skip


BODIES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "sglang": lambda values: {"embedding": values},
    "vllm": lambda values: {"data": [{"probs": values}]},
}


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("values", [[0.1] * 768, [0.2, 0.8], []])
def test_a_server_with_another_kind_of_model_stops_the_run(folder: str, kind: Kind, values: list[float]) -> None:
    with serving(lambda payload: (200, BODIES[kind](values))) as url, pytest.raises(RewardError) as error:
        served_reward_model(["w6"], ["w7"], urls=url, kind=kind, model=folder)
    assert f"answered with {len(values)} values" in str(error.value)
    assert "one label" in str(error.value)
    assert {"sglang": "--is-embedding", "vllm": "--runner pooling"}[kind] in str(error.value)
    assert url not in str(error.value)


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("values", [[True], ["1e3"], [None], [[1.0]], [10**400], 1.5, "1", True, None, {"0": 1.0}])
def test_what_is_no_number_is_unreadable(folder: str, kind: Kind, values: Any) -> None:
    counts = served_reward_model.__dict__["counts"]
    counts.clear()
    with serving(lambda payload: (200, BODIES[kind](values))) as url:
        assert served_reward_model(["w6"], ["w7"], urls=url, kind=kind, model=folder) == [None]
    assert counts["unreadable"] == 1


@pytest.mark.parametrize("kind", BODIES)
def test_a_whole_number_is_a_score(folder: str, kind: Kind) -> None:
    with serving(lambda payload: (200, BODIES[kind]([-2]))) as url:
        assert served_reward_model(["w6"], ["w7"], urls=url, kind=kind, model=folder) == [-2.0]


def test_no_server_is_an_error(folder: str) -> None:
    with serving(sglang_format(len)) as url:
        pass
    with pytest.raises(BackendError, match="no inference server is healthy"):
        served_reward_model(["w6"], ["w7"], urls=url, kind="sglang", model=folder, retries=0)


def test_unknown_kind_and_tokenizer(folder: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="kind must be one of sglang, vllm"):
        served_reward_model(["w6"], ["w7"], urls="http://127.0.0.1:9", kind="tgi", model=folder)  # type: ignore[arg-type]
    with pytest.raises(RewardError, match="cannot load the tokenizer"):
        served_reward_model(
            ["w6"], ["w7"], urls="http://127.0.0.1:9", kind="vllm", model="m", tokenizer=str(tmp_path / "nothing")
        )
