"""Self-BLEU of groups of completions, against nltk's sentence_bleu called for each completion.

64 groups of 16 completions of 64 words. The words are drawn from a Zipf distribution, and half of each completion are
stretches of one text of its group, so that n-grams of every order match. The scores must agree to 1e-9.
"""

from __future__ import annotations

import random
import sys

from _benchmark import finish, options, seconds
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from asn_rl.ops.ngrams import self_bleu

GOAL = 20
TOLERANCE = 1e-9
VOCABULARY, STRETCH = 2000, 8
Group = list[list[str]]


def main() -> int:
    arguments = options(
        __doc__ or "", "python scripts/benchmark_self_bleu.py --groups 16", groups=64, completions=16, words=64
    )
    generator = random.Random(0)
    groups = [_group(generator, arguments.completions, arguments.words) for _ in range(arguments.groups)]
    ours, theirs = [self_bleu(group) for group in groups], [_nltk(group) for group in groups]
    pairs = [pair for rows in zip(ours, theirs, strict=True) for pair in zip(*rows, strict=True)]
    gap = max(abs(a - b) for a, b in pairs)
    mean = sum(a for a, _ in pairs) / len(pairs)
    print(f"{len(pairs)} completions, mean self-BLEU {mean:.3f}, largest difference {gap:.1e}")
    if gap > TOLERANCE:
        print(f"the scores differ by more than {TOLERANCE:g}; the times mean nothing")
        return 1
    fast = seconds(lambda: [self_bleu(group) for group in groups], 5 if arguments.quick else 15)
    slow = seconds(lambda: [_nltk(group) for group in groups], 1 if arguments.quick else 5, warmup=0)
    print(f"asn_rl {fast:.3f} s, nltk {slow:.2f} s")
    return finish("benchmark_self_bleu", slow / fast, GOAL, at_least=True)


def _group(generator: random.Random, completions: int, words: int) -> Group:
    common = _draw(generator, words)
    return [_completion(generator, common, words) for _ in range(completions)]


def _completion(generator: random.Random, common: list[str], words: int) -> list[str]:
    pieces = [
        common[start : start + STRETCH] if generator.random() < 0.5 else _draw(generator, STRETCH)
        for start in range(0, words, STRETCH)
    ]
    return [word for piece in pieces for word in piece][:words]


def _draw(generator: random.Random, count: int) -> list[str]:
    ranks = range(1, VOCABULARY + 1)
    return [f"w{rank}" for rank in generator.choices(ranks, [1 / rank for rank in ranks], k=count)]


def _nltk(group: Group) -> list[float]:
    smooth = SmoothingFunction().method1
    return [
        sentence_bleu([*group[:i], *group[i + 1 :]], text, smoothing_function=smooth)  # type: ignore[arg-type]
        for i, text in enumerate(group)
    ]


if __name__ == "__main__":
    sys.exit(main())
