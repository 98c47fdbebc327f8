"""SamplingNetwork on a sketch against the same network over the full vocabulary: forward, and forward + backward.

Both sides compute the same policy for the same rows, in float32. The full side takes one row at a time: its activations
for one row fill half a gigabyte, and larger batches are no faster.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from asn_policies import SamplingNetwork
from asn_rl.ops.context import CONTEXT_SIZE
from asn_rl.ops.sketch import Sketch, SketchSize, build_sketch
from asn_rl.types import Observation

VOCABULARY = 49_152
GOAL = 100.0


def main() -> int:
    args = _arguments()
    rows = args.rows or (16 if args.quick else 64)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    policy = SamplingNetwork()
    logits = 3 * torch.randn(rows, VOCABULARY)
    sketch = build_sketch(logits, SketchSize())[0]
    full = [every_token_a_point(row) for row in logits.unsqueeze(1)]
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    print(f"SamplingNetwork, {parameters:,} parameters; {rows} rows, V = {VOCABULARY:,}, {args.threads} thread(s)")
    print(f"{'':20} {'sketch ms/row':>14} {'full ms/row':>14} {'ratio':>8}")

    ratios = []
    for name, act in (("forward", forward), ("forward + backward", forward_backward)):
        act(policy, full[0])
        fast = median_seconds(lambda act=act: act(policy, sketch), args.repeats)
        slow = median_seconds(lambda act=act: [act(policy, row) for row in full], 1)
        ratios.append(slow / fast)
        print(f"{name:20} {1e3 * fast / rows:14.3f} {1e3 * slow / rows:14.1f} {ratios[-1]:8.0f}")
    building = median_seconds(lambda: build_sketch(logits, SketchSize()), args.repeats)
    print(f"{'building the sketch':20} {1e3 * building / rows:14.3f}   (not part of the ratio)")

    ratio = min(ratios)
    print(f"benchmark_network ratio={ratio:.1f} goal={GOAL:.0f} {'ok' if ratio >= GOAL else 'short'}")
    return 0 if ratio >= GOAL else 1


def every_token_a_point(logits: Tensor) -> Sketch:
    """The sketch of `logits` (..., V) in which every token is a point of its own."""
    logprobs = torch.log_softmax(logits, -1)
    return Sketch(logprobs, torch.zeros_like(logprobs), torch.zeros_like(logprobs))


@torch.no_grad()
def forward(policy: SamplingNetwork, sketch: Sketch) -> Tensor:
    return policy(_observation(sketch)).logprobs


def forward_backward(policy: SamplingNetwork, sketch: Sketch) -> None:
    policy.zero_grad(set_to_none=True)
    (-policy(_observation(sketch)).logprobs.amax(-1).mean()).backward()


def _observation(sketch: Sketch) -> Observation:
    return Observation(sketch, torch.zeros(*sketch.log_mass.shape[:-1], CONTEXT_SIZE))


def median_seconds(act: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` calls, after one more to warm up when there are several."""
    if repeats > 1:
        act()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python scripts/benchmark_network.py --quick",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="16 rows instead of 64: under 50 seconds")
    parser.add_argument("--rows", type=int, help="rows of logits (default: 64, or 16 with --quick)")
    parser.add_argument("--repeats", type=int, default=20, help="timed passes on the sketch; the median counts")
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads; more than the free cores slow small steps most"
    )
    args = parser.parse_args()
    if min(args.rows or 1, args.repeats, args.threads) < 1 or args.rows == 0:
        parser.error("--rows, --repeats and --threads must be at least 1")
    return args


if __name__ == "__main__":
    sys.exit(main())
