"""Shared fixtures. One thread: torch's OpenMP threads spin, and on shared cores that slows a step fifty-fold.

Tests that are skipped, and why (a name here is the only way to skip):
* those that use `benchmark_data`, where neither ASN_RL_DATA nor a folder `shared/data` beside the checkout holds the
  benchmark files, whose licences do not all allow shipping them;
* those that use `sglang_server`, `vllm_server` or `vllm_python`, where ASN_RL_SGLANG_PYTHON or ASN_RL_VLLM_PYTHON
  does not name the Python of an environment with the engine (`tests/contracts/conftest.py`): 3 GB each;
* `tests/unit/test_serving_vllm.py`, where vLLM is not installed: `tests/contracts/test_vllm.py` runs it in vLLM's
  Python;
* those that use `compiler`, where there is no C compiler;
* those that use `triton_interpreter`, where Triton is not installed (it has no builds but for Linux).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from asn_rl.backends import BackendConfig, load_backend
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.toy import ToyBackend
from asn_rl.ops.vocabulary import fused, native


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A job sets the threads of its process; the next test starts with one again."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm() -> HFBackend:
    """The embedded SmolLM2-135M-Instruct in float32."""
    backend = load_backend(BackendConfig(dtype="float32"))
    assert isinstance(backend, HFBackend)
    return backend


@pytest.fixture(scope="session")
def smollm_logits(smollm: HFBackend) -> torch.Tensor:
    """(T, V) real next-token logits along two chat completions: confident and open positions."""
    rows = []
    for prompt, completion in (
        ("What is 3 + 4?", "3 + 4 is equal to 7."),
        ("Name an animal.", "The animal I'm referring to is the African elephant."),
    ):
        ids = smollm.tokenizer(completion, add_special_tokens=False)["input_ids"]
        rows.append(smollm.score(smollm.encode(prompt), ids)[0])
    return torch.cat(rows)


@pytest.fixture
def toy() -> ToyBackend:
    return ToyBackend.random(vocab=32, seed=0)


@pytest.fixture(scope="session")
def benchmark_data() -> Path:
    """The folder that holds the benchmarks' files."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ASN_RL_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"no benchmark files: ASN_RL_DATA is not set and there is no {beside}")
    return folder


@pytest.fixture(scope="session")
def compiler() -> None:
    """Something that compiles C."""
    if not native.available():
        pytest.skip("no C compiler: the passes over the vocabulary cannot be compiled")


@pytest.fixture(scope="session")
def triton_interpreter() -> None:
    """Triton, interpreting its kernels where there is no GPU."""
    if not fused.available(torch.device("cpu")):
        pytest.skip("Triton is not installed, or does not interpret")
