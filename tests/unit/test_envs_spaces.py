"""Point features and actions of the decoding environments."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor

from asn_envs.decoding import DecodingEnv
from asn_envs.spaces import POINT_FEATURES, as_dict, observation_space, point_features, resolve_points
from asn_rl.ops.context import CONTEXT, context_vector
from asn_rl.ops.sketch import SketchSize, build_sketch
from asn_rl.types import Observation


def features(logits: Tensor, size: SketchSize) -> Tensor:
    return point_features(build_sketch(logits, size)[0])


def test_features_of_a_distribution_by_hand():
    # p = .5 (point 0), .2 and .2 (tied: point 1, point 2 is empty), .1 = v and everything below: tail.
    logits = torch.tensor([0.5, 0.2, 0.2, 0.06, 0.04]).log()
    expected = [
        [math.log(0.5), 0, 0, 0, 0, 1],
        [math.log(0.2), math.log(2.5), 0.5, math.log(2), math.log(2), 1],
        [0, 0, 0, 0, 0, 0],
        [math.log(0.05), math.log(10), 0.9, math.log(4), math.log(2), 1],
        [0, 0, 0, 0, 0, 0],
    ]
    got = features(logits, SketchSize(head=3, tail=2))
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(50_000),
        torch.tensor([0.0, -1e4, -math.inf]),
        torch.tensor([-math.inf, 3.0]),
        torch.arange(300.0) * -2,
        torch.randn(4, 3, 1000, generator=torch.Generator().manual_seed(0)) * 10,
        torch.randn(200, generator=torch.Generator().manual_seed(1)).half(),
    ],
)
def test_observations_lie_in_the_space(logits: Tensor):
    size = SketchSize(head=8, tail=4)
    sketch, _ = build_sketch(logits, size)
    counts = torch.full(sketch.log_mass.shape[:-1], 3)
    context = context_vector(sketch, counts, counts, counts * 1e3, counts * 1e3)
    obs = as_dict(Observation(sketch, context))
    flat = {name: value.reshape(-1, *value.shape[len(logits.shape) - 1 :]).numpy() for name, value in obs.items()}
    space = observation_space(size.points)
    for row in range(len(flat["points"])):
        assert space.contains({name: value[row] for name, value in flat.items()})
    nonempty = obs["points"][..., -1] == 1
    assert torch.equal(nonempty, sketch.mask)
    assert not obs["points"][~nonempty].any()


def test_bounds_are_finite():
    for space in observation_space(12).values():
        assert isinstance(space, Box)
        assert np.isfinite(space.low).all()
        assert np.isfinite(space.high).all()


def test_empty_points_go_to_the_nearest_before_then_after():
    mask = torch.tensor([[False, True, False, False, True, False]]).expand(6, -1)
    points, replaced = resolve_points(torch.arange(6), mask)
    assert points.tolist() == [1, 1, 1, 1, 4, 4]
    assert replaced.tolist() == [True, False, True, True, False, True]


def test_the_page_lists_every_entry_with_its_bounds():
    page = DecodingEnv.__doc__ or ""
    rows = re.findall(r"\| (\d) \| (\w+) \| (?:\[(-?\d+), (-?\d+)\]|(\d) or (\d)) \|", page)
    listed = [(name, float(a or c), float(b or d)) for _, name, a, b, c, d in rows]
    assert listed == [(entry.name, entry.low, entry.high) for entry in (*POINT_FEATURES, *CONTEXT)]
