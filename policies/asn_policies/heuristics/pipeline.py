"""Ordered pipelines of heuristics as policies, in the grammar of the reference project: `{name, params}` lists."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from asn_policies.base import PolicyModule, check_rows
from asn_policies.heuristics.rules import RULES, Rule
from asn_rl.errors import ConfigError, InvalidValue, UnknownName
from asn_rl.ops.logprobs import normalize
from asn_rl.types import Observation, PolicyOutput, State


def make_rule(step: Mapping[str, Any]) -> Rule:
    """`{"name": "top_p", "params": {"top_p": 0.9}}` -> a rule."""
    given = step if isinstance(step, Mapping) else {}
    name, params = given.get("name"), given.get("params") or {}
    if not isinstance(name, str) or not isinstance(params, Mapping) or set(given) - {"name", "params"}:
        known = ", ".join(sorted(RULES))
        raise ConfigError(
            f"a pipeline step is {{name, params}} with params a mapping, got {step!r}; known names: {known}"
        )
    if name not in RULES:
        raise UnknownName("heuristic", name, RULES)
    rule = RULES[name]
    fields = {field.name for field in dataclasses.fields(rule)}
    for parameter in params:
        if parameter not in fields:
            raise UnknownName(f"parameter of heuristic {name!r}", str(parameter), fields)
    try:
        return rule(**params)
    except TypeError as error:
        raise ConfigError(f"heuristic {name!r}: {error}; parameters: {', '.join(sorted(fields))}") from error


class Pipeline(PolicyModule):
    """Heuristics applied in order; an empty list is the base model.

    Args:
        steps: list of `{name, params}`.
        title: name for tables and plots; default: the steps written out.
    """

    def __init__(self, steps: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
        super().__init__()
        self.rules = [make_rule(step) for step in steps]
        self.needs = type(self).needs.union(*(rule.needs for rule in self.rules))
        self.layer_count = max((rule.layer_count for rule in self.rules), default=0)
        self.title = title or " ".join(describe(rule) for rule in self.rules) or "base"

    def initial_state(self, batch_size: int, device: torch.device) -> State | None:
        state = {
            f"{i}/{name}": value
            for i, rule in enumerate(self.rules)
            for name, value in rule.initial_state(batch_size, device).items()
        }
        return state or None

    def forward(self, obs: Observation, state: State | None = None) -> PolicyOutput:
        if state is None and any(rule.initial_state(1, obs.context.device) for rule in self.rules):
            raise InvalidValue("state", None, "what initial_state() or the last step returned", "a rule here has state")
        check_rows(state, obs)
        logprobs, following = normalize(obs.sketch.log_mass), dict(state or {})
        for i, rule in enumerate(self.rules):
            prefix = f"{i}/"
            own = {name.removeprefix(prefix): value for name, value in following.items() if name.startswith(prefix)}
            own = rule.advance(obs, own)
            logprobs = rule.apply(logprobs, obs, own)
            following |= {prefix + name: value for name, value in own.items()}
        return PolicyOutput(logprobs, following or None)


def describe(rule: Rule) -> str:
    """`top_p=0.9`, `mirostat(tau=3.0,eta=0.1,version=2)`, `greedy`."""
    values = {
        field.name: getattr(rule, field.name)
        for field in dataclasses.fields(rule)
        if field.name != "min_tokens_to_keep" or rule.min_tokens_to_keep != 1  # type: ignore[attr-defined]
    }
    if len(values) == 1:
        return f"{rule.name}={next(iter(values.values()))}"
    return rule.name + (f"({','.join(f'{k}={v}' for k, v in values.items())})" if values else "")


def read_pipelines(path: str | Path) -> list[Pipeline]:
    """The `sampling_pipelines` of a YAML file: a list of `{name, weight, processors: [{name, params}]}`."""
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read pipelines from {path}: {error}") from error
    entries = raw.get("sampling_pipelines") if isinstance(raw, dict) else None
    if not entries or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(
            f"{path} holds no 'sampling_pipelines' list of {{name, processors}} entries; write one with: asn-rl grid"
        )
    names = [entry.get("name") for entry in entries]
    twice = {name for name in names if names.count(name) > 1}
    if twice or None in names:
        wrong = sorted(map(str, twice)) or "missing"
        raise ConfigError(f"every pipeline in {path} needs a name of its own; repeated or missing: {wrong}")
    return [Pipeline(entry.get("processors") or [], title=entry["name"]) for entry in entries]
