from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from asn_rl.errors import InvalidValue, RewardError
from asn_rl.rewards import _if_verifiable
from asn_rl.rewards import ifeval as ifeval_module
from asn_rl.rewards.ifeval import evaluate_ifeval, ifeval, instruction_verdicts
from asn_rl.testing import check_reward

ENGLISH = "the weather is fine today and we walk along the river with our old friends"
KINDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "keywords:existence": ({"keywords": ["river", "fish"]}, "A fish in the River.", "A fish."),
    "keywords:frequency": ({"keyword": "fish", "frequency": 2, "relation": "at least"}, "Fish eat fish.", "A fish."),
    "keywords:forbidden_words": ({"forbidden_words": ["fish"]}, "Fishes swim.", "A fish swims."),
    "keywords:letter_frequency": (
        {"letter": "z", "let_frequency": 2, "let_relation": "at least"},
        "Zebras in a zoo.",
        "A zoo.",
    ),
    "language:response_language": (
        {"language": "de"},
        "Das Wetter ist heute sehr schön und wir gehen am Fluss spazieren.",
        ENGLISH,
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": "less than"},
        "Dr. Smith met Mr. Jones.",
        "One came. Two went.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "One\n***\nTwo", "One\n\nTwo"),
    "length_constraints:number_words": ({"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        "First.\n\nThen more.",
        "First.\n\nAnd more.",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name] of [town]", "[name] of Rome"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Bye.\nP.S. See you.", "Bye."),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* one\n* two", "One. Two."),
    "detectable_format:constrained_response": ({}, "My answer is maybe.", "Perhaps."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*one* and *two*", "*one* and two"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1\na",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "{a: 1}"),
    "detectable_format:title": ({}, "<<Rivers>>\nThey flow.", "<Rivers> flow"),
    "combination:two_responses": ({}, "One way.******Another.", "One way.******One way."),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi."}, "Say hi. Hi!", "Hi! Say hi."),
    "startend:end_checker": ({"end_phrase": "The end."}, "It rains. The end.", "The end. It rains."),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"},
        "NO RAIN today. It is dry.",
        "NO rain today.",
    ),
    "change_case:english_capital": ({}, ENGLISH.upper(), ENGLISH),
    "change_case:english_lowercase": ({}, ENGLISH, ENGLISH.upper()),
    "punctuation:no_comma": ({}, "one and two", "one, two"),
    "startend:quotation": ({}, '"Quoted."', "Not quoted."),
}
RESPONSES = [
    "",
    " \n ",
    "<think>one, two</think>Three.",
    "**Bold.**\n\nSecond, with a list:\n* a\n- b\n\nThird? Yes! e.g. this. (Done.)",
    "Sure, here it is:\n" + ENGLISH + "\nI hope this helps.",
    "1 + 1 = 2 😀 ¿Qué?",
]


@pytest.fixture(scope="module")
def direct() -> Callable[..., tuple[bool, bool]]:
    """if-verifiable's own function on one instruction, in this process."""
    langdetect = importlib.import_module("langdetect")
    langdetect.DetectorFactory.seed = 0
    _if_verifiable.provide_punkt()
    checkers = dict(_if_verifiable._module("ifbench.instructions_registry").INSTRUCTION_DICT)
    checkers |= _if_verifiable._module("ifeval.instructions_registry").INSTRUCTION_DICT

    def ask(response: str, instruction: str, kwargs: dict[str, Any]) -> tuple[bool, bool]:
        evaluate = _if_verifiable._module("common").evaluate_instructions
        _, scores = evaluate(response, [instruction], [kwargs], "the prompt", checkers)
        return scores.binary_strict == 1.0, scores.binary_loose == 1.0

    return ask


def verdicts(cases: list[tuple[str, str, dict[str, Any]]], **options: Any) -> list[Any]:
    columns = [[instruction] for _, instruction, _ in cases], [[kwargs] for _, _, kwargs in cases]
    return [row[0] for row in instruction_verdicts([response for response, _, _ in cases], *columns, **options)]


def test_every_kind_of_ifeval_is_followed_and_broken() -> None:
    assert len(KINDS) == 25
    good = verdicts([(good, name, kwargs) for name, (kwargs, good, _) in KINDS.items()])
    bad = verdicts([(bad, name, kwargs) for name, (kwargs, _, bad) in KINDS.items()])
    assert dict(zip(KINDS, good, strict=True)) == dict.fromkeys(KINDS, (True, True))
    assert dict(zip(KINDS, bad, strict=True)) == dict.fromkeys(KINDS, (False, False))


def test_agreement_with_the_package_on_every_kind_of_ifeval(direct: Callable[..., Any]) -> None:
    cases = [
        (response, name, kwargs) for name, (kwargs, good, bad) in KINDS.items() for response in (good, bad, *RESPONSES)
    ]
    assert verdicts(cases) == [direct(*case) for case in cases]


def test_agreement_with_the_package_on_ifbench(direct: Callable[..., Any]) -> None:
    """Arguments are those that the checkers draw for themselves."""
    checkers = _if_verifiable._module("ifbench.instructions_registry").INSTRUCTION_DICT
    needs_data = {"ratio:stop_words", "words:start_verb"}
    given = {
        "ratio:overlap": {"reference_text": ENGLISH, "percentage": 20},
        "sentence:keyword": {"word": "river", "N": 1},
        "repeat:repeat_change": {"prompt_to_repeat": "Say hi."},
        "repeat:repeat_simple": {},
        "repeat:repeat_span": {"prompt_to_repeat": ENGLISH, "n_start": 1, "n_end": 4},
        "format:options": {"options": "yes/no"},
        "count:words_japanese": {"N": 2},
        "count:word_count_range": {"min_words": 2, "max_words": 20},
    }
    state, cases = random.getstate(), []
    try:
        random.seed(1)
        for name in sorted(set(checkers) - needs_data):
            checker = checkers[name](name)
            if name not in given:
                checker.build_description()
            kwargs = given.get(name) or checker.get_instruction_args() or {}
            cases += [(text, name, kwargs) for text in (*RESPONSES[2:5], ENGLISH)]
    finally:
        random.setstate(state)
    found = verdicts(cases)
    known = [(case, verdict) for case, verdict in zip(cases, found, strict=True) if verdict is not None]
    assert len({case[1] for case, _ in known}) >= 50
    assert [verdict for _, verdict in known] == [direct(*case) for case, _ in known]


@pytest.mark.parametrize("symbol", ["#", "!"])
def test_symbols_are_counted(symbol: str) -> None:
    """Keys 1122 and 1129, for which the package draws a letter."""
    kwargs = {"letter": symbol, "let_frequency": 3, "let_relation": "at least"}
    asked = [(text, "keywords:letter_frequency", kwargs) for text in (symbol * 3, symbol * 2, "etaoin" * 20)]
    assert verdicts(asked * 3) == [(True, True), (False, False), (False, False)] * 3


def test_levels_and_modes() -> None:
    columns = {
        "instruction_id_list": [["punctuation:no_comma", "length_constraints:number_words"]] * 4 + [None, []],
        "kwargs": [[{"num_words": None}, {"num_words": 3, "relation": "at least", "keyword": None}]] * 4 + [None, []],
    }
    texts = ["a b c", "a b", "a, b", "Sure, here:\na b c", "x", "x"]

    def score(**options: Any) -> list[float | None]:
        return ifeval(["q"] * 6, texts, **columns, **options)

    assert score() == [1.0, 0.0, 0.0, 0.0, None, None]
    assert score(mode="loose") == [1.0, 0.0, 0.0, 1.0, None, None]
    assert score(level="instruction") == [1.0, 0.5, 0.0, 0.5, None, None]
    assert score(level="instruction", mode="loose") == [1.0, 0.5, 0.0, 1.0, None, None]
    assert score(terminated=[False] * 6) == score()


def test_masked_instructions_are_counted() -> None:
    ifeval.__dict__["counts"].clear()
    columns = {
        "instruction_id_list": [["punctuation:no_comma", "length_constraints:number_words"]] * 2
        + [["length_constraints:number_words"]],
        "kwargs": [[{}, {}], [{}, {"num_words": 3}], [{}]],
    }
    assert ifeval(["q"] * 3, ["a b", "a, b", "a"], **columns) == [None, 0.0, None]
    assert ifeval(["q"] * 3, ["a b", "a, b", "a"], level="instruction", **columns) == [1.0, 0.0, None]
    assert ifeval.__dict__["counts"] == {"unspecified": 6}


def test_slow_check_is_masked_and_the_others_are_answered() -> None:
    ifeval.__dict__["counts"].clear()
    columns = {
        "instruction_id_list": [["detectable_content:number_placeholders"]] * 3,
        "kwargs": [[{"num_placeholders": 1}]] * 3,
    }
    ifeval(["q"] * 3, ["[x]"] * 3, time_limit=2.0, workers=1, **columns)
    scores = ifeval(["q"] * 3, ["[a]", "[" * 100_000, "a"], time_limit=2.0, workers=1, **columns)
    assert scores == [1.0, None, 0.0]
    assert ifeval.__dict__["counts"] == {"timeout": 1}


def test_missing_nltk_data_masks_the_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("nltk.data"), "path", [])
    assert _if_verifiable.follows("Go home.", "words:start_verb", {}) == "nltk_data"


def test_contract() -> None:
    names = [["language:response_language", "keywords:existence"], ["length_constraints:number_sentences"]]
    kwargs = [[{"language": "en"}, {"keywords": []}], [{"num_sentences": 1}]]
    messages = [{"role": "assistant", "content": ENGLISH}]
    check_reward(ifeval, ["q", "q"], [messages, "One. Two."], instruction_id_list=names, kwargs=kwargs)


def test_check_in_this_process_leaves_random_as_it_was(direct: Callable[..., Any]) -> None:
    before = random.getstate()
    assert _if_verifiable.follows("a", "keywords:existence", {}) == "unspecified"
    assert random.getstate() == before


def test_accuracies() -> None:
    names = [["punctuation:no_comma", "length_constraints:number_words"], ["punctuation:no_comma"]]
    kwargs: list[list[dict[str, Any]]] = [[{}, {"num_words": 2, "relation": "at least"}], [{}]]
    assert evaluate_ifeval(["a, b", "Well, yes:\nfine"], names, kwargs) == {
        "prompt_level_strict_acc": 0.0,
        "inst_level_strict_acc": 1 / 3,
        "prompt_level_loose_acc": 0.5,
        "inst_level_loose_acc": 2 / 3,
    }
    with pytest.raises(RewardError, match="nothing could be checked"):
        evaluate_ifeval(["a"], [[]], [[]])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "needs a column 'instruction_id_list'"),
        ({"instruction_id_list": [["punctuation:no_comma"]]}, "needs a column 'kwargs'"),
        ({"instruction_id_list": [["punctuation:no_comma"]], "kwargs": [[]]}, "one dict in 'kwargs' for each"),
        ({"instruction_id_list": [["punctuation:no_coma"]], "kwargs": [[{}]]}, "Did you mean 'punctuation:no_comma'"),
        ({"instruction_id_list": [["startend:quotation"]], "kwargs": [[{"n": 1}]]}, "does not take kwargs"),
    ],
)
def test_refused_rows(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        ifeval(["q"], ["a"], **columns)


@pytest.mark.parametrize("option", ["level", "mode"])
def test_refused_options(option: str) -> None:
    options: dict[str, Any] = {option: "all"}
    with pytest.raises(InvalidValue, match=f"{option} must be"):
        ifeval(["q"], ["a"], instruction_id_list=[[]], kwargs=[[]], **options)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "if_verifiable" else find(name))
    with pytest.raises(RewardError, match=r"pip install 'asn_rl\[ifeval\]'"):
        ifeval(["q"], ["a"], instruction_id_list=[None], kwargs=[None], time_limit=99)


def test_the_network_is_not_tried() -> None:
    script = f"""
import sys; sys.path[:] = {sys.path!r}
import socket
tried = []
def refuse(*arguments, **options):
    tried.append(arguments)
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import nltk
download = nltk.download
from asn_rl.rewards._if_verifiable import instruction_checker
follows = instruction_checker()
counted = follows("Dr. Smith came. He left.", "length_constraints:number_sentences",
                  {{"num_sentences": 3, "relation": "less than"}})
print(counted, tried, "datasets" in sys.modules, nltk.download is download)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("(True, True) [] False True\n", "")


def test_a_check_is_made_once_for_all_four_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {
        "instruction_id_list": [["punctuation:no_comma"], ["punctuation:no_comma"]],
        "kwargs": [[{}], [{}]],
    }
    texts = ["never asked before", "never, asked before"]
    first = ifeval(["q"] * 2, texts, mode="strict", **columns)

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"asked again: {arguments}")

    pool = ifeval_module._shared_pool(2, 5.0)
    monkeypatch.setattr(pool, "map", lambda calls: [] if not calls else refuse(calls))
    for level, mode in (("prompt", "loose"), ("instruction", "strict"), ("instruction", "loose")):
        assert ifeval(["q"] * 2, texts, level=level, mode=mode, **columns) == first == [1.0, 0.0]
