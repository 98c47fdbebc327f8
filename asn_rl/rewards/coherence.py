"""How likely and how repetitive a completion is: cheap signs of coherence, on any prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from asn_rl.errors import InvalidValue
from asn_rl.ops import ngrams
from asn_rl.rewards.inputs import completion_text

if TYPE_CHECKING:
    from asn_rl.backends.hf import HFBackend


def log_likelihood(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    model: str = "smollm2-135m-instruct",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "cpu",
    chat_template: bool = True,
    system_prompt: str | None = None,
    examples: Sequence[Mapping[str, str]] = (),
    batch_tokens: int = 2048,
    **columns: Any,
) -> list[float | None]:
    """Mean log-prob of a completion's tokens given the prompt under `model`, nats a token: at most 0, higher is more
    likely.

    The prompt is encoded as the rollout's backend does with the same options. Where `model` decodes the completion's
    own ids to exactly its text, they were sampled with its tokenizer and are scored as they are; elsewhere (another
    model's ids, or none) the text is encoded by `model`. End-of-sequence ids are left out, so that completions that
    ended and those that the token limit cut off compare.

    None for a completion without tokens, and where prompt and completion exceed the model's context.
    `log_likelihood.counts` has how often: `empty`, `too_long`; and `reencoded`, completions whose text was encoded.

    Args:
        model, dtype, device, chat_template, system_prompt, examples: as in `asn_rl.backends.BackendConfig`; loaded
            once a process.
        batch_tokens: padded positions computed at a time; times the vocabulary, that is the memory for logits.

    Raises:
        BackendError: the model cannot be loaded.
        InvalidValue: `batch_tokens` below 1.
    """
    from asn_rl.backends import BackendConfig, Example, shared_backend

    if batch_tokens < 1:
        raise InvalidValue("batch_tokens", batch_tokens, ">= 1")
    turns = tuple(Example(**turn) for turn in examples)
    backend = shared_backend(BackendConfig("hf", model, dtype, device, chat_template, system_prompt, turns))
    return mean_logprobs(backend, prompts, completions, completion_ids, batch_tokens)  # type: ignore[arg-type]


def repetition_rate(
    prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, *, n: int = 3, **columns: Any
) -> list[float | None]:
    """Share of a completion's n-grams that occurred before in it, in [0, 1): higher repeats more, so give it a negative
    weight. It is 1 - distinct-n (Li et al. 2016) of the completion, over whitespace words in lower case.

    0 for a completion of fewer than `n` words: masked, it would come after those that can repeat themselves.

    Raises:
        InvalidValue: `n` below 1.
    """
    return [ngrams.repetition_rate(completion_text(text).lower().split(), n) for text in completions]


def mean_logprobs(
    backend: HFBackend,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None,
    batch_tokens: int,
) -> list[float | None]:
    """`log_likelihood` under a given backend."""
    encoded: dict[str, list[int]] = {}
    for prompt in prompts:
        if repr(prompt) not in encoded:
            encoded[repr(prompt)] = backend.encode(prompt)
    prompt_ids = [encoded[repr(prompt)] for prompt in prompts]
    texts = [completion_text(completion) for completion in completions]
    given = [None] * len(texts) if completion_ids is None else completion_ids
    tokens = [_tokens(backend, text, ids) for text, ids in zip(texts, given, strict=True)]
    fits = [_fits(backend, prompt, row) for prompt, row in zip(prompt_ids, tokens, strict=True)]
    keys = [(tuple(prompt), tuple(row)) for prompt, row in zip(prompt_ids, tokens, strict=True)]
    distinct = list(
        dict.fromkeys(key for key, fit in zip(keys, fits, strict=True) if fit)
    )  # cold sampling repeats itself
    logprobs = backend.token_logprobs([p for p, _ in distinct], [row for _, row in distinct], batch_tokens=batch_tokens)
    means = {key: float(row.double().mean()) for key, row in zip(distinct, logprobs, strict=True)}
    return [means.get(key) for key in keys]


def _tokens(backend: HFBackend, text: str, ids: Sequence[int] | None) -> list[int]:
    """A completion in the backend's token ids, without end-of-sequence ids."""
    if ids is not None and all(0 <= token < backend.vocab_size for token in ids) and backend.decode(ids) == text:
        return [token for token in ids if token not in backend.eos_token_ids]
    COUNTS["reencoded"] += 1
    return list(backend.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _fits(backend: HFBackend, prompt_ids: Sequence[int], tokens: Sequence[int]) -> bool:
    if not tokens or not prompt_ids:
        COUNTS["empty"] += 1
        return False
    if len(prompt_ids) + len(tokens) > backend.max_context:
        COUNTS["too_long"] += 1
        return False
    return True


COUNTS: Counter[str] = Counter()
log_likelihood.__dict__["counts"] = COUNTS
