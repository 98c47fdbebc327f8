"""Scalar reward models: any transformers sequence classifier with one label, in this process or behind a server.

A model reads prompt and completion as it was trained to: rendered once through its own chat template, as the user's
and the assistant's turns; without a template as a text pair. Token ids go to servers, not text, so that no template or
special token is added a second time there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from asn_rl.errors import AsnError, InvalidValue, RewardError
from asn_rl.rewards.inputs import completion_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["sglang", "vllm"]


def reward_model(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Any = None,
    *,
    model: str,
    dtype: str = "auto",
    device: str = "cpu",
    max_length: int = 4096,
    batch_size: int = 16,
    **columns: Any,
) -> list[float | None]:
    """The one logit that a sequence classifier gives to prompt and completion.

    Raw scores, of the model's own scale: normalise them in the reward's configuration. Of a longer conversation the
    last `max_length` tokens are read (and the first, where it is a beginning-of-sequence token), so that the completion
    stays whole; text pairs lose the end of the longer one. `reward_model.counts` has how many were `truncated`, and
    `not_finite` scores, which are None.

    Args:
        model: folder or hub id of a model that `AutoModelForSequenceClassification` reads, with one label.
        dtype: auto (bfloat16 where the hardware multiplies it natively), float32, bfloat16 or float16.
        device: torch device.
        max_length: tokens read at most; the model's own limit where that is smaller.
        batch_size: conversations scored at a time; memory and speed. Scores do not depend on it, up to rounding. A
            model whose configuration names no padding token is given one at a time.

    Raises:
        RewardError: no such model, one of another kind (several labels, or a head without trained weights).
        InvalidValue: an argument out of range.
    """
    _check_sizes(max_length, batch_size)
    classifier, tokenizer = _classifier(model, dtype, device)
    limit = min(max_length, _context(classifier.config), tokenizer.model_max_length)
    rows = [
        conversation(tokenizer, prompt, completion, limit, COUNTS)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    if classifier.config.get_text_config().pad_token_id is None:
        batch_size = 1
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))  # similar lengths: less padding
    scores: list[float | None] = [None] * len(rows)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        for i, value in zip(part, _logits(classifier, [rows[i] for i in part]).tolist(), strict=True):
            scores[i] = _finite(value, COUNTS)
    return scores


def served_reward_model(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Any = None,
    *,
    urls: Sequence[str] | str,
    kind: Kind,
    model: str,
    tokenizer: str | None = None,
    max_length: int = 4096,
    concurrency: int = 8,
    timeout_s: float = 60.0,
    retries: int = 2,
    **columns: Any,
) -> list[float | None]:
    """As `reward_model`, scored by SGLang or vLLM servers; one request a completion.

    SGLang: `sglang serve --model-path M --is-embedding`, asked at `/classify`. vLLM: `vllm serve M --runner pooling`,
    asked at `/classify` without an activation: versions that do not know `use_activation` answer with the sigmoid.

    None where a request failed after its retries or the answer held no score: masked, never a number in its place.
    `served_reward_model.counts` has `failed` by reason, `unreadable` answers, `not_finite` scores and `truncated`.

    Args:
        urls: one server or several, for example http://localhost:30000.
        kind: sglang or vllm.
        model: the name under which the servers know the model.
        tokenizer: folder or hub id of its tokenizer; None: that of `model`.
        max_length: tokens sent at most, the last ones; not more than the servers' context.
        concurrency: requests in flight.
        timeout_s: seconds a request may take.
        retries: further attempts of a request.

    Raises:
        RewardError: no such tokenizer, or a server whose model gives several numbers: an embedding, several labels.
        BackendError: no server is healthy at the start.
        ConfigError: the package httpx is missing.
        InvalidValue: an unknown kind of server, or an argument out of range.
    """
    from asn_rl.backends.servers import ServersConfig, shared_pool

    if kind not in _REQUESTS:
        raise InvalidValue("kind", kind, f"one of {', '.join(_REQUESTS)}")
    _check_sizes(max_length, 1)
    addresses = (urls,) if isinstance(urls, str) else tuple(urls)
    pool = shared_pool(ServersConfig(addresses, concurrency, timeout_s, retries))
    reader = _tokenizer(tokenizer or model)
    rows = [
        conversation(reader, prompt, completion, max_length, SERVED_COUNTS)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    payloads = [{"model": model, **_REQUESTS[kind](row["input_ids"])} for row in rows]
    scores: list[float | None] = [None] * len(rows)
    for i, answer in pool.post("/classify", payloads, dict):
        if isinstance(answer, dict):
            scores[i] = _served_score(kind, answer)
        else:
            SERVED_COUNTS[f"failed/{answer.reason}"] += 1
    return scores


def conversation(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any, limit: int, counts: Counter[str]
) -> dict[str, list[int]]:
    """`input_ids` (and `token_type_ids` of models that have them) of a finished conversation, `limit` at most."""
    text = completion_text(completion)
    if not tokenizer.chat_template:
        pair = (completion_text(prompt), text)
        whole = tokenizer(*pair)
        counts["truncated"] += len(whole["input_ids"]) > limit
        if len(whole["input_ids"]) > limit:
            whole = tokenizer(*pair, truncation="longest_first", max_length=limit)
        return {name: list(whole[name]) for name in ("input_ids", "token_type_ids") if name in whole}
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    rendered = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": text}], tokenize=False)
    # The template writes the special tokens itself; adding them again would double a BOS.
    ids = list(tokenizer(str(rendered), add_special_tokens=False)["input_ids"])
    counts["truncated"] += len(ids) > limit
    if len(ids) <= limit:
        return {"input_ids": ids}
    first = ids[:1] if ids[0] == tokenizer.bos_token_id else []  # models lean on it more than on any other
    return {"input_ids": first + ids[len(ids) - limit + len(first) :]}


def _check_sizes(max_length: int, batch_size: int) -> None:
    if max_length < 1:
        raise InvalidValue("max_length", max_length, ">= 1")
    if batch_size < 1:
        raise InvalidValue("batch_size", batch_size, ">= 1")


def _context(config: Any) -> int:
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20


def _logits(classifier: PreTrainedModel, rows: Sequence[dict[str, list[int]]]) -> Tensor:
    """(B,) scores of one batch, padded on the right: the mask hides it from encoders, causality from decoders."""
    import torch

    padding = {"input_ids": classifier.config.get_text_config().pad_token_id, "token_type_ids": 0, "attention_mask": 0}
    width = max(len(row["input_ids"]) for row in rows)
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    batch = {
        # Nothing is padded, and so no padding token needed, where a row is alone.
        name: torch.tensor([row[name] + [padding[name]] * (width - len(row[name])) for row in rows])
        for name in rows[0]
    }
    with torch.inference_mode():
        output = classifier(**{name: tensor.to(classifier.device) for name, tensor in batch.items()})
    return output.logits[:, 0].float()


def _finite(value: float, counts: Counter[str]) -> float | None:
    counts["not_finite"] += not math.isfinite(value)
    return value if math.isfinite(value) else None


@cache
def _classifier(name: str, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen classifier and its tokenizer, once a process.

    Raises:
        RewardError: it cannot be loaded, or is none with one trained label.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from asn_rl.backends.hf import resolve_dtype

    try:
        config = AutoConfig.from_pretrained(name)
        if config.num_labels != 1:
            raise RewardError(
                f"{name!r} has {config.num_labels} labels ({', '.join(config.architectures or ['unknown kind'])}); a "
                "reward model is a sequence classifier with num_labels 1. Use pairwise_judge for a language model"
            )
        tokenizer = _tokenizer(name)
        place = torch.device(device)
        loaded = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=resolve_dtype(dtype, place), output_loading_info=True
        )
        classifier, report = loaded
        classifier.to(place)
    except AsnError:
        raise
    except Exception as error:  # transformers, safetensors and torch raise of every kind here
        raise RewardError(
            f"cannot load the reward model {name!r}: {error}. Give a folder or hub id of a model for "
            "AutoModelForSequenceClassification, with its tokenizer"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise RewardError(
            f"{name!r} lacks trained weights of {', '.join(missing[:3])}: it is not a trained reward model and its "
            "scores would be random"
        )
    return classifier.eval().requires_grad_(False), tokenizer


@cache
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers and tokenizers raise of every kind here
        raise RewardError(
            f"cannot load the tokenizer of the reward model {name!r}: {error}. Give a folder or hub id that holds it"
        ) from error


_REQUESTS = {
    "sglang": lambda ids: {"input_ids": ids},
    "vllm": lambda ids: {"input": ids, "use_activation": False},
}
_PATHS: dict[str, tuple[str | int, ...]] = {"sglang": ("embedding",), "vllm": ("data", 0, "probs")}
"""where an answer holds the list of the one score"""
_START: dict[str, str] = {
    "sglang": "sglang serve --is-embedding",
    "vllm": "vllm serve --runner pooling --convert classify",
}


def _served_score(kind: Kind, answer: Any) -> float | None:
    """The one number of an answer; None, and counted, where it cannot be read.

    Raises:
        RewardError: a list of no or several numbers. Every other answer of that server is one, too.
    """
    found = answer
    try:
        for key in _PATHS[kind]:
            found = found[key]
        if isinstance(found, list) and len(found) != 1:
            raise RewardError(
                f"a server of kind {kind!r} answered with {len(found)} values for one completion; a reward model is a "
                f"sequence classifier with one label and gives one. Check which model it serves: {_START[kind]}, with "
                "a model of num_labels 1, not an embedding model or one of several labels"
            )
        value = found[0] if isinstance(found, list) else None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError
        score = float(value)
    except (LookupError, TypeError, ValueError, OverflowError):
        SERVED_COUNTS["unreadable"] += 1
        return None
    return _finite(score, SERVED_COUNTS)


COUNTS: Counter[str] = Counter()
SERVED_COUNTS: Counter[str] = Counter()
reward_model.__dict__["counts"] = COUNTS
served_reward_model.__dict__["counts"] = SERVED_COUNTS
