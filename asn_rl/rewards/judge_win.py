"""Win rates: a judge compares each completion with another answer to the same prompt, in both orders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from asn_rl.rewards.inputs import group_keys, required_column
from asn_rl.rewards.letter_judge import Comparison, Judge, first_preferred, letter_judge, one_question


def judge_win(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Any = None,
    *,
    model: str = "smollm2-135m-instruct",
    dtype: str = "auto",
    device: str = "cpu",
    chat_template: bool = True,
    batch_size: int = 32,
    minimum_share: float = 0.2,
    **columns: Any,
) -> list[float | None]:
    """1.0 where a causal language model prefers the completion to the row's reference, 0.0 where it prefers the
    reference, 0.5 for a tie: it prefers whichever stands first (Zheng et al. 2023, arXiv:2306.05685, section 3.4), or
    the texts are equal. The mean is the win rate, ties half.

    The column `references` lists answers to the row's prompt. The j-th completion of a group (equal cells of `group`,
    else `prompt_id`, else prompts) meets the j-th of them, from the first again where there are fewer. A reference is a
    text, or messages: a whole conversation from the prompt on, which may hold earlier answers of its own. None where
    the row has no references, and where the judge answered neither letter in one of the orders.

    `judge_win.counts` has the `answers` asked for, `first_preferred` of those (half of them without position bias),
    `neither` (void answers), `too_long` (of those, the ones beyond the judge's context), `pairs` with two valid
    answers and, of those, `disagreed` (the orders contradicted each other).

    Args: as in `pairwise_judge`.

    Raises: as `pairwise_judge`, and RewardError without the column `references`.
    """
    references = required_column(columns, "references", "judge_win")
    seen: Counter[Any] = Counter()
    asked: dict[int, Comparison] = {}
    for i, key in enumerate(group_keys(prompts, columns)):
        if references[i]:
            asked[i] = _comparison(prompts[i], completions[i], references[i][seen[key] % len(references[i])])
        seen[key] += 1
    judge = letter_judge(model, dtype, device, chat_template, batch_size, COUNTS)
    won = wins(list(asked.values()), judge, minimum_share, COUNTS)
    scores: list[float | None] = [None] * len(completions)
    for i, share in zip(asked, won.tolist(), strict=True):
        scores[i] = None if np.isnan(share) else share
    return scores


def wins(
    comparisons: Sequence[Comparison], judge: Judge, minimum_share: float, counts: Counter[str] | None = None
) -> np.ndarray:
    """(m,) 1 where the judge prefers the first text in both orders, 0 where it prefers the second in both, else 1/2;
    NaN where an answer is void. An equal question is asked once, equal texts are not compared.

    Args:
        counts: counter of what `judge_win.counts` has.
    """
    pairs = [pair for pair in dict.fromkeys(comparisons) if pair.first != pair.second]
    orders = [order for pair in pairs for order in (pair, pair._replace(first=pair.second, second=pair.first))]
    first = first_preferred(orders, judge, minimum_share).reshape(-1, 2) if orders else np.empty((0, 2))
    prefers = np.stack([np.sign(first[:, 0] - 0.5), np.sign(0.5 - first[:, 1])], 1)  # 1: the pair's first text
    valid, agreed = ~np.isnan(first).any(1), prefers[:, 0] == prefers[:, 1]
    outcome = np.where(valid, np.where(agreed, (1 + prefers[:, 0]) / 2, 0.5), np.nan)
    if counts is not None:
        counts["answers"] += first.size
        counts["first_preferred"] += int((first > 0.5).sum())
        counts["neither"] += int(np.isnan(first).sum())
        counts["pairs"] += int(valid.sum())
        counts["disagreed"] += int((valid & ~agreed).sum())
    found = dict(zip(pairs, outcome.tolist(), strict=True))
    return np.array([found.get(comparison, 0.5) for comparison in comparisons])


def _comparison(prompt: Any, completion: Any, reference: Any) -> Comparison:
    """The completion first; what is asked for first is the other order's business."""
    other = (prompt, reference) if isinstance(reference, str) else (list(reference[:-1]), list(reference[-1:]))
    question, (mine, theirs) = one_question([prompt, other[0]], [completion, other[1]])
    return Comparison(question, mine, theirs)


COUNTS: Counter[str] = Counter()
judge_win.__dict__["counts"] = COUNTS
