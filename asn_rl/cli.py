"""`asn-rl <verb>`: thin commands over the functions of the library."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from asn_rl import __version__
from asn_rl.errors import AsnError
from asn_rl.registry import allow_local_plugins
from asn_rl.threads import limit_spinning

_JOB_VERBS = {
    "run": "the whole job: label, distill, grpo, compare, report",
    "label": "run the grid of heuristics on training and selection prompts; find which wins where",
    "distill": "teach the policy the winning heuristics",
    "grpo": "improve the policy by GRPO against an older checkpoint",
    "compare": "compare the policies with static rules on held-out prompts",
    "report": "write report.html",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. 2: an error that a change of the command mends, 130: interrupted."""
    limit_spinning()
    allow_local_plugins()
    options = _parser().parse_args(arguments)
    try:
        options.function(options)
    except AsnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}. Mend it, and the same command continues from what is done", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues from what is done", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="asn-rl", description="Teach a frozen language model how to sample.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    for name, summary in _JOB_VERBS.items():
        _add_job_verb(verbs, name, summary)
    _add(
        verbs, "keys", "list every setting of a job with its default and meaning", "asn-rl keys", _keys, lambda p: None
    )
    _add(
        verbs,
        "grid",
        "write a grid of sampling pipelines as YAML",
        "asn-rl grid --kind filtered --family llama --output pipelines.yaml",
        _grid,
        lambda p: (
            p.add_argument("--kind", default="full", help="full (396 pipelines) or filtered (143)"),
            p.add_argument("--family", default="llama", help="whose official setting to add: llama, gemma, qwen, none"),
            p.add_argument("--output", type=Path, required=True, help="YAML file to write"),
        ),
    )
    _add(
        verbs,
        "model",
        "fetch or convert a base model and show what it is",
        "asn-rl model smollm2-135m-instruct",
        _model,
        lambda p: p.add_argument("name", help="embedded short name, hub id or folder"),
    )
    return parser


def _add(
    verbs: argparse._SubParsersAction,
    name: str,
    summary: str,
    example: str,
    function: Callable[[argparse.Namespace], None],
    options: Callable[[argparse.ArgumentParser], object],
) -> None:
    parser = verbs.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options(parser)
    parser.set_defaults(function=function)


def _add_job_verb(verbs: argparse._SubParsersAction, name: str, summary: str) -> None:
    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--config", type=Path, required=True, help="YAML file, for example configs/demo.yaml")
        parser.add_argument("--run", type=Path, required=True, help="run folder; an unfinished one is continued")
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")

    example = f"asn-rl {name} --config configs/demo.yaml --run runs/demo grpo.steps=10"
    _add(verbs, name, summary, example, _job_verb, options)


def _job_verb(options: argparse.Namespace) -> None:
    from asn_rl.config import load_config
    from asn_rl.job import JobConfig

    config = load_config(JobConfig, options.config, options.overrides)

    from asn_rl import job as stages
    from asn_rl.analysis.report import print_comparison, write_report

    job = stages.Job(config, options.run)
    if options.verb == "label":
        stages.label(job)
    elif options.verb == "distill":
        stages.distil(job)
    elif options.verb == "grpo":
        stages.reinforce(job)
    else:
        print_comparison(stages.compare(job))
        if options.verb in ("report", "run"):
            print(f"report: {write_report(job)}")


def _keys(options: argparse.Namespace) -> None:
    from asn_rl.config import describe
    from asn_rl.job import JobConfig

    print(describe(JobConfig))


def _grid(options: argparse.Namespace) -> None:
    import yaml

    from asn_rl.registry import load_attribute

    entries = load_attribute("asn_policies.heuristics:grid")(options.kind, options.family)
    options.output.write_text(yaml.safe_dump({"sampling_pipelines": entries}, sort_keys=False))
    print(f"{len(entries)} pipelines written to {options.output}")


def _model(options: argparse.Namespace) -> None:
    from asn_rl.backends import BackendConfig, load_backend

    backend = load_backend(BackendConfig(model=options.name))
    print(f"{options.name}: vocabulary {backend.vocab_size}, hidden size {backend.hidden_size}, context ", end="")
    print(f"{backend.max_context}, end tokens {sorted(backend.eos_token_ids)}, fingerprint {backend.fingerprint}")


if __name__ == "__main__":
    sys.exit(main())
