"""Completions of benchmark rows on which two scorers may disagree: right, nearly right, malformed and foreign ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

from _harness import GSM8K, IFEVAL, Comparison, Item

from asn_rl.backends import BackendConfig, load_backend
from asn_rl.errors import ConfigError
from asn_rl.registry import load_attribute
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Prompt

Row = tuple[Prompt, Mapping[str, Any]]
QUESTIONS = ("prompt", "question", "problem")
"""what the benchmarks call the field that is asked"""
FULL_WIDTH, ARABIC = ({ord(str(d)): chr(zero + d) for d in range(10)} for zero in (0xFF10, 0x0660))


def _number(solution: str) -> int:
    return int(solution.split("#### ")[1].replace(",", ""))


GSM8K_KINDS: dict[str, Callable[[str, int], str]] = {
    "gold solution": lambda s, n: s,
    "gold": lambda s, n: f"#### {n}",
    "thousands": lambda s, n: f"#### {1000 * n:,}" if n == 0 else f"#### {n:,}",
    "currency": lambda s, n: f"#### ${n}",
    "currency after": lambda s, n: f"#### {n}$",
    "unit": lambda s, n: f"#### {n} dollars",
    "full stop": lambda s, n: f"So we are done.\n#### {n}.",
    "comma after": lambda s, n: f"#### {n}, as we wanted",
    "cents": lambda s, n: f"#### {n}.00",
    "decimal": lambda s, n: f"#### {n}.5",
    "negative": lambda s, n: f"#### -{n}",
    "negative, spaced": lambda s, n: f"#### - {n}",
    "unicode minus": lambda s, n: f"#### \u2212{n}",
    "en dash": lambda s, n: f"The result is \u2013{n}",
    "no space": lambda s, n: f"####{n}",
    "two spaces": lambda s, n: f"####  {n}",
    "new line": lambda s, n: f"####\n{n}",
    "three marks": lambda s, n: f"### {n}",
    "five marks": lambda s, n: f"##### {n}",
    "one more": lambda s, n: f"#### {n + 1}",
    "two answers, right first": lambda s, n: f"#### {n}\n#### {n + 7}",
    "two answers, right last": lambda s, n: f"#### {n + 7}\n#### {n}",
    "answer is": lambda s, n: f"The answer is {n}.",
    "answer is, then more": lambda s, n: f"The answer is {n}. We used 3 steps.",
    "several numbers": lambda s, n: f"3 + 4 = 7, so 7 and {n} and then {n}",
    "equation": lambda s, n: f"{n}={n}",
    "percent": lambda s, n: f"It is {n}%.",
    "fraction": lambda s, n: f"It is {2 * n}/2",
    "ratio": lambda s, n: f"It is {n}:1",
    "boxed": lambda s, n: f"Thus $\\boxed{{{n}}}$.",
    "bold": lambda s, n: f"**{n}**",
    "exponent": lambda s, n: f"#### {n}e0",
    "leading zero": lambda s, n: f"#### 0{n}",
    "sign": lambda s, n: f"#### +{n}",
    "million": lambda s, n: f"#### {n},000",
    "dots": lambda s, n: f"#### {n}...",
    "only dots": lambda s, n: "#### ... $. ,,",
    "minus only": lambda s, n: "#### -",
    "truncated": lambda s, n: s[: len(s) // 2],
    "truncated mark": lambda s, n: s.split("#### ")[0] + "#### ",
    "empty": lambda s, n: "",
    "spaces": lambda s, n: " \n\t ",
    "None": lambda s, n: "None",
    "nan": lambda s, n: "#### nan",
    "lm-eval's word for none": lambda s, n: "[invalid]",
    "words": lambda s, n: "I cannot answer that.",
    "code fence": lambda s, n: f"```\n#### {n}\n```",
    "code": lambda s, n: f"```python\nx = {n}\nprint(x)\n```",
    "Spanish": lambda s, n: f"La respuesta es {n} d\u00f3lares.",
    "Chinese": lambda s, n: f"\u7b54\u6848\u662f{n}\u3002",
    "full-width digits": lambda s, n: f"#### {n}".translate(FULL_WIDTH),
    "Arabic digits": lambda s, n: f"#### {n}".translate(ARABIC),
    "full-width then plain": lambda s, n: f"{str(n + 1).translate(FULL_WIDTH)} #### {n}",
    "no-break space": lambda s, n: f"####\u00a0{n}\u00a0",
    "spaces in number": lambda s, n: f"#### {n} 000",
    "apostrophe in number": lambda s, n: f"It is {n}'000",
    "question repeated": lambda s, n: f"#### {n}\n\nQuestion: 5 + 5?\nAnswer: 10",
    "long": lambda s, n: "We go on. " * 2000 + f"#### {n}",
    "NUL": lambda s, n: f"\0#### {n}\0",
    "upper case": lambda s, n: s.upper(),
    "backwards": lambda s, n: s[::-1],
}

_FRAGMENTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "keywords:existence": lambda k: " ".join(k["keywords"]),
    "keywords:frequency": lambda k: " ".join([k["keyword"]] * k["frequency"]),
    "keywords:letter_frequency": lambda k: k["letter"] * k["let_frequency"],
    "length_constraints:number_sentences": lambda k: " ".join(["It rains."] * k["num_sentences"]),
    "length_constraints:number_words": lambda k: " ".join(["rain"] * k["num_words"]),
    "length_constraints:number_paragraphs": lambda k: "\n***\n".join(["Rain."] * k["num_paragraphs"]),
    "length_constraints:nth_paragraph_first_word": lambda k: "\n\n".join([k["first_word"]] * k["num_paragraphs"]),
    "detectable_content:number_placeholders": lambda k: " ".join(["[name]"] * k["num_placeholders"]),
    "detectable_content:postscript": lambda k: f"\n{k['postscript_marker']} More rain",
    "detectable_format:number_bullet_lists": lambda k: "\n" + "\n".join(["* rain"] * k["num_bullets"]),
    "detectable_format:constrained_response": lambda k: "My answer is yes.",
    "detectable_format:number_highlighted_sections": lambda k: " ".join(["*rain*"] * k["num_highlights"]),
    "detectable_format:multiple_sections": lambda k: "\n".join(
        f"{k['section_spliter']} {i + 1}\nrain" for i in range(k["num_sections"])
    ),
    "detectable_format:title": lambda k: "<<Rain>>",
    "combination:two_responses": lambda k: "Rain******Sun",
    "combination:repeat_prompt": lambda k: k["prompt_to_repeat"],
    "startend:end_checker": lambda k: k["end_phrase"],
    "change_case:capital_word_frequency": lambda k: " ".join(["RAIN"] * k["capital_frequency"]),
}


def _attempt(row: Mapping[str, Any]) -> str:
    """A response made to follow a row's instructions; where they interfere with each other it does not follow all."""
    pairs = list(zip(row["instruction_id_list"], row["kwargs"], strict=True))
    ids = [name for name, _ in pairs]
    order = sorted(pairs, key=lambda pair: (pair[0] != "combination:repeat_prompt", "end_checker" in pair[0]))
    text = " ".join(_FRAGMENTS[name](kwargs) for name, kwargs in order if name in _FRAGMENTS) or "The rain is falling."
    if "detectable_format:json_format" in ids:
        text = json.dumps({"weather": text})
    if "change_case:english_capital" in ids:
        text = text.upper()
    if "change_case:english_lowercase" in ids:
        text = text.lower()
    if "punctuation:no_comma" in ids:
        text = text.replace(",", "")
    return f'"{text}"' if "startend:quotation" in ids else text


IFEVAL_KINDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "attempt": _attempt,
    "attempt with preamble": lambda row: f"Sure, here it is:\n{_attempt(row)}\nI hope this helps.",
    "attempt in bold": lambda row: f"**{_attempt(row)}**",
    "attempt, upper case": lambda row: _attempt(row).upper(),
    "attempt, lower case": lambda row: _attempt(row).lower(),
    "attempt, truncated": lambda row: _attempt(row)[: len(_attempt(row)) // 2],
    "attempt in a code fence": lambda row: f"```\n{_attempt(row)}\n```",
    "attempt in quotes": lambda row: f'"{_attempt(row)}"',
    "attempt, spaced": lambda row: f"\n\n  {_attempt(row)}  \n",
    "attempt twice": lambda row: f"{_attempt(row)}******{_attempt(row)}!",
    "the prompt": lambda row: row["prompt"],
    "empty": lambda row: "",
    "spaces": lambda row: " \n ",
    "None": lambda row: "None",
    "numbers": lambda row: "12, -3.5, 1,000 and \u22127",
    "symbols": lambda row: "# ## ### !!! !? [a] [b] <<>> <<T>> * x\n- y",
    "German": lambda row: "Das Wetter ist heute sehr sch\u00f6n, und wir gehen am Fluss spazieren. Kommst du mit?",
    "Hindi": lambda row: (
        "\u0906\u091c \u092e\u094c\u0938\u092e \u092c\u0939\u0941\u0924 \u0905\u091a\u094d\u091b\u093e"
        " \u0939\u0948\u0964 \u0939\u092e \u0928\u0926\u0940 \u0915\u0947 \u0915\u093f\u0928\u093e\u0930\u0947"
        " \u091a\u0932\u0924\u0947 \u0939\u0948\u0902\u0964"
    ),
    "Japanese": lambda row: "\u4eca\u65e5\u306f\u3068\u3066\u3082\u3044\u3044\u5929\u6c17\u3067\u3059\u306d\u3002",
    "emoji": lambda row: "\U0001f600 \U0001f327\ufe0f Dr. Smith met Mr. Jones at 5 p.m. e.g. \u00a1S\u00ed!",
    "JSON": lambda row: json.dumps({"prompt": row["prompt"][:80], "n": [1, None, -2.5]}),
    "markdown": lambda row: "# Title\n\n* *one* and **two**\n- three\n\n***\n\nSECTION 1\nP.S. Four\nP.P.S. five",
}

MATH_KINDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "gold solution": lambda row: row["solution"],
    "boxed": lambda row: f"The final answer is $\\boxed{{{row['answer']}}}$.",
    "final answer": lambda row: f"Final Answer: The final answer is ${row['answer']}$. I hope it is correct.",
    "bare": lambda row: row["answer"],
    "boxed 42": lambda row: "Thus \\boxed{42}.",
    "negated": lambda row: f"The final answer is $\\boxed{{-({row['answer']})}}$.",
    "two boxes": lambda row: f"First $\\boxed{{17}}$, and then $\\boxed{{{row['answer']}}}$.",
    "truncated": lambda row: row["solution"][: len(row["solution"]) // 2],
    "empty": lambda row: "",
    "the problem": lambda row: row["problem"],
}


def made(comparison: Comparison, rows: Sequence[Row], count: int) -> list[Item]:
    """`count` completions, every kind on rows spread over the benchmark, and all kinds on IFEval's rows that ask for a
    symbol."""
    if comparison is GSM8K:
        makers = {kind: _of_solution(make) for kind, make in GSM8K_KINDS.items()}
    else:
        makers = IFEVAL_KINDS if comparison is IFEVAL else MATH_KINDS
    items = [
        Item(kind, prompt, fields, make(fields))
        for prompt, fields in rows
        if comparison is IFEVAL and asks_for_symbol(fields)
        for kind, make in makers.items()
    ]
    spread = (rows[i * len(rows) // count] for i in range(count))
    items += [
        Item(kind, prompt, fields, make(fields))
        for (kind, make), (prompt, fields) in zip(cycle(makers.items()), spread, strict=False)
    ]
    return items[:count]


def _of_solution(make: Callable[[str, int], str]) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: make(row["answer"], _number(row["answer"]))


def asks_for_symbol(row: Mapping[str, Any]) -> bool:
    """Whether a row of IFEval counts something that is no letter: '#' in key 1122, '!' in key 1129."""
    letters = [kwargs.get("letter") for kwargs in row["kwargs"]]
    return any(letter is not None and not "a" <= letter.lower() <= "z" for letter in letters)


def generated(rows: Sequence[Row], count: int, model: str, tokens: int) -> list[Item]:
    """Completions of a model in its chat, at temperature 1 with min-p 0.1; every second one greedy."""
    if count == 0:
        return []
    backend = load_backend(BackendConfig(model=model))
    if not getattr(backend, "chat_template", False):
        raise ConfigError(f"the base model {model!r} has no chat template")
    pipeline, config = load_attribute("asn_policies:Pipeline"), RolloutConfig(max_new_tokens=tokens, max_batch=64)
    chosen = [rows[i * len(rows) // count] for i in range(count)]
    rules = [[{"name": "min_p", "params": {"min_p": 0.1}}], [{"name": "greedy"}]]
    items = []
    for i, steps in enumerate(rules):
        part = chosen[i :: len(rules)]
        asked = [
            Prompt(prompt.id, next(fields[name] for name in QUESTIONS if name in fields)) for prompt, fields in part
        ]
        done = rollout(pipeline(steps), backend, asked, config) if part else None
        texts = done.completions if done else []
        items += [Item("generated", prompt, fields, text) for (prompt, fields), text in zip(part, texts, strict=True)]
    return items
