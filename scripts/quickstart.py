"""The main job in one go, on the embedded model: distil, improve by GRPO, compare on held-out prompts.

    python scripts/quickstart.py                      # the demo, in runs/demo
    python scripts/quickstart.py --seed 1 --run runs/demo-1
    python scripts/quickstart.py grpo.steps=5         # any setting of the configuration

Does what `asn-rl run --config configs/demo.yaml --run runs/demo` does and says what happens. Interrupted, it continues.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from asn_rl.threads import limit_spinning

limit_spinning()

from asn_rl.analysis.report import print_comparison, write_report
from asn_rl.config import load_config
from asn_rl.errors import AsnError
from asn_rl.job import Job, JobConfig, compare, distil, label, reinforce
from asn_rl.registry import allow_local_plugins
from asn_rl.runs import console

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    options = _options()
    begin = time.monotonic()
    allow_local_plugins()
    try:
        seeds = [f"{section}.seed={options.seed + base}" for section, base in _SEEDS.items()]
        config = load_config(JobConfig, options.config, [*seeds, *options.overrides])
        path = run(Job(config, options.run))
    except (AsnError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    console.print(f"[bold]{time.monotonic() - begin:.0f} seconds.[/] Open {path} in a browser.", highlight=False)
    return 0


def run(job: Job) -> Path:
    """All stages, with a line about each."""
    say = console.print
    backend = job.backend
    say(f"base model {job.config.backend.model}, fingerprint {backend.fingerprint}, {job.threads} threads")
    say("\n[bold]1. Label.[/] Which static rule wins on which prompt?")
    labels = label(job)
    for name, means in labels["selection"].items():
        say(f"   {name:22s}" + "  ".join(f"{stratum} {mean:.3f}" for stratum, mean in means.items()), highlight=False)
    say(f"   best static rule on the selection split: [bold]{labels['best_static']}[/]", highlight=False)
    say("\n[bold]2. Distil[/] each prompt's winner into one small policy.")
    policy = distil(job)
    say(f"   {type(policy).__name__}, {sum(p.numel() for p in policy.parameters()):,} parameters", highlight=False)
    say("\n[bold]3. GRPO[/] against the distilled checkpoint.")
    reinforce(job)
    say("\n[bold]4. Compare[/] on held-out prompts.")
    print_comparison(compare(job))
    return write_report(job)


_SEEDS = {"label": 1000, "distill": 0, "grpo": 0, "compare": 2000}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [key=value ...]",
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml", help="YAML file of the job")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "demo", help="run folder")
    parser.add_argument("--seed", type=int, default=0, help="added to the seed of every stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
