"""Policies and static rules on benchmarks: the labelling pipeline on a benchmark's prompts, then metrics."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from asn_rl.errors import AsnError, ConfigError, DataError, InvalidValue, UnknownName
from asn_rl.evaluation.benchmarking import (
    EvaluateConfig,
    answer_codes,
    gold_texts,
    metric_names,
    named_verifiers,
    per_entry,
    primary_metric,
)
from asn_rl.evaluation.comparison import Arm
from asn_rl.evaluation.metrics import measure, parse_name
from asn_rl.evaluation.power import (
    PairedDesign,
    forecast,
    measured_forecast,
    minimum_detectable_effect,
    pilot,
)
from asn_rl.evaluation.record import SCHEMA, Record, TaskSettings, read_record, task_record, values_of
from asn_rl.evaluation.samples import Samples
from asn_rl.evaluation.seeds import seed_report
from asn_rl.evaluation.sequential import StopDecision, stop_decision
from asn_rl.evaluation.statistics import masked_mean
from asn_rl.job.benchmark_runs import (
    JUDGED,
    Scored,
    Task,
    fingerprint,
    joined,
    learned_arms,
    leave_out,
    nothing_ran,
    prepared,
    run_prompts,
    seed_name,
)
from asn_rl.job.job import Job
from asn_rl.rewards.compose import unique_names
from asn_rl.rewards.embedding_diversity import EMBEDDED
from asn_rl.rewards.letter_judge import position_share
from asn_rl.runs import console, write_json
from asn_rl.training import parallel
from asn_rl.types import Prompt

FIRST = 3
"""completions without a score that a note names"""


def evaluate(job: Job) -> Record:
    """Run every rule of the grid and every policy on the benchmarks of `evaluate.tasks`. The best static rule is chosen
    on each benchmark's selection split; all comparisons are on its test split. Each turn of a conversation is a task.

    Writes `evaluation/` and `evaluation.json`. What is there is passed over; what was left out is tried again. A
    benchmark that cannot be run or scored is named in the record (`left_out`), and the others go on.

    Raises:
        ConfigError: no tasks, or no grid of static rules.
        UnknownName: a reference that is no arm.
        DataError: no benchmark could be run.
    """
    parallel.main_alone()
    path, config = job.run / "evaluation.json", job.config.evaluate
    done = read_record(path) if path.exists() else {"tasks": {}, "left_out": {}}
    if done["tasks"] and not done["left_out"]:
        return done
    if not config.tasks:
        raise ConfigError("evaluate.tasks is empty; name benchmarks, for example --tasks gsm8k,ifeval")
    arms = [*job.static_rules.values(), *learned_arms(job)]
    if config.reference is not None and config.reference not in (arm.name for arm in arms):
        raise UnknownName("evaluate.reference", config.reference, [arm.name for arm in arms])
    ready, left_out = prepared(job, arms)
    tasks = done["tasks"]
    for task in ready:
        if task.name in tasks:
            continue
        console.print(f"\n[bold]{task.name}[/]: {task.benchmark.title}", highlight=False)
        try:
            tasks[task.name] = _record(job, task, arms)
        except AsnError as error:
            leave_out(left_out, task.name, error)
    if not tasks:
        raise DataError(nothing_ran(left_out))
    record = {"schema": SCHEMA, "base_model": job.backend.fingerprint, "tasks": tasks, "left_out": left_out}
    write_json(path, record)
    return record


def _record(job: Job, task: Task, arms: Sequence[Arm]) -> Record:
    config, benchmark = job.config.evaluate, task.benchmark
    judged = config.judge is not None
    primary = primary_metric(benchmark, judged)
    opponent = _selection_reference(job) if primary == "win_rate" else None
    selection = run_prompts(job, task, "selection", task.prompts["selection"], job.arms, opponent)
    baseline, detectable = _best_static(job, task, _samples(job, task, selection, job.arms), primary, len(arms))
    reference = (config.reference or baseline) if judged else None
    scored, decisions = _test(job, task, arms, baseline, reference)
    settings = TaskSettings(
        version=str(benchmark.version),
        fingerprint=fingerprint(task),
        split="test",
        limits={"prompts": config.limit, "tokens": task.rollout.max_new_tokens},
        family=benchmark.family or benchmark.name,
        primary=primary,
        judge=_judge(config, reference) if reference is not None else None,
        stop_early=config.stop_early if decisions else None,
        how=config.how,
    )
    ks, scorers = config.ks or (config.num_generations,), unique_names(config.scorers)
    record = task_record(
        _samples(job, task, scored, arms),
        [prompt.id for prompt in scored.prompts],
        settings,
        metrics=metric_names(benchmark, ks, scorers, judged, config.metrics),
        baseline=baseline,
        kinds={arm.name: "static" if arm.name in job.static_rules else "policy" for arm in arms},
        detectable=detectable,
        notes=_notes(scored, arms, decisions, len(task.prompts["test"])),
        decisions=decisions,
    )
    return _with_seeds(job, record)


def _selection_reference(job: Job) -> str:
    """Whom the rules of the grid meet on the selection split: all the same one, so that win rates rank them."""
    names, wanted = [arm.name for arm in job.arms], job.config.evaluate.reference
    return wanted if wanted in names else names[0]


def _judge(config: EvaluateConfig, reference: str) -> dict[str, Any]:
    assert config.judge is not None
    return {"function": config.judge.function, "arguments": dict(config.judge.arguments), "reference": reference}


def _test(
    job: Job, task: Task, arms: Sequence[Arm], baseline: str, reference: str | None
) -> tuple[Scored, dict[str, StopDecision]]:
    """The test prompts, or as many as it takes to know of every policy whether it is better or worse."""
    config, found = job.config.evaluate, []
    decisions: dict[str, StopDecision] = {}
    blocks = _blocks(task.prompts["test"], config.stop_early, config.seed)
    for number, block in enumerate(blocks):
        name = "test" if config.stop_early is None else f"test-{number:03d}"
        found.append(run_prompts(job, task, name, block, arms, reference))
        if config.stop_early is not None:
            samples = _samples(job, task, joined(found), arms)
            values = samples.scores if task.benchmark.verifiers or samples.wins is None else samples.wins
            decisions = _decisions(job, values, arms, baseline)
            if decisions and all(decision.outcome != "undecided" for decision in decisions.values()):
                break
    return joined(found), decisions


def _best_static(job: Job, task: Task, samples: Samples, primary: str, arms: int) -> tuple[str, dict[str, Any] | None]:
    """The best rule of the grid on the selection split, and what the comparison on the test split can show."""
    values = measure(samples, primary)  # (P, A)
    means = np.array([np.nanmean(column) if not np.isnan(column).all() else np.nan for column in values.T])
    if np.isnan(means).all():
        raise DataError(f"benchmark {task.name!r}: every score on the selection split is masked; check its verifier")
    sign = 1 if parse_name(primary).metric.better == "higher" else -1
    best = int(np.nanargmax(sign * means))
    found = f"{samples.arms[best]}, {primary} {means[best]:.3f}"
    console.print(f"  best static rule on {len(samples.strata)} selection prompts: {found}", highlight=False)
    detectable = _detectable(job, task, samples, values, best, primary, arms)
    if detectable is not None:
        console.print(f"  {detectable['sentence']}", highlight=False)
    return samples.arms[best], detectable


def _detectable(
    job: Job, task: Task, samples: Samples, values: np.ndarray, best: int, primary: str, arms: int
) -> dict[str, Any] | None:
    """What comparing `arms` with the best rule can show, from (P, A) values on the selection split."""
    prompts, base = len(task.prompts["test"]), float(np.nanmean(values[:, best]))
    plain = PairedDesign(samples=samples.samples, comparisons=max(1, arms - 1), level=job.config.evaluate.level)
    reference = job.config.evaluate.reference
    if primary == "win_rate" and reference is None:  # then it is the best rule, a tie with itself
        return measured_forecast(prompts, 0.5, values - 0.5, plain)
    if primary == "win_rate" and reference not in samples.arms:  # rules have not met it yet
        return None
    if primary != "accuracy":
        return measured_forecast(prompts, base, values - values[:, [best]], plain)
    base_rate = float(np.clip(base, 0.001, 0.999))
    # Of the rules, the one that is told apart worst: a near copy of the baseline would promise too much.
    designs = _pilots(samples, best, plain) or [plain]
    design = max(designs, key=lambda design: minimum_detectable_effect(prompts, base_rate, design))
    return forecast(prompts, base_rate, design)


def _pilots(samples: Samples, best: int, plain: PairedDesign) -> list[PairedDesign]:
    """What the selection split says of comparing each other rule with the best one; none where it says nothing."""
    designs = []
    for i in range(len(samples.arms)):
        if i != best:
            with suppress(InvalidValue):  # too few samples, or no variance
                between, correlation = pilot(samples.scores[:, [best, i]])
                designs.append(replace(plain, between=between, correlation=correlation))
    return designs


def _blocks(prompts: list[Prompt], size: int | None, seed: int) -> list[list[Prompt]]:
    """All prompts at once; or, to be looked at in between, in random order, a few at a time."""
    if size is None:
        return [prompts]
    shuffled = random.Random(seed).sample(prompts, len(prompts))
    return [shuffled[low : low + size] for low in range(0, len(shuffled), size)]


def _samples(job: Job, task: Task, scored: Scored, arms: Sequence[Arm]) -> Samples:
    verifiers = task.benchmark.verifiers
    columns = [prompt.columns for prompt in scored.prompts]
    scores = {
        v.name: per_entry(scored.scores[v.name], columns, v.entries) if v.entries else scored.scores[v.name]
        for v in verifiers
    }
    first = scores[verifiers[0].name] if verifiers else np.full(scored.tokens.shape, np.nan)
    chosen_by = {name: scored.scores[name] for name in unique_names(job.config.evaluate.scorers)}
    return Samples(
        tuple(arm.name for arm in arms),
        ("all",) * len(scored.prompts),
        first,
        tokens=scored.tokens,
        truncated=scored.truncated,
        answers=_answers(task, scored, first),
        scorers=chosen_by,
        verifiers={name: scores[name] for name in named_verifiers(task.benchmark)} | chosen_by,
        wins=scored.wins,
        texts=scored.texts,
        encoder=EMBEDDED,
        price=job.config.evaluate.price,
    )


def _answers(task: Task, scored: Scored, scores: np.ndarray) -> np.ndarray | None:
    kind = task.benchmark.answers
    if kind is None:
        return None
    return answer_codes(scored.texts, scores, scored.truncated, kind, gold_texts(task.benchmark, scored.prompts))


def _decisions(job: Job, values: np.ndarray, arms: Sequence[Arm], baseline: str) -> dict[str, StopDecision]:
    """Of every policy against the best static rule by (P, A, S) values in [0, 1], valid however often it is asked."""
    policies = [arm.name for arm in arms if arm.name not in job.static_rules]
    level = 1 - (1 - job.config.evaluate.level) / max(1, len(policies))
    places = {arm.name: i for i, arm in enumerate(arms)}
    means = {name: masked_mean(values[:, places[name]]) for name in [baseline, *policies]}
    return {name: stop_decision(means[name] - means[baseline], level=level) for name in policies}


def _notes(scored: Scored, arms: Sequence[Arm], decisions: Mapping[str, StopDecision], prompts: int) -> list[str]:
    notes = [f"{name} ({count})" for name, count in sorted(scored.events.items())]
    for reason, ids in sorted(scored.unscored.items()):
        notes.append(f"no score by {reason} ({len(ids)} completions; first: {'; '.join(ids[:FIRST])})")
    fixed = [arm.name for arm in arms if arm.deterministic]
    if fixed:
        notes.append(f"{', '.join(fixed)}: decoded once a prompt, counted as every sample")
    broken = sum("\ufffd" in text for row in scored.texts for group in row for text in group)
    if broken:
        notes.append(f"{broken} completions hold bytes that are no UTF-8; they were scored with U+FFFD in their place")
    if (bias := _position_bias(scored.events)) is not None:
        notes.append(bias)
    if decisions:
        notes.append(
            f"looked at {len(scored.prompts)} of {prompts} prompts in random order; what holds under such looking: "
            + "; ".join(f"{name} {d.outcome} [{d.low:+.3f}, {d.high:+.3f}]" for name, d in decisions.items())
        )
    return notes


def _position_bias(events: Mapping[str, int]) -> str | None:
    """Of a judge that counts as `judge_win` does; None: it gave no valid answer, or does not count."""
    found = {name.rpartition(": ")[2]: count for name, count in events.items() if name.startswith(JUDGED)}
    share, pairs = position_share({"first_preferred": 0} | found), found.get("pairs", 0)
    if share is None or not pairs:
        return None
    (first, valid), disagreed = share, found.get("disagreed", 0) / pairs
    return (
        f"the judge took the first of two answers in {first:.0%} of {valid} (50 %: no position bias); the two orders "
        f"of a pair contradicted each other in {disagreed:.0%} of {pairs} pairs, which are ties"
    )


def _with_seeds(job: Job, record: Record) -> Record:
    """The record with a report over training seeds where a policy was given with several."""
    arms, baseline = record["arms"], record["baseline"]
    for name, folders in job.config.evaluate.policies.items():
        if len(folders) > 1:
            members = [seed_name(name, i) for i in range(len(folders))]
            gaps = np.stack([values_of(arms[m]) - values_of(arms[baseline]) for m in members], 1)
            report = seed_report(gaps, record["strata"], job.config.evaluate.how)
            arms[members[0]]["seeds"] = report.as_dict()
    return record
