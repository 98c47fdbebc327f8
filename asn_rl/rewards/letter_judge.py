"""A causal language model that is shown two answers and says, by one letter, which is the better one.

For capable judges. SmolLM2-135M, the default of the rewards that ask it, runs the mechanics and no more: its opinion is
*anti*-correlated with correctness (0.39 of right-against-wrong pairs where chance is 0.5).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from asn_rl.errors import InvalidValue, RewardError
from asn_rl.rewards.inputs import completion_text

if TYPE_CHECKING:
    from asn_rl.backends.hf import HFBackend

INSTRUCTIONS = """\
Two answers to the same request are shown below. Decide which one is better.

A better answer does what was asked, stays relevant, is accurate, and gives as much detail as the request calls for. \
The order of the answers means nothing, and a longer answer is not better for being longer.

[Request]
{question}

[Answer A]
{first}

[Answer B]
{second}

Which answer is better? Reply with the letter only: A or B."""


class Comparison(NamedTuple):
    """What a judge is asked."""

    question: str
    first: str
    second: str


Judge = Callable[[Sequence[Comparison]], np.ndarray]
"""m comparisons -> (m, 2) probabilities of the answers "first" and "second"; what is missing to 1 went elsewhere"""


def first_preferred(comparisons: Sequence[Comparison], judge: Judge, minimum_share: float) -> np.ndarray:
    """(m,) P(first is better) among the two answers; NaN, void: the judge put less than `minimum_share` on both.

    Raises:
        RewardError: a judge that does not return probabilities.
        InvalidValue: a share outside [0, 1].
    """
    if not 0 <= minimum_share <= 1:
        raise InvalidValue("minimum_share", minimum_share, "in [0, 1]")
    answers = _checked(judge(comparisons), len(comparisons))
    share = answers.sum(1)
    valid = (share >= minimum_share) & (share > 0)
    return np.where(valid, answers[:, 0] / np.where(valid, share, 1.0), np.nan)


def position_share(counts: Mapping[str, int]) -> tuple[float, int] | None:
    """Share of the valid answers that took the first of two, and their number, from what a labeller that judges pairs
    counted; None: it gave no valid answer, or does not count."""
    valid = counts.get("answers", 0) - counts.get("neither", 0)
    return (counts["first_preferred"] / valid, valid) if valid > 0 and "first_preferred" in counts else None


def _checked(answers: np.ndarray, count: int) -> np.ndarray:
    answers = np.asarray(answers, dtype=np.float64)
    if answers.shape != (count, 2) or not ((answers >= 0) & (answers <= 1)).all() or (answers.sum(1) > 1 + 1e-6).any():
        raise RewardError(
            f"a judge must return ({count}, 2) probabilities of 'first' and 'second' that sum to 1 at most, got shape "
            f"{answers.shape}: {answers!r:.200}"
        )
    return answers


def one_question(prompts: Sequence[Any], completions: Sequence[Any]) -> tuple[str, list[str]]:
    """What n conversations have in common, as the question, and what each goes on with, as its answer.

    Where the prompts are equal that is the prompt, and the completions. In a later turn, whose prompts hold earlier
    answers of their own, the answers are what follows the turns that all share.

    Args:
        prompts: n texts or message lists.
        completions: n texts or message lists.
    """
    if all(prompt == prompts[0] for prompt in prompts):
        return _request(prompts[0]), [completion_text(completion) for completion in completions]
    asked = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in prompts]
    turns_of_all = enumerate(zip(*asked, strict=False))
    shared = next((i for i, turns in turns_of_all if any(turn != turns[0] for turn in turns)), min(map(len, asked)))
    answers = [
        _continued([*turns[shared:], {"role": "assistant", "content": completion_text(completion)}])
        for turns, completion in zip(asked, completions, strict=True)
    ]
    return _request(asked[0][:shared]), answers


def _continued(turns: Sequence[Mapping[str, Any]]) -> str:
    """An answer that is itself a conversation: its own text, then the further turns with their roles."""
    return "\n\n".join([completion_text(turns[:1]), *(_spoken(turn) for turn in turns[1:])])


def _request(prompt: Any) -> str:
    """What the judge reads as the request: a text, or the turns of a conversation with their roles."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return completion_text(prompt)
    return "\n".join(_spoken(turn) for turn in prompt)


def _spoken(turn: Mapping[str, Any]) -> str:
    return f"{str(turn.get('role')).capitalize()}: {completion_text([turn])}"


class LetterJudge:
    """A causal language model as a judge: the probabilities of "A" and "B" as its next token.

    Args:
        backend: a transformers backend; a chat template is used where it has one.
        batch_size: comparisons computed at a time.
        counts: counter of comparisons that exceed the judge's context, as `too_long`; they get probability 0.

    Raises:
        RewardError: a letter is no single token of the tokenizer.
    """

    def __init__(self, backend: HFBackend, batch_size: int = 32, counts: Counter[str] | None = None) -> None:
        if batch_size < 1:
            raise InvalidValue("batch_size", batch_size, ">= 1")
        self.backend, self.batch_size = backend, batch_size
        self.counts = Counter() if counts is None else counts
        self.template = INSTRUCTIONS if backend.chat_template else f"{INSTRUCTIONS}\n\nLetter:"
        self.letters = [self._letter_ids(letter) for letter in "AB"]

    def _letter_ids(self, letter: str) -> list[int]:
        """Tokens that are this letter, with and without a space before it."""
        tokenizer = self.backend.tokenizer
        encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (letter, f" {letter}")]
        found = {ids[0] for ids in encoded if len(ids) == 1 and str(tokenizer.decode(ids)).strip() == letter}
        if not found:
            raise RewardError(
                f"the letter {letter!r} is no single token of the judge {self.backend.model.name_or_path!r}; use "
                "another judge"
            )
        return sorted(found)

    def __call__(self, comparisons: Sequence[Comparison]) -> np.ndarray:
        import torch

        ids = [self.backend.encode(self.template.format(**comparison._asdict())) for comparison in comparisons]
        fits = [i for i, row in enumerate(ids) if len(row) < self.backend.max_context]
        self.counts["too_long"] += len(ids) - len(fits)
        fits.sort(key=lambda i: len(ids[i]))  # similar lengths together: less padding
        answers = np.zeros((len(ids), 2))
        for start in range(0, len(fits), self.batch_size):
            rows = fits[start : start + self.batch_size]
            probs = torch.softmax(self.backend.start([ids[i] for i in rows]).logits.float(), -1).double()
            answers[rows] = torch.stack([probs[:, letter].sum(-1) for letter in self.letters], -1).cpu().numpy()
        return answers


def letter_judge(
    model: str, dtype: Any, device: str, chat_template: bool, batch_size: int, counts: Counter[str]
) -> LetterJudge:
    """A judge of these settings; judges of one model share it."""
    from asn_rl.backends import BackendConfig, shared_backend
    from asn_rl.backends.hf import HFBackend

    backend = shared_backend(BackendConfig("hf", model, dtype, device, chat_template))
    assert isinstance(backend, HFBackend)
    return LetterJudge(backend, batch_size, counts)
