"""Every heuristic on points against an independent rule over the whole vocabulary, on real next-token logits.

Oracles are transformers' warpers where they exist and float64 brute force otherwise. With every token its own point the
two agree to 1e-5. On the default sketch a cut that falls inside a tail point keeps or drops it whole.

Ties: our rules keep all tokens as probable as the last one kept. So do transformers' top-k, min-p, epsilon, eta and
typical; its top-p cuts through a tie in an order that depends on the sort.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from asn_policies import Pipeline
from asn_rl.backends.toy import ToyBackend
from asn_rl.ops.context import context_vector
from asn_rl.ops.sketch import PointMap, SketchSize, build_sketch, expand, token_points
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Observation, Prompt

INF = math.inf
Oracle = Callable[[Tensor], Tensor]
"""(T, V) float64 logits -> (T, V) float64 logits, -inf where a token is cut"""


def warper(process: hf.LogitsProcessor) -> Oracle:
    return lambda logits: process(torch.zeros(len(logits), 1, dtype=torch.long), logits.clone())  # type: ignore[arg-type]


def entropy(logits: Tensor) -> Tensor:
    logps = torch.log_softmax(logits, -1)
    return -(logps.exp() * torch.where(logps > -INF, logps, 0.0)).sum(-1)


def greedy(logits: Tensor) -> Tensor:
    return torch.where(logits == logits.amax(-1, keepdim=True), logits, -INF)


def top_n_sigma(n: float) -> Oracle:
    def rule(logits: Tensor) -> Tensor:
        bound = logits.amax(-1, keepdim=True) - n * logits.std(-1, unbiased=False, keepdim=True)
        return torch.where(logits >= bound, logits, -INF)

    return rule


def top_h(alpha: float) -> Oracle:
    """The paper's rule by bisection over the length of the prefix, entropies computed from scratch."""

    def rule(logits: Tensor) -> Tensor:
        kept = torch.full_like(logits, -INF)
        for row, out in zip(logits, kept, strict=True):
            order, bound = row.argsort(descending=True), alpha * entropy(row)
            low, high = 1, len(row) + 1  # the first `low` tokens fit, the first `high` do not
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if entropy(row[order[:middle]]) <= bound + 1e-9 else (low, middle)
            out[order[:low]] = row[order[:low]]
        return kept

    return rule


def edt(temperature: float, theta: float, base: float = 0.8) -> Oracle:
    return lambda logits: logits / (temperature * base ** (theta / entropy(logits)))[:, None]


@dataclass(frozen=True)
class Case:
    steps: list[tuple[str, dict[str, float]]]
    oracle: list[Oracle]

    def pipeline(self) -> Pipeline:
        return Pipeline([{"name": name, "params": params} for name, params in self.steps])

    def over_vocabulary(self, logits: Tensor) -> Tensor:
        """(T, V) float64 probabilities."""
        logits = logits.double()
        for rule in self.oracle:
            logits = rule(logits)
        return torch.softmax(logits, -1)


def heat(t: float) -> tuple[tuple[str, dict[str, float]], Oracle]:
    return ("temperature", {"temperature": t}), warper(hf.TemperatureLogitsWarper(t))


def case(name: str, oracle: Oracle, **params: float) -> Case:
    return Case([(name, params)], [oracle])


TRUNCATIONS = {
    "greedy": case("greedy", greedy),
    **{f"top_k {k}": case("top_k", warper(hf.TopKLogitsWarper(k)), top_k=k) for k in (1, 20, 64, 300)},
    **{f"top_p {p}": case("top_p", warper(hf.TopPLogitsWarper(p)), top_p=p) for p in (0.5, 0.9, 0.98)},
    **{f"min_p {m}": case("min_p", warper(hf.MinPLogitsWarper(m)), min_p=m) for m in (0.0005, 0.01, 0.1)},
    **{f"epsilon {e}": case("epsilon", warper(hf.EpsilonLogitsWarper(e)), epsilon=e) for e in (4e-3, 2e-4, 1e-5)},
    **{f"eta {e}": case("eta", warper(hf.EtaLogitsWarper(e)), epsilon=e) for e in (1e-3, 1e-4)},
    **{f"typical {m}": case("typical", warper(hf.TypicalLogitsWarper(m)), mass=m) for m in (0.2, 0.9, 0.95)},
    **{f"top_n_sigma {n}": case("top_n_sigma", top_n_sigma(n), n=n) for n in (0.3, 1.0, 1.5, 3.0)},
    **{f"top_h {a}": case("top_h", top_h(a), alpha=a) for a in (0.1, 0.4, 0.9)},
}
TEMPERATURES = {f"temperature {t}": Case([heat(t)[0]], [heat(t)[1]]) for t in (0.3, 0.7, 1.2, 2.5)}
TEMPERATURES |= {
    f"edt {t}, {theta}": case("edt", edt(t, theta), temperature=t, theta=theta) for t, theta in ((0.7, 0.2), (1.5, 1.0))
}
KEEP = {"min_tokens_to_keep": 5}
COMBINED = {
    "temperature, top_p": Case(
        [heat(0.7)[0], ("top_p", {"top_p": 0.9})], [heat(0.7)[1], warper(hf.TopPLogitsWarper(0.9))]
    ),
    "gemma": Case(
        [heat(1.2)[0], ("top_p", {"top_p": 0.95}), ("top_k", {"top_k": 64})],
        [heat(1.2)[1], warper(hf.TopPLogitsWarper(0.95)), warper(hf.TopKLogitsWarper(64))],
    ),
    "truncation, temperature": Case(
        [("min_p", {"min_p": 0.02}), heat(2.5)[0]], [warper(hf.MinPLogitsWarper(0.02)), heat(2.5)[1]]
    ),
    "typical after top_k": Case(
        [("top_k", {"top_k": 50}), ("typical", {"mass": 0.6})],
        [warper(hf.TopKLogitsWarper(50)), warper(hf.TypicalLogitsWarper(0.6))],
    ),
    "top_p, at least 5": Case([("top_p", {"top_p": 0.1, **KEEP})], [warper(hf.TopPLogitsWarper(0.1, **KEEP))]),  # type: ignore[arg-type]
    "min_p, at least 5": Case([("min_p", {"min_p": 0.9, **KEEP})], [warper(hf.MinPLogitsWarper(0.9, **KEEP))]),  # type: ignore[arg-type]
    "typical, at least 5": Case([("typical", {"mass": 0.01, **KEEP})], [warper(hf.TypicalLogitsWarper(0.01, **KEEP))]),  # type: ignore[arg-type]
    "eta, at least 5": Case([("eta", {"epsilon": 0.9, **KEEP})], [warper(hf.EtaLogitsWarper(0.9, **KEEP))]),  # type: ignore[arg-type]
}  # fmt: skip
CASES = TRUNCATIONS | TEMPERATURES | COMBINED


def observe(logits: Tensor, size: SketchSize) -> tuple[Observation, PointMap]:
    sketch, points = build_sketch(logits, size)
    zeros = torch.zeros(len(logits))
    return Observation(sketch, context_vector(sketch, zeros, zeros, zeros, zeros)), points


def spread(logps: Tensor, obs: Observation, points: PointMap, logits: Tensor) -> Tensor:
    """(T, V) float64 probabilities of a policy given its log-probabilities over points."""
    shift = torch.where(obs.sketch.mask, logps - obs.sketch.log_mass, 0.0)
    return torch.softmax(expand(logits, points, shift).double(), -1)


@pytest.fixture(scope="module")
def rows(smollm_logits: Tensor) -> Tensor:
    """(7, V): confident and open positions."""
    return smollm_logits[::3]


@pytest.fixture(scope="module")
def every_token(rows: Tensor) -> tuple[Observation, PointMap]:
    return observe(rows, SketchSize(rows.shape[-1], 1))


def total_variation(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().sum(-1) / 2


@pytest.mark.parametrize("name", CASES)
def test_with_every_token_a_point_it_is_the_oracle(
    name: str, rows: Tensor, every_token: tuple[Observation, PointMap]
) -> None:
    obs, points = every_token
    actual = spread(CASES[name].pipeline()(obs).logprobs, obs, points, rows)
    expected = CASES[name].over_vocabulary(rows)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    if "edt" not in name:  # at T = 0.001 probabilities underflow in fp32 before they do in float64
        assert torch.equal(actual > 0, expected > 0)


@pytest.mark.parametrize("name", [name for name in TRUNCATIONS if "sigma" not in name])
def test_on_the_default_sketch_only_the_point_of_the_cut_differs(name: str, rows: Tensor) -> None:
    """All tokens in which the supports differ lie in one tail point, whose mass bounds the total variation. Typical
    sampling visits points by their distance from the entropy, so there head points may be left out as well, because a
    tail point was kept whole before them."""
    obs, points = observe(rows, SketchSize())
    actual = spread(CASES[name].pipeline()(obs).logprobs, obs, points, rows)
    expected = CASES[name].over_vocabulary(rows)
    base = torch.softmax(rows.double(), -1)
    where = token_points(rows, points)
    for t in range(len(rows)):
        differs = (actual[t] > 0) != (expected[t] > 0)
        involved = where[t][differs].unique()
        in_tail = involved[involved >= points.size.head]
        assert len(in_tail) <= 1
        assert "typical" in name or len(involved) <= len(in_tail), "a cut in the head must be exact"
        kept = max(base[t][support[t] > 0].sum() for support in (actual, expected))
        mass = base[t][torch.isin(where[t], involved)].sum()
        assert total_variation(actual[t], expected[t]) <= mass / kept + 1e-5


@pytest.mark.parametrize("n", [0.3, 1.0, 1.5, 3.0])
def test_top_n_sigma_on_the_default_sketch_knows_the_deviation_to_six_percent(n: float, rows: Tensor) -> None:
    """The sketch has no spread inside a tail point: measured up to 5.6 % off. Tokens in which the supports differ lie
    that close to the cut, or in the tail point (two octaves at most) that holds it."""
    obs, points = observe(rows, SketchSize())
    actual = spread(case("top_n_sigma", greedy, n=n).pipeline()(obs).logprobs, obs, points, rows)
    deviation = rows.double().std(-1, unbiased=False, keepdim=True)
    cut = rows.amax(-1, keepdim=True) - n * deviation
    differs = (actual > 0) != (rows >= cut)
    reach = 0.06 * n * deviation + torch.where(token_points(rows, points) >= points.size.head, 2 * math.log(2), 0.0)
    assert ((rows - cut).abs() <= reach)[differs].all()


@pytest.mark.parametrize("t", [0.2, 0.7, 1.5, 5.0])
def test_top_n_sigma_keeps_the_same_tokens_at_every_temperature(t: float, rows: Tensor) -> None:
    obs, _ = observe(rows, SketchSize())
    cut = ("top_n_sigma", {"n": 1.0})
    heated = Case([heat(t)[0], cut], []).pipeline()(obs).logprobs
    assert torch.equal(heated > -INF, Case([cut], []).pipeline()(obs).logprobs > -INF)


# Total variation on these rows (entropies 0.01 to 6.5 nats): inside an octave tokens keep the base model's proportions.
MEASURED = {
    "temperature 0.3": 4e-4,
    "temperature 0.7": 1.1e-2,
    "temperature 1.2": 1.1e-2,
    "temperature 2.5": 4.9e-2,
    "edt 0.7, 0.2": 1.1e-2,
    "edt 1.5, 1.0": 2.1e-2,
}


@pytest.mark.parametrize("name", TEMPERATURES)
def test_temperature_on_the_default_sketch(name: str, rows: Tensor) -> None:
    obs, points = observe(rows, SketchSize())
    actual = spread(CASES[name].pipeline()(obs).logprobs, obs, points, rows)
    assert total_variation(actual, CASES[name].over_vocabulary(rows)).max() < 1.2 * MEASURED[name]


def test_ties(rows: Tensor) -> None:
    """bf16 logits. Top-k keeps the ties of the k-th token, here and in transformers. Top-p keeps them here alone."""
    logits = rows.bfloat16().float()
    obs, points = observe(logits, SketchSize(300, 32))
    assert (obs.sketch.log_count[:, :300] > 0).any()

    top_k = CASES["top_k 64"]
    kept = spread(top_k.pipeline()(obs).logprobs, obs, points, logits) > 0
    assert torch.equal(kept, top_k.over_vocabulary(logits) > 0)
    assert (kept.sum(-1) > 64).any()

    top_p = CASES["top_p 0.9"]
    ours = spread(top_p.pipeline()(obs).logprobs, obs, points, logits) > 0
    theirs = top_p.over_vocabulary(logits) > 0
    assert (ours | ~theirs).all()
    extra = (ours & ~theirs)[:6]  # the last row is cut in the tail
    lowest = torch.where(theirs, logits, INF).amin(-1, keepdim=True).expand_as(logits)[:6]
    assert extra.any()
    assert torch.equal(logits[:6][extra], lowest[extra])


def test_top_h_follows_the_paper_and_not_its_code() -> None:
    """Uniform over 100 tokens: the entropy of n of them is log n, so alpha = 0.4 keeps 100^0.4 = 6. Partial sums of
    -p log p, which transformers compares, keep 40. (Ours are 1e-6 nats apart: ties would stay together.)"""
    logits = torch.zeros(1, 100)
    theirs = hf.TopHLogitsWarper(0.4)(torch.zeros(1, 1, dtype=torch.long), logits)  # type: ignore[arg-type]
    obs, _ = observe(logits - torch.arange(100) * 2**-20, SketchSize(100, 1))
    ours = CASES["top_h 0.4"].pipeline()(obs).logprobs
    assert (int((theirs > -INF).sum()), int((ours > -INF).sum())) == (40, 6)


def test_top_h_keeps_a_point_whole_as_soon_as_one_token_of_it_fits() -> None:
    obs, _ = observe(torch.zeros(1, 100), SketchSize(4, 4))
    assert int(torch.isfinite(CASES["top_h 0.4"].pipeline()(obs).logprobs).sum()) == 1
    # p = 1/2 and fifty times 1/100: the prefix has 0.1 nats with one of the fifty, 2.6 with all; alpha H = 0.26.
    obs, _ = observe(torch.tensor([[0.5] + [0.01] * 50]).log(), SketchSize(2, 4))
    assert int(torch.isfinite(CASES["top_h 0.1"].pipeline()(obs).logprobs).sum()) == 2


class MirostatOracle:
    """Algorithms 1 and 2 of arXiv:2007.14966, token by token, in float64."""

    def __init__(self, tau: float, eta: float, version: int, fitted: int = 100) -> None:
        self.tau, self.eta, self.version, self.fitted, self.mu = tau, eta, version, fitted, 2 * tau

    def probabilities(self, logits: Tensor) -> Tensor:
        probs = torch.softmax(logits.double(), -1)
        ranked = probs.sort(descending=True).values
        if self.version == 2:
            keep = (-probs.log2() < self.mu) | (probs == ranked[0])
        else:
            keep = probs >= ranked[self.k(ranked.tolist()) - 1]
        return torch.where(keep, probs, 0.0) / probs[keep].sum()

    def k(self, ranked: list[float]) -> int:
        ratios = [(math.log((i + 1) / i), math.log(ranked[i - 1] / ranked[i])) for i in range(1, self.fitted)]
        s = sum(t * b for t, b in ratios) / sum(t * t for t, _ in ratios)
        epsilon, size = s - 1, len(ranked)
        k = (epsilon * 2**self.mu / (1 - size**-epsilon)) ** (1 / s)
        return min(max(round(k), 1), size)

    def observe(self, logits: Tensor, token: int) -> float:
        surprise = -float(torch.log_softmax(logits.double(), -1)[token])
        self.mu -= self.eta * (surprise / math.log(2) - self.tau)
        return surprise


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mirostat_follows_the_oracle_through_a_completion(
    version: int, dtype: torch.dtype, smollm_logits: Tensor
) -> None:
    """Every token a point; both see the surprises of the same tokens. bf16 rows have ties among the first 100."""
    logits = smollm_logits.to(dtype).float()
    oracle = MirostatOracle(tau=3.0, eta=0.5, version=version)
    policy = case("mirostat", greedy, tau=3.0, eta=0.5, version=version).pipeline()
    state, last, total = policy.initial_state(1, logits.device), 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    supports = set()
    for t, row in enumerate(logits.split(1)):
        sketch, points = build_sketch(row, SketchSize(row.shape[-1], 1))
        counters = (torch.tensor([value]) for value in (float(t), 30.0 - t, last, total))
        obs = Observation(sketch, context_vector(sketch, *counters))
        output = policy(obs, state)
        expected = oracle.probabilities(row[0])
        torch.testing.assert_close(spread(output.logprobs, obs, points, row)[0], expected, rtol=0, atol=1e-5)
        supports.add(int((expected > 0).sum()))
        last = oracle.observe(row[0], int(torch.multinomial(expected, 1, generator=generator)))
        state, total = output.state, total + last
    assert len(supports) > 8, "the comparison needs cuts of many sizes"


def test_mirostat_1_fits_as_many_tokens_as_the_head_holds(rows: Tensor) -> None:
    """The default head gives 64 of the paper's 100 tokens."""
    obs, points = observe(rows, SketchSize())
    policy = case("mirostat", greedy, tau=5.0, version=1).pipeline()
    kept = policy(obs, policy.initial_state(len(rows), rows.device)).logprobs > -INF
    oracle = MirostatOracle(tau=5.0, eta=0.1, version=1, fitted=64)
    where = token_points(rows, points)
    for t, row in enumerate(rows):
        expected = oracle.probabilities(row) > 0
        assert 1 < expected.sum() < 2000
        assert set(where[t][expected].tolist()) == set(kept[t].nonzero().squeeze(-1).tolist())


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_holds_its_target(version: int) -> None:
    """4,000 tokens of a toy model with 4.3 bits of entropy are drawn at 2.5 bits of mean surprise, within 0.05."""
    table = ToyBackend.random(vocab=120, seed=3).table
    table[:, 0] = -INF  # never ends
    backend = ToyBackend(table)
    prompts = [Prompt("a", "w1")]
    config = RolloutConfig(max_new_tokens=1000)

    def mean_bits(policy: Pipeline) -> float:
        drawn = rollout(policy, backend, prompts, config, num_generations=4, seed=1)
        return -float(drawn.base_logprobs.double().mean()) / math.log(2)

    assert mean_bits(Pipeline([])) > 4
    assert abs(mean_bits(case("mirostat", greedy, tau=2.5, version=version).pipeline()) - 2.5) < 0.05
