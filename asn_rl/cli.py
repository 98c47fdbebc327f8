"""`asn-rl <verb>`: thin commands over the functions of the library."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asn_rl import __version__
from asn_rl.errors import AsnError, ConfigError
from asn_rl.registry import allow_local_plugins
from asn_rl.threads import limit_spinning

if TYPE_CHECKING:
    from asn_rl.job import Job

_JOB_VERBS = {
    "run": "the whole job: generate, verify, label, select, distill, grpo, compare, report",
    "generate": "complete training and selection prompts under every heuristic of the grid",
    "verify": "check that every candidate is there; exit status 1 if not",
    "label": "score the candidates with every labeller",
    "select": "rate the heuristics prompt by prompt, keep the best candidates; which rule wins where",
    "distill": "teach the policy what won",
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
        return options.function(options) or 0
    except AsnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}. Mend it, and the same command continues from what is done", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues from what is done", file=sys.stderr)
        return 130


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
    _add_job_verb(verbs, "train-reward-model", "fit a small reward model to a labeller's scores in a run folder")
    _add(
        verbs,
        "index-corpus",
        "index text or JSONL files for the rewards that measure corpus overlap",
        "asn-rl index-corpus articles.jsonl notes.txt --output index --model smollm2-135m-instruct",
        _index_corpus,
        lambda p: (
            p.add_argument("files", nargs="+", type=Path, metavar="FILE", help="text (paragraphs) or JSONL"),
            p.add_argument("--output", type=Path, required=True, help="folder of the index"),
            p.add_argument("--model", default="smollm2-135m-instruct", help="base model whose token ids are indexed"),
            p.add_argument("--field", default="text", help="JSONL fields that are documents, separated by commas"),
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
    function: Callable[[argparse.Namespace], int | None],
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
        if name == "verify":
            parser.add_argument("--fix", action="store_true", help="generate what is missing")
        if name == "train-reward-model":
            parser.add_argument("--labeller", required=True, help="whose scores to learn, for example numeric_answer")
            parser.add_argument("--output", type=Path, required=True, help="folder of the reward model")
        if name in ("label", "select"):
            parser.add_argument(
                "--engine", choices=("local", "ray"), default="local", help="run here, or as Ray Data on a cluster"
            )
            parser.add_argument(
                "--ray-address", help="running cluster (auto: the one of this machine); default: a new one"
            )

    own = {"train-reward-model": "--labeller numeric_answer --output reward-model"}.get(name, "grpo.steps=10")
    example = f"asn-rl {name} --config configs/demo.yaml --run runs/demo {own}"
    _add(verbs, name, summary, example, _job_verb, options)


def _job_verb(options: argparse.Namespace) -> int:
    from asn_rl.config import load_config
    from asn_rl.job import JobConfig

    config = load_config(JobConfig, options.config, options.overrides)

    from asn_rl import job as stages
    from asn_rl.analysis.labelling_report import write_labelling_report
    from asn_rl.analysis.report import print_comparison, write_report

    job = stages.Job(config, options.run)
    if options.verb == "verify":
        return _verify(job, fix=options.fix)
    if options.verb == "generate":
        stages.generate(job)
    elif options.verb == "label":
        stages.label(job, *_engine(options))
    elif options.verb == "select":
        stages.select(job, *_engine(options))
        print(f"report: {write_labelling_report(job.run)}")
    elif options.verb == "train-reward-model":
        report = stages.fit_reward_model(job, options.labeller, options.output)
        print(
            f"{options.output}: {report.accuracy:.3f} [{report.accuracy_low:.3f}, {report.accuracy_high:.3f}] of "
            f"{report.held_out_pairs} pairs of {report.held_out_prompts} held-out prompts in the right order"
        )
    elif options.verb == "distill":
        stages.distil(job)
    elif options.verb == "grpo":
        stages.reinforce(job)
    else:
        print_comparison(stages.compare(job))
        if options.verb in ("report", "run"):
            print(f"reports: {write_labelling_report(job.run)} and {write_report(job)}")
    return 0


def _verify(job: Job, *, fix: bool) -> int:
    from asn_rl import job as stages

    if fix:
        stages.generate(job)
    found = stages.verify(job)
    for split, part in found.items():
        for line in part.lines():
            print(f"{split}: {line}")
    return 0 if all(part.ok for part in found.values()) else 1


def _engine(options: argparse.Namespace) -> list[Any]:
    """The engine that was asked for; none: the stage's own."""
    if options.engine == "local":
        if options.ray_address is not None:
            raise ConfigError(f"--ray-address {options.ray_address!r} needs --engine ray")
        return []
    from asn_rl.labelling.ray_engine import RayConfig, ray_engine, ray_map

    config = RayConfig(address=options.ray_address)
    return [ray_engine(config) if options.verb == "label" else ray_map(config)]


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


def _index_corpus(options: argparse.Namespace) -> None:
    from asn_rl.rewards.corpus_index import index_corpus

    info = index_corpus(options.files, options.output, model=options.model, field=options.field)
    print(f"{options.output}: {info.documents} documents, {info.tokens} tokens")


def _model(options: argparse.Namespace) -> None:
    from asn_rl.backends import BackendConfig, load_backend

    backend = load_backend(BackendConfig(model=options.name))
    print(f"{options.name}: vocabulary {backend.vocab_size}, hidden size {backend.hidden_size}, context ", end="")
    print(f"{backend.max_context}, end tokens {sorted(backend.eos_token_ids)}, fingerprint {backend.fingerprint}")


if __name__ == "__main__":
    sys.exit(main())
