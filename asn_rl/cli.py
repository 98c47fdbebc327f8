"""`asn-rl <verb>`: thin commands over the functions of the library."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from asn_rl import __version__
from asn_rl._job_verbs import JOB_VERBS, add_job_options, run_job_verb
from asn_rl.errors import AsnError
from asn_rl.registry import allow_local_plugins
from asn_rl.threads import limit_spinning


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
        folder = getattr(options, "run", Path.cwd())
        advice = f"Free some space on the disk of {folder}" if error.errno == errno.ENOSPC else "Mend it"
        print(f"error: {error}. {advice}, and the same command continues from what is done", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues from what is done", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="asn-rl", description="Teach a frozen language model how to sample.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    for name, verb in JOB_VERBS.items():
        example = f"asn-rl {name} --config configs/demo.yaml --run runs/demo {verb.example}"
        _add(verbs, name, verb.summary, example, partial(run_job_verb, verb), partial(add_job_options, verb))
    _add(
        verbs, "keys", "list every setting of a job with its default and meaning", "asn-rl keys", _keys, lambda p: None
    )
    _add(
        verbs,
        "compare",
        "merge evaluations of several runs into one table and page",
        "asn-rl compare runs/eval-a runs/eval-b --output leaderboard.html",
        _compare,
        lambda p: (
            p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder that `asn-rl eval` made"),
            p.add_argument("--output", type=Path, default=Path("leaderboard.html"), help="page to write"),
        ),
    )
    _add(verbs, "benchmarks", "list the benchmarks that come along", "asn-rl benchmarks", _benchmarks, lambda p: None)
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


def _keys(options: argparse.Namespace) -> None:
    from asn_rl.config import describe
    from asn_rl.job import JobConfig

    print(describe(JobConfig))


def _compare(options: argparse.Namespace) -> None:
    from asn_rl.analysis.evaluation_page import print_evaluation, write_evaluation_page
    from asn_rl.evaluation.leaderboard import merge_records
    from asn_rl.evaluation.record import read_record

    record = merge_records({str(run): read_record(run / "evaluation.json") for run in options.runs})
    print_evaluation(record)
    print(f"page: {write_evaluation_page(record, options.output)}")


def _benchmarks(options: argparse.Namespace) -> None:
    from asn_rl.data.benchmark import benchmark_names, load_benchmark

    for name in benchmark_names():
        benchmark = load_benchmark(name)
        print(f"{name:18s} {benchmark.title} ({benchmark.licence}; {benchmark.paper})")


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
