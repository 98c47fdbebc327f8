"""Do the verifiers of the benchmarks know right from wrong? Gold answers must be accepted, corrupted ones must not.

For every benchmark whose data is there: the gold answer of every row of every part through every verifier (all must be
accepted), then corrupted gold answers of rows drawn at random (at most 0.2 % may be). The corruptions are a digit
changed, the sign flipped, one more or less, the decimal point moved, another row's answer, the answer left as a sum; in
formulas a term added, a sign or a digit changed; and the problem handed back as it is. One that leaves the value as it
was, or a problem that ends in its answer, is no corruption and is drawn again. What is accepted wrongly or not accepted
is listed by id. Code is checked on gold answers only; instructions and open questions have none. `math_answer` that
takes unmarked answers evaluates what it finds, as lm-eval does: it gets neither sums nor problems.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Callable, Collection, Iterator
from decimal import Decimal, InvalidOperation
from typing import Any

from asn_rl.data.benchmark import Benchmark, Verifier, benchmark_names, gold_rows, load_benchmark
from asn_rl.data.benchmark_format import render
from asn_rl.errors import ConfigError, DataError, UnknownName
from asn_rl.rewards import REWARDS
from asn_rl.rewards.inputs import completion_text
from asn_rl.rewards.numeric import last_number
from asn_rl.types import Prompt

MOST_ACCEPTED = 0.002
CHUNK = 500
ATTEMPTS = 3
"""a comparison that is masked is asked for again: on a busy machine some run out of time"""
Row = tuple[Prompt, dict[str, Any]]
Corruption = tuple[Prompt, str, str, str]
"""prompt, gold answer, wrong completion, kind of corruption"""
ECHO, SUM = "problem echoed", "gold as an unevaluated expression"


def main() -> int:
    arguments = _arguments()
    print(f"{'benchmark':18} {'verifier':16} {'rows':>6} {'gold accepted':>14} {'corrupted':>10} {'accepted':>9}")
    short = False
    for name in arguments.tasks.split(",") if arguments.tasks else benchmark_names():
        benchmark = load_benchmark(name)
        if benchmark.gold is None:
            print(f"{name:18} no gold answers")
            continue
        try:
            rows = gold_rows(benchmark, arguments.path)
        except (DataError, ConfigError) as error:
            print(f"{name:18} SKIPPED: {error}")
            continue
        for verifier in benchmark.verifiers:
            short |= not _check(benchmark, verifier, rows, arguments.corrupted, arguments.seed)
    print("short" if short else "ok")
    return int(short)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python scripts/check_benchmarks.py --path data --tasks gsm8k,math500",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", help="benchmarks, separated by commas (default: all)")
    parser.add_argument("--path", help="folder of all benchmarks' files (default: ASN_RL_DATA)")
    parser.add_argument("--corrupted", type=int, default=2000, help="corrupted answers a verifier, default 2000")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    return parser.parse_args()


def _check(benchmark: Benchmark, verifier: Verifier, rows: list[Row], count: int, seed: int) -> bool:
    try:
        score = _scorer(verifier)
    except UnknownName as error:
        print(f"{benchmark.name:18} {verifier.name:16} SKIPPED: {error}")
        return True
    assert benchmark.gold is not None
    golds = [render(benchmark.gold, fields, prompt.id) for prompt, fields in rows]
    scores = score([prompt for prompt, _ in rows], golds)
    refused = [
        f"{prompt.id}: gold {fields.get('answer', '...')!r} scores {value}"
        for (prompt, fields), value in zip(rows, scores, strict=True)
        if value != 1.0
    ]
    wrong = []
    if "answer" in rows[0][0].columns:
        left_out = (ECHO, SUM) if _evaluates(verifier) else ()
        wrong = list(_corrupted(rows, benchmark.gold, count, random.Random(seed), left_out))
    values = score([prompt for prompt, *_ in wrong], [text for _, _, text, _ in wrong])
    accepted = [
        f"{prompt.id}: {kind}: gold {gold!r}, accepted {text!r:.200}"
        for (prompt, gold, text, kind), value in zip(wrong, values, strict=True)
        if value
    ]
    masked = sum(value is None for value in values)
    right = len(rows) - len(refused)
    share = f"{right / len(rows):.2%}"
    listed = f"{len(accepted)} ({masked} masked)" if masked else str(len(accepted))
    print(f"{benchmark.name:18} {verifier.name:16} {len(rows):6} {share:>14} {len(wrong) or '-':>10} {listed:>9}")
    for line in [f"  gold not accepted  {line}" for line in refused] + [
        f"  wrong accepted  {line}" for line in accepted
    ]:
        print(line)
    return not refused and len(accepted) <= MOST_ACCEPTED * len(wrong)


def _scorer(verifier: Verifier) -> Callable[[list[Prompt], list[str]], list[float | None]]:
    function = REWARDS.resolve(verifier.function)

    def score(prompts: list[Prompt], completions: list[str]) -> list[float | None]:
        scores: list[float | None] = [None] * len(prompts)
        for _ in range(ATTEMPTS):
            asked = [i for i, value in enumerate(scores) if value is None]
            for low in range(0, len(asked), CHUNK):
                part = asked[low : low + CHUNK]
                columns = {name: [prompts[i].columns[name] for i in part] for name in prompts[0].columns}
                texts = [completions[i] for i in part]
                found = function([prompts[i].last_turn for i in part], texts, **verifier.arguments, **columns)
                for i, value in zip(part, found, strict=True):
                    scores[i] = value
        return scores

    return score


def _evaluates(verifier: Verifier) -> bool:
    return verifier.function == "math_answer" and not verifier.arguments.get("marked")


def _corrupted(
    rows: list[Row], template: str, count: int, generator: random.Random, left_out: Collection[str]
) -> Iterator[Corruption]:
    made = 0
    while made < count:
        prompt, fields = rows[generator.randrange(len(rows))]
        gold = str(fields["answer"])
        kinds = NUMBER_KINDS if _number(gold) is not None else FORMULA_KINDS
        kind = generator.choice([kind for kind in kinds if kind not in left_out])
        if kind == ECHO:
            problem = completion_text(prompt.content)
            if last_number(problem) != _number(gold):
                made += 1
                yield prompt, gold, problem, kind
            continue
        answer = kinds[kind](gold, generator) if kinds[kind] is not None else str(generator.choice(rows)[1]["answer"])
        if answer is not None and _differs(gold, answer):
            made += 1
            yield prompt, gold, render(template, {**fields, "answer": answer}, prompt.id), kind


def _number(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("\\!", "").replace("\\$", "").strip())
    except InvalidOperation:
        return None


def _differs(gold: str, answer: str) -> bool:
    a, b = _number(gold), _number(answer)
    if a is not None and b is not None:
        return a != b
    return _squeezed(gold) != _squeezed(answer)


def _squeezed(formula: str) -> str:
    """A formula without what changes its looks only."""
    return re.sub(r"\\left|\\right|\\!|\\,|\\ |\s|\\text|\\d?frac|[{}$]", "", formula)


def _digit(text: str, generator: random.Random) -> str | None:
    places = [i for i, character in enumerate(text) if character in "0123456789"]
    if not places:
        return None
    at = generator.choice(places)
    return text[:at] + generator.choice([d for d in "123456789" if d != text[at]]) + text[at + 1 :]


def _sign(text: str, generator: random.Random) -> str:
    return text[1:] if text.startswith("-") else f"-{text}"


def _one_off(text: str, generator: random.Random) -> str:
    value = _number(text)
    assert value is not None
    return str(value + generator.choice([-1, 1]))


def _point(text: str, generator: random.Random) -> str:
    value = _number(text)
    assert value is not None
    return f"{value.scaleb(generator.choice([-1, 1])):f}"


def _sum(text: str, generator: random.Random) -> str | None:
    value, part = _number(text), generator.randint(1, 9)
    assert value is not None
    return None if value == part else f"{value - part}+{part}"


def _inner_sign(text: str, generator: random.Random) -> str | None:
    places = [match.start() for match in re.finditer(r"(?<=[\w)}\s])[+-](?=[\w(\\\s])", text)]
    if not places:
        return None
    at = generator.choice(places)
    return text[:at] + {"+": "-", "-": "+"}[text[at]] + text[at + 1 :]


def _term(text: str, generator: random.Random) -> str | None:
    """One more, where the answer is one expression: not a list, interval, equation, base or word."""
    if re.search(r"[,=<>_%]|text|\\in|\\cup|pmatrix|\\$|circ", text):
        return None
    return f"{text}+{generator.randint(1, 9)}"


NUMBER_KINDS: dict[str, Any] = {
    "digit changed": _digit,
    "sign flipped": _sign,
    "off by one": _one_off,
    "decimal point moved": _point,
    "another row's answer": None,
    SUM: _sum,
    ECHO: None,
}
FORMULA_KINDS: dict[str, Any] = {
    "digit changed": _digit,
    "sign changed": _inner_sign,
    "term added": _term,
    "another row's answer": None,
    ECHO: None,
}

if __name__ == "__main__":
    sys.exit(main())
