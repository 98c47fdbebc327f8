"""What the generated text says of a token, against counting by hand."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from asn_rl.ops.history import empty_history, history_features, remember


@given(st.lists(st.integers(0, 6), max_size=20), st.integers(1, 9))
def test_counts_and_recency_are_those_of_the_text(text: list[int], bound: int) -> None:
    history = empty_history(1, bound, "cpu")
    known: dict[int, tuple[int, int]] = {}  # token -> occurrences since it was taken up, last step
    for step, token in enumerate(text):
        history = remember(history, torch.tensor([token]), step)
        if token not in known and len(known) == bound:
            known.pop(min(known, key=lambda other: known[other][1]))
        known[token] = (known.get(token, (0, 0))[0] + 1, step)
    columns = (part[0].tolist() for part in (history.tokens, history.count, history.last))
    found = {token: (count, last) for token, count, last in zip(*columns, strict=True) if token >= 0}
    assert found == known
    points = torch.where(history.tokens >= 0, history.tokens, -1)  # token i lies in point i
    features = history_features(history, points, len(text), 8)[0]
    for token in range(8):
        count, last = known.get(token, (0, 0))
        recency = 1 / (len(text) - last) if token in known else 0.0
        torch.testing.assert_close(features[token], torch.tensor([float(count), recency]))


def test_rows_are_independent_and_can_be_dropped() -> None:
    history = remember(empty_history(3, 2, "cpu"), torch.tensor([5, 6, 7]), 0)
    assert history.index(torch.tensor([2, 0])).tokens.tolist() == [[7, -1], [5, -1]]
