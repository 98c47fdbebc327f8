"""Start SGLang with policies.

    python -m asn_rl.serving.sglang_server --model smollm2-135m-instruct --policies policies/ --port 30000
    curl localhost:30000/generate -H 'Content-Type: application/json' -d '{"text": "Hello", "sampling_params":
        {"max_new_tokens": 32, "custom_params": {"asn_policy": "math"}}}'

`policies/` holds policy folders; a request names one of them. A folder that is replaced (`save_policy`) is read again
when the next request begins. GET /health says whether the server lives, GET /asn_rl/status what became of requests and
policies. What follows `--` goes to SGLang: -- --tp-size 4 --api-key KEY.

Install asn_rl, and the package of the policies' classes, beside SGLang. requirements/sglang-cpu.txt is for a machine
without a GPU, where the server computes in plain torch (`asn_rl.serving._sglang_cpu`); set OMP_NUM_THREADS there.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from asn_rl.backends.embedded import resolve_model
from asn_rl.errors import AsnError, ConfigError
from asn_rl.serving import _sglang_cpu
from asn_rl.serving.launching import launcher_parser, parsed, serving_settings
from asn_rl.serving.settings import STATUS, STATUS_PATH
from asn_rl.serving.sglang import secure
from asn_rl.serving.status import read_status

_FLAGS = ("--enable-custom-logit-processor", "--disable-overlap-schedule")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options, passed_on = _options(arguments)
    try:
        command = prepare(options, passed_on)
    except AsnError as error:
        sys.exit(f"error: {error}")
    _prepare_process()
    from sglang.launch_server import run_server  # type: ignore[import-not-found]
    from sglang.srt.entrypoints.http_server import app  # type: ignore[import-not-found]
    from sglang.srt.plugins import load_plugins  # type: ignore[import-not-found]
    from sglang.srt.server_args import prepare_server_args  # type: ignore[import-not-found]
    from sglang.srt.utils import kill_process_tree  # type: ignore[import-not-found]

    app.add_api_route(STATUS_PATH, _status, methods=["GET"])
    load_plugins()
    try:
        run_server(prepare_server_args(command))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def prepare(options: argparse.Namespace, passed_on: Sequence[str]) -> list[str]:
    """Set the environment of the server's processes; SGLang's arguments.

    Raises:
        AsnError: the options make no sense together.
    """
    if any(argument.startswith("--speculative-algo") for argument in passed_on):
        raise ConfigError(
            "speculative decoding draws several tokens at a time, a policy one after the other; leave it out"
        )
    model = resolve_model(options.model)
    on_cpu = options.device == "cpu"
    if on_cpu:
        os.environ.update(_sglang_cpu.ENVIRONMENT)
        _sglang_cpu.install()  # reading the tokenizer asks for torchvision
    settings = serving_settings(options, model)
    os.environ.update(settings.environment())
    # A policy that changes just then may be old on one rank and new on another: they are to agree on the token.
    os.environ.setdefault("SYNC_TOKEN_IDS_ACROSS_TP", str(_is_parallel(passed_on)).lower())
    place = ["--model-path", model, "--host", options.host, "--port", str(options.port)]
    device = list(_sglang_cpu.FLAGS) if on_cpu else ["--device", options.device]
    return [*place, *device, *_FLAGS, *passed_on]


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = launcher_parser("asn_rl.serving.sglang_server", __doc__, port=30000, reports="a new temporary one")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help=f"where the base model runs (default here: {device})")
    return parsed(parser, arguments)


def _is_parallel(passed_on: Sequence[str]) -> bool:
    return any(argument.split("=")[0] in ("--tp", "--tp-size", "--tensor-parallel-size") for argument in passed_on)


async def _status() -> dict[str, Any]:
    return read_status(os.environ[STATUS])


def _prepare_process() -> None:
    """What every process of the server needs; the spawned ones come here by importing this module."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        _sglang_cpu.install()
    secure()


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":
    _prepare_process()
