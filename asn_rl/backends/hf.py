"""Any transformers causal language model, frozen.

Prompts of a batch share the computation of their common beginning (usually the system turn); the rest is prefilled
once per distinct prompt, in chunks of similar length, left-padded with explicit positions. Completions of a prompt are
computed together until they part. Only what is asked for acts on the distribution: the model's `generation_config` is
used for its end-of-sequence ids and nothing else.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from asn_rl.backends.batching import chunks_of_similar_length, scoring_chunks
from asn_rl.backends.embedded import resolve_model
from asn_rl.backends.fingerprint import fingerprint
from asn_rl.backends.hf_session import HFSession
from asn_rl.backends.kv_cache import has_recurrent_layers, is_row_cache, reorder, row_cache, row_layers
from asn_rl.backends.model_parts import CaptureHidden, final_norm, output_embedding
from asn_rl.backends.weight_layout import pack_weights
from asn_rl.errors import BackendError, InvalidValue
from asn_rl.protocols import Scored
from asn_rl.types import Messages

if TYPE_CHECKING:
    from asn_rl.backends import BackendConfig

_PREFILL_TOKENS = 2048  # padded positions a prefill chunk may hold
_MIN_SHARED_PREFIX = 8  # shorter common beginnings are not worth a pass of their own
_CONTEXTS = ("max_position_embeddings", "max_seq_len")  # what configurations call the longest sequence
_TURN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
Stamp = tuple[tuple[str, int, int], ...]
# Frozen weights that are in use: backends of one model that render prompts differently share them.
_models: WeakValueDictionary[tuple[str, Stamp, torch.dtype, torch.device], PreTrainedModel] = WeakValueDictionary()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class HFBackend:
    """A frozen transformers causal LM as a source of next-token distributions.

    Args:
        model: the language model; moved to evaluation mode, its parameters frozen.
        tokenizer: its tokenizer.
        chat_template: render prompts through the tokenizer's chat template.
        system_prompt: system turn for text prompts; None leaves the template's default.
        examples: (user, assistant) turns before text prompts.
    """

    # Matrix products round differently for different batch shapes.
    batch_invariant = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: bool = True,
        system_prompt: str | None = None,
        examples: Sequence[tuple[str, str]] = (),
    ) -> None:
        if chat_template and not tokenizer.chat_template:
            raise BackendError(
                f"the tokenizer of {model.name_or_path!r} has no chat template; set backend.chat_template=false "
                "to use prompts as raw text"
            )
        if not chat_template and (system_prompt is not None or examples):
            raise BackendError("backend.system_prompt and backend.examples need backend.chat_template=true")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.opening: Messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        for user, assistant in examples:
            self.opening += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        config = model.config.get_text_config()
        self.vocab_size: int
        self.hidden_size: int  # of what the output embedding reads; some models project before it
        self.vocab_size, self.hidden_size = output_embedding(model).weight.shape  # type: ignore[misc]
        self.max_context: int = next((n for name in _CONTEXTS if (n := getattr(config, name, None))), 1 << 20)
        self.eos_token_ids = _eos_token_ids(model, tokenizer)
        self.device = torch.device(model.device)
        self.fingerprint = fingerprint(model.config, tokenizer)
        parameters = inspect.signature(model.forward).parameters
        # Models without it count positions by slot (ALiBi) or from the mask.
        self._takes_positions = "position_ids" in parameters
        caches = [name for name in ("past_key_values", "cache_params") if name in parameters]
        if not caches:
            raise BackendError(
                f"{type(model).__name__} takes no transformers cache (past_key_values or cache_params); use another "
                "base model"
            )
        self._cache_name = caches[0]
        self._prefix: tuple[tuple[int, ...], DynamicCache] | None = None
        if has_recurrent_layers(row_cache(model.config)):
            self._check_decoding()

    @classmethod
    def from_config(cls, config: BackendConfig) -> HFBackend:
        """Load the model and tokenizer a configuration names."""
        device = _checked_device(config.device)
        dtype = resolve_dtype(config.dtype, device)
        source = resolve_model(config.model)
        key = (str(source), _stamp(source), dtype, device)
        try:
            model = _models.get(key) or AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
            raise BackendError(
                f"cannot load the base model {config.model!r}{offline}: {error}. Give a folder or hub id of a causal "
                "language model, or the embedded name smollm2-135m-instruct"
            ) from error
        _models[key] = model.to(device)  # type: ignore[call-arg]
        pack_weights(model)
        return cls(
            model,
            tokenizer,
            chat_template=config.chat_template,
            system_prompt=config.system_prompt,
            examples=[(example.user, example.assistant) for example in config.examples],
        )

    def encode(self, content: str | Messages) -> list[int]:
        if not self.chat_template:
            if not isinstance(content, str):
                raise InvalidValue("prompt", content, "text when backend.chat_template is false")
            return list(self.tokenizer(content)["input_ids"])
        text = self.tokenizer.apply_chat_template(self._messages(content), tokenize=False, add_generation_prompt=True)
        # The template writes the special tokens itself; adding them again would double a BOS.
        return list(self.tokenizer(str(text), add_special_tokens=False)["input_ids"])

    def _messages(self, content: str | Messages) -> Messages:
        if not isinstance(content, str):
            return content
        return [*self.opening, {"role": "user", "content": content}]

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    @torch.inference_mode()
    def start(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        repeats: int = 1,
        hidden: bool = False,
        layers: Sequence[int] = (),
    ) -> HFSession:
        return HFSession(self, *self._prefill(prompt_ids, repeats, layers), hidden=hidden, layers=layers)

    @torch.no_grad()  # not inference mode: what is returned here may be trained on
    def score(
        self, prompt_ids: Sequence[int], completion_ids: Sequence[int], *, hidden: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        ids = torch.tensor([[*prompt_ids, *completion_ids]], device=self.device)
        with CaptureHidden(self.model) as captured:
            logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=len(completion_ids) + 1).logits
        states = captured.value[0, :-1, 0].float().clone() if hidden else None
        return logits[0, :-1].clone(), states

    def token_logprobs(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        *,
        batch_tokens: int = _PREFILL_TOKENS,
    ) -> list[Tensor]:
        """Log-probs of completions given their prompts: for each a (T,) tensor on the CPU, nats, fp32."""
        logprobs: list[Tensor] = [torch.empty(0)] * len(completion_ids)
        for scored in self.score_many(prompt_ids, completion_ids, batch_tokens=batch_tokens):
            logprobs[scored.index] = _gathered(scored.logits, completion_ids[scored.index]).cpu()
        return logprobs

    @torch.no_grad()
    def score_many(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        *,
        hidden: bool = False,
        layers: Sequence[int] = (),
        batch_tokens: int = _PREFILL_TOKENS,
    ) -> Iterator[Scored]:
        """What `score` gives one by one, to rounding (1e-4 in float32), of every completion that has tokens, in any
        order.

        Completions are taken in chunks, of equal prompts or of equal lengths, whichever computes less; a prompt is
        computed once a chunk (with every completion where layers are not plain full attention), and logits are held
        for one chunk.

        Args:
            prompt_ids, completion_ids: one entry a completion; at least one prompt token each.
            batch_tokens: padded positions of completions a chunk may hold; a longer completion is a chunk of its own.
        """
        whole = not is_row_cache(row_cache(self.model.config))
        scored = self._scored_whole if whole else self._scored_behind_prompts
        shared = None if whole else len(self._shared_prefix(prompt_ids)) if prompt_ids else 0
        for chunk in scoring_chunks(prompt_ids, completion_ids, batch_tokens, shared):
            parts = scored([prompt_ids[i] for i in chunk], [completion_ids[i] for i in chunk], layers)
            for i, (logits, states) in zip(chunk, parts, strict=True):
                own = states[:, 0].float() if hidden else None
                yield Scored(i, logits, own, self.layer_logits(states[:, 1:]) if layers else None)

    def layer_logits(self, states: Tensor) -> Tensor:
        """(B, L, V) what the model's final norm and output embedding make of states (B, L, D) of earlier layers."""
        return output_embedding(self.model)(final_norm(self.model)(states))

    def _scored_behind_prompts(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], layers: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the prompts, one over the completions behind them, padded on the right."""
        cache, mask, first, first_hidden, owner = self._prefill(prompts, 1, layers)
        reorder(cache, owner)
        mask, first, first_hidden = mask[owner], first[owner], first_hidden[owner]
        ids, real = self._padded_right([row[:-1] for row in completions])
        width = ids.shape[1]
        rest, rest_hidden = first[:, None][:, :0], first_hidden[:, None][:, :0]
        if width:
            positions = mask.sum(-1, keepdim=True) + torch.arange(width, device=self.device)
            rest, rest_hidden = self._outputs(ids, torch.cat([mask, real], 1), positions, cache, width, layers)
        for i, row in enumerate(completions):
            later = slice(0, len(row) - 1)
            yield (
                torch.cat([first[i : i + 1], rest[i, later]]),
                torch.cat([first_hidden[i : i + 1], rest_hidden[i, later]]),
            )

    def _scored_whole(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], layers: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over whole sequences without a cache: not every layer continues one by several tokens."""
        sequences = [[*prompt, *row] for prompt, row in zip(prompts, completions, strict=True)]
        ids, real = self._padded_right(sequences)
        skipped = min(map(len, prompts)) - 1
        with CaptureHidden(self.model, layers) as captured:
            logits = self.model(
                input_ids=ids, attention_mask=real, use_cache=False, logits_to_keep=ids.shape[1] - skipped
            ).logits
        for i, (prompt, row) in enumerate(zip(prompts, completions, strict=True)):
            begin = len(prompt) - 1 - skipped
            yield logits[i, begin : begin + len(row)], captured.value[i, begin : begin + len(row)]

    def _padded_right(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids (B, T) and attention mask: causal models do not look at what comes later."""
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], dtype=torch.long, device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        return ids, (torch.arange(width, device=self.device) < lengths[:, None]).long()

    def forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache, layers: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, V) and hidden states (B, 1 + L, D), the last one first, at the last column of `ids`."""
        logits, hidden = self._outputs(ids, mask, positions, cache, 1, layers)
        return logits[:, -1], hidden[:, -1]

    def _outputs(
        self,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: DynamicCache,
        keep: int,
        layers: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, keep, V) and hidden states (B, keep, 1 + L, D) at the last columns of `ids`, which extend the
        cache."""
        explicit: dict[str, Any] = {self._cache_name: cache}
        if self._takes_positions:
            explicit["position_ids"] = positions
        with CaptureHidden(self.model, layers) as captured:
            output = self.model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=keep, **explicit)
        return output.logits, captured.value

    def _check_decoding(self) -> None:
        """Refuse a model that decodes a padded batch differently from one sequence: some recurrent ones do."""
        ids = [(17 * i + 3) % self.vocab_size for i in range(12)]
        rows = [ids[:2], ids[:6]]
        session = self.start(rows)
        for token in ids[6:]:
            session.step(torch.full((2,), token, device=self.device))
            rows = [[*row, token] for row in rows]
            for row, batched in zip(rows, session.logits.float(), strict=True):
                alone = self.score(row, row[:1])[0][0].float()
                # Rounding in bf16 gives about 0.01 here, a lost state 0.3.
                if not (batched - alone).norm() < 0.2 * (alone - alone.mean()).norm():
                    raise BackendError(
                        f"{type(self.model).__name__} decodes a left-padded batch with a cache differently from single "
                        "sequences in this version of transformers; use another base model"
                    )

    def _prefill(
        self, prompt_ids: Sequence[Sequence[int]], repeats: int, layers: Sequence[int]
    ) -> tuple[DynamicCache, Tensor, Tensor, Tensor, Tensor]:
        """Cache, attention mask (S, slots), logits (S, V) and hidden states (S, 1 + L, D) of every distinct prompt, and
        (B,) which of them a row repeats."""
        distinct = {tuple(ids): None for ids in prompt_ids}
        index = {ids: i for i, ids in enumerate(distinct)}
        owner = torch.tensor([index[tuple(ids)] for ids in prompt_ids], device=self.device).repeat_interleave(repeats)
        cache = row_cache(self.model.config)
        if not is_row_cache(cache):
            mask, logits, hidden = self._prefill_chunk(list(distinct), max(map(len, distinct)), 0, cache, layers)
            return cache, mask, logits, hidden, owner

        prefix = self._shared_prefix(list(distinct))
        rests = [ids[len(prefix) :] for ids in distinct]
        shape = (len(rests), len(prefix) + max(map(len, rests)))
        mask = torch.zeros(shape, dtype=torch.long, device=self.device)
        mask[:, : len(prefix)] = 1
        if prefix:
            everyone = torch.arange(len(rests), device=self.device)
            _copy_into(cache, self._prefix_cache(prefix), everyone, slice(0, len(prefix)), shape)
        outputs: list[tuple[Tensor, Tensor]] = [(mask, mask)] * len(rests)
        for chunk in chunks_of_similar_length(list(map(len, rests)), _PREFILL_TOKENS):
            width = len(rests[chunk[-1]])
            part = self._expanded(prefix, len(chunk)) if prefix else row_cache(self.model.config)
            part_mask, logits, hidden = self._prefill_chunk([rests[i] for i in chunk], width, len(prefix), part, layers)
            rows, columns = torch.tensor(chunk, device=self.device), slice(shape[1] - width, shape[1])
            _copy_into(cache, part, rows, columns, shape, start=len(prefix))
            mask[rows, columns] = part_mask[:, len(prefix) :]
            for i, output in zip(chunk, zip(logits, hidden, strict=True), strict=True):
                outputs[i] = output
        logits, hidden = (torch.stack(column) for column in zip(*outputs, strict=True))
        return cache, mask, logits, hidden, owner

    def _prefill_chunk(
        self,
        rests: Sequence[Sequence[int]],
        width: int,
        offset: int,
        cache: DynamicCache,
        layers: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One left-padded pass. The cache already holds `offset` shared positions."""
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rests], device=self.device)
        lengths = torch.tensor([len(r) for r in rests], device=self.device)
        real = torch.arange(width, device=self.device) >= (width - lengths)[:, None]
        mask = torch.cat([torch.ones(len(rests), offset, dtype=torch.bool, device=self.device), real], 1).long()
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, offset:]
        logits, hidden = self.forward(ids, mask, positions, cache, layers)
        return mask, logits, hidden

    def _shared_prefix(self, prompt_ids: Sequence[Sequence[int]]) -> tuple[int, ...]:
        # A shared beginning leaves a gap before shorter prompts, which only explicit positions bridge.
        if len(prompt_ids) == 1 or not self._takes_positions:
            return ()
        low, high = min(map(tuple, prompt_ids)), max(map(tuple, prompt_ids))  # what these share, all share
        common = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
        common = min(common, min(map(len, prompt_ids)) - 1)  # every prompt keeps a token of its own
        return low[:common] if common >= _MIN_SHARED_PREFIX else ()

    def _prefix_cache(self, prefix: tuple[int, ...]) -> DynamicCache:
        if self._prefix is None or self._prefix[0] != prefix:
            cache = row_cache(self.model.config)
            self._prefill_chunk([prefix], len(prefix), 0, cache)
            self._prefix = (prefix, cache)
        return self._prefix[1]

    def _expanded(self, prefix: tuple[int, ...], rows: int) -> DynamicCache:
        """A cache whose rows all begin with `prefix`."""
        cache, length = row_cache(self.model.config), len(prefix)
        everyone = torch.arange(rows, device=self.device)
        _copy_into(cache, self._prefix_cache(prefix), everyone, slice(0, length), (rows, length))
        return cache


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies bf16 matrices natively, else float32.

    On a CPU without AMX or AVX512-BF16 a bf16 decoding step of SmolLM2-135M takes three times as long as fp32.
    """
    if name not in ("auto", *DTYPES):
        raise InvalidValue("dtype", name, f"auto, {', '.join(DTYPES)}")
    if name != "auto":
        return DTYPES[name]
    if device.type != "cpu":
        return torch.bfloat16
    features = torch.cpu.get_capabilities()
    native = features.get("amx_bf16") or features.get("avx512_bf16") or features.get("bf16")
    return torch.bfloat16 if native else torch.float32


def _stamp(source: str | os.PathLike[str]) -> Stamp:
    """Names, times and sizes of a folder's files: weights that changed on disk are loaded again."""
    if not os.path.isdir(source):
        return ()
    return tuple(sorted((entry.name, (s := entry.stat()).st_mtime_ns, s.st_size) for entry in os.scandir(source)))


def _checked_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BackendError(
            f"backend.device {name!r} cannot be used here: {error}. Use cpu, or install a torch for it"
        ) from error
    return device


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """End-of-sequence ids of model and tokenizer, and the turn markers that chat models emit in their place."""
    declared = model.generation_config.eos_token_id if model.generation_config else None
    candidates = declared if isinstance(declared, list) else [declared]
    vocabulary = tokenizer.get_vocab()
    turn_ends = [vocabulary[token] for token in _TURN_ENDS if token in vocabulary]
    ids = {token for token in (*candidates, tokenizer.eos_token_id, *turn_ends) if isinstance(token, int)}
    if not ids:
        raise BackendError(f"{model.name_or_path!r} declares no end-of-sequence token; set one in its tokenizer")
    return frozenset(ids)


def _gathered(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """(T,) log-probs of tokens under logits (T, V)."""
    logits = logits.float()
    index = torch.tensor(list(tokens), dtype=torch.long, device=logits.device)
    return logits.gather(-1, index.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def _copy_into(
    cache: DynamicCache, part: DynamicCache, rows: Tensor, columns: slice, shape: tuple[int, int], *, start: int = 0
) -> None:
    """Copy slots `start` onwards of `part`, whose rows are as many as `rows` or one for all, into `rows` and `columns`
    of a cache of `shape`."""
    for target, layer in zip(row_layers(cache), row_layers(part), strict=True):
        target.fill(*layer.entries(start), rows, columns, shape)
