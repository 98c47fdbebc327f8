"""A static rule behind a trained policy, for what its training prompts have not shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asn_rl.checkpoint import CONFIG, load_policy, save_policy
from asn_rl.data.sampler import PromptSampler
from asn_rl.errors import InvalidValue, UnknownName
from asn_rl.evaluation.context_range import context_limits, outside_share
from asn_rl.job.job import BASE, GREEDY, Job
from asn_rl.job.labelling import select
from asn_rl.registry import load_attribute
from asn_rl.rollout import rollout
from asn_rl.runs import console
from asn_rl.training import parallel


def guard(
    job: Job, *, candidate: str | Path | None = None, rule: str | None = None, output: str | Path | None = None
) -> dict[str, Any]:
    """Write a policy that is the candidate inside the range of contexts that it meets on training prompts, and a static
    rule outside, row by row and token by token.

    Args:
        candidate: policy folder; default: `policy` in the run folder.
        rule: one of the job's heuristics, "greedy" or "T=1"; default: the best one on the selection split.
        output: where it goes; default: `guarded` in the run folder.

    Returns:
        `folder`, `rule`, `limits` (context entry -> [low, high]) and `outside`, the share of the training prompts'
        tokens that the rule answers.

    Raises:
        CheckpointError: no policy, or one of another base model or sketch size.
        UnknownName: no such rule.
        InvalidValue: `output` is the candidate's folder, or a folder that holds something else than a policy.
    """
    parallel.main_alone()
    candidate, output = Path(candidate or job.run / "policy"), Path(output or job.run / "guarded")
    _check_output(output, candidate)
    job.check_policy(candidate)
    cls = load_attribute(job.config.guard.policy)
    if not hasattr(cls, "around"):
        raise InvalidValue("guard.policy", job.config.guard.policy, "a class with around(folder, processors, limits)")
    declared = job.heuristics if job.config.heuristics or job.config.grid else []
    processors = {GREEDY: [{"name": GREEDY}], BASE: [], **{spec.name: spec.processors for spec in declared}}
    name = rule or select(job)["best_static"]
    if name not in processors:
        raise UnknownName("static rule", name, processors)
    config, prompts = job.config.guard, job.prompts("train")
    if config.prompts < len(prompts):
        prompts = PromptSampler(prompts, config.prompts, config.seed, job.config.compare.stratify_by).draw(0)
    policy, count = load_policy(candidate), config.num_generations
    met = rollout(policy, job.backend, prompts, job.config.rollout, num_generations=count, seed=config.seed)
    limits = context_limits(met, config.cut, config.margin)
    save_policy(output, cls.around(candidate, processors[name], limits), **job.metadata)
    outside = outside_share(met, limits)
    console.print(
        f"{output}: the policy in {candidate}, and {name} where the context leaves what {len(met)} completions of "
        f"training prompts show ({outside:.2%} of their own tokens)",
        highlight=False,
    )
    return {"folder": str(output), "rule": name, "limits": limits, "outside": outside}


def _check_output(output: Path, candidate: Path) -> None:
    """What is there is replaced as a whole: only a policy may be, and not the candidate."""
    if output.exists() and not (output / CONFIG).is_file():
        raise InvalidValue("output", str(output), "a new folder, or one that holds a policy", "it would be replaced")
    if output.resolve() in (candidate.resolve(), *candidate.resolve().parents):
        raise InvalidValue("output", str(output), "another folder than the candidate's")
