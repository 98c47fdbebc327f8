"""The verbs of `asn-rl` that work on a run folder: what each takes, and which stage it calls."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asn_rl.errors import ConfigError

if TYPE_CHECKING:
    from asn_rl.job import Job
    from asn_rl.labelling.ray_engine import RayConfig


@dataclass(frozen=True)
class JobVerb:
    """A stage of a job as a command."""

    summary: str
    function: Callable[[Job, argparse.Namespace], int | None]
    """returns the exit status, None for success"""
    options: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    example: str = "grpo.steps=10"
    overrides: Callable[[argparse.Namespace], list[str]] = lambda options: []
    """settings that options stand for"""


def add_job_options(verb: JobVerb, parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="YAML file, for example configs/demo.yaml")
    parser.add_argument("--run", type=Path, required=True, help="run folder; an unfinished one is continued")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
    verb.options(parser)


def run_job_verb(verb: JobVerb, options: argparse.Namespace) -> int | None:
    from asn_rl.config import load_config
    from asn_rl.job import Job, JobConfig

    settings = [*verb.overrides(options), *options.overrides]
    # Workers of a running cluster have working folders of their own.
    run = options.run.absolute() if getattr(options, "engine", "local") == "ray" else options.run
    return verb.function(Job(load_config(JobConfig, options.config, settings), run), options)


def _generate(job: Job, options: argparse.Namespace) -> None:
    from asn_rl.job import generate

    generate(job)


def _verify(job: Job, options: argparse.Namespace) -> int:
    from asn_rl.job import generate, verify

    if options.fix:
        generate(job)
    found = verify(job)
    for split, part in found.items():
        for line in part.lines():
            print(f"{split}: {line}")
    return 0 if all(part.ok for part in found.values()) else 1


def _label(job: Job, options: argparse.Namespace) -> None:
    from asn_rl.job import label
    from asn_rl.rewards.compose import unique_names

    again: list[str] = []
    if options.retry_masked is not None:
        again = [options.retry_masked] if options.retry_masked else unique_names(job.scorers)
    label(job, *_label_engine(job, options), retry=again)


def _label_options(parser: argparse.ArgumentParser) -> None:
    _engine_options(parser)
    parser.add_argument(
        "--ray-workers",
        type=int,
        metavar="N",
        help="label workers, each with a model of its own; default: one a core, or as many as the GPUs carry",
    )
    parser.add_argument(
        "--ray-gpus",
        type=float,
        metavar="F",
        help="GPUs that a label worker holds, default 0; labellers with device: cuda need 1, or 0.5 if two share one",
    )
    parser.add_argument(
        "--retry-masked",
        nargs="?",
        const="",
        metavar="LABELLER",
        help="ask again for scores that are masked, of this labeller or of all: a server or a checker may have failed",
    )


def _select(job: Job, options: argparse.Namespace) -> None:
    from asn_rl.analysis.labelling_report import write_labelling_report
    from asn_rl.job import select

    select(job, *_select_engine(options))
    print(f"report: {write_labelling_report(job.run)}")


def _label_engine(job: Job, options: argparse.Namespace) -> list[Any]:
    """The engine that was asked for; none: the stage's own. Labellers that it cannot run are refused before the first
    one starts."""
    config = _ray_config(options)
    if config is None:
        return []
    from asn_rl.labelling.ray_engine import check_gpus, ray_engine
    from asn_rl.rewards.compose import unique_names

    for name, labeller in zip(unique_names(job.scorers), job.scorers, strict=True):
        check_gpus(name, labeller, config)
    return [ray_engine(config)]


def _select_engine(options: argparse.Namespace) -> list[Any]:
    config = _ray_config(options)
    if config is None:
        return []
    from asn_rl.labelling.ray_engine import ray_map

    return [ray_map(config)]


_RAY_OPTIONS = {"--ray-address": "address", "--ray-workers": "concurrency", "--ray-gpus": "num_gpus"}
"""options of engine ray, and what they are in its configuration"""


def _ray_config(options: argparse.Namespace) -> RayConfig | None:
    """What the options of engine ray say; None: the engine is another one."""
    given = {option: getattr(options, option[2:].replace("-", "_"), None) for option in _RAY_OPTIONS}
    settings = {option: value for option, value in given.items() if value is not None}
    if options.engine == "ray":
        from asn_rl.labelling.ray_engine import RayConfig

        return RayConfig(**{_RAY_OPTIONS[option]: value for option, value in settings.items()})
    for option, value in settings.items():
        raise ConfigError(f"{option} {value!r} needs --engine ray")
    return None


def _engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="run here, or as Ray Data on a cluster"
    )
    parser.add_argument("--ray-address", help="running cluster (auto: the one of this machine); default: a new one")


def _train_reward_model(job: Job, options: argparse.Namespace) -> None:
    from asn_rl.job import fit_reward_model

    report = fit_reward_model(job, options.labeller, options.output)
    print(
        f"{options.output}: {report.accuracy:.3f} [{report.accuracy_low:.3f}, {report.accuracy_high:.3f}] of "
        f"{report.held_out_pairs} pairs of {report.held_out_prompts} held-out prompts in the right order"
    )


def _reward_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--labeller", required=True, help="whose scores to learn, for example numeric_answer")
    parser.add_argument("--output", type=Path, required=True, help="folder of the reward model")


def _distill(job: Job, options: argparse.Namespace) -> None:
    from asn_rl.job import distil

    distil(job)


def _reinforce(job: Job, options: argparse.Namespace) -> None:
    from asn_rl.job import reinforce

    reinforce(job)


def _report(job: Job, options: argparse.Namespace) -> None:
    from asn_rl.analysis.labelling_report import write_labelling_report
    from asn_rl.analysis.report import print_comparison, write_report
    from asn_rl.job import compare

    print_comparison(compare(job))
    print(f"reports: {write_labelling_report(job.run)} and {write_report(job)}")


def _headroom(job: Job, options: argparse.Namespace) -> None:
    from asn_rl.job import headroom

    report = headroom(job, options.split)
    for name, gain in report.gains.items():
        print(f"{name:28s} {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")
    print(report.verdict)


def _headroom_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", choices=("train", "selection"), default="train", help="whose candidates to judge by")


def _evaluate(job: Job, options: argparse.Namespace) -> int:
    from asn_rl.analysis.evaluation_page import print_evaluation, write_evaluation_page
    from asn_rl.job import evaluate

    record = evaluate(job)
    print_evaluation(record)
    print(f"report: {write_evaluation_page(record, job.run / 'evaluation.html')}")
    return 1 if record["left_out"] else 0


def _evaluation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", help="benchmarks, separated by commas: names (`asn-rl benchmarks`) or YAML files")
    parser.add_argument("--limit", type=int, help="prompts a split of a benchmark at most")
    parser.add_argument("--data", help="folder of the benchmarks' files; default: environment variable ASN_RL_DATA")
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="a trained policy; again with the same name: another training seed of it",
    )


def _evaluation_overrides(options: argparse.Namespace) -> list[str]:
    policies: dict[str, list[str]] = {}
    for given in options.policy:
        name, separator, folder = given.partition("=")
        if not (name and separator and folder):
            raise ConfigError(f"--policy {given!r} must be NAME=FOLDER, for example --policy rl=runs/demo/policy")
        policies.setdefault(name, []).append(folder)
    values = {
        "tasks": options.tasks and options.tasks.split(","),
        "limit": options.limit,
        "data": options.data,
        "policies": policies or None,
    }
    return [f"evaluate.{name}={json.dumps(value)}" for name, value in values.items() if value is not None]


def _promote(job: Job, options: argparse.Namespace) -> int:
    from asn_rl.data.jsonl import read_prompt_file
    from asn_rl.job import promote
    from asn_rl.job.promotion import decided_on

    candidate = options.candidate or job.run / "policy"
    record = promote(
        job, candidate, options.incumbent, into=options.into, output=options.output,
        prompts=read_prompt_file(options.prompts) if options.prompts else None, seen=decided_on(options.seen),
    )  # fmt: skip
    return 0 if record["outcome"] == "promoted" else 1


def _guard(job: Job, options: argparse.Namespace) -> None:
    from asn_rl.job import guard

    guard(job, candidate=options.candidate, rule=options.rule, output=options.output)


def _guard_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--candidate", type=Path, help="policy folder; default: policy in the run folder")
    parser.add_argument("--rule", help="name of a static rule; default: the best one on the selection split")
    parser.add_argument("--output", type=Path, help="folder of the guarded policy; default: guarded in the run folder")


def _promotion_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--candidate", type=Path, help="policy folder; default: policy in the run folder")
    parser.add_argument("--incumbent", required=True, help="policy folder, or the name of a static rule")
    parser.add_argument("--into", type=Path, help="where the candidate goes if the incumbent is a rule")
    parser.add_argument("--output", type=Path, help="folder of the decision; default: promotion in the run folder")
    parser.add_argument("--prompts", type=Path, help="JSONL file of the prompts that decide; default: promotion.split")
    parser.add_argument(
        "--seen",
        type=Path,
        nargs="+",
        default=[],
        help="folders of earlier decisions: their prompts may not decide",
    )


JOB_VERBS = {
    "run": JobVerb("the whole job: generate, verify, label, select, distill, RL, comparison, report", _report),
    "generate": JobVerb("complete training and selection prompts under every heuristic of the grid", _generate),
    "verify": JobVerb(
        "check that every candidate is there; exit status 1 if not",
        _verify,
        lambda parser: parser.add_argument("--fix", action="store_true", help="generate what is missing"),
    ),
    "label": JobVerb("score the candidates with every labeller", _label, _label_options, "--retry-masked"),
    "select": JobVerb(
        "rate the heuristics prompt by prompt, keep the best candidates; which rule wins where",
        _select,
        _engine_options,
    ),
    "train-reward-model": JobVerb(
        "fit a small reward model to a labeller's scores in a run folder",
        _train_reward_model,
        _reward_model_options,
        "--labeller numeric_answer --output reward-model",
    ),
    "headroom": JobVerb(
        "can choosing the heuristic by prompt help at all? judged by the candidates of a run",
        _headroom,
        _headroom_options,
        "--split train",
    ),
    "distill": JobVerb("teach the policy what won", _distill),
    "reinforce": JobVerb("improve the policy by RL (setting algorithm: grpo, ppo or lpo)", _reinforce),
    "report": JobVerb("compare the policies with static rules on held-out prompts, and write report.html", _report),
    "eval": JobVerb(
        "policies and the grid of static rules on benchmarks; exit status 1 if a benchmark could not be run",
        _evaluate,
        _evaluation_options,
        "--tasks gsm8k,ifeval --limit 100 --policy rl=runs/demo/policy",
        _evaluation_overrides,
    ),
    "guard": JobVerb(
        "put a static rule behind a policy, for contexts that its training prompts have not shown",
        _guard,
        _guard_options,
        "--rule greedy",
    ),
    "promote": JobVerb(
        "put a policy in the incumbent's place if fresh prompts show that it is better; exit status 1 if not",
        _promote,
        _promotion_options,
        "--incumbent greedy --into live",
    ),
}
