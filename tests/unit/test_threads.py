from __future__ import annotations

import os

import pytest

from asn_rl.threads import set_threads


@pytest.mark.parametrize(
    ("count", "wished", "expected"), [(2, "1", 2), (None, "3", 3), (None, "4,2", 0), (None, "0", 0)]
)
def test_what_is_given_wins_over_the_environment(
    monkeypatch: pytest.MonkeyPatch, count: int | None, wished: str, expected: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", wished)
    assert set_threads(count) == (expected or len(os.sched_getaffinity(0)))
