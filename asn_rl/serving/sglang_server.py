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
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from asn_rl.backends.embedded import resolve_model
from asn_rl.backends.hf import base_model_fingerprint
from asn_rl.errors import AsnError, ConfigError
from asn_rl.serving import _sglang_cpu
from asn_rl.serving.settings import STATUS, STATUS_PATH, ServingSettings
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
    status = options.status or Path(tempfile.mkdtemp(prefix="asn_rl_status_"))
    _remove_reports(status)
    fingerprint = None if options.any_base_model else base_model_fingerprint(model)
    settings = ServingSettings(options.policies, status, fingerprint, options.tracked)
    os.environ.update(settings.environment())
    # A policy that changes just then may be old on one rank and new on another: they are to agree on the token.
    os.environ.setdefault("SYNC_TOKEN_IDS_ACROSS_TP", str(_is_parallel(passed_on)).lower())
    place = ["--model-path", model, "--host", options.host, "--port", str(options.port)]
    device = list(_sglang_cpu.FLAGS) if on_cpu else ["--device", options.device]
    return [*place, *device, *_FLAGS, *passed_on]


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(
        prog="python -m asn_rl.serving.sglang_server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--model", required=True, help="base model: short name, folder or hub id")
    parser.add_argument("--policies", required=True, type=Path, help="folder of policy folders")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=30000, help="default 30000")
    parser.add_argument("--status", type=Path, help="folder for reports (default: a new temporary one)")
    parser.add_argument("--any-base-model", action="store_true", help="serve policies of other base models too")
    parser.add_argument("--tracked", type=int, default=32, help="tracked tokens, as in training (default 32)")
    parser.add_argument("--device", default=device, help=f"where the base model runs (default here: {device})")
    return parser.parse_args(given[:cut]), given[cut + 1 :]


def _is_parallel(passed_on: Sequence[str]) -> bool:
    return any(argument.split("=")[0] in ("--tp", "--tp-size", "--tensor-parallel-size") for argument in passed_on)


def _remove_reports(folder: Path) -> None:
    """What an earlier server reported."""
    for path in folder.glob("status-*.json"):
        path.unlink()


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
