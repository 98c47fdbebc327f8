"""Random causal language models of several architectures, small enough to run in milliseconds."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from asn_rl.backends.hf import HFBackend

VOCAB = 40
_IDS = {"vocab_size": VOCAB, "eos_token_id": 0, "pad_token_id": 1, "bos_token_id": 0}
_GPT = {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_LLAMA = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "learned positions": lambda: transformers.GPT2Config(**_GPT),
    "sliding window": lambda: transformers.MistralConfig(**_LLAMA, sliding_window=6),
    "alternating windows": lambda: transformers.Gemma3TextConfig(**_LLAMA, sliding_window=6, head_dim=8),
    "rotary": lambda: transformers.Qwen2Config(**_LLAMA),
    "linear biases by slot": lambda: transformers.MptConfig(**_IDS, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "linear biases by mask": lambda: transformers.BloomConfig(**_IDS, hidden_size=32, n_layer=2, n_head=4),
    "convolutions": lambda: transformers.Lfm2Config(**_LLAMA, layer_types=["conv", "full_attention"]),
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<eos>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def tiny_backend(config: PreTrainedConfig) -> HFBackend:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # position embeddings and biases start near zero
    return HFBackend(model, tiny_tokenizer(), chat_template=False)
