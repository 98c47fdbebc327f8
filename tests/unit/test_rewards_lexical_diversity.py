from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

from asn_rl.backends.hf import HFBackend
from asn_rl.errors import InvalidValue, RewardError
from asn_rl.ops.ngrams import distinct_n
from asn_rl.rewards.lexical_diversity import distinct_ngrams, self_bleu_diversity
from asn_rl.testing import check_reward

A, B = "the cat sat on the mat today", "a dog ran over the green hill"
TEXTS = [A, B, A + " again", "completely different words are used here", ""]


def nltk_diversity(text: str, others: list[str]) -> float:
    smooth = SmoothingFunction().method1
    references = [other.split() for other in others]
    return 1 - float(sentence_bleu(references, text.split(), smoothing_function=smooth))  # type: ignore[arg-type]


def test_self_bleu_diversity_is_one_minus_nltks_bleu() -> None:
    scores = check_reward(self_bleu_diversity, ["p"] * 5, TEXTS, terminated=[True, False, True, True, True])
    expected = [nltk_diversity(text, TEXTS[:i] + TEXTS[i + 1 :]) for i, text in enumerate(TEXTS[:4])]
    assert scores == pytest.approx([*expected, 0.0], abs=1e-9)
    assert scores[3] == 1.0


def test_copies_have_no_diversity() -> None:
    assert self_bleu_diversity(["p"] * 3, [A] * 3) == [0.0] * 3
    assert distinct_ngrams(["p"] * 3, [A] * 3) == [0.0] * 3


def test_copies_of_fewer_than_four_words_do_have_some() -> None:
    assert self_bleu_diversity(["p"] * 2, ["yes"] * 2) == pytest.approx([1 - 0.1**0.75] * 2)
    assert distinct_ngrams(["p"] * 2, ["yes"] * 2, n=1) == [0.0, 0.0]


def test_saying_nothing_is_not_diverse() -> None:
    for function in (self_bleu_diversity, distinct_ngrams):
        assert check_reward(function, ["p"] * 4, [A, "", " \n", B])[1:3] == [0.0, 0.0]
        assert function(["p"] * 2, ["", ""]) == [0.0, 0.0]


def test_a_group_of_one_has_no_score() -> None:
    for function in (self_bleu_diversity, distinct_ngrams):
        assert check_reward(function, ["p", "q", "p"], [A, A, B])[1] is None
        assert function(["p"], [""]) == [None]
        assert function([], []) == []


def test_distinct_ngrams_by_hand() -> None:
    texts = ["a b c", "a b d", "x y x y x", "a"]
    assert check_reward(distinct_ngrams, ["p"] * 4, texts) == [1 / 2, 1 / 2, 2 / 4, 0.0]
    assert distinct_ngrams(["p"] * 4, texts, n=1) == [1 / 3, 1 / 3, 2 / 5, 0.0]
    with pytest.raises(InvalidValue, match="n must be >= 1 word, got 0"):
        distinct_ngrams(["p"], ["a"], n=0)


def test_groups() -> None:
    for function in (self_bleu_diversity, distinct_ngrams):
        pair, zero = function(["p"] * 2, [A, B]), [0.0, 0.0]
        assert 0.0 not in pair
        assert function(["p", "q", "p", "q"], [A, A, B, A]) == [pair[0], 0.0, pair[1], 0.0]
        assert function(["p"] * 4, [A, A, B, A], prompt_id=["1", "2", "1", "2"]) == [pair[0], 0.0, pair[1], 0.0]
        columns = {"prompt_id": ["1"] * 4, "group": ["1\nx", "1\ny", "1\nx", "1\ny"]}
        assert check_reward(function, ["p"] * 4, [A, A, B, A], **columns) == [pair[0], 0.0, pair[1], 0.0]
        assert function(["p"] * 4, [A, A, B, B], group=["1", "1", "2", "2"]) == [*zero, *zero]


def test_chat_messages() -> None:
    prompts = [[{"role": "user", "content": "Tell me."}]] * 2
    completions = [[{"role": "assistant", "content": text}] for text in (A, B)]
    assert check_reward(self_bleu_diversity, prompts, completions) == self_bleu_diversity(["p"] * 2, [A, B])
    with pytest.raises(RewardError, match="must be text or a list of messages"):
        distinct_ngrams(["p"] * 2, [3, 4])


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=8).map(" ".join), min_size=2, max_size=6))
def test_scores_are_between_zero_and_one(texts: list[str]) -> None:
    for function in (self_bleu_diversity, distinct_ngrams):
        for score, text in zip(function(["p"] * len(texts), texts), texts, strict=True):
            assert score is not None
            assert 0 <= score <= 1
            assert text.split() or score == 0


def test_the_real_models_hotter_texts_are_more_diverse(smollm: HFBackend) -> None:
    from asn_policies import Pipeline
    from asn_rl.rollout import RolloutConfig, rollout
    from asn_rl.types import Prompt

    means = {}
    for temperature in (0.3, 1.5):
        policy = Pipeline([{"name": "temperature", "params": {"temperature": temperature}}])
        config = RolloutConfig(max_new_tokens=20)
        run = rollout(policy, smollm, [Prompt("a", "Write a sentence about the sea.")], config, num_generations=6)
        texts, ids = run.completions, ["a"] * 6
        for function in (self_bleu_diversity, distinct_ngrams):
            scores = [score for score in check_reward(function, ids, texts, prompt_id=ids) if score is not None]
            means[function.__name__, temperature] = sum(scores) / len(scores)
        means["distinct_n", temperature] = distinct_n([text.split() for text in texts], 2)
    for measure in ("self_bleu_diversity", "distinct_ngrams", "distinct_n"):
        assert means[measure, 0.3] + 0.1 < means[measure, 1.5]
