"""Which base model it is: what policies, candidates and servers are checked against."""

from __future__ import annotations

import hashlib
import json

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase


def base_model_fingerprint(model: str) -> str:
    """`LogitsBackend.fingerprint` of a model by folder or hub id; its weights are not read."""
    return fingerprint(AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model))


def fingerprint(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the architecture and the vocabulary, independent of dtype, device and library versions."""
    architecture = {
        key: value
        for key, value in config.to_dict().items()
        if key not in {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"}
    }
    text = json.dumps([architecture, sorted(tokenizer.get_vocab().items())], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
