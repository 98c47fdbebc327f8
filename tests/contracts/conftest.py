"""Inference engines, started once a test run.

Skipped where the environment variable is not set: ASN_RL_SGLANG_PYTHON names the Python of an environment with SGLang
(requirements/sglang-cpu.txt), ASN_RL_VLLM_PYTHON that of one with vLLM (requirements/vllm-cpu.txt).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import engine_servers
import pytest
from engine_servers import Running


@pytest.fixture(scope="session")
def sglang_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with engine_servers.sglang(_python("ASN_RL_SGLANG_PYTHON"), tmp_path_factory.mktemp("sglang")) as server:
        yield server


@pytest.fixture(scope="session")
def vllm_python() -> str:
    return _python("ASN_RL_VLLM_PYTHON")


@pytest.fixture(scope="session")
def vllm_server(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with engine_servers.vllm(vllm_python, tmp_path_factory.mktemp("vllm")) as server:
        yield server


def _python(variable: str) -> str:
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} does not name the Python of an environment with the engine")
    return python
