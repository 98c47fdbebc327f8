"""The same policy trained by TRL's GRPOTrainer and by ours, from the same start; rewards on other prompts.

    pip install "asn_rl[trl]"
    python scripts/train_with_trl.py --run runs/trl
    python scripts/train_with_trl.py --run runs/trl-long --steps 40 --max-new-tokens 32

Settings that both have are the same: prompts and completions a step, one gradient step a batch, AdamW, clipping, and
the KL coefficient against the start. The draws are not, nor is the KL penalty (TRL estimates it from the drawn tokens,
ours is exact), so the rewards agree to the noise of training. Use the TRL half where a pipeline is built on TRL; the
other half reads the base model once a step.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

from asn_rl.threads import limit_spinning

limit_spinning()
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import _recipe
import torch
from datasets import Dataset
from trl import GRPOConfig as TRLConfig  # type: ignore[attr-defined]  # TRL exports lazily
from trl import GRPOTrainer  # type: ignore[attr-defined]

from asn_policies import OrderStatisticsNetwork
from asn_rl.backends import BackendConfig
from asn_rl.checkpoint import load_policy
from asn_rl.errors import DataError
from asn_rl.integrations.trl import PolicyCausalLM, check_trainer, with_ends
from asn_rl.protocols import LogitsBackend, Policy
from asn_rl.rewards.compose import RewardConfig, RewardSuite, score
from asn_rl.rewards.numeric import numeric_answer
from asn_rl.rollout import rollout
from asn_rl.runs import open_run
from asn_rl.training.grpo import GRPOConfig, train
from asn_rl.types import Prompt

BETA = 0.01


def main() -> int:
    options = _options()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    return _recipe.exit_status(lambda: run(options))


def run(options: argparse.Namespace) -> None:
    open_run(options.run, {name: str(value) for name, value in vars(options).items()})
    backend, prompts = _recipe.load(options, "train")
    start = PolicyCausalLM.wrap(
        OrderStatisticsNetwork(),
        BackendConfig(model=options.model, device=options.device),
        max_new_tokens=options.max_new_tokens,
    )
    start.save_pretrained(options.run / "start")
    begin = time.monotonic()
    with_trl(options, prompts)
    between = time.monotonic()
    with_ours(options, backend, prompts)
    seconds = {"start": 0.0, "trl": between - begin, "ours": time.monotonic() - between}

    _, held_out = _recipe.load(options, "test")
    rewards = {name: mean_rewards(options, backend, held_out, folder(options, name)) for name in seconds}
    print(f"mean reward of {len(held_out)} held-out prompts, {options.num_generations} completions each")
    for name, reward in rewards.items():
        print(f"{name:6s} {_summary(reward)}   trained in {seconds[name]:.0f} s")
    print(f"ours - trl {_summary(rewards['ours'] - rewards['trl'])}, paired by prompt")


def with_trl(options: argparse.Namespace, prompts: list[Prompt]) -> None:
    """GRPO by TRL, from `RUN/start`, whose folder is also the reference."""
    model = PolicyCausalLM.from_pretrained(options.run / "start")
    rows = [{"prompt": [{"role": "user", "content": prompt.content}], **prompt.columns} for prompt in prompts]
    args = TRLConfig(
        str(options.run / "trl"),
        max_steps=options.steps,
        per_device_train_batch_size=options.prompts_per_step * options.num_generations,
        gradient_accumulation_steps=1,
        num_generations=options.num_generations,
        max_completion_length=options.max_new_tokens,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        beta=BETA,
        seed=options.seed,
        report_to="none",
        save_strategy="no",
        logging_steps=max(1, options.steps // 4),
        use_cpu=model.backend.device.type == "cpu",
    )
    trainer = GRPOTrainer(
        model,
        with_ends(numeric_answer, model),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=model.tokenizer,
    )
    apart = check_trainer(trainer)
    print(f"TRL's loss scores {apart.tokens} drawn tokens within {apart.largest:.2g} nats of how they were drawn")
    trainer.train()
    trainer.save_model(str(options.run / "trl"))


def with_ours(options: argparse.Namespace, backend: LogitsBackend, prompts: list[Prompt]) -> None:
    """GRPO by `asn_rl.training.grpo`, from the same start."""
    start = folder(options, "start")
    config = GRPOConfig(
        steps=options.steps,
        prompts_per_step=options.prompts_per_step,
        num_generations=options.num_generations,
        num_iterations=1,
        minibatch_tokens=options.prompts_per_step * options.num_generations * options.max_new_tokens,
        learning_rate=options.learning_rate,
        beta=BETA,
        seed=options.seed,
    )
    rollout_config = PolicyCausalLM.from_pretrained(options.run / "start").config.rollout
    suite = RewardSuite([RewardConfig("numeric_answer")])
    train(load_policy(start), load_policy(start), backend, prompts, suite, rollout_config, config, options.run / "ours")


def folder(options: argparse.Namespace, name: str) -> Path:
    """The policy in a folder that either side wrote."""
    return options.run / name / "policy"


def mean_rewards(
    options: argparse.Namespace, backend: LogitsBackend, prompts: list[Prompt], policy: Path
) -> torch.Tensor:
    """(P,) of each prompt; the draws are the same for every policy."""
    loaded: Policy = load_policy(policy)
    config = PolicyCausalLM.from_pretrained(options.run / "start").config.rollout
    drawn = rollout(loaded, backend, prompts, config, num_generations=options.num_generations, seed=1 + options.seed)
    total = score(RewardSuite([RewardConfig("numeric_answer")]), drawn).total
    if total.isnan().any():
        raise DataError("a prompt has no answer to compare with; choose a source with the column `answer`")
    return total.reshape(len(prompts), -1).mean(1)


def _summary(values: torch.Tensor) -> str:
    return f"{values.mean():.3f} +- {values.std() / len(values) ** 0.5:.3f}"


def _options() -> argparse.Namespace:
    parser = _recipe.parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    _recipe.add_model_and_data(parser, seed=0)
    parser.set_defaults(source="arithmetic", max_new_tokens=20)
    parser.add_argument("--steps", type=int, default=20, help="policy updates")
    parser.add_argument("--prompts-per-step", type=int, default=8, help="prompts of a step")
    parser.add_argument("--num-generations", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="AdamW step size")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
