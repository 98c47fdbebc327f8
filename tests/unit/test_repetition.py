"""Rules that read the generated text or earlier layers, against the same rules over the whole vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from asn_policies import Pipeline
from asn_policies.heuristics import make_rule
from asn_policies.heuristics.layer_contrast import layer_divergences
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import InvalidValue
from asn_rl.observing import history_entry, layer_entry
from asn_rl.ops.context import context_vector
from asn_rl.ops.history import History, empty_history, remember
from asn_rl.ops.sketch import PointMap, SketchSize, build_sketch, expand
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Observation, Prompt
from asn_rl.unroll import recorded_logprobs

SAID = [[4, 9, 4, 30, 4], [1, 1, 1, 1, 2], [7, 8, 9, 10, 11]]
LOGITS = 3 * torch.randn(3, 60, generator=torch.Generator().manual_seed(0))


def step(name: str, **params: Any) -> dict[str, Any]:
    return {"name": name, "params": params}


def history(said: list[list[int]], bound: int = 8) -> History:
    table = empty_history(len(said), bound, "cpu")
    for t, tokens in enumerate(zip(*said, strict=True)):
        table = remember(table, torch.tensor(tokens), t)
    return table


def observe(logits: Tensor, said: list[list[int]], size: SketchSize) -> tuple[Observation, PointMap]:
    table = history(said)
    sketch, points = build_sketch(logits, size, table.tokens)
    context = context_vector(sketch, *(torch.full((len(logits),), value) for value in (5.0, 9.0, 2.0, 7.0)))
    entry = history_entry(logits, sketch, points, table, len(said[0]))
    return Observation(sketch, context, history=entry), points


def over_vocabulary(policy: Pipeline, logits: Tensor, said: list[list[int]], size: SketchSize) -> Tensor:
    """(B, V) float64 probabilities."""
    obs, points = observe(logits, said, size)
    shift = torch.where(obs.sketch.mask, policy(obs).logprobs - obs.sketch.log_mass, 0.0)
    return torch.softmax(expand(logits, points, shift).double(), -1)


def by_transformers(logits: Tensor, said: list[list[int]], penalty: float) -> Tensor:
    scores = torch.log_softmax(logits.double(), -1)
    return torch.softmax(RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(said), scores), -1)  # type: ignore[arg-type]


@pytest.mark.parametrize("penalty", [1.0, 1.3, 2.5, 0.8])
@pytest.mark.parametrize("size", [SketchSize(60, 1), SketchSize(8, 4)], ids=["every token", "sketch"])
def test_repetition_penalty_is_that_of_transformers_on_log_probabilities(size: SketchSize, penalty: float) -> None:
    ours = over_vocabulary(Pipeline([step("repetition_penalty", penalty=penalty)]), LOGITS, SAID, size)
    torch.testing.assert_close(ours, by_transformers(LOGITS, SAID, penalty), atol=1e-6, rtol=1e-5)


def test_repetition_penalty_on_real_logits(smollm_logits: Tensor) -> None:
    said = torch.cat([smollm_logits.topk(3, -1).indices, torch.arange(100, 102).expand(len(smollm_logits), 2)], -1)
    logits = smollm_logits.float()
    ours = over_vocabulary(
        Pipeline([step("repetition_penalty", penalty=1.4)]), logits, said.tolist(), SketchSize(64, 32)
    )
    torch.testing.assert_close(ours, by_transformers(logits, said.tolist(), 1.4), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("frequency", "presence"), [(0.7, 0.0), (0.0, 1.1), (0.4, -0.5), (-1.0, 0.3)])
def test_frequency_and_presence_are_those_of_the_interface(frequency: float, presence: float) -> None:
    count = torch.stack([torch.bincount(torch.tensor(row), minlength=60) for row in SAID]).double()
    expected = torch.softmax(LOGITS.double() - frequency * count - presence * (count > 0), -1)
    policy = Pipeline([step("frequency_presence", frequency=frequency, presence=presence)])
    for size in (SketchSize(60, 1), SketchSize(8, 4)):
        torch.testing.assert_close(over_vocabulary(policy, LOGITS, SAID, size), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rule", [step("repetition_penalty", penalty=1.3), step("frequency_presence", frequency=0.5)])
def test_a_constant_on_the_logits_and_the_order_of_the_vocabulary_change_nothing(rule: dict[str, Any]) -> None:
    policy, size = Pipeline([rule]), SketchSize(8, 4)
    probs = over_vocabulary(policy, LOGITS, SAID, size)
    torch.testing.assert_close(over_vocabulary(policy, LOGITS - 37.5, SAID, size), probs, atol=1e-6, rtol=1e-4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    renamed = torch.argsort(order)[torch.tensor(SAID)].tolist()
    torch.testing.assert_close(over_vocabulary(policy, LOGITS[:, order], renamed, size), probs[:, order])


def test_rules_act_on_what_the_rule_before_left() -> None:
    """Penalty after top-k: the tokens that were cut stay cut, the scores are renormalised."""
    policy = Pipeline([step("top_k", top_k=3), step("repetition_penalty", penalty=1.5)])
    top = LOGITS.topk(3, -1)
    said = [[int(row[0]), int(row[2])] for row in top.indices]
    scores = torch.log_softmax(top.values.double(), -1) * torch.tensor([1.5, 1.0, 1.5])
    ours = over_vocabulary(policy, LOGITS, said, SketchSize(60, 1))
    torch.testing.assert_close(ours.gather(-1, top.indices), torch.softmax(scores, -1), atol=1e-6, rtol=1e-5)


def test_the_rollout_captures_what_the_rules_read() -> None:
    backend, prompts = ToyBackend.random(12, seed=1, scale=1.0), [Prompt(str(i), f"w{i}") for i in range(1, 5)]
    config = RolloutConfig(max_new_tokens=12, head=6, tail=3, tracked=12)
    policy = Pipeline([step("repetition_penalty", penalty=4.0), step("temperature", temperature=0.9)])
    assert policy.needs == {"history"}
    runs = [rollout(p, backend, prompts, config, num_generations=8, seed=3) for p in (policy, Pipeline([]))]
    distinct = [sum(len(set(ids)) / len(ids) for ids in run.completion_ids) / len(run) for run in runs]
    assert distinct[0] > distinct[1] + 0.05

    at = runs[0].points.unsqueeze(-1)
    inner = runs[0].base_logprobs - runs[0].observations.sketch.log_mass.gather(-1, at).squeeze(-1)
    again = recorded_logprobs(policy, runs[0]).gather(-1, at).squeeze(-1) + inner
    torch.testing.assert_close(again, runs[0].behaviour_logprobs)


LAYERS = 3 * torch.randn(3, 4, 60, generator=torch.Generator().manual_seed(7))


def with_layers(logits: Tensor, layers: Tensor, size: SketchSize) -> tuple[Observation, PointMap]:
    sketch, points = build_sketch(logits, size)
    context = context_vector(sketch, *(torch.full((len(logits),), value) for value in (5.0, 9.0, 2.0, 7.0)))
    return Observation(sketch, context, layer_logprobs=layer_entry(logits, sketch, points, layers)), points


def divergences(logits: Tensor, layers: Tensor) -> Tensor:
    """(B, L) Jensen-Shannon divergences over the vocabulary, float64."""
    last, earlier = torch.softmax(logits.double(), -1).unsqueeze(1), torch.softmax(layers.double(), -1)
    middle = (last + earlier) / 2
    halves = [torch.special.entr(p).sum(-1) for p in (last, earlier)]
    return torch.special.entr(middle).sum(-1) - sum(halves) / 2


def dola(logits: Tensor, layers: Tensor, alpha: float, chosen: Tensor) -> Tensor:
    """The paper's distribution, float64."""
    last = torch.log_softmax(logits.double(), -1)
    earlier = torch.log_softmax(layers.double(), -1)[torch.arange(len(logits)), chosen]
    keep = last.exp() >= alpha * last.exp().amax(-1, keepdim=True)
    return torch.softmax(torch.where(keep, last - earlier, -math.inf), -1)


def contrasted(policy: Pipeline, logits: Tensor, layers: Tensor, size: SketchSize) -> Tensor:
    obs, points = with_layers(logits, layers, size)
    shift = torch.where(obs.sketch.mask, policy(obs).logprobs - obs.sketch.log_mass, 0.0)
    return torch.softmax(expand(logits, points, shift).double(), -1)


@pytest.mark.parametrize("alpha", [0.1, 0.013])
def test_layer_contrast_is_the_papers(alpha: float) -> None:
    size, far = SketchSize(60, 1), divergences(LOGITS, LAYERS)
    obs, _ = with_layers(LOGITS, LAYERS, size)
    assert obs.layer_logprobs is not None
    ours = layer_divergences(obs.sketch.log_mass, obs.layer_logprobs, obs.sketch.log_count)
    torch.testing.assert_close(ours.double(), far, atol=1e-5, rtol=1e-5)

    expected = dola(LOGITS, LAYERS, alpha, far.argmax(-1))
    policy = Pipeline([step("layer_contrast", alpha=alpha)])
    torch.testing.assert_close(contrasted(policy, LOGITS, LAYERS, size), expected, atol=1e-5, rtol=1e-4)
    for layer in range(4):
        expected = dola(LOGITS, LAYERS, alpha, torch.full((3,), layer))
        policy = Pipeline([step("layer_contrast", alpha=alpha, layer=layer)])
        torch.testing.assert_close(contrasted(policy, LOGITS, LAYERS, size), expected, atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 8), head=st.integers(1, 20))
def test_the_divergence_over_points_is_a_lower_bound(seed: int, scale: float, head: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, layers = scale * torch.randn(2, 40, generator=generator), scale * torch.randn(2, 3, 40, generator=generator)
    obs, _ = with_layers(logits, layers, SketchSize(head, 4))
    assert obs.layer_logprobs is not None
    ours = layer_divergences(obs.sketch.log_mass, obs.layer_logprobs, obs.sketch.log_count)
    assert (ours >= -1e-5).all()
    assert (ours <= divergences(logits, layers) + 1e-5).all()


def test_layer_contrast_of_the_real_model(smollm: HFBackend) -> None:
    """On the default sketch, against the whole vocabulary: the layer, and the distribution where it is the same."""
    layers, policy = (6, 12, 18, 24), Pipeline([step("layer_contrast")])
    prompt = smollm.encode("Name an animal.")
    text = "The animal I'm referring to is the African elephant. It lives in the savannah, where it eats grass."
    ids = smollm.tokenizer(text, add_special_tokens=False)["input_ids"]
    scored = next(iter(smollm.score_many([prompt], [ids], layers=layers)))
    assert scored.layer_logits is not None
    logits, earlier = scored.logits.float(), scored.layer_logits.float()
    obs, _ = with_layers(logits, earlier, SketchSize())
    assert obs.layer_logprobs is not None
    ours = layer_divergences(obs.sketch.log_mass, obs.layer_logprobs, obs.sketch.log_count)
    full = divergences(logits, earlier)
    same = ours.argmax(-1) == full.argmax(-1)
    assert float(same.float().mean()) > 0.6
    lost = full.amax(-1) - full.gather(-1, ours.argmax(-1, keepdim=True)).squeeze(-1)
    assert float(lost.max()) < 3e-3, "another layer is only taken where two are equally far"
    expected = dola(logits, earlier, 0.1, full.argmax(-1))
    distance = (contrasted(policy, logits, earlier, SketchSize()) - expected).abs().sum(-1) / 2
    assert float(distance[same].max()) < 1e-3

    config = RolloutConfig(max_new_tokens=6, layers=layers)
    run = rollout(policy, smollm, [Prompt("a", "Name an animal.")], config, num_generations=2)
    at = run.points.unsqueeze(-1)
    inner = run.base_logprobs - run.observations.sketch.log_mass.gather(-1, at).squeeze(-1)
    again = recorded_logprobs(policy, run).gather(-1, at).squeeze(-1) + inner
    torch.testing.assert_close(again, run.behaviour_logprobs)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (step("repetition_penalty", penalty=0.0), r"repetition_penalty\.penalty must be in \(0, inf\), got 0\.0"),
        (step("repetition_penalty", penalty=math.inf), r"repetition_penalty\.penalty must be in \(0, inf\)"),
        (step("frequency_presence", frequency=2.1), r"frequency_presence\.frequency must be in \[-2, 2\], got 2\.1"),
        (step("frequency_presence", presence=math.nan), r"frequency_presence\.presence must be in \[-2, 2\], got nan"),
        (step("layer_contrast", alpha=0.0), r"layer_contrast\.alpha must be in \(0, 1\], got 0\.0"),
        (step("layer_contrast", layer=-1), r"layer_contrast\.layer must be an integer >= 0, or null"),
        (step("layer_contrast", layer=0.5), r"layer_contrast\.layer must be an integer >= 0, or null"),
    ],
)
def test_illegal_parameters_are_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        make_rule(rule)


def test_what_was_not_captured_is_named() -> None:
    sketch, _ = build_sketch(LOGITS, SketchSize(8, 4))
    obs = Observation(sketch, torch.zeros(3, 8))
    with pytest.raises(InvalidValue, match=r"observation\.history must be a tensor, got None; a rule reads it"):
        Pipeline([step("frequency_presence", presence=1.0)])(obs)
    with pytest.raises(InvalidValue, match=r"observation\.layer_logprobs must be a tensor"):
        Pipeline([step("layer_contrast")])(obs)
    layered, _ = with_layers(LOGITS, LAYERS, SketchSize(8, 4))
    with pytest.raises(InvalidValue, match=r"layer_contrast\.layer must be below 4, the number of captured layers"):
        Pipeline([step("layer_contrast", layer=4)])(layered)
