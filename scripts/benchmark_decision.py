"""Drawing a token with a policy, against transformers' top-p and `torch.multinomial`, on the same logits.

Ours: sketch, context, order-statistics policy, and the choice of point and token. Theirs: `TopPLogitsWarper(0.9)`,
softmax and multinomial. In the same process, on the same threads or GPU. `transform` is what an inference engine calls
instead of `decide`; `read` reads every logit once.
"""

from __future__ import annotations

import sys

from asn_rl.threads import limit_spinning, set_threads

limit_spinning()

import torch
from _benchmark import finish, options, seconds
from torch import Tensor
from transformers import TopPLogitsWarper

from asn_policies import OrderStatisticsNetwork
from asn_rl.ops.context import context_vector
from asn_rl.ops.draws import invert_cdf
from asn_rl.ops.sketch import SketchSize, build_sketch, choose_tokens, expand
from asn_rl.ops.vocabulary import passes
from asn_rl.types import Observation

GOAL = 3.0


@torch.no_grad()
def main() -> int:
    example = "python scripts/benchmark_decision.py --rows 64 --vocab 49152   (--vocab 128000 with a GPU)"
    arguments = options(__doc__ or "", example, rows=64, vocab=49152)
    set_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, repeats = arguments.rows, 5 if arguments.quick else 25
    generator = torch.Generator().manual_seed(0)
    # As spread as those of a language model: a few likely tokens, most of them 10 to 20 nats below.
    logits = (3 * torch.randn(rows, arguments.vocab, generator=generator)).to(device)
    policy, size = OrderStatisticsNetwork().to(device), SketchSize()
    zero, left = torch.zeros(rows, device=device), torch.full((rows,), 28.0, device=device)
    uniforms = torch.rand(rows, 2, generator=generator, dtype=torch.float64).to(device)
    warper = TopPLogitsWarper(0.9)

    def decide() -> Tensor:
        sketch, points = build_sketch(logits, size)
        logprobs = policy(Observation(sketch, context_vector(sketch, zero, left, zero, zero))).logprobs
        return choose_tokens(logits, points, invert_cdf(logprobs.double().exp(), uniforms[:, 0]), uniforms[:, 1])

    def transform() -> Tensor:
        sketch, points = build_sketch(logits, size)
        logprobs = policy(Observation(sketch, context_vector(sketch, zero, left, zero, zero))).logprobs
        return expand(logits, points, torch.where(sketch.mask, logprobs - sketch.log_mass, 0.0), transformed)

    def top_p() -> Tensor:
        return torch.multinomial(warper(None, logits).softmax(-1), 1)  # type: ignore[arg-type]

    def read() -> Tensor:
        return logits.amax(-1)

    transformed = torch.empty_like(logits)
    timed = {call.__name__: seconds(_awaited(call, device), repeats) for call in (decide, transform, top_p, read)}
    print(f"{rows} rows of {arguments.vocab} logits on {device}, {torch.get_num_threads()} threads: ", end="")
    print(f"{passes(logits).__name__.rpartition('.')[2]} passes")  # type: ignore[attr-defined]
    print(", ".join(f"{name} {1e3 * duration:.2f} ms" for name, duration in timed.items()))
    return finish("benchmark_decision", timed["top_p"] / timed["decide"], GOAL, at_least=True)


def _awaited(call, device: torch.device):
    if device.type != "cuda":
        return call

    def finished() -> None:
        call()
        torch.cuda.synchronize()

    return finished


if __name__ == "__main__":
    sys.exit(main())
