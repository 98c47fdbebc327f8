from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asn_rl.data.benchmark import load_benchmark
from asn_rl.errors import RewardError
from asn_rl.rewards.compose import RewardConfig, RewardSuite
from asn_rl.rewards.extraction import extracted_answer
from asn_rl.types import Prompt

GSM8K = {verifier.name: verifier.arguments for verifier in load_benchmark("gsm8k").verifiers}


def score(text: Any, answer: Any = "18", **arguments: Any) -> float | None:
    return extracted_answer([""], [text], answer=[answer], **arguments)[0]


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("9 * 2 = 18\n#### 18", 1, 1),
        ("#### 18.", 1, 1),
        ("#### 18,", 1, 1),
        ("#### 1,8", 1, 1),
        ("#### -18", 0, 0),
        ("####18", 0, 1),
        ("#### $18", 0, 1),
        ("#### 18\n\nSo 7 are left", 1, 0),
        ("#### 7 #### 18", 0, 1),  # strict takes the first match, flexible the last
        ("#### 18.0", 0, 0),  # compared as text
        ("It makes $18.", 0, 1),
        ("18 $", 0, 1),
        ("18 $.", 0, 0),  # "$." is the last match; nothing is left of it
        ("eighteen", 0, 0),
        ("", 0, 0),
    ],
)
def test_gsm8k_as_lm_eval_scores_it(text: str, strict: float, flexible: float) -> None:
    assert (score(text, **GSM8K["strict_match"]), score(text, **GSM8K["flexible_extract"])) == (strict, flexible)


@given(st.text(alphabet="#0123456789.,$- \n", max_size=25), st.sampled_from(["1", "12", "-3", "1,234"]))
def test_against_findall(text: str, answer: str) -> None:
    """lm-eval's steps, over `re.findall`: select a match, its first group that is not empty, strip, remove."""
    for arguments in GSM8K.values():
        found = re.findall(arguments["pattern"], text)
        chosen: Any = found[arguments.get("match", 0)] if found else "[invalid]"
        chosen = next((group for group in chosen if group), "[invalid]") if isinstance(chosen, tuple) else chosen
        sides = [chosen.strip(), answer]
        for pattern in arguments["remove"]:
            sides = [re.sub(pattern, "", side) for side in sides]
        assert score(text, answer, **arguments) == float(sides[0] == sides[1])


def test_an_answer_that_was_cut_off_is_wrong_unless_asked_for() -> None:
    assert score("#### 18", terminated=[False]) == 0.0
    assert score("#### 18", terminated=[False], unfinished=True) == 1.0


def test_options() -> None:
    assert score("The answer is Paris.", "paris", pattern="answer is (.+)") == 0.0
    ignoring = {"ignore_case": True, "ignore_punctuation": True}
    assert score("The answer is Paris.", "paris", pattern="answer is (.+)", **ignoring) == 1.0
    assert score("a=1 a=2 a=3", "2", pattern="a=(.)", match=1) == 1.0
    assert score("a=1", "1", pattern="a=(.)", match=3) == 0.0
    assert score("x", None) is None
    assert score([{"role": "assistant", "content": "#### 18"}]) == 1.0
    assert score("#### 18", 18) == 1.0


def test_bad_input() -> None:
    with pytest.raises(RewardError, match="needs a column 'answer'"):
        extracted_answer([""], ["#### 18"])
    with pytest.raises(RewardError, match=r"'\(' is no regular expression"):
        score("x", pattern="(")
    with pytest.raises(RewardError, match=r"'\*' is no regular expression"):
        score("x", remove=["*"])


def test_in_a_suite() -> None:
    prompts = [Prompt("a", "q", {"answer": "18"}), Prompt("b", "q", {})]
    with RewardSuite([RewardConfig("extracted_answer", arguments=GSM8K["strict_match"])]) as suite:
        raw = suite.scores(prompts, ["#### 18", "#### 18"], [None, None], terminated=[True, True])
    assert raw.values == {"extracted_answer": [1.0, None]}
    assert raw.reasons == {"extracted_answer": [None, "the function returned None"]}
    assert raw.counts["extracted_answer/masked"] == 1
