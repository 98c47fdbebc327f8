"""Answers a second of `math_answer` (2 workers) on 1,000 mixed mathematical answers, 1 % of them pathological.

Golds and answers look like GSM8K's and MATH-500's, in equal parts: integers, decimals, fractions, LaTeX, expressions,
right and wrong, eight answers a gold as in labelling. The pathological ones (10**10**10, factorial towers, deep
nesting; some that no filter knows) must be masked or decided correctly; one that is scored wrongly, or a masked
ordinary one, fails the benchmark. math-verify in this process, on the ordinary ones, is the peer. No text occurs
twice, so no verdict comes from the cache; 200 further answers go ahead to start the workers.
"""

from __future__ import annotations

import logging
import random
import sys
import time

from _benchmark import finish, options
from math_verify import parse, verify

from asn_rl.rewards.math import math_answer

GOAL = 100.0
TIME_LIMIT = 5.0
Case = tuple[str, str, bool]
"""gold, text, whether the text is right"""


def main() -> int:
    arguments = options(__doc__ or "", "python scripts/benchmark_verifiers.py --quick", answers=1000, seed=0)
    generator = random.Random(arguments.seed)
    hard = max(1, arguments.answers // 100)
    ordinary = [_ordinary(generator, i) for i in range(arguments.answers - hard)]
    pathological = [_pathological(generator, i) for i in range(hard)]
    cases = ordinary + pathological
    generator.shuffle(cases)
    _score([_ordinary(generator, -1 - i) for i in range(200)])
    begin = time.perf_counter()
    scores = _score(cases)
    rate = len(cases) / (time.perf_counter() - begin)
    found = dict(zip(cases, scores, strict=True))
    masked = [case for case in pathological if found[case] is None]
    decided = [case for case in pathological if found[case] == float(case[2])]
    wrong = [case for case in pathological if case not in masked and case not in decided]
    lost = [case for case in ordinary if found[case] is None]
    print(f"pathological: {len(masked)} masked, {len(decided)} decided correctly, {len(wrong)} scored wrongly {wrong}")
    print(f"ordinary: {len(lost)} masked {lost}; masked for: {dict(math_answer.__dict__['counts'])}")
    print(f"as drawn: {sum(found[case] == float(case[2]) for case in ordinary)} of {len(ordinary)} ordinary ones")
    peer, agreed = _peer(ordinary, found)
    print(f"math_answer {rate:.0f} answers/s, math-verify in one process {peer:.0f}/s, which agrees on {agreed:.1%}")
    if wrong or lost:
        print("answers were scored wrongly or lost; the rate means nothing")
        return 1
    return finish("benchmark_verifiers", rate / GOAL, 1.0, at_least=True)


def _peer(cases: list[Case], found: dict[Case, float | None]) -> tuple[float, float]:
    logging.disable()
    begin = time.perf_counter()
    verdicts = [verify(parse(f"${gold}$"), parse(text)) for gold, text, _ in cases]
    rate = len(cases) / (time.perf_counter() - begin)
    return rate, sum(found[case] == float(verdict) for case, verdict in zip(cases, verdicts, strict=True)) / len(cases)


def _score(cases: list[Case]) -> list[float | None]:
    golds, texts = [gold for gold, _, _ in cases], [text for _, text, _ in cases]
    return math_answer(["q"] * len(cases), texts, answer=golds, time_limit=TIME_LIMIT, workers=2)


def _ordinary(generator: random.Random, i: int) -> Case:
    """Answer i % 8 of gold i // 8: of 20 golds 15 are integers, a decimal, a fraction, 3 LaTeX; 5 in 8 are right."""
    gold_number = i // 8
    n, k = 1000 + 7 * gold_number, 2 + gold_number % 8
    special = [
        (f"{n}.{k}", f"{n}.{k}0", f"{n}.{k}1"),
        (
            f"\\frac{{{2 * n + 1}}}{{{2 * k}}}",
            f"\\dfrac{{{2 * n + 1}}}{{{2 * k}}}",
            f"\\frac{{{2 * n + 3}}}{{{2 * k}}}",
        ),
        (f"{n}\\sqrt{{{k}}}", f"\\sqrt{{{k}}}\\cdot {n}", f"{n}\\sqrt{{{k + 1}}}"),
        (f"x^2+{n}x+{k}", f"{k}+{n}x+x^2", f"x^2+{n}x-{k}"),
        (f"({n},{k})", f"\\left({n}, {k}\\right)", f"({k},{n})"),
    ]
    integer = (str(n), f"{n:,}", str(n + k))
    gold, right, wrong = special[gold_number // 4 % 5] if gold_number % 4 == 0 else integer
    is_right = i % 8 < 5
    answer, filler = right if is_right else wrong, f"We take {k} and then {generator.randint(10**6, 10**7)}. "
    wordings = [
        f"{filler}That gives the answer: $\\boxed{{{answer}}}$.",
        f"{filler}So the total is ${answer}$.",
        f"{filler}We simplify both sides.\n\nTherefore, the final answer is ${answer}$. I hope it is correct.",
        f"{filler}\\[ {answer} \\]",
        f"Let us see. {filler * 10}The answer is \\boxed{{{answer}}}",
    ]
    return gold, wordings[generator.randrange(len(wordings))], is_right


def _pathological(generator: random.Random, i: int) -> Case:
    """Astronomic or deeply nested answers; every third is right, its gold being the same text."""
    n, depth = generator.randint(7, 9) + 10 * i, generator.randint(60, 120)
    texts = [
        f"{n}**{n}**{n}",
        f"{n}^{{10^8}}",
        f"(({n}!)!)!",
        "\\frac{1}{" * depth + str(n) + "}" * depth,
        f"{n}^{{{n}^{{{n}}}}}",
        "\\sqrt{" * depth + str(n) + "}" * depth,
        f"{n}{n}{n}{n}!",
        f"\\binom{{10^{{{n}}}}}{{10^5}}",
        f"(x+{n})^{{99999}}",
        f"{n}!!!!",
    ]
    text = texts[i % len(texts)]
    return (text, f"The answer is ${text}$", True) if i % 3 == 0 else (str(n + 1), f"The answer is ${text}$", False)


if __name__ == "__main__":
    sys.exit(main())
