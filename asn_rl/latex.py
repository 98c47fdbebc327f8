"""What boxes of LaTeX hold."""

from __future__ import annotations


def last_boxed(text: str) -> str | None:
    """What the last `\\boxed{...}` of a text holds, braces balanced; None: there is none."""
    mark = text.rfind("\\boxed{")
    start = mark + len("\\boxed{")
    end = None if mark < 0 else closing_brace(text, start)
    return None if end is None else text[start:end]


def closing_brace(text: str, start: int) -> int | None:
    """Place of the brace that closes the one before `start`; None: there is none."""
    depth = 1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return at
    return None
