"""Generate, verify and label on the toy backend: whole, resumable, nothing twice and nothing made up."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asn_policies import Pipeline
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import DataError, InvalidValue
from asn_rl.labelling.generate import InProcess, generate
from asn_rl.labelling.grid import Grid
from asn_rl.labelling.labels import label, read_labels
from asn_rl.labelling.records import (
    LABEL,
    ShardWriter,
    candidate_record,
    folder_name,
    read_prompts,
    read_records,
    shards,
    write_prompts,
)
from asn_rl.labelling.store import CandidateStore, read_candidates
from asn_rl.labelling.verify import verify
from asn_rl.rewards.compose import RewardConfig, RewardSuite, score
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Candidate, Key, Prompt

PROMPTS = [Prompt(f"p{i}", f"w{i}", {"valid": [f"w{n}" for n in range(6, 32)], "answer": str(i)}) for i in range(1, 5)]
BY_ID = {prompt.id: prompt for prompt in PROMPTS}
RULES = {
    "greedy": Pipeline([{"name": "greedy"}]),
    "base": Pipeline([]),
    "hot": Pipeline([{"name": "temperature", "params": {"temperature": 2.0}}]),
}
GRID = Grid(tuple(BY_ID), tuple(RULES), (7, 8, 9))
CONFIG = RolloutConfig(max_new_tokens=6, head=5, tail=6, max_batch=5)


def source(**changes) -> InProcess:
    backend = ToyBackend.random(32, seed=3)
    backend.table[:, 0] = 2.0
    return InProcess(backend, RULES, BY_ID, CONFIG, **({"deterministic": ["greedy"]} | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> CandidateStore:
    folder = tmp_path_factory.mktemp("candidates")
    assert generate(CandidateStore(GRID, folder), source(), folder) == 0
    return CandidateStore(GRID, folder)


def all_candidates(store: CandidateStore) -> dict[Key, Candidate]:
    found = [c for i in range(len(GRID.prompts)) for c in read_candidates(store.locations(i))]
    return {candidate.key: candidate for candidate in found}


def test_every_cell_is_the_rollout_of_its_prompt_heuristic_and_seed(whole: CandidateStore) -> None:
    assert verify(whole).ok
    candidates = all_candidates(whole)
    assert set(candidates) == {(p, h, s) for p in GRID.prompts for h in GRID.heuristics for s in GRID.seeds}
    for (prompt, heuristic, seed), candidate in candidates.items():
        alone = rollout(RULES[heuristic], source().backend, [BY_ID[prompt]], CONFIG, seed=seed)
        assert candidate.completion_ids == alone.completion_ids[0]
        assert candidate.completion == alone.completions[0]
        assert candidate.terminated == bool(alone.terminated[0])
    assert len({candidates["p1", "hot", seed].completion for seed in GRID.seeds}) > 1


def test_a_deterministic_heuristic_is_decoded_once_and_counts_for_every_seed(whole: CandidateStore) -> None:
    every = source(deterministic=[])
    cells = [("p1", "greedy", seed) for seed in GRID.seeds]
    assert [c for part in source()(cells) for c in part] == [c for part in every(cells) for c in part]


class Stopping:
    """Stops after some portions, as a killed process does."""

    def __init__(self, portions: int) -> None:
        self.left = portions

    def __call__(self, cells: Sequence[Key]) -> Iterator[list[Candidate]]:
        for portion in source()(cells):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield portion


@given(stops=st.lists(st.integers(0, 3), max_size=4), torn=st.booleans())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_interrupted_generation_continues_and_repeats_nothing(
    stops: list[int], torn: bool, whole: CandidateStore, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("interrupted")
    for portions in stops:
        store = CandidateStore(GRID, folder)
        if store.present.all():
            break
        with contextlib.suppress(KeyboardInterrupt):
            generate(store, Stopping(portions), folder)
        if torn and shards(folder):
            with shards(folder)[-1].open("a") as file:
                file.write('{"schema": "asn_rl.candidate/1", "prompt_id": "p')
    generate(CandidateStore(GRID, folder), source(), folder)
    again = CandidateStore(GRID, folder)
    assert verify(again).ok
    assert again.copies == 0
    assert all_candidates(again) == all_candidates(whole)


def test_missing_cells_are_named_and_only_those_are_generated(whole: CandidateStore, tmp_path: Path) -> None:
    kept = [c for c in all_candidates(whole).values() if c.key not in {("p2", "hot", 8), ("p3", "greedy", 9)}]
    with ShardWriter(tmp_path) as shard:
        shard.write([candidate_record(candidate) for candidate in kept])
    found = verify(CandidateStore(GRID, tmp_path))
    assert not found.ok
    assert found.missing == [("p2", "hot", 8), ("p3", "greedy", 9)]
    assert "missing: prompt 'p2', heuristic 'hot', seed 8" in list(found.lines())
    generate(CandidateStore(GRID, tmp_path), source(), tmp_path)
    assert len(shards(tmp_path)[1].read_text().splitlines()) == 2
    assert verify(CandidateStore(GRID, tmp_path)).ok


def test_cells_that_a_source_leaves_out_are_counted(tmp_path: Path) -> None:
    def lossy(cells: Sequence[Key]) -> Iterator[list[Candidate]]:
        for portion in source()(cells):
            yield portion[1:]

    store = CandidateStore(GRID, tmp_path)
    left_out = generate(store, lossy, tmp_path)
    assert left_out == GRID.size - int(CandidateStore(GRID, tmp_path).present.sum()) > 0


def candidate(**changes) -> Candidate:
    fields = {"prompt_id": "p1", "heuristic": "hot", "seed": 7, "completion": "x", "completion_ids": (3, 0)}
    return Candidate(**(fields | {"terminated": True} | changes))


def written(folder: Path, *candidates: Candidate) -> CandidateStore:
    with ShardWriter(folder) as shard:
        shard.write([candidate_record(c) for c in candidates])
    return CandidateStore(GRID, folder)


def test_repeated_records_are_counted_and_different_texts_of_a_cell_are_conflicts(tmp_path: Path) -> None:
    found = verify(written(tmp_path, candidate(), candidate(), candidate(completion="y")))
    assert (found.copies, found.present, len(found.conflicts)) == (1, 1, 1)
    assert "line 3" in found.conflicts[0]
    assert "another text" in found.conflicts[0]


def test_blank_and_truncated_completions_are_counted(tmp_path: Path) -> None:
    found = verify(written(tmp_path, candidate(completion=" "), candidate(seed=8, terminated=False)))
    assert (found.empty, found.truncated) == (1, 1)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"schema": "asn_rl.candidate/9"}', "schema 'asn_rl.candidate/9'"),
        ("[1]", "schema None"),
        ("{nonsense}", "not JSON"),
        (json.dumps(candidate_record(candidate(heuristic="hott"))), "did you mean 'hot'"),
        (json.dumps(candidate_record(candidate(seed=99))), "seed 99 is not one of"),
        (json.dumps(candidate_record(candidate(prompt_id="zz"))), "prompt id 'zz'"),
        (json.dumps(candidate_record(candidate()) | {"terminated": 1}), "'terminated' is 1"),
        (json.dumps(candidate_record(candidate()) | {"seed": "7"}), "'seed' is '7'"),
        (json.dumps(candidate_record(candidate()) | {"completion_ids": ["a"]}), "completion_ids"),
    ],
)
def test_malformed_records_stop_with_file_line_and_reason(tmp_path: Path, line: str, named: str) -> None:
    (tmp_path / "shard-00000.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"shard-00000\.jsonl, line 1") as error:
        CandidateStore(GRID, tmp_path)
    assert named in str(error.value)


def test_a_full_disk_loses_nothing_that_was_written(tmp_path: Path) -> None:
    """In a process of its own: the limit on file sizes cannot be taken back."""
    program = f"""
import resource, signal, sys
from pathlib import Path
from typing import Any
from asn_rl.labelling.records import ShardWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
line = {candidate_record(candidate())!r}
try:
    with ShardWriter(Path({str(tmp_path)!r})) as shard:
        for seed in (7, 8, 9) * 20:
            shard.write([line | {{"seed": seed, "heuristic": "hot"}}])
except OSError as error:
    print(error)
    sys.exit(3)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert f"File too large: {str(tmp_path / 'shard-00000.jsonl')!r}" in done.stdout
    store = CandidateStore(GRID, tmp_path)
    assert store.present.sum() == 3
    generate(store, source(), tmp_path)
    assert CandidateStore(GRID, tmp_path).present.all()


def test_prompts_are_kept_with_their_columns(tmp_path: Path) -> None:
    chat = Prompt("chat", [{"role": "user", "content": "Hé"}], {"answer": None})
    splits = {"train": PROMPTS, "selection": [chat]}
    write_prompts(tmp_path / "prompts.jsonl", splits)
    assert read_prompts(tmp_path / "prompts.jsonl") == splits


# ---- labels


def test_labels_are_the_rewards_of_a_rollout(tmp_path: Path) -> None:
    """One implementation, two paths: a rollout scored as in RL, and its completions as labelled candidates."""
    configs = [RewardConfig("distinct_valid"), RewardConfig("length_budget", arguments={"budget": 3})]
    run = rollout(RULES["hot"], source().backend, PROMPTS, CONFIG, num_generations=3, seed=1)
    direct = score(RewardSuite(configs), run)
    grid = Grid(tuple(BY_ID), ("hot",), (0, 1, 2))
    with ShardWriter(tmp_path / "candidates") as shard:
        shard.write(
            [
                candidate_record(
                    Candidate(
                        prompt.id, "hot", sample, run.completions[i], run.completion_ids[i], bool(run.terminated[i])
                    )
                )
                for i, (prompt, sample) in enumerate(zip(run.prompts, run.sample, strict=True))
            ]
        )
    store = CandidateStore(grid, tmp_path / "candidates")
    label(configs, store, BY_ID, tmp_path / "labels")
    for name, expected in direct.components.items():
        labels = read_labels(tmp_path / "labels" / name, name, store)
        assert labels.seen.all()
        np.testing.assert_array_equal(labels.scores.reshape(-1), expected.numpy())
    assert 0 < direct.components["distinct_valid"].sum() < len(run)


def test_comparing_labellers_see_one_heuristic_at_a_time(whole: CandidateStore, tmp_path: Path) -> None:
    label([RewardConfig("distinct_valid")], whole, BY_ID, tmp_path)
    scores = read_labels(tmp_path / "distinct_valid", "distinct_valid", whole).scores
    copies = scores[:, 0]  # greedy: the same text three times
    assert set(np.unique(copies)) <= {0.0, 1 / 3}
    for i, heuristic in ((i, h) for i in range(4) for h in (1, 2)):
        cell = scores[i, heuristic]
        assert cell.sum() == pytest.approx(round(cell.sum()))  # the number of distinct valid answers


def test_masked_labels_stay_masked(whole: CandidateStore, tmp_path: Path) -> None:
    prompts = {i: Prompt(p.id, p.content, {"answer": None if i == "p1" else "3"}) for i, p in BY_ID.items()}
    counts = label([RewardConfig("numeric_answer")], whole, prompts, tmp_path)
    labels = read_labels(tmp_path / "numeric_answer", "numeric_answer", whole)
    assert labels.seen.all()
    assert np.isnan(labels.scores[0]).all()
    assert not np.isnan(labels.scores[1:]).any()
    assert counts["numeric_answer"]["numeric_answer/masked"] == 9


def test_a_labeller_that_crashes_on_one_prompt_masks_that_one_only(whole: CandidateStore, tmp_path: Path) -> None:
    config = RewardConfig("toy_rewards:crash_on", arguments={"prompt": PROMPTS[1].content})
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
        counts = label([config], whole, BY_ID, tmp_path)
    scores = read_labels(tmp_path / folder_name(config.function), config.function, whole).scores
    assert np.isnan(scores[1]).all()
    assert (np.delete(scores, 1, 0) == 1).all()
    masked = scores[1].size
    records = [record for _, record in read_records(tmp_path / folder_name(config.function), LABEL)]
    reasons = [record["reason"] for record in records if "reason" in record]
    assert len(reasons) == masked
    assert all(reason.startswith("error, ZeroDivisionError") for reason in reasons)
    assert all(("reason" in record) == (record["score"] is None) for record in records)
    assert counts[config.function][f"{config.function}/masked"] == masked
    assert counts[config.function][f"{config.function}/error"] >= 1


def test_a_column_that_only_other_prompts_have_is_none(whole: CandidateStore, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("asn_rl.labelling.labels.CHUNK", 1)
    prompts = {i: Prompt(p.id, p.content, {"answer": "3"} if i == "p1" else {}) for i, p in BY_ID.items()}
    label([RewardConfig("numeric_answer")], whole, prompts, tmp_path)
    known = ~np.isnan(read_labels(tmp_path / "numeric_answer", "numeric_answer", whole).scores).all((1, 2))
    assert known.tolist() == [True, False, False, False]


def test_labelling_continues_with_what_is_not_done(whole: CandidateStore, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("asn_rl.labelling.labels.CHUNK", 1)
    config, seen = RewardConfig("distinct_valid"), []
    from asn_rl.labelling import labels as module

    def stopping(*arguments):
        for n, answer in enumerate(module.local_engine(*arguments)):
            if n == 2:
                raise KeyboardInterrupt
            yield answer

    with pytest.raises(KeyboardInterrupt):
        label([config], whole, BY_ID, tmp_path, stopping)

    def watching(config, name, chunks):
        for answer in module.local_engine(config, name, chunks):
            seen.extend(record["prompt_id"] for record in answer[1])
            yield answer

    label([config], whole, BY_ID, tmp_path, watching)
    assert set(seen) == {"p3", "p4"}
    label([config], whole, BY_ID, tmp_path, watching)
    assert len(seen) == 18
    full = tmp_path / "full"
    label([config], whole, BY_ID, full)
    name = "distinct_valid"
    np.testing.assert_array_equal(
        read_labels(tmp_path / name, name, whole).scores, read_labels(full / name, name, whole).scores
    )


def test_masked_labels_are_asked_for_again(whole: CandidateStore, tmp_path: Path) -> None:
    config = RewardConfig("toy_rewards:unreachable", arguments={"folder": str(tmp_path)})
    place = tmp_path / "labels" / folder_name(config.function)

    def scores(out: set[str], **options: Any) -> np.ndarray:
        for prompt in BY_ID:
            (tmp_path / prompt).touch() if prompt in out else (tmp_path / prompt).unlink(missing_ok=True)
        label([config], whole, BY_ID, tmp_path / "labels", **options)
        return read_labels(place, config.function, whole).scores

    expected = scores(set())
    shutil.rmtree(tmp_path / "labels")
    first = scores({"p1", "p2"})
    assert np.isnan(first[:2]).all()
    np.testing.assert_array_equal(scores(set()), first)  # nothing is asked again unless one says so
    # p2 is still out, and p3, which is known, is so now: nothing that is known is lost.
    second = scores({"p2", "p3"}, retry=[config.function])
    np.testing.assert_array_equal(np.isnan(second).all((1, 2)), [False, True, False, False])
    last = len(shards(place))
    np.testing.assert_array_equal(scores(set(), retry=[config.function]), expected)
    assert len(shards(place)[last].read_text().splitlines()) == whole.present[1].sum()  # p2 and no other


@pytest.mark.parametrize("score_text", ["NaN", '"good"', "true", "1e999"])
def test_labels_that_are_no_numbers_are_refused(whole: CandidateStore, tmp_path: Path, score_text: str) -> None:
    key = '"prompt_id": "p1", "heuristic": "hot", "seed": 7, "labeller": "x"'
    (tmp_path / "shard-00000.jsonl").write_text(f'{{"schema": "asn_rl.label/1", {key}, "score": {score_text}}}\n')
    with pytest.raises(DataError, match="finite number or null"):
        read_labels(tmp_path, "x", whole)
    with pytest.raises(InvalidValue, match="misplaced"):
        read_labels(tmp_path, "y", whole)


@pytest.mark.parametrize("broken", ["prompt_id", "heuristic", "seed", "score"])
def test_labels_that_lack_a_field_are_refused(whole: CandidateStore, tmp_path: Path, broken: str) -> None:
    fields = {"prompt_id": "p1", "heuristic": "hot", "seed": 7, "labeller": "x", "score": 1.0}
    for record in ({**fields, broken: []}, {name: value for name, value in fields.items() if name != broken}):
        (tmp_path / "shard-00000.jsonl").write_text(json.dumps({"schema": "asn_rl.label/1", **record}) + "\n")
        with pytest.raises(DataError, match=r"shard-00000.jsonl, line 1: (a cell is|'score' must be)"):
            read_labels(tmp_path, "x", whole)


def test_a_label_of_a_text_that_was_replaced_is_made_again(whole: CandidateStore, tmp_path: Path, capsys) -> None:
    config = RewardConfig("length_budget", arguments={"budget": 3})
    shutil.copytree(whole.folder, tmp_path / "candidates")
    store = CandidateStore(GRID, tmp_path / "candidates")
    label([config], store, BY_ID, tmp_path)
    path, offset = store.location((1, 2, 0))
    lines = path.read_bytes()
    end = lines.index(b"\n", offset)
    record = json.loads(lines[offset:end]) | {"completion": "one two three four five six", "completion_ids": [3] * 9}
    path.write_bytes(lines[:offset] + json.dumps(record).encode() + lines[end:])
    store = CandidateStore(GRID, store.folder)
    labels = read_labels(tmp_path / "length_budget", "length_budget", store)
    assert (labels.stale, labels.seen[1, 2, 0], labels.seen.sum()) == (1, False, GRID.size - 1)
    label([config], store, BY_ID, tmp_path)
    assert "1 labels are of texts that were replaced" in capsys.readouterr().out
    fresh = tmp_path / "fresh"
    label([config], store, BY_ID, fresh)
    found = [read_labels(place / "length_budget", "length_budget", store) for place in (tmp_path, fresh)]
    np.testing.assert_array_equal(found[0].scores, found[1].scores)
    assert found[0].stale == 0


def test_a_labeller_that_hangs_on_one_prompt_masks_that_one_only(whole: CandidateStore, tmp_path: Path) -> None:
    arguments = {"prompt": PROMPTS[1].content}
    config = RewardConfig("slow_rewards:hang_on_prompt", arguments=arguments, time_limit=1.0, isolation="process")
    with pytest.warns(RuntimeWarning, match="timeout"):
        counts = label([config], whole, BY_ID, tmp_path)[config.function]
    scores = read_labels(tmp_path / folder_name(config.function), config.function, whole).scores
    assert np.isnan(scores).all((1, 2)).tolist() == [False, True, False, False]
    assert counts[f"{config.function}/masked"] == scores[1].size
    assert counts[f"{config.function}/timeout"] == 3  # all four prompts, two, one


@pytest.mark.parametrize("isolation", ["inline", "process"])
def test_a_score_may_know_its_uncertainty(whole: CandidateStore, tmp_path: Path, isolation: Any) -> None:
    label([RewardConfig("slow_rewards:guessed", isolation=isolation)], whole, BY_ID, tmp_path)
    place = tmp_path / folder_name("slow_rewards:guessed")
    assert {record["stderr"] for _, record in read_records(place, LABEL)} == {2.0}
    assert read_labels(place, "slow_rewards:guessed", whole).stderr == 2.0


def test_halves_of_the_seeds_are_compared_by_themselves(whole: CandidateStore, tmp_path: Path) -> None:
    rewards = [RewardConfig("distinct_ngrams", arguments={"n": 1})]
    label(rewards, whole, BY_ID, tmp_path)
    found = read_labels(tmp_path / "distinct_ngrams", "distinct_ngrams", whole)
    seeds = np.array(GRID.seeds)
    for half in range(2):
        grid = Grid(GRID.prompts, GRID.heuristics, tuple(seeds[seeds % 2 == half].tolist()))
        folder = tmp_path / f"half-{half}"
        cells = [(i, j, k) for i, j, k in np.ndindex(GRID.shape) if seeds[k] % 2 == half]
        with ShardWriter(folder / "candidates") as shard:
            shard.write([candidate_record(c) for c in read_candidates([whole.location(cell) for cell in cells])])
        store = CandidateStore(grid, folder / "candidates")
        label(rewards, store, BY_ID, folder)
        alone = read_labels(folder / "distinct_ngrams", "distinct_ngrams", store).scores
        np.testing.assert_array_equal(found.apart[..., seeds % 2 == half], alone)
    assert not np.array_equal(found.apart, found.scores)
