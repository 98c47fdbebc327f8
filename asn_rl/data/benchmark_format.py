"""From a row of a benchmark to a prompt: templates, columns and examples.

A template is text with `{{field}}` in it; `{{turns.0}}` is the first entry of a list. Nothing is evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from asn_rl.errors import DataError, InvalidValue
from asn_rl.latex import last_boxed
from asn_rl.types import Messages

FOLLOW_UPS = "follow_ups"
"""column of the user's further turns, where there are any"""
_PLACE = re.compile(r"\{\{([A-Za-z_]\w*(?:\.\w+)*)\}\}")


@dataclass(frozen=True)
class FewShot:
    """Solved examples before the question. They never come from the test part."""

    part: Literal["train", "few_shot"] | None = None
    """part whose `rows` are shown; null: `examples` are"""
    rows: tuple[int, ...] = ()
    """numbers of rows in that part, from 0, in the order shown"""
    examples: tuple[dict[str, Any], ...] = ()
    """rows written out"""

    def __post_init__(self) -> None:
        if self.part is None and (self.rows or not self.examples):
            raise InvalidValue("part", None, "train or few_shot where rows are numbered", "or write out `examples`")
        if self.part is not None and (self.examples or not self.rows):
            raise InvalidValue(
                "rows", list(self.rows), f"numbers of rows of the part {self.part!r}, without `examples`"
            )


@dataclass(frozen=True)
class PromptFormat:
    """How a row is asked."""

    text: str
    """template of the question"""
    form: Literal["chat", "raw"] = "chat"
    """chat: messages, examples being earlier turns; raw: one text, for a base model with its chat template off"""
    follow_ups: tuple[str, ...] = ()
    """templates of the user's further turns in a chat, each asked after the answer to the turn before, for example
    ["{{turns.1}}"]"""
    system: str | None = None
    """system turn of a chat; null: what the model's chat template puts there"""
    target: str = ""
    """template of the answer that follows the question in an example"""
    separator: str = "\n\n"
    """between the examples of a raw text"""
    few_shot: FewShot | None = None

    def __post_init__(self) -> None:
        for name, template in (("text", self.text), *(("follow_ups", text) for text in self.follow_ups)):
            if not _PLACE.search(template):
                raise InvalidValue(name, template, "a template with at least one {{field}}")
        if self.follow_ups and self.form == "raw":
            raise InvalidValue("follow_ups", list(self.follow_ups), "none in a raw text", "a conversation needs a chat")
        if self.few_shot is not None and not self.target:
            raise InvalidValue("target", self.target, "the template of an example's answer where there is a few_shot")
        if self.system is not None and self.form == "raw":
            raise InvalidValue("system", self.system, "null in a raw text", "write it at the beginning of `text`")


@dataclass(frozen=True)
class Column:
    """A column that verifiers read."""

    name: str
    field: str | None = None
    """field of the row, dotted as in templates, taken as it is"""
    text: str | None = None
    """or a template"""
    pattern: str | None = None
    """regular expression; the column is its group 1 in the text"""
    boxed: bool = False
    """the column is what the last \\boxed{} of the text holds"""

    def __post_init__(self) -> None:
        if (self.field is None) == (self.text is None):
            raise InvalidValue("field", self.field, f"given for column {self.name!r}, or `text`, and not both")
        if self.pattern is not None and _groups(self.pattern) != 1:
            raise InvalidValue("pattern", self.pattern, "a regular expression with one group")

    def value(self, fields: Mapping[str, Any], where: str) -> Any:
        value = render(self.text, fields, where) if self.text is not None else lookup(fields, self.field or "", where)
        if self.boxed:
            value = last_boxed(as_text(value, where))
        elif self.pattern is not None:
            found = re.search(self.pattern, as_text(value, where))
            value = found and found[1]
        if value is None and (self.boxed or self.pattern):
            raise DataError(f"{where}: no {self.pattern or 'boxed answer'} for column {self.name!r} in this row")
        return value


def _groups(pattern: str) -> int | None:
    try:
        return re.compile(pattern).groups
    except re.error:
        return None


def content(
    format: PromptFormat, fields: Mapping[str, Any], examples: Sequence[tuple[str, str]], where: str
) -> str | Messages:
    """What a row asks, after (question, answer) examples."""
    question = render(format.text, fields, where)
    if format.form == "raw":
        return format.separator.join([*(asked + answer for asked, answer in examples), question])
    messages = [{"role": "system", "content": format.system}] if format.system is not None else []
    for asked, answer in examples:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer.strip()}]
    return [*messages, {"role": "user", "content": question}]


def render(template: str, fields: Mapping[str, Any], where: str) -> str:
    """A template with its fields filled in.

    Raises:
        DataError: a field that the row lacks or that is no text, number or list of those; begins with `where`.
    """
    return _PLACE.sub(lambda place: as_text(lookup(fields, place[1], where), where), template)


def lookup(fields: Mapping[str, Any], path: str, where: str) -> Any:
    """The value of a dotted field."""
    value: Any = fields
    for step in path.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise DataError(f"{where}: no field {path!r} in this row; it has {', '.join(map(str, fields))}")
    return value


def as_text(value: Any, where: str) -> str:
    """A value as templates show it: a list by lines, 51.0 as 51, line ends as "\\n"."""
    if isinstance(value, list):
        return "\n".join(as_text(entry, where) for entry in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}: a template shows text, numbers and lists of them, got {value!r:.100}")
    return str(value).replace("\r\n", "\n")
