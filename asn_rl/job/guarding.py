"""A static rule behind a trained policy, for what its training prompts have not shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asn_rl.checkpoint import check_compatible, load_policy, save_policy
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
        CheckpointError: no policy, or one of another base model.
        UnknownName: no such rule.
        InvalidValue: `output` is the candidate's folder.
    """
    parallel.main_alone()
    candidate, output = Path(candidate or job.run / "policy"), Path(output or job.run / "guarded")
    if candidate.resolve() == output.resolve():
        raise InvalidValue("output", str(output), "another folder than the candidate's")
    check_compatible(candidate, fingerprint=job.backend.fingerprint)
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
    guarded = load_attribute(config.policy).around(candidate, processors[name], limits)
    save_policy(output, guarded, **job.metadata)
    outside = outside_share(met, limits)
    console.print(
        f"{output}: the policy in {candidate}, and {name} where the context leaves what {len(met)} completions of "
        f"training prompts show ({outside:.2%} of their own tokens)",
        highlight=False,
    )
    return {"folder": str(output), "rule": name, "limits": limits, "outside": outside}
