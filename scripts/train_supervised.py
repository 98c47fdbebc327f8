"""Supervised training: distil one sampling pipeline into a policy, on your prompts.

    python scripts/train_supervised.py --pipeline 'min_p: {min_p: 0.1}' --output policies/min-p
    python scripts/train_supervised.py --source jsonl --path questions.jsonl \
        --pipeline 'temperature: {temperature: 0.7}' 'top_p: {top_p: 0.9}' --output policies/nucleus

The functions are those of the library; copy this file and change what you need. To choose the pipeline prompt by
prompt, by reward, use `asn-rl distill`, which labels first. `scripts/train_rl.py` continues from the
folder this one writes.
"""

from __future__ import annotations

import argparse
import sys

from asn_rl.threads import limit_spinning

limit_spinning()

import _recipe
import torch
import yaml

from asn_policies import OrderStatisticsNetwork, Pipeline
from asn_rl.checkpoint import save_policy
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.training.distill import DistillConfig, distill, sketch_targets


def main() -> int:
    options = _options()
    return _recipe.exit_status(lambda: train(options))


def train(options: argparse.Namespace) -> None:
    backend, prompts = _recipe.load(options, "train")
    steps = [{"name": name, "params": params or {}} for step in options.pipeline for name, params in step.items()]
    heuristic, size = Pipeline(steps), RolloutConfig(max_new_tokens=options.max_new_tokens)
    print(f"{len(prompts)} prompts x {options.num_generations} completions under {steps}")
    visited = rollout(heuristic, backend, prompts, size, num_generations=options.num_generations, seed=options.seed)
    targets = sketch_targets([heuristic], torch.ones(len(visited), 1), visited)
    torch.manual_seed(options.seed)
    policy = OrderStatisticsNetwork()
    figures = distill(policy, visited, targets, DistillConfig(epochs=options.epochs, seed=options.seed))
    sketch = {"head": size.head, "tail": size.tail}
    save_policy(options.output, policy, base_model=options.model, fingerprint=backend.fingerprint, sketch=sketch)
    divergence = figures.get("eval/distill_kl", figures["loss/distill_kl"])  # held out, where there are prompts enough
    print(f"KL {divergence:.4f} nats a token; the policy is in {options.output}")


def _options() -> argparse.Namespace:
    parser = _recipe.parser(__doc__)
    _recipe.add_model_and_data(parser, seed=0)
    parser.add_argument(
        "--pipeline", nargs="+", type=yaml.safe_load, required=True, help="steps 'name: {param: value}'"
    )
    parser.add_argument("--output", required=True, help="folder the policy is written to")
    parser.add_argument("--num-generations", type=int, default=4, help="completions of every prompt")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the recorded tokens")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
