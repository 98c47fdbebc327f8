"""How much of a completion occurs verbatim in a corpus: from a local index, or from an infini-gram server.

Measured by the greedy parse into longest matches of `asn_rl.ops.overlap`. Overlap is a sign of fluent text, and of
recitation: the weight's sign says which of the two is wanted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from asn_rl.errors import RewardError
from asn_rl.ops.overlap import Match, Search, breaks, coverage, match_search
from asn_rl.rewards.corpus_index import open_index
from asn_rl.rewards.inputs import completion_text

if TYPE_CHECKING:
    from asn_rl.backends.servers import RequestFailure

_PARSES = 4096  # remembered: coverage and breaks of the same completion share one
_BACKOFF_S = 0.5
_OPERATORS = {"AND", "OR"}


def corpus_coverage(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    index: str,
    min_match: int = 5,
    max_match: int | None = None,
    fingerprint: str | None = None,
    **columns: Any,
) -> list[float | None]:
    """Share of a completion's tokens that lie in a match with the corpus, in [0, 1]: higher copies more.

    It reads the sampled ids, not the text, without end-of-sequence ids. 0 for a completion of fewer than `min_match`
    tokens, which cannot have a match; `corpus_coverage.counts` has how many (`short`). None for one without tokens.

    Args:
        index: folder of the index (`asn-rl index-corpus`), opened once a process.
        min_match: shorter matches do not count, tokens.
        max_match: longer matches are cut, tokens; None: no limit.
        fingerprint: of the base model that samples (`asn-rl model NAME`); an index of another one is refused. None:
            only ids outside the index's vocabulary are.

    Raises:
        RewardError: no completion ids, or an index that is missing, damaged or of another base model.
        DataError: an id outside the index's vocabulary.
        InvalidValue: see `asn_rl.ops.overlap.match_search`.
    """
    return _measured(coverage, COVERAGE_COUNTS, completion_ids, index, fingerprint, min_match, max_match)


def corpus_breaks(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None = None,
    *,
    index: str,
    min_match: int = 5,
    max_match: int | None = None,
    seams: bool = False,
    fingerprint: str | None = None,
    **columns: Any,
) -> list[float | None]:
    """How often a completion leaves the corpus: ends of matches that a missed token follows, a token, in [0, 1/2].

    Higher is more patched together, so smoothness needs a negative weight; a completion without any match has 0 too.
    Arguments, masks and errors as in `corpus_coverage`.

    Args:
        seams: count also where one match follows another at once; then in [0, 1].
    """

    def measure(matches: Sequence[Match], length: int) -> float:
        return breaks(matches, length, seams=seams)

    return _measured(measure, BREAKS_COUNTS, completion_ids, index, fingerprint, min_match, max_match)


def _measured(
    measure: Callable[[Sequence[Match], int], float],
    counts: Counter[str],
    completion_ids: Sequence[Sequence[int]] | None,
    index: str,
    fingerprint: str | None,
    min_match: int,
    max_match: int | None,
) -> list[float | None]:
    if completion_ids is None:
        raise RewardError(
            "a corpus index is looked up by token ids and there are no completion_ids; score rollouts, or records that "
            "keep them"
        )
    eos = frozenset(open_index(index, fingerprint).info.eos_token_ids)
    scores: list[float | None] = []
    for ids in completion_ids:
        tokens = tuple(token for token in ids if token not in eos)
        matches = _matches(index, fingerprint, tokens, min_match, max_match)
        counts["short"] += len(tokens) < min_match
        scores.append(measure(matches, len(tokens)) if tokens else None)
    return scores


@lru_cache(_PARSES)
def _matches(
    index: str, fingerprint: str | None, tokens: tuple[int, ...], min_match: int, max_match: int | None
) -> list[Match]:
    return open_index(index, fingerprint).matches(tokens, min_match=min_match, max_match=max_match)


def infini_gram_api_coverage(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Any = None,
    *,
    url: str,
    index: str,
    min_match: int = 1,
    max_match: int = 10,
    concurrency: int = 8,
    timeout_s: float = 10.0,
    retries: int = 3,
    **columns: Any,
) -> list[float | None]:
    """Share of a completion's whitespace words that lie in a match with the corpus of an infini-gram server, in [0, 1]:
    higher copies more.

    The server (https://api.infini-gram.io, or one's own) is asked for counts of word sequences: several requests a
    match, of up to `concurrency` completions at a time. 0 for a completion of fewer than `min_match` words, which
    cannot have a match. None for one without words or with the words AND or OR, which the server takes for operators,
    and where a request failed for good: that is not "not found". `infini_gram_api_coverage.counts` has how many
    completions were `short` or had `operators`, and how many `requests` were made, `failed` for good, or were `refused`
    (answered with an error).

    Args:
        url: of the server.
        index: name of a corpus of that server, for example v4_rpj_llama_s4.
        min_match, max_match: shorter matches do not count, longer ones are cut, words.
        concurrency: most requests under way.
        timeout_s: seconds a request may take.
        retries: further attempts of a failed request, after 0.5, 1, 2, ... seconds.

    Raises:
        RewardError: the server answers that it is asked wrongly (status 4xx): there is no such index, or no server.
        ConfigError: the package httpx is missing.
        InvalidValue: an argument outside its range.
    """
    from asn_rl.backends.servers import ServersConfig, shared_pool

    # These servers answer POST only: there is nothing to ask for their health.
    pool = shared_pool(ServersConfig((url,), concurrency, timeout_s, retries, _BACKOFF_S, health_path=None))
    texts = [completion_text(completion).split() for completion in completions]
    searches: dict[int, Search] = {}
    for i, words in enumerate(texts):
        search = match_search(len(words), min_match=min_match, max_match=max_match)
        short = len(words) < min_match
        API_COUNTS["short"] += short
        if not short and _OPERATORS & set(words):
            API_COUNTS["operators"] += 1
        elif words:
            searches[i] = search

    def occurrences(queries: Sequence[str]) -> dict[str, bool | None]:
        payloads = [{"index": index, "query_type": "count", "query": query} for query in queries]
        return {queries[i]: _occurs(answer) for i, answer in pool.post("", payloads, dict)}

    found = _parallel_search(texts, searches, occurrences)
    return [coverage(found[i], len(words)) if i in found else None for i, words in enumerate(texts)]


def _parallel_search(
    texts: Sequence[Sequence[str]],
    searches: Mapping[int, Search],
    occurrences: Callable[[Sequence[str]], Mapping[str, bool | None]],
) -> dict[int, list[Match]]:
    """Matches of the texts whose questions were all answered. A round asks one question of every unfinished search."""
    found: dict[int, list[Match]] = {}
    known: dict[str, bool | None] = {}
    questions: dict[int, str] = {}

    def advance(i: int, answer: bool | None) -> None:
        """Send an answer, and all further ones that are known; None begins the search."""
        try:
            while True:
                start, stop = next(searches[i]) if answer is None else searches[i].send(answer)
                questions[i] = " ".join(texts[i][start:stop])
                answer = known.get(questions[i])
                if answer is None:
                    return
        except StopIteration as end:
            questions.pop(i, None)
            found[i] = end.value

    for i in searches:
        advance(i, None)
    while questions:
        known |= occurrences([query for query in dict.fromkeys(questions.values()) if query not in known])
        for i, query in list(questions.items()):
            if known[query] is None:
                del questions[i]
            else:
                advance(i, known[query])
    return found


def _occurs(answer: dict[str, Any] | RequestFailure) -> bool | None:
    """Whether an answer counts an occurrence; None of one that has no count: errors come as {"error": text}."""
    API_COUNTS["requests"] += 1
    if not isinstance(answer, dict):
        if answer.final:
            raise RewardError(f"the infini-gram server refuses the request ({answer.detail}); check url and index")
        API_COUNTS["failed"] += 1
        return None
    count = answer.get("count")
    if isinstance(count, int):
        return count > 0
    API_COUNTS["refused"] += 1
    return None


COVERAGE_COUNTS: Counter[str] = Counter()
BREAKS_COUNTS: Counter[str] = Counter()
API_COUNTS: Counter[str] = Counter()
corpus_coverage.__dict__["counts"] = COVERAGE_COUNTS
corpus_breaks.__dict__["counts"] = BREAKS_COUNTS
infini_gram_api_coverage.__dict__["counts"] = API_COUNTS
