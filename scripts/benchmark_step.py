"""Cost of deciding how to sample, as a share of the base model's own decoding step.

One side: the base model's forward for one token, 64 chat prompts with a KV cache. Other side: sketch, context, policy
and choice of the token for the same 64 rows of logits. Both in the same process, on all threads.
"""

from __future__ import annotations

import sys

from asn_rl.threads import limit_spinning, set_threads

limit_spinning()

import torch
from _benchmark import finish, options, seconds

from asn_policies import OrderStatisticsNetwork
from asn_rl.backends import BackendConfig, load_backend
from asn_rl.data import DataConfig, load_prompts
from asn_rl.ops.context import context_vector
from asn_rl.ops.draws import invert_cdf
from asn_rl.ops.sketch import SketchSize, build_sketch, choose_tokens
from asn_rl.types import Observation

GOAL = 0.12


def main() -> int:
    arguments = options(__doc__ or "", "python scripts/benchmark_step.py --rows 64", rows=64)
    set_threads(arguments.threads)
    repeats = 5 if arguments.quick else 25
    shares = {dtype: _share(dtype, arguments, repeats) for dtype in ("bfloat16", "float32")}
    return finish("benchmark_step", shares["bfloat16"], GOAL, at_least=False)


@torch.no_grad()
def _share(dtype: str, arguments, repeats: int) -> float:
    backend = load_backend(BackendConfig(dtype=dtype))  # type: ignore[arg-type]
    rows = arguments.rows
    generator = torch.Generator().manual_seed(0)
    prompts = load_prompts(DataConfig(), "train")
    session = backend.start([backend.encode(prompts[i % len(prompts)].content) for i in range(rows)])
    tokens = torch.multinomial(session.logits.float().softmax(-1), 1, generator=generator).squeeze(-1)
    session.step(tokens)
    logits = session.logits.clone()
    policy, size = OrderStatisticsNetwork(), SketchSize()
    zero, uniforms = torch.zeros(rows), torch.rand(rows, 2, generator=generator, dtype=torch.float64)

    def decide() -> torch.Tensor:
        sketch, points = build_sketch(logits, size)
        obs = Observation(sketch, context_vector(sketch, zero, zero + 28, zero, zero))
        chosen = invert_cdf(policy(obs).logprobs.double().exp(), uniforms[:, 0])
        return choose_tokens(logits, points, chosen, uniforms[:, 1])

    model = seconds(lambda: session.step(tokens), repeats)
    decision = seconds(decide, repeats)
    print(f"{dtype}: model {1e3 * model:.1f} ms, sketch + policy + choice {1e3 * decision:.1f} ms, ", end="")
    print(f"share {decision / model:.1%} ({rows} rows, {torch.get_num_threads()} threads)")
    return decision / model


if __name__ == "__main__":
    sys.exit(main())
