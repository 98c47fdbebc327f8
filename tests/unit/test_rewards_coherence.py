from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CONFIGS, VOCAB, tiny_backend

from asn_rl import backends
from asn_rl.backends import BackendConfig, shared_backend
from asn_rl.backends.batching import scoring_chunks
from asn_rl.backends.hf import HFBackend
from asn_rl.errors import InvalidValue
from asn_rl.rewards.coherence import COUNTS, log_likelihood, mean_logprobs, repetition_rate
from asn_rl.testing import check_reward

# Differences of log-probs between batch shapes, float32, one thread.
ATOL = 1e-4


@pytest.fixture(autouse=True)
def fresh_counts() -> None:
    COUNTS.clear()


def one_by_one(
    backend: HFBackend, prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    scored = []
    for prompt, row in zip(prompts, rows, strict=True):
        logprobs = backend.score(prompt, row)[0].float().log_softmax(-1)
        scored.append(logprobs.gather(-1, torch.tensor(row).unsqueeze(-1)).squeeze(-1))
    return scored


def ragged(seed: int, prompt_lengths: Sequence[int], lengths: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Every prompt with every completion length, in a mixed order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(2, VOCAB, (n,), generator=generator).tolist()

    pairs = [(prompt, draw(n)) for prompt in map(draw, prompt_lengths) for n in lengths]
    order = torch.randperm(len(pairs), generator=generator).tolist()
    return [pairs[i][0] for i in order], [pairs[i][1] for i in order]


# Batched log-probs


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
@pytest.mark.parametrize("name", CONFIGS)
def test_batched_log_probs_equal_those_one_by_one(name: str, batch_tokens: int) -> None:
    backend = tiny_backend(CONFIGS[name]())
    prompts, rows = ragged(0, [1, 3, 9, 9, 14], [1, 2, 7])
    batched = backend.token_logprobs(prompts, rows, batch_tokens=batch_tokens)
    for ours, theirs in zip(batched, one_by_one(backend, prompts, rows), strict=True):
        torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)


@pytest.mark.parametrize(("batch_tokens", "prefills"), [(200, [(2, 10)]), (15, [(1, 10), (1, 10)])])
def test_a_chunk_bounds_the_positions_and_computes_a_prompt_once(
    monkeypatch: pytest.MonkeyPatch, batch_tokens: int, prefills: list[tuple[int, int]]
) -> None:
    backend = tiny_backend(CONFIGS["rotary"]())
    long, short = list(range(2, 12)), [5, 6]
    lengths = [1, 2, 4, 4, 1, 1]
    shapes: list[tuple[int, ...]] = []
    forward = backend.model.forward

    def watched(**arguments: Any) -> Any:
        shapes.append(tuple(arguments["input_ids"].shape))
        return forward(**arguments)

    monkeypatch.setattr(backend.model, "forward", watched)
    backend.token_logprobs(
        [long] * 6 + [short] * 3, [[7] * n for n in [*lengths, *lengths[:3]]], batch_tokens=batch_tokens
    )
    assert [shape for shape in shapes if shape[1] == 10] == prefills
    assert all(height * width <= 4 * batch_tokens for height, width in shapes)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), max_size=12),
    st.integers(1, 40),
    st.sampled_from([None, 0]),
)
def test_chunks_hold_each_completion_once_and_no_more_than_they_may(
    lengths: list[tuple[int, int]], batch_tokens: int, shared: int | None
) -> None:
    prompts, rows = [[1] * p for p, _ in lengths], [[2] * n for _, n in lengths]
    chunks = scoring_chunks(prompts, rows, batch_tokens, shared)
    assert sorted(i for chunk in chunks for i in chunk) == [i for i, row in enumerate(rows) if row]
    for chunk in chunks:
        prompt, width = (max(len(part[i]) for i in chunk) for part in (prompts, rows))
        beside = max(len(prompts[i]) for i in chunk) - min(len(prompts[i]) for i in chunk) if shared is None else 0
        assert len(chunk) == 1 or len(chunk) * (width + beside) <= batch_tokens
        assert len(chunk) == 1 or len(chunk) * (prompt + width) <= 4 * batch_tokens


@pytest.mark.parametrize(
    ("prompt", "shared", "expected"),
    [
        (2, 0, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (30, 0, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (30, 30, [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ],
)
def test_chunks_are_of_equal_prompts_or_of_equal_lengths(prompt: int, shared: int, expected: list[list[int]]) -> None:
    prompts = [[i] * prompt for i in range(4) for _ in range(2)]
    rows = [[2] * n for _ in range(4) for n in (3, 12)]
    assert scoring_chunks(prompts, rows, 48, shared) == expected


def test_nothing_to_score() -> None:
    backend = tiny_backend(CONFIGS["rotary"]())
    assert backend.token_logprobs([], []) == []
    assert [len(row) for row in backend.token_logprobs([[2], [3]], [[], [4]])] == [0, 1]


# The reward, on a tiny model


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> HFBackend:
    backend = tiny_backend(CONFIGS["rotary"]())
    monkeypatch.setattr(backends, "shared_backend", lambda *args, **kwargs: backend)
    return backend


def expected(backend: HFBackend, prompt: list[int], row: list[int]) -> float:
    return float(one_by_one(backend, [prompt], [row])[0].mean())


def test_scores_are_mean_log_probs_without_end_tokens(tiny: HFBackend) -> None:
    prompts, texts = ["w5 w6", "w5 w6", "w7"], ["w9 w8", "w9", "w3 w2 w4"]
    ids = [[9, 8, 0], [9], [3, 2, 4, 0]]
    scores = check_reward(log_likelihood, prompts, texts, completion_ids=ids, terminated=[True, False, True])
    encoded = [[5, 6], [5, 6], [7]]
    for score, prompt, row in zip(scores, encoded, ids, strict=True):
        assert score == pytest.approx(expected(tiny, prompt, [t for t in row if t]), abs=ATOL)
        assert score is not None
        assert score < 0
    assert not COUNTS


def test_text_is_encoded_where_the_ids_are_not_the_models(tiny: HFBackend) -> None:
    prompts, texts = ["w5 w6"] * 4, ["w9 w8"] * 4
    (kept, foreign, outside, none) = mean_logprobs(tiny, prompts, texts, [[9, 8], [9, 7], [9, 4000], [9, 8, 3]], 2048)
    assert kept == foreign == outside == none == pytest.approx(expected(tiny, [5, 6], [9, 8]), abs=ATOL)
    assert COUNTS["reencoded"] == 3
    assert mean_logprobs(tiny, prompts, texts, None, 2048) == [kept] * 4
    assert COUNTS["reencoded"] == 7


def test_message_lists(tiny: HFBackend) -> None:
    answers = [[{"role": "assistant", "content": "w9 w8"}]]
    assert mean_logprobs(tiny, ["w5"], answers, [[9, 8]], 2048) == mean_logprobs(tiny, ["w5"], ["w9 w8"], [[9, 8]], 64)


def test_what_cannot_be_scored_is_masked_and_counted(tiny: HFBackend) -> None:
    long = [2] * 63
    texts = ["", "", "w9", tiny.decode(long), tiny.decode(long[:-1])]
    ids: list[list[int]] = [[], [0], [9], long, long[:-1]]
    scores = mean_logprobs(tiny, ["w5 w6", "w5 w6", "", "w5 w6", "w5 w6"], texts, ids, 2048)
    assert [score is None for score in scores] == [True, True, True, True, False]
    assert COUNTS == {"empty": 3, "too_long": 1}


def test_batch_tokens_must_be_positive() -> None:
    with pytest.raises(InvalidValue, match="batch_tokens must be >= 1, got 0"):
        log_likelihood(["q"], ["a"], batch_tokens=0)


# On the embedded model


def test_the_embedded_model_prefers_sense(smollm: HFBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "shared_backend", lambda *args, **kwargs: smollm)
    prompts = ["What is the capital of France?"] * 4 + ["Name an animal."] * 3
    texts = [
        "The capital of France is Paris.",
        "The capital of France is banana.",
        "of The is Paris capital France.",
        "Paris",
        "A dog.",
        "The animal I'm referring to is the African elephant.",
        "The",
    ]
    ids = [smollm.tokenizer(text)["input_ids"] for text in texts]
    encoded = [smollm.encode(prompt) for prompt in prompts]
    batched = smollm.token_logprobs(encoded, ids, batch_tokens=100)
    for ours, theirs in zip(batched, one_by_one(smollm, encoded, ids), strict=True):
        torch.testing.assert_close(ours, theirs, atol=ATOL, rtol=0)
    scores = log_likelihood(prompts, texts, [[*row, min(smollm.eos_token_ids)] for row in ids])
    for score, row in zip(scores, batched, strict=True):
        assert score == pytest.approx(float(row.mean()), abs=ATOL)
    sense, wrong, shuffled = (score or 0.0 for score in scores[:3])
    assert sense > wrong > shuffled
    assert not COUNTS


def test_a_shared_backend_is_loaded_once(tmp_path: Path) -> None:
    tiny = tiny_backend(CONFIGS["rotary"]())
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    config = BackendConfig(model=str(tmp_path), dtype="float32", chat_template=False)
    first = shared_backend(config)
    assert shared_backend(replace(config)) is first
    other = shared_backend(replace(config, dtype="bfloat16"))
    assert isinstance(first, HFBackend)
    assert isinstance(other, HFBackend)
    assert other.model is not first.model
    raw = HFBackend.from_config(replace(config))
    assert raw is not first
    assert raw.model is first.model, "frozen weights are shared"
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert HFBackend.from_config(config).model is not first.model, "weights that changed on disk are loaded again"


# Repetition


@pytest.mark.parametrize(
    ("text", "n", "rate"),
    [
        ("a b c d", 1, 0.0),
        ("a a a a", 1, 0.75),
        ("A a", 1, 0.5),
        ("to be or not to be", 2, 0.2),
        ("a b a b a b", 3, 0.5),
        ("one two", 3, 0.0),
        ("", 1, 0.0),
    ],
)
def test_repetition_rate(text: str, n: int, rate: float) -> None:
    assert check_reward(repetition_rate, ["q"], [text], n=n) == [pytest.approx(rate)]


@given(st.lists(st.sampled_from("ab"), max_size=12), st.integers(1, 4))
def test_repetition_is_the_share_of_grams_seen_before(words: list[str], n: int) -> None:
    grams = [words[i : i + n] for i in range(len(words) - n + 1)]
    seen_before = sum(gram in grams[:i] for i, gram in enumerate(grams))
    (rate,) = repetition_rate(["q"], [" ".join(words)], n=n)
    assert rate == (pytest.approx(seen_before / len(grams)) if grams else 0.0)


def test_n_must_be_positive() -> None:
    with pytest.raises(InvalidValue, match="n must be >= 1 word, got 0"):
        repetition_rate(["q"], ["a"], n=0)
