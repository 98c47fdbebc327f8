from __future__ import annotations

import importlib.util
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, tiny_backend

from asn_rl.errors import DataError, InvalidValue, RewardError
from asn_rl.ops.overlap import breaks, coverage, greedy_matches
from asn_rl.rewards import corpus
from asn_rl.rewards.corpus import API_COUNTS, corpus_breaks, corpus_coverage, infini_gram_api_coverage
from asn_rl.rewards.corpus_index import (
    MAX_VOCABULARY,
    CorpusIndex,
    IndexInfo,
    build_index,
    index_corpus,
    open_index,
    read_documents,
)
from asn_rl.testing import check_reward

Documents = list[list[int]]
ENDS = (0,)


def make(folder: Path, documents: Documents, vocab_size: int = 50, **options: Any) -> IndexInfo:
    described = {"model": "some/model", "fingerprint": "f1", "eos_token_ids": ENDS, **options}
    return build_index(folder, documents, vocab_size=vocab_size, **described)


def occurrences(documents: Documents, ids: Sequence[int]) -> int:
    n = len(ids)
    return sum(row[i : i + n] == list(ids) for row in documents for i in range(len(row) - n + 1))


def longest_matches(documents: Documents, ids: Sequence[int]) -> list[int]:
    return [
        next((n for n in range(len(ids) - i, 0, -1) if occurrences(documents, ids[i : i + n])), 0)
        for i in range(len(ids))
    ]


def random_documents(seed: int, vocab: Sequence[int], count: int, longest: int) -> Documents:
    rng = random.Random(seed)
    return [rng.choices(vocab, k=rng.randint(0, longest)) for _ in range(count)]


# The index

# Few words repeat a lot; 16-bit ids; ids that take two units, some of whose halves are equal.
WORDS = {
    50: [1, 2, 3],
    65_535: [0, 1, 255, 256, 65_534],
    200_000: [0, 1, 0x7FFF, 0x8000, 0x8001, 0x10000, 199_999],
}


@pytest.mark.parametrize("vocab_size", WORDS)
@pytest.mark.parametrize(("count", "longest"), [(1, 1), (3, 12), (40, 30)])
def test_counts_and_matches_are_those_of_brute_force(tmp_path: Path, vocab_size: int, count: int, longest: int) -> None:
    words = WORDS[vocab_size]
    documents = [*random_documents(count, words, count, longest), words[:1]]
    info = make(tmp_path / "index", documents, vocab_size)
    assert (info.documents, info.tokens) == (sum(map(bool, documents)), sum(map(len, documents)))
    index = CorpusIndex(tmp_path / "index", "f1")
    assert index.info == info
    for ids in random_documents(7, words, 25, 20):
        for n in range(1, min(5, len(ids)) + 1):
            assert index.count(ids[:n]) == occurrences(documents, ids[:n])
        for min_match, max_match in ((1, None), (2, 3)):
            expected = greedy_matches(longest_matches(documents, ids), min_match=min_match, max_match=max_match)
            assert index.matches(ids, min_match=min_match, max_match=max_match) == expected


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=8), st.data())
def test_any_corpus_counts_like_brute_force(tmp_path: Path, documents: Documents, data: st.DataObject) -> None:
    make(tmp_path / "index", documents)
    index = CorpusIndex(tmp_path / "index")
    for _ in range(20):
        ids = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=6))
        assert index.count(ids) == occurrences(documents, ids)


def test_a_match_does_not_run_from_one_document_into_the_next(tmp_path: Path) -> None:
    make(tmp_path / "index", [[1, 2], [3, 4]])
    index = CorpusIndex(tmp_path / "index")
    assert [index.count(ids) for ids in ([1, 2], [3, 4], [2, 3])] == [1, 1, 0]
    assert index.matches([1, 2, 3, 4]) == [(0, 2), (2, 4)]


def test_documents_are_read_one_at_a_time_and_sorted_in_parallel(tmp_path: Path) -> None:
    alive: set[int] = set()

    class Watched(list[int]):
        def __init__(self, ids: list[int]) -> None:
            super().__init__(ids)
            alive.add(id(self))

        def __del__(self) -> None:
            alive.discard(id(self))

    def stream() -> Iterator[Watched]:
        rng = random.Random(0)
        for _ in range(300):
            assert len(alive) <= 2
            yield Watched([rng.randrange(1, 500) for _ in range(400)])

    assert make(tmp_path / "index", stream(), 500, cpus=2).tokens == 120_000  # type: ignore[arg-type]
    rng = random.Random(0)
    documents = [[rng.randrange(1, 500) for _ in range(400)] for _ in range(300)]
    index = CorpusIndex(tmp_path / "index")
    pairs = Counter(pair for row in documents for pair in pairwise(row))
    asked = [*list(pairs)[:300], (499, 0)]
    assert [index.count(pair) for pair in asked] == [pairs[pair] for pair in asked]


def test_an_index_replaces_an_older_one_but_no_other_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a folder; with 'odd' characters"
    make(folder, [[1, 2]])
    make(folder, [[3, 4]])
    assert CorpusIndex(folder).count([3, 4]) == 1
    other = tmp_path / "notes"
    other.mkdir()
    make(other, [[1]])
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    for wrong in ("letters", "letters/letter.txt"):
        with pytest.raises(InvalidValue, match="folder must be new, empty or an index"):
            make(tmp_path / wrong, [[1]])
    assert (tmp_path / "letters" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("error", [KeyboardInterrupt, DataError])
def test_an_interruption_leaves_nothing_that_looks_whole(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> Iterator[list[int]]:
        yield [1, 2]
        raise error

    with pytest.raises(error):
        make(tmp_path / "index", interrupted())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    make(tmp_path / "index", [[1, 2]])
    with pytest.raises(error):
        make(tmp_path / "index", interrupted())  # type: ignore[arg-type]
    assert CorpusIndex(tmp_path / "index").count([1, 2]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_failing_indexer_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A program in the place of the interpreter that ends with an error and says why.
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho out of disk >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    with pytest.raises(RewardError, match="failed with exit status 3: out of disk"):
        make(tmp_path / "index", [[1, 2]])
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("documents", "vocab_size", "error", "words"),
    [
        ([], 50, DataError, "holds no tokens"),
        ([[], []], 50, DataError, "holds no tokens"),
        ([[1], [2, 50]], 50, DataError, "token 50 is outside the vocabulary of 50"),
        ([[-1]], 50, DataError, "token -1 is outside"),
        ([[1]], 0, InvalidValue, "vocab_size must be between 1 and"),
        ([[1]], MAX_VOCABULARY + 1, InvalidValue, "vocab_size must be between 1 and"),
    ],
)
def test_what_cannot_be_indexed(
    tmp_path: Path, documents: Documents, vocab_size: int, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make(tmp_path / "index", documents, vocab_size)
    assert list(tmp_path.iterdir()) == []


def test_the_largest_vocabulary_fits(tmp_path: Path) -> None:
    last = MAX_VOCABULARY - 1
    make(tmp_path / "index", [[last, last, 0]], MAX_VOCABULARY)
    assert [CorpusIndex(tmp_path / "index").count(ids) for ids in ([last], [last, 0], [0, last])] == [2, 1, 0]


# Opening


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["tokenized.0", "offset.0", "table.0"])
@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_damaged_index_is_refused(tmp_path: Path, name: str, damage: Any) -> None:
    make(tmp_path / "index", [[1, 2, 3]])
    damage(tmp_path / "index" / name)
    with pytest.raises(RewardError, match=rf"is damaged \({name}\); build it anew: asn-rl index-corpus .*some/model"):
        CorpusIndex(tmp_path / "index")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": "m"}', '{"digests": {}, "eos_token_ids": [], "odd": 1}'])
def test_a_damaged_description_is_refused(tmp_path: Path, text: str) -> None:
    make(tmp_path / "index", [[1, 2, 3]])
    (tmp_path / "index" / "index.json").write_text(text)
    with pytest.raises(RewardError, match=r"index\.json is damaged .*build it anew: asn-rl index-corpus"):
        CorpusIndex(tmp_path / "index")


def test_a_description_without_files_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "index", [[1, 2, 3]])
    path = tmp_path / "index" / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "digests": {}}))
    with pytest.raises(RewardError, match=r"damaged \(index\.json\)"):
        CorpusIndex(tmp_path / "index")


def test_a_missing_index_and_one_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"no corpus index in .*; build it: asn-rl index-corpus FILE\.\.\. --output"):
        CorpusIndex(tmp_path / "index")
    make(tmp_path / "index", [[1]])
    with pytest.raises(
        RewardError, match=r"holds token ids of 'some/model', whose fingerprint is f1, not .* f2; build"
    ):
        CorpusIndex(tmp_path / "index", "f2")


def test_the_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RewardError, match=r"pip install 'asn_rl\[corpus\]'"):
        make(tmp_path / "index", [[1]])


# Reading


def test_text_files_are_divided_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "poem.txt"
    path.write_text("\n \none\ntwo\n\n\nthree é\n\t\nfour")
    assert list(read_documents(path)) == ["one\ntwo\n", "three é\n", "four"]


def test_fields_of_records(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b", "more": "c", "n": 1}\n')
    assert list(read_documents(path)) == ["a", "b"]
    assert list(read_documents(path, "more,text")) == ["a", "c", "b"]


@pytest.mark.parametrize("line", ['{"body": "a"}', '{"text": 3}', '["text"]', '{"text": ', "null"])
def test_records_without_text(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2"):
        list(read_documents(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    for name in ("latin.txt", "none.txt", "."):
        with pytest.raises(DataError, match=r"cannot read .*; give UTF-8 text or JSONL"):
            list(read_documents(tmp_path / name))


def test_files_are_indexed_in_a_models_ids(tmp_path: Path) -> None:
    tiny = tiny_backend(CONFIGS["sliding window"]())
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("w2 w3 w4\n\nw5 w6\n" + "w7 " * 100)  # longer than the model's context
    (tmp_path / "b.jsonl").write_text('{"body": "w2 w3"}\n')
    paths = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    info = index_corpus(paths, tmp_path / "index", model=str(tmp_path / "model"), field="body")
    index = CorpusIndex(tmp_path / "index", tiny.fingerprint)
    assert (info.documents, info.tokens, info.vocab_size) == (3, 107, tiny.vocab_size)
    assert set(info.eos_token_ids) == tiny.eos_token_ids
    assert [index.count(ids) for ids in ([2, 3], [6, 7], [4, 5], [7] * 100)] == [2, 1, 0, 1]


# The rewards

CORPUS = [[5, 6, 7, 8, 9, 10], [20, 21, 22, 23], [8, 9, 30]]


@pytest.fixture
def index(tmp_path: Path) -> str:
    make(tmp_path / "index", CORPUS)
    return str(tmp_path / "index")


def test_coverage_and_breaks_of_sampled_ids(index: str) -> None:
    rows = [[5, 6, 7, 8, 1, 20, 21, 22, 0], [5, 6, 7, 8], [1, 2, 3], [20, 21, 5, 6, 3], [5, 0], [0], []]
    texts = [str(row) for row in rows]
    options = {"completion_ids": rows, "index": index, "min_match": 2}
    covered = check_reward(corpus_coverage, ["q"] * 7, texts, **options)
    assert covered == [7 / 8, 1.0, 0.0, 4 / 5, 0.0, None, None]
    broken = check_reward(corpus_breaks, ["q"] * 7, texts, **options)
    assert broken == [1 / 8, 0.0, 0.0, 1 / 5, 0.0, None, None]
    assert corpus_breaks(["q"] * 7, texts, rows, index=index, min_match=2, seams=True)[3] == 2 / 5
    assert corpus_coverage(["q"] * 7, texts, rows, index=index, min_match=2, max_match=3)[:2] == [6 / 8, 3 / 4]


def test_short_completions_are_counted(index: str) -> None:
    for function in (corpus_coverage, corpus_breaks):
        counts = function.__dict__["counts"]
        counts.clear()
        assert function(["q"] * 3, ["a"] * 3, [[5, 6], [5], []], index=index, min_match=2)[1:] == [0.0, None]
        assert counts == {"short": 2}


@given(st.lists(st.integers(1, 31), min_size=1, max_size=20), st.integers(1, 4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
def test_scores_are_those_of_the_brute_force_parse(index: str, ids: list[int], min_match: int) -> None:
    matches = greedy_matches(longest_matches(CORPUS, ids), min_match=min_match)
    expected = [coverage(matches, len(ids))]
    assert corpus_coverage(["q"], ["a"], [ids], index=index, min_match=min_match) == expected
    expected = [breaks(matches, len(ids))]
    assert corpus_breaks(["q"], ["a"], [ids], index=index, min_match=min_match) == expected


def test_an_index_is_opened_once_and_parsed_once(index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row, searches = [5, 6, 7, 8, 9], []
    matches = CorpusIndex.matches
    monkeypatch.setattr(CorpusIndex, "matches", lambda self, *a, **k: searches.append(self) or matches(self, *a, **k))
    corpus_coverage(["q"], ["a"], [row], index=index)
    corpus_breaks(["q"], ["a"], [row], index=index)
    assert searches == [open_index(index, None)]


def test_completions_without_ids_and_of_another_model(index: str) -> None:
    with pytest.raises(RewardError, match="there are no completion_ids"):
        corpus_coverage(["q"], ["a"], index=index)
    with pytest.raises(DataError, match="token 5000 is outside the vocabulary of 50"):
        corpus_coverage(["q"], ["a"], [[1, 2, 3, 4, 5000]], index=index)
    with pytest.raises(RewardError, match="fingerprint is f1, not of the base model with fingerprint other"):
        corpus_coverage(["q"], ["a"], [[1]], index=index, fingerprint="other")
    with pytest.raises(InvalidValue, match="min_match must be >= 1"):
        corpus_coverage(["q"], ["a"], [[1]], index=index, min_match=0)


# A server: the protocol of api.infini-gram.io over the real engine


class InfiniGramServer(ThreadingHTTPServer):
    """Answers count queries on whitespace words, and misbehaves at the words that `trouble` names."""

    daemon_threads = True

    def __init__(self, index: CorpusIndex, words: dict[str, int], trouble: dict[str, list[str]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.index, self.words, self.trouble = index, words, trouble
        self.queries: list[str] = []
        self.lock, self.closing = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        assert set(request) == {"index", "query_type", "query"}
        assert request["query_type"] == "count"
        ids = [self.words.get(word, 0) for word in request["query"].split()]
        return {"count": self.index.count(ids), "approx": False, "latency": 0.1, "token_ids": ids}

    def trouble_with(self, query: str) -> str | None:
        with self.lock:
            self.queries.append(query)
            script = next((script for word, script in self.trouble.items() if word in query.split()), [])
            return (script.pop(0) if len(script) > 1 else script[0]) if script else None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has given up is no news."""


class Handler(BaseHTTPRequestHandler):
    server: InfiniGramServer  # type: ignore[assignment]

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply(request, self.server.trouble_with(request["query"]))

    def reply(self, request: dict[str, Any], trouble: str | None) -> None:
        if trouble == "slow":
            self.server.closing.wait(30)  # longer than any patience
        status = 500 if trouble == "fails" else 429 if trouble == "crowded" else 200
        if request["index"] != "test_index":
            status, answer = 400, {"error": f"Invalid index: {request['index']}"}
        elif trouble == "refuses":
            answer = {"error": "Please limit your input to <= 1000 characters!"}
        else:
            answer = self.server.answer(request)
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if trouble in ("torn", "garbled") else body)
        if trouble == "garbled":
            self.wfile.write(b"?" * (len(body) - len(body) // 2))

    def log_message(self, format: str, *args: Any) -> None:
        """No access log."""


SAID = ["the cat sat on the mat", "a dog lay on the rug by the door", "the end"]
VOCABULARY = {word: i for i, word in enumerate(dict.fromkeys(" ".join(SAID).split()), start=1)}
SAID_IDS = [[VOCABULARY[word] for word in text.split()] for text in SAID]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_BACKOFF_S", 0.01)


@contextmanager
def serving(folder: Path, **trouble: list[str]) -> Iterator[InfiniGramServer]:
    make(folder, SAID_IDS)
    server = InfiniGramServer(CorpusIndex(folder), VOCABULARY, trouble)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    API_COUNTS.clear()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def ask(server: InfiniGramServer, texts: list[str], **options: Any) -> list[float | None]:
    settings = {"url": server.url, "index": "test_index", "timeout_s": 20.0, "retries": 2, **options}
    return infini_gram_api_coverage(["q"] * len(texts), texts, **settings)


def word_coverage(text: str, min_match: int, max_match: int) -> float | None:
    ids = [VOCABULARY.get(word, 0) for word in text.split()]
    if not ids:
        return None
    matches = greedy_matches(longest_matches(SAID_IDS, ids), min_match=min_match, max_match=max_match)
    return coverage(matches, len(ids))


TEXTS = ["the cat sat on the rug", "the cat sat on the mat", "a unicorn", "on the  rug\nby the end", "nothing here", ""]


@pytest.mark.parametrize(("min_match", "max_match"), [(1, 10), (2, 10), (2, 3)])
def test_a_server_is_asked_about_words(tmp_path: Path, min_match: int, max_match: int) -> None:
    with serving(tmp_path / "index") as server:
        options = {"url": server.url, "index": "test_index", "min_match": min_match, "max_match": max_match}
        scores = check_reward(infini_gram_api_coverage, ["q"] * len(TEXTS), TEXTS, **options)
        assert scores == [word_coverage(text, min_match, max_match) for text in TEXTS]
        assert max(len(query.split()) for query in server.queries) <= max_match
        assert API_COUNTS["requests"] == len(server.queries)
        assert API_COUNTS["short"] == 2 * sum(len(text.split()) < min_match for text in TEXTS) > 0


def test_equal_questions_are_asked_once(tmp_path: Path) -> None:
    with serving(tmp_path / "index") as server:
        ask(server, [TEXTS[0]] * 5 + [TEXTS[1]])
        assert len(set(server.queries)) == len(server.queries)


def test_a_request_that_fails_at_first_is_repeated(tmp_path: Path) -> None:
    for trouble in ("fails", "torn", "garbled", "crowded"):
        with serving(tmp_path / trouble, rug=[trouble, trouble, "fine"]) as server:
            assert ask(server, TEXTS[:2]) == [word_coverage(text, 1, 10) for text in TEXTS[:2]]
            assert len(server.queries) == API_COUNTS["requests"] + 2
            assert (API_COUNTS["failed"], API_COUNTS["refused"]) == (0, 0)


@pytest.mark.parametrize("trouble", ["fails", "torn", "garbled", "slow", "crowded"])
def test_a_request_that_fails_for_good_masks_its_completions_only(tmp_path: Path, trouble: str) -> None:
    texts = ["the rug", "the mat", "a rug", "unicorn"]
    with serving(tmp_path / "index", rug=[trouble]) as server:
        patience = 0.3 if trouble == "slow" else 20.0
        scores = ask(server, texts, timeout_s=patience, retries=1)
        assert scores == [None, 1.0, None, 0.0]
        assert (API_COUNTS["failed"], API_COUNTS["refused"]) == (2, 0)


def test_an_answer_that_is_an_error_masks_too(tmp_path: Path) -> None:
    with serving(tmp_path / "index", rug=["refuses"]) as server:
        assert ask(server, ["the rug", "the mat"]) == [None, 1.0]
        assert (API_COUNTS["failed"], API_COUNTS["refused"]) == (0, 1)


def test_a_server_that_is_asked_wrongly_ends_the_run(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "index") as server,
        pytest.raises(RewardError, match=r"status 400: .*Invalid index: other.*; check url and index"),
    ):
        ask(server, ["the mat"], index="other")


def test_operators_of_the_server_are_not_sent(tmp_path: Path) -> None:
    with serving(tmp_path / "index") as server:
        assert ask(server, ["the cat OR the dog", "the AND", "cat and or", ""]) == [None, None, 1 / 3, None]
        assert not any({"AND", "OR"} & set(query.split()) for query in server.queries)
        assert (API_COUNTS["operators"], API_COUNTS["short"]) == (2, 1)


def test_a_server_that_is_not_there_masks_everything(tmp_path: Path) -> None:
    with serving(tmp_path / "index") as server:
        pass
    assert ask(server, ["the mat", "the rug"], retries=0, timeout_s=2.0) == [None, None]
    assert API_COUNTS["failed"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_match": 3, "max_match": 2}, "max_match must be >= min_match=3"),
        ({"url": "file:///etc/hostname"}, "urls must be addresses such as"),
        ({"concurrency": 0}, "concurrency must be >= 1"),
        ({"timeout_s": 0.0}, "timeout_s must be > 0"),
        ({"retries": -1}, "retries must be >= 0"),
    ],
)
def test_options_of_a_server_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidValue, match=words):
        infini_gram_api_coverage(["q"], ["a"], **{"url": "http://127.0.0.1:9", "index": "i", **options})
