"""Answers of a given form: one of several choices, or JSON that a schema accepts. Free patterns: `format_match`."""

from __future__ import annotations

import importlib.util
import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

from asn_rl.errors import RewardError
from asn_rl.rewards.inputs import completion_text, required_column, terminated_flags

TAIL_CHARACTERS = 2000
"""only the end of a completion is read for a choice: that is where the answer is"""
MAX_STARTS = 1000
"""brackets tried as the beginning of a JSON value"""

# Whitespace after a full stop, but not after that of "B. Paris".
_SENTENCE_END = re.compile(r"\n|(?<=\w\w[.!?])\s|(?<=\W\W[.!?])\s")
_FENCE = re.compile(r"```[a-zA-Z]*\n(.*?)```", re.DOTALL)


def choice_answer(
    prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None, **columns: Any
) -> list[float | None]:
    """1.0 where the choice that a completion states last is the row's `answer`, else 0.0.

    A row's `choices` are texts, known as A, B, C... in their order, or single letters, known by themselves; `answer` is
    one of the texts or letters. A completion states a choice by its text (in any case, as whole words), or by its
    letter where that cannot be the article "A": alone, in brackets, asterisks or a box, before "." or ")" at the
    beginning of a line, after "answer", "option" or "choice", or beside another letter ("A or B").

    The last sentence that states a choice counts. If it states two different ones, that is ambiguous and scores 0, as
    does an answer that the token limit cut off. None where `choices` or `answer` is None.

    Raises:
        RewardError: a column is missing, choices that are no list of two to 26 different texts, or an answer that is
            none of them.
    """
    choices = required_column(columns, "choices", "choice_answer")
    answers = required_column(columns, "answer", "choice_answer")
    ended = terminated_flags(columns, len(completions))
    scores: list[float | None] = []
    for completion, row, answer, whole in zip(completions, choices, answers, ended, strict=True):
        if row is None or answer is None:
            scores.append(None)
            continue
        reader = _reader(_checked_choices(row))
        right = reader.index(str(answer))
        stated = reader.last_stated(completion_text(completion)[-TAIL_CHARACTERS:]) if whole else None
        scores.append(float(stated == right))
    return scores


class ChoiceReader:
    """Finds the choices that a text states. All patterns take linear time.

    Args:
        choices: texts, or single letters.
    """

    def __init__(self, choices: Sequence[str]) -> None:
        are_letters = all(len(choice) == 1 and choice in string.ascii_letters for choice in choices)
        self.labels = [c.upper() for c in choices] if are_letters else list(string.ascii_uppercase[: len(choices)])
        self.texts = [] if are_letters else [choice.strip().lower() for choice in choices]
        label = f"[{''.join(self.labels)}]"
        either = f"(?:{label}|{label.lower()})"
        self._label = [
            re.compile(pattern)
            for pattern in (
                rf"[(\[]({either})[)\]]",
                rf"\\boxed\{{(?:\\text\{{)?({either})\}}",
                rf"\*({label})\b",
                rf"^\s{{0,8}}({label})(?:[.):]|\s*$)",
                rf"(?i:\b(?:answers?|options?|choices?))(?i:\s(?:is|are))?\s?[:\"']{{0,3}}\s?({label})(?![\w'])",
                rf"(?<!\w)({label})(?=\s?(?:or|and|/|,)\s?{label}(?!\w))",
                rf"(?<!\w){label}\s?(?:or|and|/|,)\s?({label})(?!\w)",
            )
        ]
        # The longest first: "New York City" is not "New York".
        ordered = sorted(self.texts, key=len, reverse=True)
        self._text = re.compile(
            rf"(?<!\w)(?<!\d[.,])({'|'.join(map(re.escape, ordered))})(?!\w|[.,]\d)" if ordered else r"(?!)"
        )

    def index(self, answer: str) -> int:
        """Position of the choice that a label or text means; `RewardError` if none."""
        if answer.strip().lower() in self.texts:
            return self.texts.index(answer.strip().lower())
        if answer.strip().upper() in self.labels:
            return self.labels.index(answer.strip().upper())
        known = ", ".join(self.labels + self.texts)
        raise RewardError(f"choice_answer: answer {answer!r:.200} is none of the choices: {known:.500}")

    def last_stated(self, text: str) -> int | None:
        """The one choice that the last sentence with a choice states; None: no choice, or several."""
        for sentence in reversed(_SENTENCE_END.split(text)):
            stated = self.stated(sentence)
            if stated:
                return stated.pop() if len(stated) == 1 else None
        return None

    def stated(self, sentence: str) -> set[int]:
        """Positions of all choices that a sentence states."""
        labels = {match.group(1).upper() for pattern in self._label for match in pattern.finditer(sentence)}
        texts = {match.group(1) for match in self._text.finditer(sentence.lower())}
        return {self.labels.index(label) for label in labels} | {self.texts.index(found) for found in texts}


def _checked_choices(row: Any) -> tuple[str, ...]:
    texts = tuple(map(str, row)) if isinstance(row, Sequence) and not isinstance(row, str) else ()
    if not 2 <= len(texts) <= 26 or len({text.strip().lower() for text in texts} - {""}) < len(texts):
        raise RewardError(f"choice_answer: 'choices' must be a list of 2 to 26 different texts, got {row!r:.300}")
    return texts


@lru_cache(maxsize=1024)
def _reader(choices: tuple[str, ...]) -> ChoiceReader:
    return ChoiceReader(choices)


def json_schema(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Any = None,
    *,
    schema: Mapping[str, Any] | Sequence[Any] | str | None = None,
    **columns: Any,
) -> list[float | None]:
    """1.0 where the first complete JSON value of a completion is valid under the schema, else 0.0.

    The value may stand in a code fence or in prose; a bare number, string or word only counts when it is all there is.
    None where the row's schema is None, or where the value is nested too deeply to be validated (counted as `deep` in
    `json_schema.counts`). References to other documents are not followed. A `pattern` in a schema can take
    exponential time: give such a reward `isolation: process` and a `time_limit`.

    Args:
        schema: one JSON schema for all completions (a mapping, or its JSON text), or the data's column `schema` (a
            list of them).

    Raises:
        RewardError: no schema, a bad one, or jsonschema is not installed.
    """
    if schema is None:
        required_column(columns, "schema", "json_schema")
    if importlib.util.find_spec("jsonschema") is None:
        raise RewardError("json_schema needs the package jsonschema: pip install 'asn_rl[schema]'")
    rows = [schema] * len(completions) if isinstance(schema, (Mapping, str, bool)) else schema
    assert rows is not None
    return [
        None if row is None else _is_valid(_validator(_schema_text(row)), completion_text(completion))
        for row, completion in zip(rows, completions, strict=True)
    ]


def _is_valid(validator: Any, text: str) -> float | None:
    import referencing.exceptions

    found, value = first_json(text)
    try:
        return float(found and validator.is_valid(value))
    except RecursionError:
        COUNTS["deep"] += 1
        return None
    except referencing.exceptions.Unresolvable as error:
        raise RewardError(f"json_schema: a reference in the schema leads nowhere: {error}") from error


def first_json(text: str) -> tuple[bool, Any]:
    """(whether there is one, the first complete JSON value): all of a text, of its first code fence, or in brackets."""
    fenced = _FENCE.search(text)
    for whole in [text, *([fenced.group(1)] if fenced else [])]:
        found, value, end = _decode(whole.strip(), 0)
        if found and end == len(whole.strip()):
            return True, value
    for bracket in islice(re.finditer(r"[{\[]", text), MAX_STARTS):
        found, value, _ = _decode(text, bracket.start())
        if found:
            return True, value
    return False, None


def _decode(text: str, start: int) -> tuple[bool, Any, int]:
    try:
        return True, *_DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):  # not JSON, a number of more than 4300 digits, a thousand open brackets
        return False, None, start


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _schema_text(schema: Any) -> str:
    if isinstance(schema, str):
        return schema
    try:
        return json.dumps(schema, sort_keys=True)
    except TypeError as error:
        raise RewardError(f"json_schema: {schema!r:.300} is no JSON schema: {error}") from error


@lru_cache(maxsize=1024)
def _validator(text: str) -> Any:
    import jsonschema.validators
    import referencing

    try:
        schema = json.loads(text)
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
    except (ValueError, TypeError, jsonschema.SchemaError) as error:
        reason = getattr(error, "message", str(error))
        raise RewardError(f"json_schema: {text:.300} is no JSON schema: {reason}; mend the schema") from error
    return kind(schema, registry=referencing.Registry())  # an empty registry: no reference is fetched


COUNTS: Counter[str] = Counter()
json_schema.__dict__["counts"] = COUNTS
