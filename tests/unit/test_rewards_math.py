from __future__ import annotations

import importlib.util
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from asn_rl.data.benchmark import gold_rows, load_benchmark
from asn_rl.errors import RewardError
from asn_rl.rewards import math as rewards_math
from asn_rl.rewards.astronomic import is_astronomic
from asn_rl.rewards.extraction import marked_answer
from asn_rl.rewards.math import MathVerifier, math_answer, only_repeats


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerifier]:
    with MathVerifier(workers=1, time_limit=20) as verifier:
        yield verifier


def ask(verifier: MathVerifier, gold: str, text: str) -> bool | None:
    return verifier.verdicts([(gold, text)])[0]


@pytest.mark.parametrize(
    ("gold", "text", "verdict"),
    [
        ("15", "The answer is 15.", True),
        ("15", "The answer is 16.", False),
        ("15", "I do not know.", False),
        ("15", "", False),
        ("1/2", "so $\\frac{1}{2}$", True),
        ("\\frac{1}{2}", "\\boxed{0.5}", True),
        ("$x^2+1$", "$1+x^2$", True),
        ("\\$18.90", "It costs $18.90$", True),
        ("1,234", "1234", True),
        ("40_9", "\\boxed{40_9}", True),
        ("40_9", "\\boxed{40_{9}}", True),
        ("40_9", "\\boxed{40}", True),
        ("40_9", "\\boxed{40_6}", False),
        ("(3, \\frac{\\pi}{2})", "\\boxed{\\left(3,\\frac{\\pi}{2}\\right)}", True),
    ],
)
def test_verdicts(verifier: MathVerifier, gold: str, text: str, verdict: bool) -> None:
    assert ask(verifier, gold, text) is verdict


def test_only_the_end_is_read(verifier: MathVerifier) -> None:
    assert ask(verifier, "7", "\\boxed{8} " + "so " * 1000 + "\\boxed{7}") is True
    assert ask(verifier, "7", "\\boxed{7} " + "so " * 1000) is False


def test_gold_that_is_no_mathematics(verifier: MathVerifier) -> None:
    verifier.counts.clear()
    assert ask(verifier, "", "7") is None
    assert verifier.counts == {"gold": 1}


@pytest.mark.parametrize(
    "text",
    [
        "10**10**10",
        "$7^{10^8}$",
        "$2^{3^{20}}$",
        "9^9^9",
        "$99999999!$",
        "$(1234567)!$",
        "$2^{1000000}$",
        "2**(-1000000)",
        "$" + "(" * 400 + "1" + ")" * 400 + "$",
        "$" + "\\frac{1}{" * 60 + "3" + "}" * 60 + "$",
        "$((9!)!)!$",
        "$(29!)!$",
    ],
)
def test_astronomic_answers_are_masked_and_counted(verifier: MathVerifier, text: str) -> None:
    verifier.counts.clear()
    assert verifier.verdicts([("7", text), (text, "7"), ("7", "7")]) == [None, None, True]
    assert verifier.counts == {"astronomic": 2}


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Evaluate $1^{(2^{235423523})}$. One to any power is one, so $\\boxed{1}$", True),
        ("1^{(2^{235423523})} = 1", True),
        ("10**10**10 is large. The answer is 2.", False),
        ("Here $99999999!$ cancels, so the answer is 1", True),
        ("(" * 400 + " and 1", True),
    ],
)
def test_what_is_quoted_but_not_the_answer_masks_nothing(verifier: MathVerifier, text: str, verdict: bool) -> None:
    verifier.counts.clear()
    assert ask(verifier, "1", text) is verdict
    assert not verifier.counts


@pytest.mark.parametrize(
    "text",
    [
        "2^{10}",
        "(z^5)^{17}",
        "2^3^2",
        "5!",
        "1000000",
        "f(g(h(x)))",
        "Great!!!",
        "10^5",
        "(3!)!",
        "It's 42!!!",
        "[" * 15,
    ],
)
def test_ordinary_texts_are_not_astronomic(text: str) -> None:
    assert not is_astronomic(text)


SLOW = "$2^{2^{2^{2^{2^2}}}}$"
"""whose text does not show how large it is"""


def test_killed_comparison_is_masked_counted_and_the_worker_replaced() -> None:
    with MathVerifier(workers=1, time_limit=1) as verifier:
        assert verifier.verdicts([("7", SLOW), ("7", "7")]) == [None, True]
        assert verifier.counts == {"timeout": 1}


def test_alarm_inside_the_worker_is_no_verdict() -> None:
    with MathVerifier(workers=1, time_limit=20) as verifier:
        assert verifier.verdicts([("7", SLOW)]) == [None]
        assert verifier.counts == {"error": 1}


def test_known_pairs_are_not_asked_again(verifier: MathVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ask_pool = verifier.pool.map
    monkeypatch.setattr(verifier.pool, "map", lambda items: asked.append(len(items)) or ask_pool(items))
    monkeypatch.setattr(rewards_math, "CACHE_ENTRIES", 2)
    pairs = [("3", "it is 3"), ("3", "it is 4"), ("3", "it is 3")]
    assert verifier.verdicts(pairs) == [True, False, True]
    assert verifier.verdicts(pairs) == [True, False, True]
    assert verifier.verdicts([("5", "five"), ("5", "it is 5")]) == [False, True]
    assert verifier.verdicts(pairs[:1]) == [True]
    assert asked == [2, 0, 2, 1]


def test_reward_function() -> None:
    scores = math_answer(
        ["q"] * 5,
        ["$\\frac{2}{4}$", "1/3", "1/2", "1/2", "10**10**10"],
        answer=["1/2", "1/2", "1/2", None, 0.5],
        terminated=[True, True, False, True, True],
    )
    assert scores == [1.0, 0.0, 0.0, None, None]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so $x = \\boxed{\\frac{1}{2}}$.", "$\\frac{1}{2}$"),
        ("so $\\boxed{17}$ and $\\boxed{5}$.", "$17, 5$"),
        ("First \\boxed{17}. Then \\boxed{5}", "$5$"),
        ("\\boxed{7}. My answer is based on 3 theorems", "$7$"),
        ("\\boxed{24}.\nFinal Answer: The final answer is $25$. I hope it is correct.", "$25$"),
        ("Final Answer: The final answer is $[2,5)$. I hope it is correct.", "$[2,5)$"),
        ("The final answer is $\\$18.90$. I hope it is correct.", "$\\$18.90$"),
        ("The answer is:\n\\[ x=5 \\]", "$x=5$"),
        ("The answer to the question is **1,234**.", "1,234"),
        ("**Answer:** -3.5!", "-3.5"),
        ("The answer is 7, since $x=5$.", "7"),
        ("The answer is $\\boxed{7}$", "$7$"),
        ("I think it is $7+8$", None),
        ("Put the final answer within \\boxed{}.", None),
        ("\\boxed{7", None),
        ("The answer is unknown.", None),
        ("", None),
    ],
)
def test_marked_answers(text: str, answer: str | None) -> None:
    assert marked_answer(text) == answer


PROMPT = "Evaluate $(1+2i)6-3i$ and $7 + 8$, simplify $\\sqrt{242}$ and $\\frac{4}{8}$, $x + 1$, $2^{10}$."


@pytest.mark.parametrize(
    ("answer", "gold", "repeats"),
    [
        ("$(1+2i)6-3i$", "6+9i", True),
        ("$\\sqrt{242}$", "11\\sqrt2", True),
        ("$\\left(1 + 2i\\right)6 - 3i$", "6+9i", True),
        ("$\\dfrac{4}{8}$", "\\frac{1}{2}", True),
        ("$2^{10}$", "1024", True),
        ("7 + 8", "15", True),
        ("$7+8 = 15$", "15", False),
        ("$20-5$", "15", True),
        ("$\\frac{30}{2}$", "15", True),
        ("$0.3+0.2$", "0.5", True),
        ("$\\frac{1}{2}$", "0.5", False),
        ("$1/2$", "\\frac{1}{2}", False),
        ("$10^6$", "1,000,000", False),
        ("$1 + x$", "x+1", False),
        ("$x+1$", "1+x", False),
        ("$-15$", "-15", False),
        ("$15 \\text{ cm}^2$", "15", False),
        ("$3, -5$", "-5,3", False),
        ("$9i + 6$", "6+9i", False),
    ],
)
def test_what_is_not_worked_out(answer: str, gold: str, repeats: bool) -> None:
    assert only_repeats(answer, gold, PROMPT) is repeats


def test_marked_answers_only() -> None:
    rewards_math.COUNTS.clear()
    texts = ["I think it is $7+8$", PROMPT, "\\boxed{7+8}", "\\boxed{15}", "The answer is 15.", "15", "\\boxed{16}"]
    answer = ["15"] * len(texts)
    prompts = [[{"role": "user", "content": PROMPT}]] * len(texts)
    assert math_answer(prompts, texts, answer=answer, marked=True, time_limit=20) == [0, 0, 0, 1, 1, 0, 0]
    assert math_answer.__dict__["counts"] == {"unmarked": 3, "repeated": 1}
    assert math_answer(prompts[:3], texts[:3], answer=answer[:3], time_limit=20) == [1, 0, 1]
    assert math_answer(prompts[3:4], texts[3:4], answer=[None], marked=True) == [None]


def test_problems_handed_back_are_not_answers(benchmark_data: Path) -> None:
    """What the repeated problem of a MATH-500 row scores, in its own words and with its longest formula in a box."""
    rows = gold_rows(load_benchmark("math500"), benchmark_data)
    rows = [row for row in rows if len(row[1]["problem"]) < 60]
    formulas = [max(re.findall(r"\$([^$]+)\$", fields["problem"]), key=len, default="") for _, fields in rows]
    prompts, answers = [prompt.content for prompt, _ in rows], [fields["answer"] for _, fields in rows]
    repeated, boxed = [fields["problem"] for _, fields in rows], [f"\\boxed{{{formula}}}" for formula in formulas]
    for texts in (repeated, boxed):
        assert sum(score or 0 for score in math_answer(prompts, texts, answer=answers)) >= 5
        scores = math_answer(prompts, texts, answer=answers, marked=True)
        right = {text for text, score in zip(texts, scores, strict=True) if score}
        # Fractions in lowest terms are numbers, though the problems ask for decimals; and one answer is in its problem.
        kept = ["\\frac{9}{2}", "\\frac{57}{160}", "\\frac{3}{20}", "\\sqrt{53}"]
        assert right == (set() if texts is repeated else {f"\\boxed{{{formula}}}" for formula in kept})
    golds = [f"Final Answer: The final answer is ${answer}$. I hope it is correct." for answer in answers]
    assert math_answer(prompts, golds, answer=answers, marked=True, time_limit=20) == [1] * len(rows)


def test_off_the_main_thread() -> None:
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(math_answer, ["q"], [f"$\\frac{{{i}}}{{2}}$"], answer=[i / 2]) for i in range(8)]
        assert [call.result() for call in calls] == [[1.0]] * 8


def test_alarm_of_the_caller_survives() -> None:
    signal.alarm(1000)
    try:
        assert math_answer(["q"], ["it is $2 \\cdot 3$"], answer=["6"]) == [1.0]
    finally:
        left = signal.alarm(0)
    assert left > 0


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find(name))
    with pytest.raises(RewardError, match=r"pip install 'asn_rl\[math\]'"):
        MathVerifier()


def test_missing_column() -> None:
    with pytest.raises(RewardError, match="'math_answer' needs a column 'answer'"):
        math_answer(["q"], ["7"])
