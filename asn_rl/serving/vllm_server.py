"""Start vLLM with policies.

    python -m asn_rl.serving.vllm_server --model smollm2-135m-instruct --policies policies/ --port 8000
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Hello", "temperature": 1,
        "max_tokens": 32, "vllm_xargs": {"asn_policy": "math"}}'

`policies/` holds policy folders; a request names one of them. A folder that is replaced (`save_policy`) is read again
when the next request begins. What follows `--` goes to vLLM: -- --max-model-len 2048 --tensor-parallel-size 8.
"""

from __future__ import annotations

import argparse
import ctypes.util
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from asn_rl.backends.embedded import resolve_model
from asn_rl.errors import AsnError, BackendError
from asn_rl.serving.host import policy_names
from asn_rl.serving.launching import launcher_parser, parsed, serving_settings
from asn_rl.serving.settings import STATUS_PATH, ServingSettings

PROCESSOR, MIDDLEWARE = "asn_rl.serving.vllm:PolicyLogitsProcessor", "asn_rl.serving.reports.PolicyReports"

_ON_CPUS = ("--enforce-eager", "--no-enable-chunked-prefill")
"""vLLM 0.32 on CPUs dies of a request with a seed whose prompt is read in chunks ("CPU Generator does not use
offset"), whoever sends it"""


def command(model: str, host: str, port: int, *, cpu: bool, extra: Sequence[str] = ()) -> list[str]:
    """The command that starts vLLM's API server with policies.

    Log-probs are those of the policy's distribution (`processed_logprobs`), and the model's own defaults of sampling
    parameters stay out (`generation-config vllm`).
    """
    # `vllm serve` looks for a package named vllm, which the build for CPUs is not.
    start = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    start += ["--host", host, "--port", str(port), "--logits-processors", PROCESSOR, "--middleware", MIDDLEWARE]
    start += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    return [*start, *(_ON_CPUS if cpu else []), *extra]


def cpu_environment(kv_cache_gb: int, threads: int | None) -> dict[str, str]:
    """Settings for CPUs that are not set yet: all cores given (it would keep one for itself), and none of torch's
    compilation, which takes longer than a run for what --enforce-eager leaves of it."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    wanted = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gb),
        "TORCHDYNAMO_DISABLE": "1",
        "LD_PRELOAD": ":".join(_preloads()),
    }
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _preloads() -> list[str]:
    """Libraries that make the build for CPUs faster, where they are: Intel's OpenMP, which comes with it and whose
    threads do not wait as greedily as GNU's where cores are shared, and tcmalloc."""
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    tcmalloc = ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")
    return [*([str(openmp)] if openmp.is_file() else []), *([tcmalloc] if tcmalloc else [])]


def wait_for_health(url: str, process: subprocess.Popen[bytes], limit_s: float) -> None:
    """Return when the server is healthy.

    Raises:
        BackendError: it ended, or is not healthy in time.
    """
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if process.poll() is not None:
            raise BackendError(f"vLLM ended with code {process.returncode}; what it wrote before says why")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise BackendError(f"vLLM is not healthy after {limit_s:g} s; look at what it wrote, or raise --wait")


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the server, say when it is ready, and end with it."""
    options, extra = _options(arguments)
    try:
        model = resolve_model(options.model)
        settings = serving_settings(options, model)
        process = _start(model, settings, options, extra)
    except AsnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the engine must not outlive us
    try:
        return _serve(process, settings, options)
    finally:
        process.terminate()
        process.wait()
        if options.status is None:
            shutil.rmtree(settings.status, ignore_errors=True)


def _start(
    model: str, settings: ServingSettings, options: argparse.Namespace, extra: Sequence[str]
) -> subprocess.Popen[bytes]:
    import torch

    cpu = not torch.accelerator.is_available()
    environment = os.environ | settings.environment()
    if cpu:
        environment |= cpu_environment(options.kv_cache_gb, options.threads)
    names = extra if "--served-model-name" in extra else [*extra, "--served-model-name", options.model]
    return subprocess.Popen(command(model, options.host, options.port, cpu=cpu, extra=names), env=environment)


def _serve(process: subprocess.Popen[bytes], settings: ServingSettings, options: argparse.Namespace) -> int:
    url = f"http://{options.host}:{options.port}"
    try:
        wait_for_health(url, process, options.wait)
        print(f"ready: {url}, policies {', '.join(policy_names(settings.policies)) or '(none yet)'}", flush=True)
        print(f"reports: {url}{STATUS_PATH}, files in {settings.status}", flush=True)
        return process.wait()
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = launcher_parser("asn_rl.serving.vllm_server", __doc__, port=8000, reports="one that ends with the server")
    parser.add_argument("--wait", type=float, default=600.0, help="seconds until it must be healthy (default 600)")
    parser.add_argument("--kv-cache-gb", type=int, default=2, help="memory for keys and values, on CPUs (default 2)")
    parser.add_argument("--threads", type=int, help="cores to use, on CPUs (default: all)")
    return parsed(parser, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
