"""Inference engines of environments of their own, started with policies by our launchers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from local_server import unused_port, wait_until

from asn_rl.backends.embedded import resolve_model

MODEL = "smollm2-135m-instruct"
ROOT = Path(__file__).resolve().parents[2]
START_S = 300
# The server prefills prompts in chunks and withdraws requests every few steps, as it does under load.
SGLANG = ("--dtype", "float32", "--chunked-prefill-size", "32", "--max-total-tokens", "20000", "--skip-server-warmup")
LOAD = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}


@dataclass(frozen=True)
class Running:
    """A server under way."""

    url: str
    policies: Path
    """folder of policies that it looks into"""
    process: subprocess.Popen[bytes]


@contextmanager
def vllm(python: str, folder: Path) -> Iterator[Running]:
    """vLLM likewise. It imports modules from `folder / "modules"` too."""
    policies, modules, port, log = folder / "policies", folder / "modules", unused_port(), folder / "log.txt"
    policies.mkdir()
    modules.mkdir()
    command = [python, "-m", "asn_rl.serving.vllm_server", "--model", MODEL]
    command += ["--policies", str(policies), "--status", str(folder / "status"), "--port", str(port)]
    command += ["--kv-cache-gb", "1", "--", "--dtype", "float32", "--max-model-len", "512"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "policies", modules)))}
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=out, cwd=folder, env=environment) as process,
    ):
        server = Running(f"http://127.0.0.1:{port}", policies, process)
        try:
            wait_until(lambda: _is_up(server, log), 2 * START_S)
            yield server
        finally:
            process.terminate()


@contextmanager
def sglang(python: str, folder: Path) -> Iterator[Running]:
    """SGLang on the embedded base model in float32, on the CPU, until the block ends."""
    policies, port, log = folder / "policies", unused_port(), folder / "log.txt"
    policies.mkdir()
    command = [python, "-m", "asn_rl.serving.sglang_server", "--model", resolve_model(MODEL)]
    command += ["--policies", str(policies), "--status", str(folder / "status"), "--port", str(port), "--", *SGLANG]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "policies")))
    environment = os.environ | LOAD | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        server = Running(f"http://127.0.0.1:{port}", policies, process)
        try:
            wait_until(lambda: _is_up(server, log), START_S)
            yield server
        finally:
            process.terminate()  # it ends its children


def _is_up(server: Running, log: Path) -> bool:
    assert server.process.poll() is None, log.read_text()[-4000:]
    try:
        return httpx.get(server.url + "/health", timeout=5).is_success
    except httpx.TransportError:
        return False
