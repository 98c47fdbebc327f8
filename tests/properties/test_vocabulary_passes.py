"""The compiled passes over the vocabulary against the reference, token by token where a token can be told apart."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asn_rl.errors import InvalidValue
from asn_rl.ops.sketch import PointMap, Sketch, SketchSize, build_sketch, choose_tokens, expand, token_points
from asn_rl.ops.vocabulary import VARIABLE, native, passes
from asn_rl.ops.vocabulary.octaves import half_octave_starts, half_octaves

INF = math.inf
CPU = torch.device("cpu")


def rows_of(vocab: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(6, V) logits: smooth, tied, with impossible tokens, nearly all impossible, steep, and at the edges of bins."""
    generator = torch.Generator().manual_seed(seed)
    rows = 4 * torch.randn(6, vocab, generator=generator)
    rows[1] = rows[1].round()
    rows[2, 1::3] = -INF
    rows[3, 2:] = -INF
    rows[4] *= 12
    rows[5] = half_octave_starts(CPU)[torch.randint(2, 255, (vocab,), generator=generator)]
    return rows.to(dtype)


def everything(rows: Tensor, size: SketchSize, draws: int = 3) -> tuple[Sketch, PointMap, Tensor, Tensor]:
    """Sketch, map, log-weights under a random shift, and tokens drawn in random points."""
    sketch, points = build_sketch(rows, size)
    generator = torch.Generator().manual_seed(1)
    shift = torch.randn(sketch.log_mass.shape, generator=generator)
    tokens = []
    for _ in range(draws):
        chosen = sketch.log_mass.exp().double().multinomial(1, generator=generator).squeeze(-1)
        tokens.append(choose_tokens(rows, points, chosen, torch.rand(len(rows), generator=generator).double()))
    return sketch, points, expand(rows, points, shift), torch.stack(tokens)


def check_equal(name: str, rows: Tensor, size: SketchSize, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "reference")
    sketch, points, weights, tokens = everything(rows, size)
    monkeypatch.setenv(VARIABLE, name)
    other, other_points, other_weights, other_tokens = everything(rows, size)
    torch.testing.assert_close(vars(other), vars(sketch), rtol=0, atol=1e-5)
    assert torch.equal(other.log_count, sketch.log_count), "a token lies in another point"
    assert torch.equal(token_points(rows, other_points), token_points(rows, points))
    torch.testing.assert_close(other_weights, weights, rtol=0, atol=1e-5)
    # Of tokens with equal logits in the head, `topk` may name another first.
    assert torch.equal(rows.gather(1, other_tokens.T), rows.gather(1, tokens.T))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab", "size"), [(1, SketchSize(3, 2)), (65, SketchSize()), (5003, SketchSize(64, 120))])
def test_native_passes_equal_the_reference(
    compiler: None, vocab: int, size: SketchSize, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_equal("native", rows_of(vocab, vocab, dtype), size, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "size"), [(1, SketchSize(3, 2)), (65, SketchSize()), (900, SketchSize(5, 20))])
def test_triton_passes_equal_the_reference(
    triton_interpreter: None, vocab: int, size: SketchSize, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_equal("fused", rows_of(vocab, vocab, dtype), size, monkeypatch)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-90, 0, width=32), min_size=1, max_size=200))
def test_half_octaves_by_comparison_are_those_of_the_bits(shifts: list[float]) -> None:
    starts = half_octave_starts(CPU)
    edges = starts[2:255]
    below = torch.nextafter(edges, torch.tensor(-INF))
    shift = torch.cat([torch.tensor(shifts), edges, below]).clamp(-88.0, 0.0)
    octaves = half_octaves(shift.exp())
    by_comparison = (shift.unsqueeze(-1) >= starts).sum(-1) - 1
    assert torch.equal(octaves.clamp_min(1), by_comparison.int())


def test_rows_may_be_strided_and_shared_among_threads(compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = rows_of(400, 3).repeat(3, 1)
    sketch, _ = build_sketch(wide[:, :130].contiguous(), SketchSize(8, 4))
    torch.set_num_threads(3)
    try:
        for rows in (wide[:, :130], wide[:, :130].T.contiguous().T):
            torch.testing.assert_close(vars(build_sketch(rows, SketchSize(8, 4))[0]), vars(sketch), rtol=0, atol=0)
    finally:
        torch.set_num_threads(1)


def test_log_weights_may_take_the_place_of_the_logits(compiler: None) -> None:
    rows = rows_of(300, 4)
    sketch, points = build_sketch(rows, SketchSize(8, 4))
    shift = torch.randn(sketch.log_mass.shape, generator=torch.Generator().manual_seed(0))
    expected = expand(rows, points, shift)
    assert expand(rows, points, shift, rows) is not None
    assert torch.equal(rows, expected)


def test_gradients_reach_the_shift_of_every_point(compiler: None) -> None:
    """Log-probs of the vocabulary as a function of the shift: head and tail take part."""
    rows = rows_of(300, 5)[:1]
    sketch, points = build_sketch(rows, SketchSize(8, 4))
    shift = torch.zeros(sketch.log_mass.shape, requires_grad=True)
    expand(rows, points, shift).log_softmax(-1)[0, :40].sum().backward()
    assert shift.grad is not None
    mass = sketch.log_mass.exp()
    where = token_points(rows, points)[0, :40]
    expected = torch.zeros(12).scatter_add_(0, where, torch.ones(40)) - 40 * mass[0]
    torch.testing.assert_close(shift.grad[0], expected, rtol=0, atol=1e-4)


def test_an_implementation_can_be_insisted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "fastest")
    with pytest.raises(InvalidValue, match="one of reference, native, fused, got 'fastest'"):
        passes(torch.zeros(1, 2))
    monkeypatch.setenv(VARIABLE, "native")
    monkeypatch.setattr(native, "available", lambda: False)
    with pytest.raises(InvalidValue, match="one that runs on cpu, got 'native'"):
        passes(torch.zeros(1, 2))
    monkeypatch.delenv(VARIABLE)
    assert passes(torch.zeros(1, 2)).__name__.endswith("reference")  # type: ignore[attr-defined]


def test_no_compiler_and_a_broken_one_are_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path
) -> None:
    monkeypatch.setenv("ASN_RL_CACHE", str(tmp_path))
    for compiler, said in (("false", "false could not compile"), ("/nowhere/cc", "could not compile")):
        monkeypatch.setenv("CC", compiler)
        assert native._library.__wrapped__() is None
        assert said in caplog.text
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native._library.__wrapped__() is None
    assert "no C compiler" in caplog.text
    assert not list(tmp_path.rglob("*.so"))
