"""A local suffix-array index of a corpus, in the base model's own token ids, through infini-gram (Liu et al. 2024,
"Infini-gram: Scaling Unbounded n-gram Language Models to a Trillion Tokens"; package infini-gram, Linux x86-64).

The package tokenises with a few tokenizers of the hub only, but skips that step where its result lies there already.
So `tokenized.0` and `offset.0` are written here and its indexer sorts them. `index.json` is written last: it says whose
ids these are and holds a digest of every file, because the engine, which maps the files into memory, crashes on
damaged ones.

The engine stores 16-bit units, 0xFFFF before each document. Its 32-bit variant sorts with a table of 2^32 buckets (32
GiB), so an id of a vocabulary over 65,535 is stored as two units of 15 bits, the first with its top bit set: no run of
whole ids can then match out of step, and counts are exact.
"""

from __future__ import annotations

import array
import hashlib
import importlib.util
import json
import shlex
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from asn_rl.errors import DataError, InvalidValue, RewardError
from asn_rl.ops.overlap import Match, answered, match_search

INFO = "index.json"
MAX_VOCABULARY = (1 << 30) - (1 << 15)
"""largest vocabulary that two units hold without the separator"""
_SINGLE_UNIT = 65_535  # ids below it fit one unit
_MEMORY_GIB = 4  # of the indexer; larger corpora are sorted in parts
_MIN_PARALLEL_TOKENS = 100_000  # the indexer panics when a part is nearly empty


@dataclass(frozen=True)
class IndexInfo:
    """What `index.json` says."""

    model: str
    """name of the base model whose token ids are indexed"""
    fingerprint: str
    """of that base model (`LogitsBackend.fingerprint`)"""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    """end-of-sequence ids: part of completions, never of documents"""
    documents: int
    tokens: int
    """ids of all documents together"""
    digests: Mapping[str, str]
    """sha256 of each file beside `index.json`"""


def build_index(
    folder: str | Path,
    documents: Iterable[Sequence[int]],
    *,
    model: str,
    fingerprint: str,
    vocab_size: int,
    eos_token_ids: Iterable[int] = (),
    cpus: int = 1,
) -> IndexInfo:
    """Index documents, lists of token ids, which are read one at a time. Replaces an index that lies in `folder`.

    An interruption leaves nothing in `folder`, or the index that was there. Empty documents are left out. On disk the
    index takes 2 bytes a unit and 2 to 5 more for its rank, and 8 a document.

    Args:
        model, fingerprint, vocab_size, eos_token_ids: of the base model the ids belong to.
        cpus: processes of the indexer.

    Raises:
        RewardError: infini-gram is not installed, or its indexer failed.
        InvalidValue: a vocabulary that does not fit, or a folder with something else in it.
        DataError: no tokens at all, or an id outside the vocabulary.
        CheckpointError: the folder cannot be written.
    """
    from asn_rl.checkpoint import atomic_folder

    _require_package()
    target = Path(folder).absolute()
    if not 0 < vocab_size <= MAX_VOCABULARY:
        raise InvalidValue("vocab_size", vocab_size, f"between 1 and {MAX_VOCABULARY}")
    if target.exists() and not (target / INFO).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidValue("folder", str(folder), "new, empty or an index", "an index takes the place of the folder")
    with atomic_folder(target) as scratch:
        count, tokens = _write_documents(scratch, documents, vocab_size)
        _sort(scratch, cpus if tokens >= _MIN_PARALLEL_TOKENS else 1)
        digests = {path.name: _digest(path) for path in sorted(scratch.iterdir())}
        info = IndexInfo(model, fingerprint, vocab_size, tuple(sorted(eos_token_ids)), count, tokens, digests)
        (scratch / INFO).write_text(json.dumps(asdict(info), indent=1))
    return info


def index_corpus(
    paths: Iterable[str | Path], folder: str | Path, *, model: str, field: str = "text", cpus: int = 1
) -> IndexInfo:
    """Index text and JSONL files in the token ids of a base model; see `read_documents` and `build_index`.

    Raises:
        DataError: a file that cannot be read, or no text at all.
        RewardError, InvalidValue, CheckpointError: see `build_index`.
        BackendError: the base model cannot be loaded.
    """
    from asn_rl.backends import BackendConfig, shared_backend
    from asn_rl.backends.hf import HFBackend

    backend = shared_backend(BackendConfig(model=model, chat_template=False))  # documents are no chats
    if not isinstance(backend, HFBackend):
        raise InvalidValue("model", model, "a transformers model")
    tokenizer = backend.tokenizer
    # verbose: documents may be longer than the model's context.
    return build_index(
        folder,
        (
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for path in paths
            for text in read_documents(path, field)
        ),
        model=model,
        fingerprint=backend.fingerprint,
        vocab_size=backend.vocab_size,
        eos_token_ids=backend.eos_token_ids,
        cpus=cpus,
    )


def read_documents(path: str | Path, field: str = "text") -> Iterator[str]:
    """Documents of a UTF-8 file, read as a stream.

    `.jsonl`: one from each record's `field`; several names, joined by commas, give a document each, and a record must
    have one of them. Any other file: text, documents separated by blank lines.

    Raises:
        DataError: unreadable, not UTF-8, or a record without text; the message names file and line.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8") as lines:
            yield from _records(path, lines, field.split(",")) if path.suffix == ".jsonl" else _paragraphs(lines)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; give UTF-8 text or JSONL files") from error


def _records(path: Path, lines: Iterable[str], fields: Sequence[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}. Mend or remove that line") from error
        texts = [record[name] for name in fields if name in record] if isinstance(record, dict) else []
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(
                f"{path}, line {number} must be a JSON object with text in {' or '.join(map(repr, fields))}, got "
                f"{line.strip()[:80]!r}; name the field that holds the text"
            )
        yield from texts


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    paragraph: list[str] = []
    for line in lines:
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph)
            paragraph = []
    if paragraph:
        yield "".join(paragraph)


class CorpusIndex:
    """An index, open for counting. Threads may share it.

    Args:
        folder: where `build_index` wrote it.
        fingerprint: of the base model whose ids will be looked up; None: not checked.

    Raises:
        RewardError: infini-gram is not installed, or the index is missing, damaged or of another base model; the
            message names the command that builds it.
    """

    def __init__(self, folder: str | Path, fingerprint: str | None = None) -> None:
        _require_package()
        self.folder = Path(folder).absolute()
        self.info = _read_info(self.folder)
        if fingerprint is not None and fingerprint != self.info.fingerprint:
            raise RewardError(
                f"the index {self.folder} holds token ids of {self.info.model!r}, whose fingerprint is "
                f"{self.info.fingerprint}, not of the base model with fingerprint {fingerprint}; build one for that: "
                f"{_build_command(self.folder)}"
            )
        _check_files(self.folder, self.info)
        from infini_gram.engine import InfiniGramEngine

        # The checked wrapper costs as much as the search; ids are checked here instead.
        wrapper = InfiniGramEngine(index_dir=str(self.folder), eos_token_id=0, vocab_size=_SINGLE_UNIT)
        self._find: Callable[..., Any] = wrapper.engine.find
        self._width = _width(self.info.vocab_size)

    def count(self, token_ids: Sequence[int]) -> int:
        """How often at least one token occurs in the documents, one after the other.

        Raises:
            DataError: an id outside the base model's vocabulary.
        """
        return self._find(input_ids=_units(token_ids, self.info.vocab_size)).cnt

    def matches(self, token_ids: Sequence[int], *, min_match: int = 1, max_match: int | None = None) -> list[Match]:
        """The greedy parse of a sequence into longest matches; see `asn_rl.ops.overlap`.

        Raises:
            DataError: an id outside the base model's vocabulary.
            InvalidValue: see `asn_rl.ops.overlap.match_search`.
        """
        units, width = _units(token_ids, self.info.vocab_size), self._width
        search = match_search(len(token_ids), min_match=min_match, max_match=max_match)
        return answered(search, lambda start, stop: self._find(input_ids=units[start * width : stop * width]).cnt > 0)


@cache
def open_index(folder: str, fingerprint: str | None) -> CorpusIndex:
    """The process-wide index of a folder; see `CorpusIndex`."""
    return CorpusIndex(folder, fingerprint)


def _width(vocab_size: int) -> int:
    return 1 if vocab_size <= _SINGLE_UNIT else 2


def _units(token_ids: Sequence[int], vocab_size: int) -> list[int]:
    ids = [int(token) for token in token_ids]
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise DataError(
            f"token {outside[0]} is outside the vocabulary of {vocab_size} that the index is for; was it sampled from "
            "another model?"
        )
    if _width(vocab_size) == 1:
        return ids
    return [unit for token in ids for unit in (0x8000 | token >> 15, token & 0x7FFF)]


def _write_documents(folder: Path, documents: Iterable[Sequence[int]], vocab_size: int) -> tuple[int, int]:
    """The engine's input: `tokenized.0`, and `offset.0` with the byte (u64) at which each document begins."""
    count = tokens = position = 0
    with (folder / "tokenized.0").open("wb") as text, (folder / "offset.0").open("wb") as offsets:
        for document in documents:
            if len(document) == 0:
                continue
            offsets.write(struct.pack("<Q", position))
            position += text.write(array.array("H", [0xFFFF, *_units(document, vocab_size)]).tobytes())
            count, tokens = count + 1, tokens + len(document)
    if not tokens:
        raise DataError("the corpus holds no tokens, there is nothing to index; give files with text")
    return count, tokens


def _sort(folder: Path, cpus: int) -> None:
    """Let the package's indexer write `table.0`."""
    with tempfile.TemporaryDirectory(prefix="asn-rl-index-") as short:
        # It runs shell commands with unquoted paths, so it gets a path without spaces.
        link = Path(short).absolute() / "index"
        if shlex.quote(str(link)) != str(link):
            raise InvalidValue("TMPDIR", short, "a path of letters, digits and _-./")
        link.symlink_to(folder)
        options = {"data_dir": link, "save_dir": link, "token_dtype": "u16", "cpus": cpus, "mem": _MEMORY_GIB}
        # Fewer open files than its default of 2^20, which most users may not have.
        arguments = [text for name, value in (options | {"ulimit": 1024}).items() for text in (f"--{name}", str(value))]
        run = subprocess.run(
            [sys.executable, "-m", "infini_gram.indexing", *arguments], capture_output=True, text=True, check=False
        )
    if run.returncode != 0 or not (folder / "table.0").is_file():
        raise RewardError(
            f"the indexer of infini-gram failed with exit status {run.returncode}: {(run.stdout + run.stderr)[-600:]}"
        )


def _read_info(folder: Path) -> IndexInfo:
    try:
        raw = json.loads((folder / INFO).read_text())
        return IndexInfo(**{**raw, "eos_token_ids": tuple(raw["eos_token_ids"]), "digests": dict(raw["digests"])})
    except FileNotFoundError:
        raise RewardError(f"there is no corpus index in {folder}; build it: {_build_command(folder)}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RewardError(f"{folder / INFO} is damaged ({error}); build it anew: {_build_command(folder)}") from error


def _check_files(folder: Path, info: IndexInfo) -> None:
    damaged = [name for name, digest in info.digests.items() if not _is_whole(folder / name, digest)]
    if damaged or not {"tokenized.0", "offset.0", "table.0"} <= set(info.digests):
        what = ", ".join(sorted(damaged)) or INFO
        raise RewardError(
            f"the corpus index {folder} is damaged ({what}); build it anew: {_build_command(folder, info.model)}"
        )


def _is_whole(path: Path, digest: str) -> bool:
    try:
        return _digest(path) == digest
    except OSError:
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build_command(folder: Path, model: str = "MODEL") -> str:
    return f"asn-rl index-corpus FILE... --output {shlex.quote(str(folder))} --model {shlex.quote(model)}"


def _require_package() -> None:
    if importlib.util.find_spec("infini_gram") is None:
        raise RewardError(
            "a local corpus index needs the package infini-gram (Linux x86-64): pip install 'asn_rl[corpus]'"
        )
