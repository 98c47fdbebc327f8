"""Does this library score as lm-evaluation-harness 0.4.13 does? The same completions in both, item by item.

GSM8K (strict and flexible), IFEval (prompt and instruction level, strict and loose) and MATH-500 (math_verify, against
lm-eval's minerva_math). The completions are a model's, and gold answers bent in every way that a scorer may stumble
over. Every difference is listed. The check fails on those without an explanation, of which there are two: for a symbol
('#' in IFEval's key 1122, '!' in 1129) lm-eval counts a letter that it draws at random, and we what a third count, made
here, says; and a text with a power too large to compute is masked, which lm-eval may score.

    python scripts/check_lm_eval.py --path data --tasks gsm8k,ifeval
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asn_rl.threads import limit_spinning

limit_spinning()

from _completions import asks_for_symbol, generated, made
from _harness import (
    COMPARISONS,
    IFEVAL,
    MATH500,
    Comparison,
    Item,
    Scores,
    lm_eval_task,
    rows,
    scored_by_lm_eval,
    scored_by_us,
)

from asn_rl.errors import AsnError
from asn_rl.rewards.astronomic import is_astronomic
from asn_rl.rewards.ifeval import MODES


def main() -> int:
    options = _options()
    try:
        unexplained = sum(check(COMPARISONS[name], options) for name in options.tasks.split(","))
    except AsnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"check_lm_eval {'short' if unexplained else 'ok'}")
    return int(unexplained > 0)


def check(comparison: Comparison, options: argparse.Namespace) -> int:
    """Print one benchmark's agreement; the number of completions that are scored differently without an explanation."""
    found = rows(comparison, options.path)
    items = generated(found, options.generated, options.model, options.tokens)
    items += made(comparison, found, options.made)
    with tempfile.TemporaryDirectory() as folder:
        theirs = scored_by_lm_eval(lm_eval_task(comparison, items, Path(folder)), [item.completion for item in items])
    ours = scored_by_us(comparison, items)
    different = differences(items, ours, theirs)
    unexplained = 0
    for item, our, their in different:
        reason = explanation(comparison, item, our, their)
        unexplained += reason is None
        said = [f"{name} {our[name]}, lm-eval {their[name]}" for name in our if our[name] != their[name]]
        print(f"  {item.id}: {'; '.join(said)}; {reason or f'UNEXPLAINED: {item.completion!r:.200}'}")
    for metric in ours[0]:
        print(f"  {metric}: {_mean(ours, metric):.4f}, lm-eval {_mean(theirs, metric):.4f}")
    real = sum(item.kind == "generated" for item in items)
    print(
        f"{comparison.benchmark}: {len(items)} completions, {real} of them generated; {len(different)} scored", end=" "
    )
    print(f"differently, {unexplained} of them without an explanation")
    return unexplained


def differences(
    items: Sequence[Item], ours: Sequence[Scores], theirs: Sequence[Scores]
) -> list[tuple[Item, Scores, Scores]]:
    """The items that are scored differently by any metric."""
    triples = zip(items, ours, theirs, strict=True)
    return [(item, our, their) for item, our, their in triples if any(our[name] != their[name] for name in our)]


def explanation(comparison: Comparison, item: Item, ours: Scores, theirs: Scores) -> str | None:
    """Why lm-eval scores an item differently; None: not known."""
    if comparison is MATH500 and ours["math_verify,none"] is None and is_astronomic(item.completion):
        return "masked: it holds a power too large to compute"
    if comparison is not IFEVAL or not asks_for_symbol(item.fields):
        return None
    names, kwargs = item.fields["instruction_id_list"], item.fields["kwargs"]
    symbols = [i for i, name in enumerate(names) if name == "keywords:letter_frequency"]
    for mode in MODES:
        our, their = ours[f"inst_level_{mode}_acc,none"], theirs[f"inst_level_{mode}_acc,none"]
        counted = [_enough(text, kwargs[i]) for i in symbols for text in _read(item.completion, mode)]
        if [our[i] for i in symbols] != [any(counted)] or ours[f"prompt_level_{mode}_acc,none"] != all(our):
            return None
        if any(our[i] != their[i] for i in range(len(names)) if i not in symbols):
            return None
    symbol = kwargs[symbols[0]]["letter"]
    return f"lm-eval counts a random letter; {symbol!r} is there {item.completion.count(symbol)} times"


def _enough(text: str, kwargs: Mapping[str, Any]) -> bool:
    count = text.count(kwargs["letter"])
    at_least = count >= kwargs["let_frequency"]
    return bool(text.strip()) and (at_least if kwargs["let_relation"] == "at least" else not at_least)


def _read(completion: str, mode: str) -> list[str]:
    """What IFEval reads: the text, and in the loose mode also without its first or last line, or its asterisks."""
    if mode == "strict":
        return [completion]
    lines = completion.split("\n")
    kept = [completion, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return kept + [text.replace("*", "") for text in kept]


def _mean(scores: Sequence[Scores], metric: str) -> float:
    cells = [score[metric] for score in scores]
    flat = [value for cell in cells for value in (cell if isinstance(cell, list) else [cell]) if value is not None]
    return sum(map(float, flat)) / len(flat)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="folder of the benchmarks' files; default: the environment variable ASN_RL_DATA")
    parser.add_argument("--tasks", default="gsm8k,ifeval,math500", help=f"of {', '.join(COMPARISONS)}")
    parser.add_argument("--made", type=int, default=500, help="bent gold answers a benchmark (default 500)")
    parser.add_argument("--generated", type=int, default=64, help="completions of the model a benchmark (default 64)")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="embedded short name, hub id or folder")
    parser.add_argument("--tokens", type=int, default=96, help="token limit of a generated completion (default 96)")
    options = parser.parse_args()
    unknown = [name for name in options.tasks.split(",") if name not in COMPARISONS]
    if unknown:
        parser.error(f"argument --tasks: unknown {unknown[0]!r}; known: {', '.join(COMPARISONS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
