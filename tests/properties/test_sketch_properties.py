"""The promises of DESIGN section 2, against float64 computations over the whole vocabulary."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asn_rl.errors import InvalidLogits, InvalidValue
from asn_rl.ops import context, logprobs
from asn_rl.ops.draws import invert_cdf
from asn_rl.ops.sketch import (
    PointMap,
    Sketch,
    SketchSize,
    build_sketch,
    choose_tokens,
    expand,
    points_of,
    token_points,
)

INF = math.inf
TOLERANCE = 1e-5
MODEST = settings(max_examples=80, deadline=None)

# Logits are multiples of 1/64, so that adding one constant to all is exact and ties are common.
grid = st.integers(-1900, 1900)
coarse = st.integers(-4, 4).map(lambda i: 96 * i)
sizes = st.builds(SketchSize, st.integers(1, 12), st.integers(1, 9))
seeds = st.integers(0, 2**31 - 1)


@st.composite
def logit_rows(draw: st.DrawFn) -> Tensor:
    """(V,) logits with ties and impossible tokens."""
    values = st.one_of(grid, coarse) if draw(st.booleans()) else coarse
    row = draw(st.lists(values, min_size=1, max_size=40))
    banned = draw(st.sets(st.integers(0, len(row) - 1), max_size=len(row) - 1))
    return torch.tensor([-INF if i in banned else value / 64 for i, value in enumerate(row)])


def oracle_points(logits: Tensor, size: SketchSize) -> list[int]:
    """Point of every token, from the definition in words."""
    values = logits.double().tolist()
    ranked = sorted(values, reverse=True)
    v = ranked[size.head] if len(ranked) > size.head else -INF

    edges, low = [], 1.0  # lower ends of the bins, relative to the probability of v
    for i in range(size.tail):
        narrow = 0.75 if i % 2 == 0 else 2 / 3
        low *= narrow if i < size.tail // 4 * 2 else 0.5 if i < size.tail // 4 * 3 else 0.25
        edges.append(low)

    def point(x: float) -> int:
        if x == -INF:
            return -1
        if x > v:
            return sum(other > x for other in values)
        return size.head + min(sum(math.exp(x - v) < edge for edge in edges), size.tail - 1)

    return [point(x) for x in values]


def oracle_sketch(logits: Tensor, size: SketchSize) -> Sketch:
    """Float64 sketch, point by point."""
    logps = torch.log_softmax(logits.double(), -1)
    points = torch.tensor(oracle_points(logits, size))
    mass, count, entropy = [], [], []
    for j in range(size.points):
        members = logps[points == j]
        mass.append(torch.logsumexp(members, 0).item() if len(members) else -INF)
        count.append(math.log(max(len(members), 1)))
        inside = torch.log_softmax(members, 0)
        entropy.append(-(inside.exp() * inside).sum().item())
    return Sketch(*(torch.tensor(part, dtype=torch.float64) for part in (mass, count, entropy)))


def random_shift(sketch: Sketch, seed: int, cut: float = 0.0) -> Tensor:
    """(..., N) random shift; a share `cut` of the points gets -inf, but never the last survivor."""
    generator = torch.Generator().manual_seed(seed)
    shift = 3 * torch.randn(sketch.log_mass.shape, generator=generator)
    dropped = torch.rand(sketch.log_mass.shape, generator=generator) < cut
    first = sketch.mask & (sketch.mask.cumsum(-1) == 1)
    return torch.where(dropped & ~first, -INF, shift)


def vocabulary_logprobs(logits: Tensor, points: PointMap, shift: Tensor) -> Tensor:
    return torch.log_softmax(expand(logits, points, shift).double(), -1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


def assert_same_sketch(actual: Sketch, expected: Sketch, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(vars(actual), vars(expected), rtol=0, atol=tolerance)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p (log p - log q) in float64, 0 where p is."""
    ratio = torch.where(p > -INF, p, 0.0) - torch.where(p > -INF, q, 0.0)
    return (p.exp() * ratio).sum(-1)


@MODEST
@given(logit_rows(), sizes)
def test_mass_count_and_inner_entropy_are_those_of_the_tokens(logits: Tensor, size: SketchSize) -> None:
    sketch, points = build_sketch(logits, size)
    expected = oracle_sketch(logits, size)
    assert token_points(logits, points).tolist() == oracle_points(logits, size)
    assert_close(sketch.log_mass, expected.log_mass)
    assert_close(sketch.log_count, expected.log_count)
    assert_close(sketch.inner_entropy, expected.inner_entropy)
    assert_close(points.log_normalizer, torch.logsumexp(logits.double(), -1, keepdim=True))


@MODEST
@given(logit_rows(), sizes)
def test_summaries_equal_those_over_the_vocabulary(logits: Tensor, size: SketchSize) -> None:
    sketch, _ = build_sketch(logits, size)
    logps = torch.log_softmax(logits.double(), -1)
    surprise = torch.where(logps > -INF, -logps, 0.0)
    assert_close(context.entropy(sketch), (logps.exp() * surprise).sum(-1))
    assert_close(torch.logsumexp(sketch.log_mass, -1), torch.tensor(0.0))
    assert int(sketch.log_count.exp().round()[sketch.mask].sum()) == int(torch.isfinite(logits).sum())


@MODEST
@given(logit_rows(), sizes)
def test_points_are_ordered_by_probability(logits: Tensor, size: SketchSize) -> None:
    sketch, _ = build_sketch(logits, size)
    used = sketch.logprobs[sketch.mask]
    assert (used[1:] <= used[:-1] + TOLERANCE).all()
    # Head points are ordered strictly: ties share a point.
    head = sketch.logprobs[: size.head][sketch.mask[: size.head]]
    assert (head[1:] < head[:-1]).all()


@MODEST
@given(logit_rows(), sizes, seeds)
def test_permuting_the_vocabulary_permutes_the_policy(logits: Tensor, size: SketchSize, seed: int) -> None:
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    sketch, points = build_sketch(logits, size)
    other, other_points = build_sketch(logits[order], size)
    shift = random_shift(sketch, seed, cut=0.3)
    assert_same_sketch(other, sketch)
    assert token_points(logits[order], other_points).tolist() == token_points(logits, points)[order].tolist()
    assert_close(
        vocabulary_logprobs(logits[order], other_points, shift), vocabulary_logprobs(logits, points, shift)[order]
    )


@MODEST
@given(logit_rows(), sizes, st.integers(-6400, 6400), seeds)
def test_adding_a_constant_changes_nothing(logits: Tensor, size: SketchSize, steps: int, seed: int) -> None:
    moved = logits + steps / 64
    sketch, points = build_sketch(logits, size)
    other, other_points = build_sketch(moved, size)
    assert_same_sketch(other, sketch)
    assert token_points(moved, other_points).tolist() == token_points(logits, points).tolist()
    shift = random_shift(sketch, seed, cut=0.3)
    assert_close(vocabulary_logprobs(moved, other_points, shift), vocabulary_logprobs(logits, points, shift))


@MODEST
@given(logit_rows(), sizes, seeds)
def test_tokens_with_equal_logits_get_equal_probability(logits: Tensor, size: SketchSize, seed: int) -> None:
    sketch, points = build_sketch(logits, size)
    probs = vocabulary_logprobs(logits, points, random_shift(sketch, seed, cut=0.3)).exp()
    for value in logits.unique():
        assert len(probs[logits == value].unique()) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_ties_share_a_point(dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))).to(dtype)
    size = SketchSize(64, 16)
    sketch, points = build_sketch(logits, size)
    assert (sketch.log_count[:, :64] > 0).any(), "rounding 3000 logits must tie some of the 64 largest"
    policy = vocabulary_logprobs(logits, points, random_shift(sketch, 1))
    for row, values in zip(policy, logits.float(), strict=True):
        for value in values.unique():
            assert len(row[values == value].unique()) == 1
    exact, _ = build_sketch(logits.float(), size)
    assert_same_sketch(sketch, exact, 0)


@MODEST
@given(logit_rows(), sizes, st.integers(1, 30), seeds)
def test_padding_the_vocabulary_changes_nothing(logits: Tensor, size: SketchSize, extra: int, seed: int) -> None:
    padded = torch.cat([logits, torch.full((extra,), -INF)])
    sketch, points = build_sketch(logits, size)
    other, other_points = build_sketch(padded, size)
    assert_same_sketch(other, sketch, 1e-6)
    where = token_points(padded, other_points)
    assert where[: len(logits)].tolist() == token_points(logits, points).tolist()
    assert (where[len(logits) :] == -1).all()
    assert (expand(padded, other_points, random_shift(sketch, seed))[len(logits) :] == -INF).all()


@MODEST
@given(logit_rows(), sizes, seeds)
def test_impossible_tokens_keep_probability_zero_and_yield_no_nan(logits: Tensor, size: SketchSize, seed: int) -> None:
    sketch, points = build_sketch(logits, size)
    weights = expand(logits, points, random_shift(sketch, seed, cut=0.5))
    impossible = logits == -INF
    assert not weights.isnan().any()
    assert (weights[impossible] == -INF).all()
    assert (token_points(logits, points) == -1).tolist() == impossible.tolist()
    for part in (sketch.log_mass, sketch.log_count, sketch.inner_entropy):
        assert not part.isnan().any()


SMALL = SketchSize(head=5, tail=3)
CASES = {
    "one token": [0.5],
    "V < K": [1.0, 0.0, -1.0],
    "V = K": [1.0, 0.0, -1.0, 0.5, 2.0],
    "V = K + 1": [1.0, 0.0, -1.0, 0.5, 2.0, -3.0],
    "V < K + M": [1.0, 0.0, -1.0, 0.5, 2.0, -3.0, -3.5],
    "all equal, V < K": [2.0] * 3,
    "all equal, V > K": [2.0] * 9,
    "only one possible": [-INF] * 8 + [3.0],
    "fewer possible than K": [-INF, 1.0, -INF, 0.0, -INF, -INF, -INF],
    "exactly K possible": [5.0, 4.0, 3.0, 2.0, 1.0, -INF, -INF],
    "a tie across the head's end": [3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0],
    "one far above the rest": [120.0] + [0.1 * i for i in range(9)],
}


@pytest.mark.parametrize("case", CASES)
def test_small_and_degenerate_vocabularies(case: str) -> None:
    logits = torch.tensor(CASES[case])
    sketch, points = build_sketch(logits, SMALL)
    expected = oracle_sketch(logits, SMALL)
    assert token_points(logits, points).tolist() == oracle_points(logits, SMALL)
    for name, wanted in vars(expected).items():
        assert_close(getattr(sketch, name), wanted)
    base = vocabulary_logprobs(logits, points, torch.zeros(SMALL.points))
    assert_close(base, torch.log_softmax(logits.double(), -1))


@MODEST
@given(logit_rows(), sizes, seeds)
def test_kl_and_importance_ratios_over_points_are_those_over_tokens(
    logits: Tensor, size: SketchSize, seed: int
) -> None:
    sketch, points = build_sketch(logits, size)
    old = random_shift(sketch, seed, cut=0.3)
    new = torch.where(old == -INF, -INF, random_shift(sketch, seed + 1, cut=0.3))  # support within that of `old`
    over_points = [logprobs.shifted(sketch.log_mass, shift).double() for shift in (new, old)]
    over_tokens = [vocabulary_logprobs(logits, points, shift) for shift in (new, old)]
    assert_close(kl(*over_points), kl(*over_tokens))
    where = token_points(logits, points)
    alive = over_tokens[0] > -INF
    ratio = (over_points[0] - over_points[1])[where.clamp_min(0)]
    assert_close(ratio[alive], (over_tokens[0] - over_tokens[1])[alive])
    dead = (over_points[0][where.clamp_min(0)] == -INF) | (where < 0)
    assert (dead == ~alive).all()


@MODEST
@given(logit_rows(), sizes, seeds)
def test_entropy_over_tokens_is_that_over_points_plus_the_inner_ones(
    logits: Tensor, size: SketchSize, seed: int
) -> None:
    sketch, points = build_sketch(logits, size)
    shift = random_shift(sketch, seed, cut=0.3)
    policy = logprobs.shifted(sketch.log_mass, shift)
    inner = logprobs.expectation(policy, sketch.inner_entropy)
    tokens = vocabulary_logprobs(logits, points, shift)
    expected = -(tokens.exp() * torch.where(tokens > -INF, tokens, 0.0)).sum(-1)
    assert_close(logprobs.entropy(policy) + inner, expected)


@MODEST
@given(logit_rows(), sizes, st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=6), seeds)
def test_a_chosen_token_lies_in_its_point(logits: Tensor, size: SketchSize, draws: list[float], seed: int) -> None:
    sketch, _ = build_sketch(logits, size)
    used = sketch.mask.nonzero().squeeze(-1)
    picks = torch.Generator().manual_seed(seed)
    chosen = used[torch.randint(len(used), (len(draws),), generator=picks)]
    rows = logits.expand(len(draws), -1)
    _, points = build_sketch(rows, size)
    tokens = choose_tokens(rows, points, chosen, torch.tensor(draws, dtype=torch.float64))
    assert token_points(logits, build_sketch(logits, size)[1])[tokens].tolist() == chosen.tolist()
    assert torch.isfinite(logits[tokens]).all()


def test_tokens_are_drawn_in_proportion_to_the_base_model() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (2 * torch.randn(60, generator=generator)).mul(4).round().div(4)  # with ties in head and tail
    logits[::7] = -INF
    size, draws = SketchSize(8, 3), 40_000
    rows = logits.expand(draws, -1)
    sketch, points = build_sketch(rows, size)
    assert (sketch.log_count[0, :8] > 0).any()
    for point in sketch.mask[0].nonzero().squeeze(-1).tolist():
        uniforms = torch.rand(draws, generator=generator, dtype=torch.float64)
        tokens = choose_tokens(rows, points, torch.full((draws,), point), uniforms)
        members = (token_points(logits, points.index((0,))) == point).nonzero().squeeze(-1)
        expected = draws * torch.softmax(logits[members].double(), -1)
        observed = torch.bincount(tokens, minlength=len(logits))[members].double()
        assert observed.sum() == draws, "a token of another point was drawn"
        freedom = len(members) - 1
        statistic = ((observed - expected).square() / expected).sum()
        bound = freedom + 5 * math.sqrt(2 * freedom) + 5
        assert statistic < bound, f"chi-square {statistic:.1f} with {freedom} degrees: about 5 standard deviations off"


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_impossible_tokens_are_not_drawn_at_either_end(uniform: float) -> None:
    logits = torch.tensor([[-INF, 0.0, -INF, -0.1, -0.2, -INF], [-INF, 5.0, 5.0, 5.0, 0.0, -INF]])
    for size in (SketchSize(1, 1), SketchSize(2, 3), SketchSize(8, 2)):
        sketch, points = build_sketch(logits, size)
        for point in range(size.points):
            rows = sketch.mask[:, point]
            if rows.any():
                chosen = torch.full((int(rows.sum()),), point)
                draws = torch.full(chosen.shape, uniform, dtype=torch.float64)
                tokens = choose_tokens(logits[rows], points.index(rows), chosen, draws)
                assert torch.isfinite(logits[rows].gather(1, tokens[:, None])).all()


def test_inverting_a_cdf_skips_entries_of_weight_zero() -> None:
    weights = torch.tensor([[0.0, 0.0, 1e-30, 0.0, 2e-30, 0.0]]).expand(4, -1)
    uniforms = torch.tensor([0.0, 0.33, 0.34, 1 - 2**-53], dtype=torch.float64)
    assert invert_cdf(weights, uniforms).tolist() == [2, 2, 4, 4]


@MODEST
@given(logit_rows(), sizes, seeds)
def test_the_point_of_single_tokens(logits: Tensor, size: SketchSize, seed: int) -> None:
    _, points = build_sketch(logits, size)
    ids = torch.randint(len(logits), (5,), generator=torch.Generator().manual_seed(seed))
    assert points_of(logits, ids, points).tolist() == token_points(logits, points)[ids].tolist()


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (2, 1, 3)])
def test_leading_dimensions_are_free(shape: tuple[int, ...]) -> None:
    size = SketchSize(6, 4)
    logits = 3 * torch.randn(*shape, 50, generator=torch.Generator().manual_seed(5))
    sketch, points = build_sketch(logits, size)
    assert sketch.log_mass.shape == sketch.log_count.shape == sketch.inner_entropy.shape == (*shape, 10)
    assert points.head_ids.shape == points.head_slot.shape == (*shape, 6)
    assert points.boundary.shape == points.log_normalizer.shape == (*shape, 1)
    shift = random_shift(sketch, 0)
    expanded, where = expand(logits, points, shift), token_points(logits, points)
    for at in itertools.product(*map(range, shape)):
        one, one_points = build_sketch(logits[at], size)
        assert_same_sketch(sketch.index(at), one, 0)
        assert torch.equal(where[at], token_points(logits[at], one_points))
        assert torch.equal(expanded[at], expand(logits[at], one_points, shift[at]))


@pytest.mark.parametrize("size", [SketchSize(1, 1), SketchSize(3, 120), SketchSize(100, 1), SketchSize(128, 40)])
def test_head_and_tail_are_configurable(size: SketchSize) -> None:
    logits = 6 * torch.randn(3, 500, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits = logits.float()
    sketch, points = build_sketch(logits, size)
    assert sketch.log_mass.shape == (3, size.head + size.tail) == (3, size.points)
    for row in range(3):
        expected = oracle_sketch(logits[row], size)
        assert_close(sketch.index((row,)).log_mass, expected.log_mass)
        assert_close(sketch.index((row,)).inner_entropy, expected.inner_entropy)
        assert token_points(logits, points)[row].tolist() == oracle_points(logits[row], size)


def test_a_large_vocabulary_of_equal_tail_logits_loses_no_mass() -> None:
    """Adding 131,072 equal fp32 weights one by one is off by 1e-3; the sketch must not be."""
    logits = torch.full((1, 131_072), -0.35)
    logits[:, :70] = 0.0
    logits[:, 0] = 1.0
    sketch, points = build_sketch(logits, SketchSize())
    logps = torch.log_softmax(logits.double(), -1)[0]
    members = token_points(logits, points)[0] == 64
    assert_close(sketch.log_mass[0, 64], torch.logsumexp(logps[members], 0))
    inside = torch.log_softmax(logps[members], 0)
    assert_close(sketch.inner_entropy[0, 64], -(inside.exp() * inside).sum())
    assert_close(points.log_normalizer[0, 0], torch.logsumexp(logits[0].double(), 0))


def test_float64_logits_are_rounded_once() -> None:
    logits = 5 * torch.randn(2, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = SketchSize(8, 16)
    sketch, points = build_sketch(logits, size)
    rounded, rounded_points = build_sketch(logits.float(), size)
    assert_same_sketch(sketch, rounded, 0)
    assert torch.equal(token_points(logits, points), token_points(logits.float(), rounded_points))


def test_real_logits(smollm_logits: Tensor) -> None:
    """Points of real rows: masses, counts, entropy and the base model's distribution, in fp32 and in bf16."""
    for logits in (smollm_logits, smollm_logits.bfloat16()):
        sketch, points = build_sketch(logits, SketchSize())
        logps = torch.log_softmax(logits.double(), -1)
        where = token_points(logits, points)
        assert (where >= 0).all()
        mass = torch.zeros(sketch.log_mass.shape, dtype=torch.float64).scatter_add_(-1, where, logps.exp())
        count = torch.zeros(sketch.log_mass.shape).scatter_add_(-1, where, torch.ones(where.shape))
        assert_close(sketch.log_mass, mass.log())
        assert torch.equal(torch.where(sketch.mask, sketch.log_count.exp().round(), 0.0), count)
        assert_close(context.entropy(sketch), -(logps.exp() * logps).sum(-1))
        assert_close(vocabulary_logprobs(logits, points, torch.zeros_like(sketch.log_mass)), logps)


@pytest.mark.parametrize(
    ("logits", "cause"),
    [
        (torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), "row 1 holds NaN"),
        (torch.tensor([[0.0, INF]]), r"row 0 holds \+inf"),
        (torch.full((2, 3), -INF), "row 0 holds no finite entry"),
        (torch.empty(0, 5), r"\(0, 5\) are empty"),
        (torch.empty(3, 0), r"\(3, 0\) are empty"),
        (torch.tensor(1.0), r"\(\) are empty"),
    ],
)
def test_invalid_logits_are_refused_with_advice(logits: Tensor, cause: str) -> None:
    with pytest.raises(InvalidLogits, match=cause) as caught:
        build_sketch(logits, SketchSize(4, 2))
    assert any(word in str(caught.value) for word in ("Check", "drop")), "the message must say what to do"


@pytest.mark.parametrize("position", range(6))
def test_nan_is_found_wherever_it_is(position: int) -> None:
    logits = torch.tensor([3.0, -INF, 1.0, 0.0, -1.0, -2.0])
    logits[position] = math.nan
    for size in (SketchSize(2, 2), SketchSize(8, 1)):
        with pytest.raises(InvalidLogits, match="NaN"):
            build_sketch(logits, size)


@pytest.mark.parametrize(
    ("head", "tail", "message"),
    [(0, 1, "head must be >= 1, got 0"), (1, 0, r"\[1, 120\], got 0"), (1, 121, r"\[1, 120\], got 121")],
)
def test_sketch_sizes_are_checked(head: int, tail: int, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        SketchSize(head, tail)
