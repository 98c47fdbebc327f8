"""The stages of a job, one after the other, with a line about each."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import _recipe

from asn_rl.analysis.labelling_report import write_labelling_report
from asn_rl.analysis.report import print_comparison, write_report
from asn_rl.config import load_config
from asn_rl.job import Job, JobConfig, compare, distil, generate, label, reinforce, select, verify
from asn_rl.runs import console

ROOT = Path(__file__).resolve().parent.parent

# First seed and the distance between runs: candidates count on from theirs.
_SEEDS = {
    "generate": (1000, 1000),
    "distill": (0, 1),
    "grpo": (0, 1),
    "ppo": (0, 1),
    "lpo": (0, 1),
    "compare": (2000, 1),
}


def main(description: str | None, *, config: str, run: str) -> int:
    """A recipe with its own default configuration and run folder; returns the exit status."""
    options = _options(description, config=config, run=run)
    return _recipe.exit_status(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    """Everything that `asn-rl run` does."""
    begin = time.monotonic()
    seeds = [f"{section}.seed={base + stride * options.seed}" for section, (base, stride) in _SEEDS.items()]
    path = _stages(Job(load_config(JobConfig, options.config, [*seeds, *options.overrides]), options.run))
    console.print(f"[bold]{time.monotonic() - begin:.0f} seconds.[/] Open {path} in a browser.", highlight=False)


def _stages(job: Job) -> Path:
    say = console.print
    say(f"base model {job.config.backend.model}, fingerprint {job.backend.fingerprint}, {job.threads} threads")
    say(f"\n[bold]1. Generate[/] candidates under {len(job.arms)} static rules.")
    generate(job)
    for split, found in verify(job).items():
        say(f"   {split}: {next(found.lines())}", highlight=False)
    say("\n[bold]2. Label[/] them and [bold]select[/]: what wins where?")
    label(job)
    selection = select(job)
    for name, means in selection["selection"].items():
        say(f"   {name:22s}" + "  ".join(f"{stratum} {mean:.3f}" for stratum, mean in means.items()), highlight=False)
    say(f"   best static rule on the selection split: [bold]{selection['best_static']}[/]", highlight=False)
    say(f"   {write_labelling_report(job.run)} shows more", highlight=False)
    if job.config.warm_start:
        say("\n[bold]3. Distil[/] what won into one small policy.")
        distil(job)
    say(f"\n[bold]4. {job.config.algorithm.upper()}[/] against the policy it begins at.")
    policy = reinforce(job)
    say(f"   {type(policy).__name__}, {sum(p.numel() for p in policy.parameters()):,} parameters", highlight=False)
    say("\n[bold]5. Compare[/] on held-out prompts.")
    print_comparison(compare(job))
    return write_report(job)


def _options(description: str | None, *, config: str, run: str) -> argparse.Namespace:
    """Configuration, run folder, seed and overrides, with a script's defaults."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [key=value ...]",
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / config, help="YAML file of the job")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / run, help="run folder")
    parser.add_argument("--seed", type=int, default=0, help="shifts the seed of every stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
    return parser.parse_args()
