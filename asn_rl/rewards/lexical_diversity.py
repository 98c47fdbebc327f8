"""How much the wording of completions differs within a group of them.

Words are what whitespace separates, with case and punctuation. These rewards know nothing of quality: random words are
very diverse, so weigh them against a verifier or a reward model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

from asn_rl.errors import InvalidValue
from asn_rl.ops.ngrams import marginal_distinct_n, self_bleu
from asn_rl.rewards.inputs import completion_text, group_keys


def self_bleu_diversity(
    prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
) -> list[float | None]:
    """1 - BLEU-4 of a completion against all others of its group (self-BLEU; Zhu et al. 2018, "Texygen",
    arXiv:1802.01886), in [0, 1]: 0 for a copy of another, 1 where no word is shared. See `asn_rl.ops.ngrams.self_bleu`.

    Copies score 0 from four words on only: of fewer, BLEU-4 has no 4-grams to match, and copies of one word score
    0.82. For short answers use `distinct_ngrams` with n = 1, or `distinct_valid`.

    A completion without words scores 0, though its BLEU is 0: it says nothing new. None for a group of one. Groups are
    equal cells of the column `group`, else of `prompt_id`, else equal prompts. Completions that the token limit cut
    off count as they are.
    """
    return within_groups(_self_bleu_diversity, prompts, completions, columns)


def distinct_ngrams(
    prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, *, n: int = 2, **columns: Any
) -> list[float | None]:
    """What a completion adds to its group's distinct n-grams, in [0, 1]: those of the group minus those of the group
    without it, over the number of n-grams of the completion.

    1: every n-gram is new to the group and occurs once; 0: the others have them all. N-grams that a completion repeats
    count once above and each time below the line, so saying something twice lowers it. It is the contribution of a
    completion to distinct-n (Li et al. 2016, arXiv:1510.03055), at the completion's own length.

    0 for a completion of fewer than `n` words. None for a group of one. Groups are as in `self_bleu_diversity`.

    Args:
        n: words an n-gram has.

    Raises:
        InvalidValue: `n` below 1.
    """
    if n < 1:
        raise InvalidValue("n", n, ">= 1 word")
    return within_groups(partial(_marginal_distinct, n=n), prompts, completions, columns)


def within_groups(
    function: Callable[[list[str]], Sequence[float]],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Any],
) -> list[float | None]:
    """Scores of completions by a function of the texts of a group, called for each group of two or more.

    None for a group of one; 0 for a completion without words, which is still one of its group for the others.
    """
    texts = [completion_text(completion) for completion in completions]
    members: dict[Hashable, list[int]] = defaultdict(list)
    for i, key in enumerate(group_keys(prompts, columns)):
        members[key].append(i)
    scores: list[float | None] = [None] * len(texts)
    for rows in members.values():
        if len(rows) < 2:
            continue
        for i, score in zip(rows, function([texts[i] for i in rows]), strict=True):
            scores[i] = score if texts[i].split() else 0.0
    return scores


def _self_bleu_diversity(texts: list[str]) -> list[float]:
    return [1 - bleu for bleu in self_bleu([text.split() for text in texts])]


def _marginal_distinct(texts: list[str], n: int) -> list[float]:
    return marginal_distinct_n([text.split() for text in texts], n)


self_bleu_diversity.__dict__["compares"] = "group"
distinct_ngrams.__dict__["compares"] = "group"
