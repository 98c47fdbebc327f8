"""A whole RL step (rollout, reward, update) and its part after generation, against TRL's GRPOTrainer.

    pip install "asn_rl[trl]"
    python scripts/benchmark_trl.py --quick

Same policy, base model, prompts, rewards, epochs and KL coefficient against the same reference; one gradient step an
epoch on both sides. TRL trains the wrapped model of `asn_rl.integrations.trl`. Steps of both alternate in one process;
times are divided by the completion tokens of the step, which differ by the luck of the draws. The last line is that of
the figure that is worse against its goal.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from asn_rl.threads import limit_spinning, set_threads

limit_spinning()
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from _benchmark import finish, options
from datasets import Dataset
from transformers import TrainerCallback, TrainerState
from trl import GRPOConfig as TRLConfig  # type: ignore[attr-defined]  # TRL exports lazily
from trl import GRPOTrainer  # type: ignore[attr-defined]

from asn_policies import OrderStatisticsNetwork
from asn_rl.backends import BackendConfig
from asn_rl.data import DataConfig, load_prompts
from asn_rl.integrations.trl import PolicyCausalLM, check_trainer, with_ends
from asn_rl.metrics import MetricsLogger
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.rewards.numeric import numeric_answer
from asn_rl.rollout import RolloutConfig
from asn_rl.training.grpo import GRPOConfig, Trainer

STEP_GOAL, AFTER_GOAL = 3.0, 20.0
GENERATIONS, BETA, RATE = 8, 0.02, 3e-3


@dataclass(frozen=True)
class Step:
    """Seconds a completion token."""

    whole: float
    after: float


def main() -> int:
    arguments = options(
        __doc__ or "",
        "python scripts/benchmark_trl.py --prompts 16 --epochs 1",
        prompts=8,
        tokens=32,
        epochs=4,
        steps=6,
    )
    set_threads(arguments.threads)
    prompts, tokens, steps = arguments.prompts, arguments.tokens, arguments.steps
    if arguments.quick:
        prompts, tokens, steps = 2, 12, 1
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with TemporaryDirectory() as folder:
        theirs, ours = _alternate(Path(folder), prompts, tokens, arguments.epochs, steps)
    whole = statistics.median(t.whole / o.whole for t, o in zip(theirs, ours, strict=True))
    after = statistics.median(t.after / o.after for t, o in zip(theirs, ours, strict=True))
    for name, runs in (("TRL", theirs), ("asn_rl", ours)):
        step, rest = (1e3 * statistics.median(getattr(run, part) for run in runs) for part in ("whole", "after"))
        print(f"{name:7s} {step:8.3f} ms a token, of which after generation {rest:8.4f} ms")
    figures = [("benchmark_trl_step", whole, STEP_GOAL), ("benchmark_trl_after_generation", after, AFTER_GOAL)]
    return max(
        finish(name, ratio, goal, at_least=True)
        for name, ratio, goal in sorted(figures, key=lambda figure: -figure[1] / figure[2])
    )


def _alternate(folder: Path, prompts: int, tokens: int, epochs: int, steps: int) -> tuple[list[Step], list[Step]]:
    """Steps of both, the first one of each left out."""
    start = PolicyCausalLM.wrap(OrderStatisticsNetwork(), BackendConfig(), max_new_tokens=tokens)
    start.save_pretrained(folder / "start")
    model = PolicyCausalLM.from_pretrained(folder / "start")  # where it comes from is TRL's reference
    rows = load_prompts(DataConfig(source="arithmetic"), "train")
    own = Trainer(
        OrderStatisticsNetwork(),
        OrderStatisticsNetwork(),
        model.backend,
        rows,
        RewardSuite([RewardConfig("numeric_answer")]),
        RolloutConfig(max_new_tokens=tokens),
        GRPOConfig(
            steps=steps + 1, prompts_per_step=prompts, num_generations=GENERATIONS, num_iterations=epochs,
            minibatch_tokens=prompts * GENERATIONS * tokens, beta=BETA, learning_rate=RATE,
        ),
        folder / "own",
        {},
    )  # fmt: skip
    with MetricsLogger(folder / "own") as log:
        ours: list[Step] = []

        def our_step() -> None:
            begin = time.perf_counter()
            metrics = own.train_step(log)
            seconds = time.perf_counter() - begin
            drawn = metrics["policy/length"] * prompts * GENERATIONS
            ours.append(Step(seconds / drawn, (seconds - metrics["time/rollout"]) / drawn))

        clock = _Clock(our_step, epochs)
        trainer = GRPOTrainer(
            model,
            clock.counted(with_ends(numeric_answer, model)),
            args=TRLConfig(
                str(folder / "trl"), max_steps=epochs * (steps + 1), num_iterations=epochs,
                per_device_train_batch_size=prompts * GENERATIONS, gradient_accumulation_steps=1,
                num_generations=GENERATIONS, max_completion_length=tokens, beta=BETA, learning_rate=RATE,
                report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no",
                use_cpu=model.backend.device.type == "cpu",
            ),
            train_dataset=Dataset.from_list(
                [{"prompt": [{"role": "user", "content": row.content}], **row.columns} for row in rows]
            ),
            processing_class=model.tokenizer,
            callbacks=[clock],
        )  # fmt: skip
        check_trainer(trainer)
        trainer._generate = clock.timed(trainer._generate)
        trainer.train()
    return clock.steps[1:], ours[1:]


class _Clock(TrainerCallback):
    """Times TRL's steps, each of several epochs, and does one of ours after each."""

    def __init__(self, our_step: Callable[[], None], epochs: int) -> None:
        self.steps: list[Step] = []
        self.our_step, self.epochs = our_step, epochs
        self.begin = self.generating = 0.0
        self.tokens = 0

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step % self.epochs == 0:
            self.begin, self.generating, self.tokens = time.perf_counter(), 0.0, 0

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step % self.epochs:
            return
        whole = time.perf_counter() - self.begin
        self.steps.append(Step(whole / self.tokens, (whole - self.generating) / self.tokens))
        self.our_step()

    def timed(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            begin = time.perf_counter()
            out = generate(*given)
            self.generating += time.perf_counter() - begin
            return out

        return run

    def counted(self, reward: Callable[..., Any]) -> Callable[..., Any]:
        def run(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> Any:
            self.tokens += sum(map(len, completion_ids))
            return reward(prompts, completions, completion_ids, **columns)

        return run


if __name__ == "__main__":
    sys.exit(main())
