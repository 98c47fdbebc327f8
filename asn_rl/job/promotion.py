"""Safe promotion: a candidate policy takes the incumbent's place only where fresh prompts show that it is better."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asn_rl.checkpoint import CARD, CONFIG, WEIGHTS, atomic_folder, check_compatible, load_policy, read_policy_config
from asn_rl.config import to_dict
from asn_rl.data.store import load_trajectories, save_trajectories
from asn_rl.errors import CheckpointError, ConfigError, DataError, InvalidValue, UnknownName
from asn_rl.evaluation.comparison import Arm, ArmResult, arm_result, run_arm
from asn_rl.evaluation.promotion import PromotionConfig, minimum_detectable_effect, promotion_test
from asn_rl.evaluation.statistics import stratified_mean
from asn_rl.job.job import Job
from asn_rl.runs import console, write_json
from asn_rl.training import parallel
from asn_rl.types import Prompt

CANDIDATE, INCUMBENT = "candidate", "incumbent"


def promote(
    job: Job,
    candidate: str | Path,
    incumbent: str | Path,
    *,
    config: PromotionConfig | None = None,
    prompts: Sequence[Prompt] | None = None,
    seen: Sequence[Prompt] = (),
    into: str | Path | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Compare a candidate with the incumbent on fresh prompts, and put it in its place if it is better.

    Writes to `output`: `inputs.json`, the completions of both, `forecast.json` (the smallest gain that these prompts
    can show, before the candidate has generated anything) and `decision.json`. The same call continues after an
    interruption, and repeats a decision without generating.

    A promoted candidate is copied into the incumbent's folder, which is replaced as a whole; what it held is in
    "<name>.previous" beside it. A process killed between the two renames of that replacement leaves no folder: the same
    call puts the candidate there.

    Args:
        job: the run that trained the candidate: base model, rewards, rollout, and the prompts it has seen.
        candidate: policy folder.
        incumbent: policy folder, or the name of a static rule: one of the job's heuristics, "greedy" or "T=1".
        config: default: `promotion` of the job's configuration.
        prompts: prompts that decide; default: those of `config.split`.
        seen: further prompts that may not decide. Those that decided in this run folder before may not, and see
            `decided_on`.
        into: where a promoted candidate goes when the incumbent is a static rule; default: nowhere.
        output: default: `promotion` in the run folder.

    Returns:
        What `decision.json` says.

    Raises:
        DataError: a prompt that decides was trained or selected on or has decided before, or a stratum column is
            missing.
        CheckpointError: no policy, one of another base model, or one that has changed since the comparison began.
        ConfigError: `output` holds another comparison.
        UnknownName: the incumbent is neither a folder nor a rule.
    """
    parallel.main_alone()
    config, candidate = config or job.config.promotion, Path(candidate)
    output = Path(output or job.run / "promotion")
    place = _place(job, candidate, incumbent, into)
    check_compatible(candidate, fingerprint=job.backend.fingerprint)
    prompts = job.prompts(config.split) if prompts is None else prompts
    earlier = [path.parent for path in job.run.glob("*/decision.json") if path.parent.resolve() != output.resolve()]
    check_fresh(prompts, [*job.prompts("train"), *job.prompts("selection"), *decided_on(earlier), *seen])
    inputs = {
        CANDIDATE: folder_digest(candidate),
        INCUMBENT: str(incumbent),
        "into": None if place is None else str(place),
        "prompts": _digest([prompt.id, _text(prompt)] for prompt in prompts),
        "config": to_dict(config),
    }
    before = _open(output, inputs, None if place is None else folder_digest(place))
    path = output / "decision.json"
    record = json.loads(path.read_text()) if path.exists() else None
    promoted = record is not None and record["outcome"] == "promoted"
    now = None if place is None else folder_digest(place)
    if now not in (before, *((inputs[CANDIDATE], None) if promoted else ())):
        raise CheckpointError(
            f"{place} has changed since the comparison in {output}, which is about what was there before; compare "
            "again with another output folder"
        )
    if record is None:
        record = _decide(job, output, candidate, incumbent, prompts, config)
        write_json(path, record)
    if place is not None and record["outcome"] == "promoted" and now != inputs[CANDIDATE]:
        _install(candidate, place, path)
    console.print(record["sentence"], highlight=False)
    return record


def check_fresh(prompts: Sequence[Prompt], seen: Sequence[Prompt]) -> None:
    """`DataError` if a prompt has the content of one that was seen; ids play no part. A candidate may have learned it
    by heart; and of several candidates that are compared on the same prompts, the luckiest would be promoted."""
    known = {_text(prompt): prompt.id for prompt in seen}
    for prompt in prompts:
        if _text(prompt) in known:
            raise DataError(
                f"prompt {prompt.id!r} was seen in training, selection or an earlier decision (there "
                f"{known[_text(prompt)]!r}); decide on fresh prompts, of another split or file (--prompts)"
            )


def decided_on(outputs: Sequence[Path]) -> list[Prompt]:
    """The prompts of earlier comparisons, by their output folders.

    Raises:
        CheckpointError: a folder holds no comparison.
    """
    return [prompt for output in outputs for prompt in load_trajectories(output / INCUMBENT).prompts]


def folder_digest(folder: Path) -> str | None:
    """Hash of a policy's arguments and weights; None where there is no folder."""
    if not folder.exists():
        return None
    read_policy_config(folder)
    try:
        return _digest(hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (CONFIG, WEIGHTS))
    except OSError as error:
        raise CheckpointError(f"cannot read the policy in {folder}: {error}; restore it") from error


def _place(job: Job, candidate: Path, incumbent: str | Path, into: str | Path | None) -> Path | None:
    """Where a promoted candidate goes; None: nowhere."""
    if str(incumbent) in job.static_rules:
        place = None if into is None else Path(into)
    elif into is None:
        place = Path(incumbent)
        previous = place.with_name(f"{place.name}.previous")
        if not place.is_dir() and not previous.is_dir():  # a replacement may have been cut short
            advice = "Or give the folder of a policy."
            raise UnknownName("incumbent", str(incumbent), job.static_rules, advice)
    else:
        raise InvalidValue("into", str(into), "left out with the folder of an incumbent", "its place is that folder")
    if place is not None and place.resolve() == candidate.resolve():
        raise InvalidValue("candidate", str(candidate), "another folder than the incumbent's")
    return place


def _open(output: Path, inputs: dict[str, Any], place: str | None) -> str | None:
    """Digest of what lay in the incumbent's place when the comparison in `output` began, which may be now."""
    path = output / "inputs.json"
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        write_json(path, inputs | {"place": place})
        return place
    old = json.loads(path.read_text())
    began = old.pop("place")
    changed = sorted(name for name in old if old[name] != inputs.get(name))
    if changed:
        raise ConfigError(
            f"{output} holds a comparison with other inputs ({', '.join(changed)}); choose another output folder, or "
            "remove this one"
        )
    return began


def _decide(
    job: Job,
    output: Path,
    candidate: Path,
    incumbent: str | Path,
    prompts: Sequence[Prompt],
    config: PromotionConfig,
) -> dict[str, Any]:
    strata, rule = job.strata(prompts), job.static_rules.get(str(incumbent))
    if rule is None:
        check_compatible(incumbent, fingerprint=job.backend.fingerprint)
    old = _result(job, output, rule or Arm(INCUMBENT, load_policy(incumbent)), INCUMBENT, prompts, config)
    forecast = minimum_detectable_effect(old.per_prompt(), strata, config)
    write_json(output / "forecast.json", {"detectable": _number(forecast), "prompts": len(prompts)})
    console.print(_announcement(forecast, len(prompts), config), highlight=False)
    new = _result(job, output, Arm(CANDIDATE, load_policy(candidate)), CANDIDATE, prompts, config)
    decision = promotion_test(new.rewards, old.rewards, strata, config)
    return {
        "outcome": decision.outcome,
        "sentence": decision.sentence,
        "gain": decision.gain,
        "low": _number(decision.low),
        "high": _number(decision.high),
        "level": config.level,
        "bound": config.bound,
        "prompts": decision.prompts,
        "masked": decision.masked,
        "samples": config.num_generations,
        "detectable": {"before": _number(forecast), "after": _number(decision.detectable)},
        CANDIDATE: {"folder": str(candidate), **_figures(new, strata)},
        INCUMBENT: {"name": str(incumbent), **_figures(old, strata)},
    }


def _result(
    job: Job, output: Path, arm: Arm, name: str, prompts: Sequence[Prompt], config: PromotionConfig
) -> ArmResult:
    """What `output` holds, or a rollout that is then stored there. Both policies share their random draws."""
    folder, samples = output / name, config.num_generations
    if not folder.exists():
        save_trajectories(folder, run_arm(arm, job.backend, prompts, job.config.rollout, samples, config.seed))
    return arm_result(name, load_trajectories(folder), job.rewards, samples)


def _announcement(forecast: float, prompts: int, config: PromotionConfig) -> str:
    if math.isnan(forecast):
        return f"{prompts} prompts: the incumbent earns the same on all of them, which forecasts no detectable gain"
    return (
        f"{prompts} prompts: a gain of {forecast:.4f} in the mean reward would be found {100 * config.power:g} times "
        "in 100, if the differences spread as the incumbent's rewards do"
    )


def _figures(result: ArmResult, strata: Sequence[str]) -> dict[str, float]:
    return {
        "reward": stratified_mean(result.per_prompt(), strata),
        "tokens": float(result.tokens.mean()),
        "truncated": float(result.truncated.mean()),
    }


def _install(candidate: Path, place: Path, decision: Path) -> None:
    """Put the candidate into the incumbent's place, and what was there beside it."""
    if place.exists():
        with atomic_folder(place.with_name(f"{place.name}.previous")) as scratch:
            shutil.copytree(place, scratch, dirs_exist_ok=True)
    with atomic_folder(place) as scratch:
        for source in (candidate / CONFIG, candidate / WEIGHTS, candidate / CARD, decision):
            if source.exists():
                shutil.copy(source, scratch)


def _text(prompt: Prompt) -> str:
    return json.dumps(prompt.content, sort_keys=True)


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()


def _number(value: float) -> float | None:
    """None for what JSON has no number for."""
    return value if math.isfinite(value) else None
