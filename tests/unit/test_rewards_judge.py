from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau
from tiny_models import CONFIGS, tiny_backend

from asn_rl.backends.hf import HFBackend
from asn_rl.errors import InvalidValue, RewardError
from asn_rl.ops.pairwise import bradley_terry, swiss_rounds
from asn_rl.rewards.judge import pairwise_judge, tournament, tournaments
from asn_rl.rewards.letter_judge import INSTRUCTIONS, Comparison, LetterJudge
from asn_rl.testing import check_reward


class RuleJudge:
    """Prefers the text with more letters "x"; leans to the first by `bias` nats; answers a letter with `share`."""

    def __init__(self, bias: float = 0.0, share: float = 0.9, silent: Sequence[str] = ()) -> None:
        self.bias, self.share, self.silent = bias, share, silent
        self.calls: list[list[Comparison]] = []

    def __call__(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        self.calls.append(list(comparisons))
        answers = []
        for _, first, second in comparisons:
            p = 1 / (1 + np.exp(second.count("x") - first.count("x") - self.bias))
            share = 0.05 if {first, second} & set(self.silent) else self.share
            answers.append((share * p, share * (1 - p)))
        return np.array(answers).reshape(len(comparisons), 2)


TEXTS = ["x" * n for n in (3, 0, 5, 1, 4, 2)]


def test_the_better_text_is_stronger() -> None:
    result = tournament("q", TEXTS, RuleJudge())
    assert np.asarray(kendalltau(result.strength, [3, 0, 5, 1, 4, 2]))[0] > 0.8
    assert (result.strength.argmax(), result.strength.argmin()) == (2, 1)
    assert result.strength.mean() == pytest.approx(0, abs=1e-9)
    assert result.position_bias == pytest.approx(0, abs=1e-12)
    assert result.comparisons.tolist() == [swiss_rounds(6)] * 6
    assert (result.answers, result.neither) == (swiss_rounds(6) * 3 * 2, 0)
    assert (result.stderr < 1).all()


def test_everybody_meets_everybody_in_enough_rounds() -> None:
    """Then the rating is the fit of all pairs, whatever the order of play."""
    result = tournament("q", TEXTS[:4], RuleJudge(), rounds=3, prior=2.0, seed=3)
    margin = np.subtract.outer([3, 0, 5, 1], [3, 0, 5, 1])
    wins = np.where(np.eye(4, dtype=bool), 0, 1 / (1 + np.exp(-margin.astype(float))))
    expected = bradley_terry(wins, 2.0)
    np.testing.assert_allclose(result.strength, expected.strength, atol=1e-9)
    np.testing.assert_allclose(result.stderr, expected.stderr, atol=1e-9)


def test_position_bias_is_measured_and_mostly_cancels() -> None:
    leaning = tournament("q", TEXTS, RuleJudge(bias=1.5), rounds=5)
    assert leaning.position_bias is not None
    assert 0.05 < leaning.position_bias < 0.5
    assert leaning.first_preferred > leaning.answers / 2
    assert np.argsort(leaning.strength).tolist() == np.argsort([3, 0, 5, 1, 4, 2]).tolist()
    always_first = tournament("q", TEXTS, lambda asked: np.tile([0.99, 0.0], (len(asked), 1)))
    assert always_first.position_bias == pytest.approx(0.5)
    assert always_first.strength == pytest.approx(np.zeros(6), abs=1e-9)


def test_void_answers_contribute_nothing() -> None:
    judge = RuleJudge(silent=["xxxxx"])
    result = tournament("q", TEXTS, judge, minimum_share=0.2)
    silenced = TEXTS.index("xxxxx")
    assert result.comparisons[silenced] == 0
    assert result.strength[silenced] == pytest.approx(0, abs=1e-12)
    assert result.stderr[silenced] == 1.0
    assert result.neither == 2 * swiss_rounds(6)
    valid = [c for call in judge.calls for c in call if "xxxxx" not in (c.first, c.second)]
    assert result.comparisons.sum() == len(valid)
    everything = tournament("q", TEXTS, judge, minimum_share=0.0)
    assert everything.neither == 0


def test_one_valid_order_is_not_enough() -> None:
    """It would carry the position bias."""

    def judge(asked: Sequence[Comparison]) -> np.ndarray:
        return np.array([[0.9, 0.0] if c.first < c.second else [0.01, 0.02] for c in asked])

    result = tournament("q", ["a", "b"], judge)
    assert result.comparisons.tolist() == [0, 0]
    assert (result.answers, result.neither, result.position_bias) == (2, 1, 0.5)


def test_equal_texts_share_one_player() -> None:
    result = tournament("q", ["xx", "", "xx", "x"], RuleJudge())
    assert result.strength[0] == result.strength[2] > result.strength[3] > result.strength[1]
    alone = tournament("q", ["xx", "xx"], RuleJudge())
    assert alone.comparisons.tolist() == [0, 0]
    assert alone.position_bias is None


def test_tournaments_run_side_by_side_in_one_call_a_round() -> None:
    judge = RuleJudge()
    fields = [("one", TEXTS), ("two", TEXTS[:3]), ("three", ["x"]), ("four", TEXTS[1:])]
    together = tournaments(fields, judge, seed=5)
    assert len(judge.calls) == swiss_rounds(6)
    assert {c.question for c in judge.calls[0]} == {"one", "two", "four"}
    for (question, texts), result in zip(fields, together, strict=True):
        alone = tournament(question, texts, RuleJudge(), seed=5)
        np.testing.assert_array_equal(alone.strength, result.strength)
        assert alone.answers == result.answers


def test_large_field() -> None:
    generator = np.random.default_rng(0)
    truth = 1.5 * generator.standard_normal(143)
    place = {f"text {i}": strength for i, strength in enumerate(truth)}

    def judge(asked: Sequence[Comparison]) -> np.ndarray:
        p = 1 / (1 + np.exp([place[c.second] - place[c.first] for c in asked]))
        return np.stack([p, 1 - p], -1)

    result = tournament("q", list(place), judge)
    assert result.answers == 9 * 71 * 2
    assert np.asarray(kendalltau(result.strength, truth))[0] > 0.9


@pytest.mark.parametrize(
    "answers", [np.ones((1, 2)), np.full((2, 2), np.nan), np.full((2, 2), -0.1), np.full((2, 2), 0.7)]
)
def test_judges_that_return_no_probabilities(answers: np.ndarray) -> None:
    with pytest.raises(RewardError, match="a judge must return"):
        tournament("q", ["a", "b"], lambda _: answers)


@pytest.mark.parametrize(
    ("options", "name"), [({"rounds": 0}, "rounds"), ({"minimum_share": 1.5}, "minimum_share"), ({"prior": 0}, "prior")]
)
def test_options_out_of_range(options: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidValue, match=name):
        tournament("q", ["a", "b"], RuleJudge(), **options)


# The judge itself: SmolLM2 runs the mechanics; it is too small for an opinion


@pytest.fixture(scope="module")
def judge(smollm: HFBackend) -> LetterJudge:
    return LetterJudge(smollm, counts=Counter())


def test_letters_are_next_token_probabilities(judge: LetterJudge, smollm: HFBackend) -> None:
    asked = [Comparison("What is 3 + 4?", "7", "I like {trains}."), Comparison("Name an animal.", "a cat", "a rock")]
    answers = judge(asked)
    for comparison, answer in zip(asked, answers, strict=True):
        text = INSTRUCTIONS.format(**comparison._asdict())
        assert all(part in text for part in comparison)
        logits = smollm.score(smollm.encode(text), [0])[0][0]
        probs = logits.double().softmax(-1)
        expected = [sum(float(probs[token]) for token in range(len(probs)) if token in ids) for ids in judge.letters]
        assert answer == pytest.approx(expected, abs=1e-4)
    tokens = [{str(smollm.tokenizer.decode([token])) for token in ids} for ids in judge.letters]
    assert tokens == [{"A", " A"}, {"B", " B"}]
    assert (answers.sum(1) > 0.2).all()  # it does answer with a letter


def test_answers_do_not_depend_on_the_batch(judge: LetterJudge, smollm: HFBackend) -> None:
    texts = ["7", "The answer is 7.", "12", "I do not know, but it may be seven or so."]
    asked = [Comparison("What is 3 + 4?", a, b) for a in texts for b in texts if a != b]
    np.testing.assert_allclose(LetterJudge(smollm, batch_size=3)(asked), judge(asked), atol=1e-4)


def test_comparisons_beyond_the_context_are_void(judge: LetterJudge, smollm: HFBackend) -> None:
    judge.counts.clear()
    answers = judge([Comparison("q", "long " * smollm.max_context, "short")])
    assert answers.tolist() == [[0.0, 0.0]]
    assert judge.counts == {"too_long": 1}


def test_tokenizer_without_the_letters() -> None:
    with pytest.raises(RewardError, match="the letter 'A' is no single token"):
        LetterJudge(tiny_backend(CONFIGS["rotary"]()))


def test_reward_function() -> None:
    counts = pairwise_judge.__dict__["counts"]
    counts.clear()
    prompts = ["What is 3 + 4?"] * 3 + [[{"role": "user", "content": "Name an animal."}]] * 2 + ["Say hello."]
    completions = ["7", "I like trains.", "7", "a cat", [{"role": "assistant", "content": "a rock"}], "hello"]

    def score(prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> list[float | None]:
        return pairwise_judge(prompts, completions, dtype="float32", minimum_share=0.05, **columns)

    scores = check_reward(score, prompts, completions, prompt_id=["a", "a", "a", "b", "b", "c"], group=list("uvwxyz"))
    assert scores[5] is None  # nobody to meet
    assert all(value is not None for value in scores[:5])
    assert scores[0] == scores[2]
    assert scores[0] == pytest.approx(-scores[1])  # type: ignore[operator]
    assert scores[3] == pytest.approx(-scores[4])  # type: ignore[operator]
    assert counts["answers"] == 2 * 4  # two calls by the check, two pairs in two orders each
    assert counts["uncompared"] == 2


def test_opinions_of_nobody_are_masked() -> None:
    assert pairwise_judge(["q", "q"], ["yes", "no"], dtype="float32", minimum_share=1.0) == [None, None]


def test_unknown_precision() -> None:
    with pytest.raises(InvalidValue, match="dtype must be auto, float32"):
        pairwise_judge(["q", "q"], ["yes", "no"], dtype="int8")
