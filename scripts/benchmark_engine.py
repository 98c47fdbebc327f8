"""Tokens a second of an engine with a policy against without: 64 requests at once, tokens and log-probs come back.

    python -m asn_rl.serving.vllm_server --model smollm2-135m-instruct --policies served --port 8000
    python scripts/benchmark_engine.py --engine vllm --url http://127.0.0.1:8000 --policies served

Rounds with and without the policy alternate; end-of-sequence tokens are ignored, so that every request has the same
length in both. The median of the rounds' ratios counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from _benchmark import finish
from check_engine import CLIENTS, LEARNED, QUESTIONS, served_or_raise, write_policies

from asn_rl.backends import BackendConfig, load_backend
from asn_rl.backends.servers import ServersConfig
from asn_rl.errors import AsnError
from asn_rl.rollout import RolloutConfig
from asn_rl.serving.client import PooledClient

GOAL = 0.9


def main() -> int:
    options = _options()
    try:
        with _client(options) as client:
            client.pool.check(wait_s=60)
            return finish(f"{options.engine}_throughput", _ratio(client, options), GOAL, at_least=True)
    except AsnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _client(options: argparse.Namespace) -> PooledClient:
    made = CLIENTS[options.engine]

    class FixedLength(made):  # type: ignore[misc, valid-type]
        def payload(self, *arguments: Any) -> dict[str, Any]:
            body = super().payload(*arguments)
            body.get("sampling_params", body)["ignore_eos"] = True
            return body

    return FixedLength(ServersConfig((options.url,), concurrency=options.requests))


def _ratio(client: PooledClient, options: argparse.Namespace) -> float:
    backend = load_backend(BackendConfig(model=options.model))
    write_policies(options.policies, backend, RolloutConfig().size)
    ids = [backend.encode(QUESTIONS[i % len(QUESTIONS)]) for i in range(options.requests)]

    def speed(policy: str | None) -> float:
        begin = time.perf_counter()
        answers = served_or_raise(client.complete(ids, policy=policy, max_new_tokens=options.tokens))
        return sum(len(answer.completion_ids) for answer in answers) / (time.perf_counter() - begin)

    for policy in (None, LEARNED):  # compiles, fills the prefix cache
        speed(policy)
    ratios = []
    for _ in range(1 if options.quick else options.rounds):
        without, having = speed(None), speed(LEARNED)
        print(f"without {without:.0f} tokens/s, with the policy {having:.0f}", flush=True)
        ratios.append(having / without)
    return statistics.median(ratios)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, choices=sorted(CLIENTS))
    parser.add_argument("--url", required=True, help="a server that does nothing else")
    parser.add_argument("--policies", required=True, type=Path, help="folder of policies that the server serves")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="base model (default %(default)s)")
    parser.add_argument("--requests", type=int, default=64, help="at once (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of each completion (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="with and without (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
