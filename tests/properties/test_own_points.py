"""Tokens with points of their own: the sketch stays exact, and the policy still acts on the whole vocabulary."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asn_rl.errors import InvalidLogits
from asn_rl.ops.sketch import (
    SketchSize,
    build_sketch,
    choose_tokens,
    expand,
    points_of,
    token_points,
    without_tokens,
)

SIZE = SketchSize(4, 8)
INF = math.inf
values = st.one_of(st.integers(-300, 300).map(lambda i: i / 64), st.sampled_from([0.0, 1.0, -INF]))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """(V,) logits with at least one possible token, and (P,) distinct tokens, some places free."""
    row = draw(st.lists(values, min_size=2, max_size=30))
    row[draw(st.integers(0, len(row) - 1))] = 0.5
    chosen = draw(st.lists(st.integers(0, len(row) - 1), unique=True, max_size=6))
    free = draw(st.integers(0, 3))
    return torch.tensor(row), torch.tensor(draw(st.permutations(chosen + [-1] * free)), dtype=torch.long)


@given(cases())
def test_every_token_lies_in_one_point_and_masses_add_up(case: tuple[Tensor, Tensor]) -> None:
    logits, own = case
    sketch, points = build_sketch(logits, SIZE, own)
    where, logprobs = token_points(logits, points), torch.log_softmax(logits.double(), -1)
    assert torch.equal(where >= 0, logits > -INF)
    for j in range(len(sketch.log_mass)):
        members = logprobs[where == j]
        expected = torch.logsumexp(members, 0) if len(members) else torch.tensor(-INF)
        torch.testing.assert_close(sketch.log_mass[j].double(), expected.double(), atol=1e-5, rtol=0)
        assert sketch.log_count[j].exp().round() == max(len(members), 1)
        inside = torch.log_softmax(members, 0)
        torch.testing.assert_close(sketch.inner_entropy[j].double(), -(inside.exp() * inside).sum(), atol=1e-4, rtol=0)
    used = sketch.logprobs[sketch.mask]
    assert (used[1:] <= used[:-1] + 1e-5).all()


@given(cases())
def test_named_tokens_are_alone_in_their_points(case: tuple[Tensor, Tensor]) -> None:
    logits, own = case
    _, points = build_sketch(logits, SIZE, own)
    where = token_points(logits, points)
    for token in own[own >= 0].tolist():
        assert points_of(logits, torch.tensor([token]), points).tolist() == [int(where[token])]
        if logits[token] > -INF:
            assert (where == where[token]).sum() == 1


@given(cases(), st.integers(0, 1000))
def test_expanding_and_choosing_agree_with_the_points(case: tuple[Tensor, Tensor], seed: int) -> None:
    logits, own = case
    sketch, points = build_sketch(logits, SIZE, own)
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(sketch.log_mass.shape, generator=generator)
    full = expand(logits, points, shift).log_softmax(-1)
    over_points = torch.log_softmax(sketch.log_mass + shift, -1)
    where = token_points(logits, points)
    summed = torch.zeros_like(over_points).scatter_add_(-1, where.clamp_min(0), full.exp())
    torch.testing.assert_close(summed, over_points.exp(), atol=1e-5, rtol=0)
    chosen = sketch.mask.nonzero().squeeze(-1)
    many = logits.expand(len(chosen), -1)
    _, batch = build_sketch(many, SIZE, own.expand(len(chosen), -1))
    tokens = choose_tokens(many, batch, chosen, torch.rand(len(chosen), generator=generator, dtype=torch.float64))
    assert where[tokens].tolist() == chosen.tolist()


def test_without_names_the_points_are_the_same() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    plain, _ = build_sketch(logits, SIZE)
    named, _ = build_sketch(logits, SIZE, torch.full((3, 2), -1))
    for row in range(3):
        torch.testing.assert_close(named.log_mass[row][named.mask[row]], plain.log_mass[row][plain.mask[row]])


def test_a_named_token_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(InvalidLogits, match="NaN"):
        build_sketch(torch.tensor([0.0, math.nan, 1.0]), SIZE, torch.tensor([1]))


def test_removing_tokens_leaves_the_others() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    assert without_tokens(logits, torch.tensor([[2, -1]])).tolist() == [[0.0, 1.0, -INF]]
    assert without_tokens(logits, None) is logits
