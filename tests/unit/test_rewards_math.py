from __future__ import annotations

import importlib.util
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from asn_rl.errors import RewardError
from asn_rl.rewards import math as rewards_math
from asn_rl.rewards.astronomic import is_astronomic
from asn_rl.rewards.math import MathVerifier, math_answer


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
