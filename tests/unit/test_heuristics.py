"""Heuristics by hand: refusals, grammar, files, grids, order and state of pipelines."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from asn_policies import Pipeline
from asn_policies.heuristics import RULES, grid, make_rule, read_pipelines
from asn_rl.errors import ConfigError, InvalidValue, UnknownName
from asn_rl.ops.context import context_vector
from asn_rl.ops.sketch import SketchSize, build_sketch
from asn_rl.types import Observation

INF = math.inf
Step = dict[str, Any]


def step(name: str, **params: Any) -> Step:
    return {"name": name, "params": params}


def observe(
    probs: list[float], size: SketchSize | None = None, position: float = 0.0, surprise: float = 0.0
) -> Observation:
    """One row with these token probabilities."""
    sketch, _ = build_sketch(torch.tensor([probs]).log(), size or SketchSize(len(probs), 1))
    counters = (torch.tensor([value]) for value in (position, 9.0, surprise, surprise))
    return Observation(sketch, context_vector(sketch, *counters))


def kept(steps: list[Step], probs: list[float], size: SketchSize | None = None) -> list[float]:
    """Probabilities of the points after the pipeline, the empty ones left out, rounded to 4 digits."""
    obs = observe(probs, size)
    policy = Pipeline(steps)
    logps = policy(obs, policy.initial_state(1, obs.context.device)).logprobs[obs.sketch.mask]
    return [round(p, 4) for p in logps.exp().tolist()]


P = [0.5, 0.25, 0.12, 0.06, 0.04, 0.02, 0.01]
"""Entropy 1.3695 nats."""
SQUARED = [round(p * p / sum(q * q for q in P), 4) for p in P]
TWO = [0.6667, 0.3333, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([step("greedy")], [1, 0, 0, 0, 0, 0, 0]),
        ([step("temperature", temperature=0.5)], SQUARED),
        ([step("top_k", top_k=2)], TWO),
        ([step("top_k", top_k=100)], P),
        ([step("top_p", top_p=0.74)], TWO),
        ([step("top_p", top_p=0.76)], [0.5747, 0.2874, 0.1379, 0, 0, 0, 0]),
        ([step("top_p", top_p=1.0)], P),
        ([step("min_p", min_p=0.3)], TWO),
        ([step("min_p", min_p=0.0)], P),
        ([step("epsilon", epsilon=0.2)], TWO),
        ([step("epsilon", epsilon=0.9)], [1, 0, 0, 0, 0, 0, 0]),
        ([step("top_h", alpha=1.0)], P),
        ([step("mirostat", tau=1.2)], TWO),  # mu = 2.4 bits: 1/2 and 1/4
        ([step("edt", temperature=0.5, theta=0.0)], SQUARED),
    ],
)
def test_rules_on_a_distribution_worked_by_hand(steps: list[Step], expected: list[float]) -> None:
    assert kept(steps, P) == expected


def test_typical_may_drop_the_most_probable_token() -> None:
    """0.25 (1.386 nats) is closest to the entropy, then 0.5 (0.693), then 0.12 (2.120)."""
    assert kept([step("typical", mass=0.2)], P) == [0, 1, 0, 0, 0, 0, 0]
    assert kept([step("typical", mass=0.3)], P) == TWO


def test_eta_falls_with_the_entropy() -> None:
    """sqrt(0.2) exp(-H) is 0.114 for P, below epsilon = 0.2, and 0.30 where the model is sure, above it."""
    assert kept([step("eta", epsilon=0.2)], P) == [0.5747, 0.2874, 0.1379, 0, 0, 0, 0]
    assert kept([step("epsilon", epsilon=0.2)], P) == TWO
    assert kept([step("eta", epsilon=0.2)], [0.75, 0.22, 0.03]) == [0.7732, 0.2268, 0]


def test_top_n_sigma_cuts_by_the_deviation_of_the_logits() -> None:
    """Logits 4, 3, 2, 1, 0: deviation sqrt(2)."""
    probs = torch.softmax(torch.arange(4.0, -1, -1), 0).tolist()
    assert [p > 0 for p in kept([step("top_n_sigma", n=1.0)], probs)] == [True, True, False, False, False]
    assert [p > 0 for p in kept([step("top_n_sigma", n=1.5)], probs)] == [True, True, True, False, False]


def test_edt_is_cold_where_the_model_is_sure() -> None:
    """T = 0.8^(1/H): the largest of two probabilities grows more, the smaller the entropy."""
    sure, unsure = ([0.95, 0.05], [0.55, 0.45])
    rule = [step("edt", temperature=1.0, theta=1.0)]
    gain = [kept(rule, probs)[0] / probs[0] for probs in (sure, unsure)]
    assert kept(rule, sure)[0] > 0.98
    assert gain[1] > 1
    heat = 0.8 ** (1 / -sum(p * math.log(p) for p in sure))
    weights = [p ** (1 / heat) for p in sure]
    assert kept(rule, sure)[0] == round(weights[0] / sum(weights), 4)


@pytest.mark.parametrize(
    "rule",
    [
        step("top_k", top_k=1),
        step("top_p", top_p=0.01),
        step("min_p", min_p=1.0),
        step("epsilon", epsilon=0.9),
        step("eta", epsilon=0.9),
        step("top_n_sigma", n=0.01),
        step("top_h", alpha=0.01),
        step("typical", mass=0.01),
    ],
)
@pytest.mark.parametrize("least", [1, 3, 100])
def test_min_tokens_to_keep(rule: Step, least: int) -> None:
    steps = [{**rule, "params": {**rule["params"], "min_tokens_to_keep": least}}]
    probs = kept(steps, P)
    # epsilon 0.9 etc. would keep none; eta's own bound keeps two here.
    own = sum(p > 0 for p in kept([rule], P))
    assert sum(p > 0 for p in probs) == max(own, min(least, len(P)))
    assert abs(sum(probs) - 1) < 1e-3


def test_ties_count_as_tokens_towards_the_minimum() -> None:
    """Two tied tokens share a point: three tokens need two points."""
    probs = [0.3, 0.3, 0.2, 0.1, 0.1]
    assert kept([step("top_p", top_p=0.1, min_tokens_to_keep=3)], probs) == [0.75, 0.25, 0]


ILLEGAL = [
    ("temperature", {"temperature": 0}, r"temperature.temperature must be in \(0, inf\), got 0; for T = 0 use greedy"),
    ("temperature", {"temperature": -1.0}, r"in \(0, inf\), got -1.0"),
    ("temperature", {"temperature": INF}, r"in \(0, inf\), got inf"),
    ("temperature", {"temperature": math.nan}, r"in \(0, inf\), got nan"),
    ("edt", {"temperature": 0.0, "theta": 1.0}, r"edt.temperature must be in \(0, inf\), got 0.0"),
    ("edt", {"temperature": 1.0, "theta": -0.1}, r"edt.theta must be in \[0, inf\), got -0.1"),
    ("edt", {"temperature": 1.0, "theta": 1.0, "base": 1.1}, r"edt.base must be in \(0, 1\], got 1.1"),
    ("edt", {"temperature": 1.0, "theta": 1.0, "base": 0}, r"edt.base must be in \(0, 1\], got 0"),
    ("top_k", {"top_k": 0}, "top_k.top_k must be an integer >= 1, got 0"),
    ("top_k", {"top_k": 2.5}, "top_k.top_k must be an integer >= 1, got 2.5"),
    ("top_p", {"top_p": 0.0}, r"top_p.top_p must be in \(0, 1\], got 0.0"),
    ("top_p", {"top_p": 1.3}, r"top_p.top_p must be in \(0, 1\], got 1.3"),
    ("top_p", {"top_p": math.nan}, r"in \(0, 1\], got nan"),
    ("min_p", {"min_p": -0.1}, r"min_p.min_p must be in \[0, 1\], got -0.1"),
    ("min_p", {"min_p": 1.01}, r"min_p.min_p must be in \[0, 1\], got 1.01"),
    ("typical", {"mass": 0}, r"typical.mass must be in \(0, 1\), got 0"),
    ("typical", {"mass": 1}, r"typical.mass must be in \(0, 1\), got 1"),
    ("epsilon", {"epsilon": 0}, r"epsilon.epsilon must be in \(0, 1\), got 0"),
    ("epsilon", {"epsilon": 1.0}, r"epsilon.epsilon must be in \(0, 1\), got 1.0"),
    ("eta", {"epsilon": 0}, r"eta.epsilon must be in \(0, 1\), got 0"),
    ("eta", {"epsilon": 2}, r"eta.epsilon must be in \(0, 1\), got 2"),
    ("top_n_sigma", {"n": 0}, r"top_n_sigma.n must be in \(0, inf\), got 0"),
    ("top_n_sigma", {"n": INF}, r"top_n_sigma.n must be in \(0, inf\), got inf"),
    ("top_h", {"alpha": 0}, r"top_h.alpha must be in \(0, 1\], got 0"),
    ("top_h", {"alpha": 1.2}, r"top_h.alpha must be in \(0, 1\], got 1.2"),
    ("mirostat", {"tau": 0}, r"mirostat.tau must be in \(0, inf\) bits, got 0"),
    ("mirostat", {"eta": 0}, r"mirostat.eta must be in \(0, 1\], got 0"),
    ("mirostat", {"eta": 1.5}, r"mirostat.eta must be in \(0, 1\], got 1.5"),
    ("mirostat", {"version": 3}, "mirostat.version must be 1 or 2, got 3"),
    ("repetition_penalty", {"penalty": 0}, r"repetition_penalty.penalty must be in \(0, inf\), got 0"),
    ("frequency_presence", {"frequency": 2.5}, r"frequency_presence.frequency must be in \[-2, 2\], got 2.5"),
    ("frequency_presence", {"presence": -3}, r"frequency_presence.presence must be in \[-2, 2\], got -3"),
    ("layer_contrast", {"alpha": 0}, r"layer_contrast.alpha must be in \(0, 1\], got 0"),
    ("layer_contrast", {"layer": -1}, "layer_contrast.layer must be an integer >= 0, or null"),
    *(
        (name, {**params, "min_tokens_to_keep": least}, f"{name}.min_tokens_to_keep must be an integer >= 1")
        for name, params in {
            "top_k": {"top_k": 3}, "top_p": {"top_p": 0.5}, "min_p": {"min_p": 0.5}, "typical": {"mass": 0.5},
            "epsilon": {"epsilon": 0.5}, "eta": {"epsilon": 0.5}, "top_n_sigma": {"n": 1.0}, "top_h": {"alpha": 0.5},
        }.items()
        for least in (0, 1.5)
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "params", "message"), ILLEGAL)
def test_illegal_parameters_are_refused_with_the_allowed_range(name: str, params: Step, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        make_rule(step(name, **params))


def test_every_parameter_of_every_rule_has_an_illegal_value_above() -> None:
    tried = {(name, key) for name, params, message in ILLEGAL for key in params if f"{name}.{key} must" in message}
    existing = {(rule.name, field.name) for rule in RULES.values() for field in dataclasses.fields(rule)}
    assert existing == tried


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (step("topp", top_p=0.9), UnknownName, "unknown heuristic 'topp'. Did you mean 'top_p'"),
        (step("nothing"), UnknownName, "Known: edt, epsilon, eta, frequency_presence, greedy, layer_contrast, min_p"),
        (step("top_p", topp=0.9), UnknownName, "unknown parameter of heuristic 'top_p' 'topp'. Did you mean 'top_p'"),
        (step("greedy", top_k=1), UnknownName, "unknown parameter of heuristic 'greedy' 'top_k'"),
        (step("top_p"), ConfigError, "heuristic 'top_p': .*missing.*'top_p'.*parameters: min_tokens_to_keep, top_p"),
        (step("top_p", top_p="0.9"), ConfigError, "heuristic 'top_p': .*'str'"),
        ({"params": {"top_p": 0.9}}, ConfigError, "a pipeline step is {name, params}.*known names: edt"),
        ({"name": "top_p", "top_p": 0.9}, ConfigError, "a pipeline step is {name, params}"),
        ({"name": "top_p", "params": [0.9]}, ConfigError, "params a mapping"),
        ({"name": ["top_p"]}, ConfigError, "a pipeline step is {name, params}"),
        ("top_p", ConfigError, "a pipeline step is {name, params}.*got 'top_p'"),
    ],
)
def test_the_grammar_of_a_step(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_rule(given)
    with pytest.raises(error, match=message):
        Pipeline([given])


def test_steps_without_parameters() -> None:
    assert make_rule({"name": "greedy"}) == make_rule({"name": "greedy", "params": None}) == RULES["greedy"]()


@pytest.mark.parametrize(
    ("steps", "title"),
    [
        ([], "base"),
        ([step("greedy")], "greedy"),
        ([step("temperature", temperature=0.7), step("top_p", top_p=0.9)], "temperature=0.7 top_p=0.9"),
        ([step("top_k", top_k=5, min_tokens_to_keep=2)], "top_k(min_tokens_to_keep=2,top_k=5)"),
        ([step("mirostat")], "mirostat(tau=3.0,eta=0.1,version=2)"),
    ],
)
def test_titles_say_what_a_pipeline_does(steps: list[Step], title: str) -> None:
    assert Pipeline(steps).title == title
    assert Pipeline(steps, title="mine").title == "mine"


def test_the_order_of_a_pipeline_matters() -> None:
    """Two hot steps: p^(1/2) first flattens P, then 0.6 of the mass needs three tokens; before that it needs two."""
    heat, cut = step("temperature", temperature=2.0), step("top_p", top_p=0.6)
    assert sum(p > 0 for p in kept([heat, cut], P)) == 3
    assert sum(p > 0 for p in kept([cut, heat], P)) == 2


def test_an_empty_pipeline_is_the_base_model() -> None:
    assert kept([], P) == P


def run(policy: Pipeline, surprises: list[float]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Log-probabilities along steps that each follow a token of this surprise (nats), and the last state."""
    state, seen = policy.initial_state(1, torch.device("cpu")), []
    for t, surprise in enumerate(surprises):
        output = policy(observe(P, position=float(t), surprise=surprise), state)
        state = output.state
        seen.append(output.logprobs)
    assert state is not None
    return seen, state


def test_mirostat_moves_by_eta_times_the_excess_in_bits() -> None:
    bits = math.log(2)
    _, state = run(Pipeline([step("mirostat", tau=2.0, eta=0.5)]), [0.0, 5 * bits, 1 * bits])
    assert state["0/mu"].item() == pytest.approx(4.0 - 0.5 * (5 - 2) - 0.5 * (1 - 2))


def test_states_of_two_rules_do_not_mix() -> None:
    surprises = [0.0, 3.0, 0.5, 0.1]
    first, second = step("mirostat", tau=1.0, eta=0.5), step("mirostat", tau=2.5, eta=0.1, version=2)
    _, both = run(Pipeline([first, step("temperature", temperature=1.5), second]), surprises)
    _, alone_first = run(Pipeline([first]), surprises)
    _, alone_second = run(Pipeline([second]), surprises)
    assert set(both) == {"0/mu", "2/mu"}
    assert torch.equal(both["0/mu"], alone_first["0/mu"])
    assert torch.equal(both["2/mu"], alone_second["0/mu"])


def test_a_pipeline_keeps_state_that_is_not_its_own() -> None:
    output = Pipeline([step("greedy")])(observe(P), {"other": torch.ones(1)})
    assert output.state is not None
    assert set(output.state) == {"other"}


def test_a_stateless_pipeline_has_no_state() -> None:
    policy = Pipeline([step("top_k", top_k=2)])
    assert policy.initial_state(3, torch.device("cpu")) is None
    assert policy(observe(P)).state is None


def test_a_missing_state_is_named() -> None:
    with pytest.raises(InvalidValue, match="what initial_state"):
        Pipeline([step("mirostat")])(observe(P))


def test_pipelines_are_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "pipelines.yaml"
    path.write_text(yaml.safe_dump({"sampling_pipelines": [*grid("filtered"), {"name": "plain", "weight": 1}]}))
    pipelines = read_pipelines(path)
    assert len(pipelines) == 144
    assert pipelines[0].title == "temp 0.3"
    assert pipelines[0].rules == [make_rule(step("temperature", temperature=0.3))]
    assert (pipelines[-1].title, pipelines[-1].rules) == ("plain", [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sampling_pipelines: [", "cannot read pipelines"),
        ("[1, 2]", "holds no 'sampling_pipelines' list"),
        ("pipelines: []", "holds no 'sampling_pipelines' list"),
        ("sampling_pipelines: []", "asn-rl grid"),
        ("sampling_pipelines: {name: a}", "holds no 'sampling_pipelines' list"),
        ("sampling_pipelines: [greedy]", "holds no 'sampling_pipelines' list"),
        ("sampling_pipelines: [{name: a}, {name: a}]", "repeated or missing: \\['a'\\]"),
        ("sampling_pipelines: [{processors: []}]", "repeated or missing: missing"),
        ("sampling_pipelines: [{name: a, processors: [top_k]}]", "a pipeline step is"),
        ("sampling_pipelines: [{name: a, processors: [{name: top_kk}]}]", "Did you mean 'top_k'"),
    ],
)
def test_files_that_hold_no_pipelines(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pipelines.yaml"
    path.write_text(text)
    with pytest.raises((ConfigError, UnknownName), match=message):
        read_pipelines(path)


def test_a_missing_or_binary_file_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    for name in ("missing.yaml", "binary.yaml"):
        with pytest.raises(ConfigError, match="cannot read pipelines"):
            read_pipelines(tmp_path / name)


@pytest.mark.parametrize(
    ("kind", "family", "count"),
    [
        ("full", "llama", 396),
        ("full", "gemma", 396),
        ("full", "qwen", 396),
        ("full", "none", 384),
        ("filtered", "llama", 143),
        ("filtered", "qwen", 143),
        ("filtered", "none", 134),
    ],
)
def test_grids_have_the_published_sizes_and_unique_names(kind: str, family: str, count: int) -> None:
    entries = grid(kind, family)
    assert len(entries) == len({entry["name"] for entry in entries}) == count
    assert all(entry["processors"][0]["name"] == "temperature" for entry in entries)
    for entry in entries:
        Pipeline(entry["processors"], title=entry["name"])


def test_grid_temperatures_are_the_published_ones() -> None:
    heats = {entry["processors"][0]["params"]["temperature"] for entry in grid("full")}
    assert sorted(heats) == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.4, 1.7, 2.1, 2.5]
    filtered = grid("filtered")
    for name, hottest in (("top_k", 1.4), ("epsilon", 1.4), ("min_p", 2.1)):
        ending = [entry["processors"][0]["params"] for entry in filtered if entry["processors"][-1]["name"] == name]
        assert max(params["temperature"] for params in ending) == hottest


def test_official_extras_keep_their_order() -> None:
    official = {family: grid("filtered", family)[1]["processors"][1:] for family in ("llama", "gemma", "qwen")}
    assert official["llama"] == [step("top_p", top_p=0.9)]
    assert official["gemma"] == [step("top_p", top_p=0.95), step("top_k", top_k=64)]
    assert official["qwen"] == [step("top_p", top_p=0.8), step("top_k", top_k=20)]


def test_unknown_grids_and_families() -> None:
    with pytest.raises(UnknownName, match=r"unknown grid 'ful'\. Did you mean 'full'"):
        grid("ful")
    with pytest.raises(UnknownName, match=r"unknown model family 'lama'\. Did you mean 'llama'"):
        grid("full", "lama")
