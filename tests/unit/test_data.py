from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asn_policies import Pipeline
from asn_rl.backends.toy import ToyBackend
from asn_rl.data import DataConfig, load_prompts
from asn_rl.data.sampler import PromptSampler
from asn_rl.data.splits import SPLITS, split_slice
from asn_rl.data.store import load_trajectories, save_trajectories
from asn_rl.errors import CheckpointError, ConfigError, DataError, InvalidValue, UnknownName
from asn_rl.ops.context import check_context
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import OPTIONAL_INPUTS, Prompt


def load(source: str, split: str = "train", limit: int | None = None, **arguments: Any) -> list[Prompt]:
    return load_prompts(DataConfig(source, arguments, limit), split)


def by_split(source: str, **arguments: Any) -> dict[str, list[Prompt]]:
    return {split: load(source, split, **arguments) for split in SPLITS}


def assert_disjoint(parts: dict[str, set[Any]]) -> None:
    assert all(parts.values()), "an empty split"
    for a, b in combinations(parts, 2):
        assert not parts[a] & parts[b], (a, b)


# Splits


@given(count=st.integers(0, 300))
def test_splits_divide_a_list_in_order_without_overlap(count: int):
    items = list(range(count))
    assert [i for split in SPLITS for i in split_slice(items, split)] == items


def test_splits_have_their_declared_shares():
    assert {split: len(split_slice(range(100), split)) for split in SPLITS} == {
        "train": 50,
        "selection": 20,
        "test": 30,
    }


@pytest.mark.parametrize("source", ["arithmetic", "open_ended", "mixture"])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_prompt_is_in_two_splits(source: str, seed: int):
    parts = by_split(source, seed=seed)
    assert_disjoint({split: {prompt.id for prompt in prompts} for split, prompts in parts.items()})
    assert_disjoint({split: {str(prompt.content) for prompt in prompts} for split, prompts in parts.items()})


@pytest.mark.parametrize("seed", [0, 1])
def test_operand_pairs_are_never_shared_between_splits_in_either_order(seed: int):
    def pair(prompt: Prompt) -> frozenset[str]:
        return frozenset(c for c in str(prompt.content) if c.isdigit())

    parts = by_split("arithmetic", operations="+-*", seed=seed)
    assert_disjoint({split: {pair(prompt) for prompt in prompts} for split, prompts in parts.items()})
    assert sum(map(len, parts.values())) == 3 * 100, "every ordered pair under every operation"


def test_categories_are_never_shared_between_splits():
    parts = by_split("open_ended")
    assert_disjoint({split: {prompt.id.split("/")[1] for prompt in prompts} for split, prompts in parts.items()})


@pytest.mark.parametrize("source", ["arithmetic", "open_ended", "mixture"])
def test_a_split_is_a_function_of_the_seed(source: str):
    assert load(source) == load(source)
    assert load(source, seed=0) != load(source, seed=1)


@pytest.mark.parametrize("source", ["arithmetic", "open_ended", "mixture", "reasoning_gym"])
def test_an_unknown_split_is_refused_with_a_suggestion(source: str):
    with pytest.raises(UnknownName, match=r"unknown split 'tset'. Did you mean 'test'"):
        load(source, "tset")


# Built-in sources


def test_arithmetic_answers_are_right():
    for prompt in load("arithmetic", operations="+-*"):
        question = str(prompt.content).removeprefix("What is ").removesuffix("?")
        left, operation, right = question.split(" ")
        a, b = int(left), int(right)
        assert prompt.columns["answer"] == str({"+": a + b, "-": a - b, "*": a * b}[operation])


@pytest.mark.parametrize("operations", ["", "/", "+/"])
def test_operations_that_are_not_offered_are_refused(operations: str):
    with pytest.raises(InvalidValue, match="operations must be some of"):
        load("arithmetic", operations=operations)


def test_open_prompts_carry_what_counts_as_valid():
    prompts = load("open_ended", forms=["Name {}."])
    assert all(str(prompt.content).startswith("Name a") for prompt in prompts)
    for prompt in prompts:
        valid = prompt.columns["valid"]
        assert len(valid) == len(set(valid)) > 10
        assert all(answer == answer.strip().lower() for answer in valid)


def test_the_mixture_holds_both_tasks():
    prompts = load("mixture", "test")
    assert prompts == load("arithmetic", "test") + load("open_ended", "test")
    assert {prompt.columns["task"] for prompt in prompts} == {"arithmetic", "open"}


# load_prompts


def test_a_limit_takes_prompts_evenly_and_a_large_one_takes_all():
    everything = load("arithmetic")
    few = load("arithmetic", limit=5)
    places = [everything.index(prompt) for prompt in few]
    assert len(few) == 5
    gaps = [b - a for a, b in pairwise(places)]
    assert max(gaps) - min(gaps) <= 1
    assert load("arithmetic", limit=10_000) == everything


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(limit: int):
    with pytest.raises(InvalidValue, match="limit must be >= 1"):
        DataConfig(limit=limit)


def nothing(split: str) -> list[Prompt]:
    return []


def doubled(split: str) -> list[Prompt]:
    return [Prompt("same", "a"), Prompt("other", "b"), Prompt("same", "c")]


def test_a_source_of_ones_own_is_known_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_source.py").write_text(
        "from asn_rl.types import Prompt\ndef two(split, *, text):\n    return [Prompt(i, text) for i in split[:2]]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load("my_source:two", "test", text="hi") == [Prompt("t", "hi"), Prompt("e", "hi")]


def test_an_empty_split_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("asn_rl.data.arithmetic.arithmetic", nothing)
    with pytest.raises(DataError, match="'train' split of source 'arithmetic' holds no prompts"):
        load("arithmetic")


def test_two_prompts_with_one_id_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("asn_rl.data.arithmetic.arithmetic", doubled)
    with pytest.raises(DataError, match="prompt id 'same' occurs twice"):
        load("arithmetic")


def test_an_argument_the_source_does_not_take_is_named():
    with pytest.raises(ConfigError, match=r"'arithmetic'.*'opperations'.*check data\.arguments"):
        load("arithmetic", opperations="+")


# JSONL


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_go_where_their_split_column_says(tmp_path: Path):
    rows = [{"prompt": f"q{i}", "answer": str(i), "split": split, "id": i} for i, split in enumerate([*SPLITS, "test"])]
    path = write(tmp_path / "a.jsonl", *rows)
    assert load("jsonl", path=path) == [Prompt("0", "q0", {"answer": "0"})]
    assert [prompt.content for prompt in load("jsonl", "test", path=path)] == ["q2", "q3"]


def test_a_file_without_split_column_is_divided_at_random_by_seed(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", *({"prompt": f"q{i}"} for i in range(40)))
    parts = by_split("jsonl", path=path)
    assert_disjoint({split: {str(prompt.content) for prompt in prompts} for split, prompts in parts.items()})
    assert [len(prompts) for prompts in parts.values()] == [20, 8, 12]
    assert load("jsonl", path=path, seed=1) != parts["train"]
    assert parts["train"][0].id.startswith("line-")


def test_a_text_that_occurs_twice_stays_in_one_split(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", *({"prompt": f"q{i // 2}", "answer": i} for i in range(40)))
    parts = by_split("jsonl", path=path)
    assert_disjoint({split: {str(prompt.content) for prompt in prompts} for split, prompts in parts.items()})
    assert sum(map(len, parts.values())) == 40


def test_prompts_may_be_messages(tmp_path: Path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = write(tmp_path / "a.jsonl", {"prompt": messages, "split": "train"})
    assert load("jsonl", path=path) == [Prompt("line-1", messages)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": ""}', "line 3: 'prompt' must be text or a list"),
        ('{"question": "x"}', "line 3: 'prompt' must be text.*got None"),
        ('{"prompt": []}', "line 3: 'prompt' must be text"),
        ('{"prompt": [{"role": "user"}]}', "line 3: 'prompt' must be text"),
        ('{"prompt": 7}', "line 3: 'prompt' must be text"),
        ('{"prompt": "x", "split": "tset"}', "line 3: 'split' must be one of train, selection, test, got 'tset'"),
        ('{"prompt": "x"', "line 3 is not JSON"),
        (r'{"prompt": "x", "id": "\ud800"}', "line 3 holds half of a surrogate pair"),
        ('"x"', "line 3 must be a JSON object"),
        ('{"prompt": "x", "split": "test"}', "some rows have a 'split' and some do not"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_file_and_line(tmp_path: Path, row: str, message: str):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n\n{row}\n{{"prompt": "fine too"}}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl.*{message}"):
        load("jsonl", path=str(path))


def test_a_missing_or_empty_file_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="cannot read"):
        load("jsonl", path=str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="holds no prompts"):
        load("jsonl", path=str(tmp_path / "empty.jsonl"))


# reasoning-gym


def test_procedural_splits_are_full_and_share_no_question():
    parts = by_split("reasoning_gym", size=30)
    assert_disjoint({split: {str(prompt.content) for prompt in prompts} for split, prompts in parts.items()})
    assert all(len(prompts) >= 28 for prompts in parts.values())
    other = {str(prompt.content) for prompt in load("reasoning_gym", size=30, seed=1)}
    assert len(other & {str(prompt.content) for prompts in parts.values() for prompt in prompts}) <= 2


def test_where_questions_are_few_the_splits_still_share_none():
    few = {"min_digits": 1, "max_digits": 1, "min_terms": 2, "max_terms": 2}
    parts = by_split("reasoning_gym", size=60, config=few)
    assert_disjoint({split: {str(prompt.content) for prompt in prompts} for split, prompts in parts.items()})
    assert all(len({p.id for p in prompts}) == len(prompts) for prompts in parts.values())


def test_families_without_verified_answers_are_refused():
    with pytest.raises(InvalidValue, match=r"family must be one with verified answers.*; differs between processes"):
        load("reasoning_gym", family="word_ladder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "chain_smu"}, "refuses family 'chain_smu'"),
        ({"config": {"min_digits": 5, "max_digits": 1}}, "refuses family 'chain_sum'"),
        ({"config": {"digits": 5}}, "refuses family 'chain_sum'"),
    ],
)
def test_what_the_package_refuses_is_a_configuration_error(arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        load("reasoning_gym", **arguments)


@pytest.mark.parametrize("size", [0, 10**9])
def test_a_size_out_of_range_is_refused(size: int):
    with pytest.raises(InvalidValue, match="size must be in"):
        load("reasoning_gym", size=size)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"reasoning-gym is not installed; run: pip install 'asn_rl\[tasks\]'"):
        load("reasoning_gym")


# Sampler


def tasks(**counts: int) -> list[Prompt]:
    return [Prompt(f"{task}{i}", "x", {"task": task}) for task, count in counts.items() for i in range(count)]


@given(step=st.integers(0, 100), seed=st.integers(0, 2**31))
def test_a_step_is_a_function_of_seed_and_step_alone(step: int, seed: int):
    prompts = tasks(a=7, b=12)
    sampler = PromptSampler(prompts, 5, seed, "task")
    for earlier in range(3):
        sampler.draw(earlier)
    assert sampler.draw(step) == PromptSampler(prompts, 5, seed, "task").draw(step)


@given(
    step=st.integers(0, 50),
    per_step=st.integers(3, 12),
    counts=st.tuples(*[st.integers(4, 9)] * 3),
    seed=st.integers(0),
)
def test_a_step_is_balanced_and_holds_no_prompt_twice(step: int, per_step: int, counts: tuple[int, ...], seed: int):
    drawn = PromptSampler(tasks(a=counts[0], b=counts[1], c=counts[2]), per_step, seed, "task").draw(step)
    assert len({prompt.id for prompt in drawn}) == len(drawn) == per_step
    shares = Counter(prompt.columns["task"] for prompt in drawn)
    assert max(shares.values()) - min(shares.values()) <= 1
    assert shares["a"] >= shares["b"] >= shares["c"], "the first ones get one more"


def test_an_epoch_sees_every_prompt_once_where_steps_divide_it():
    sampler = PromptSampler(tasks(a=12), 4, seed=3)
    for epoch in range(3):
        seen = [prompt.id for step in range(3 * epoch, 3 * epoch + 3) for prompt in sampler.draw(step)]
        assert sorted(seen) == sorted(f"a{i}" for i in range(12))


def test_strata_of_the_same_size_are_shuffled_independently():
    drawn = PromptSampler(tasks(a=30, b=30), 20, 0, "task").draw(0)
    numbers = [prompt.id[1:] for prompt in drawn]
    assert numbers[:10] != numbers[10:]


def test_steps_and_seeds_differ():
    draws = [PromptSampler(tasks(a=50), 4, seed).draw(step) for seed in (0, 1) for step in (0, 1, 13)]
    assert all(a != b for a, b in combinations(draws, 2))


def test_prompts_that_cannot_fill_a_step_are_refused():
    with pytest.raises(DataError, match="the prompt list is empty"):
        PromptSampler([], 4, 0)
    with pytest.raises(DataError, match="prompt 'x' lacks the column 'task'"):
        PromptSampler([*tasks(a=3), Prompt("x", "y")], 2, 0, "task")
    with pytest.raises(DataError, match="a draw of 1 prompts cannot hold all 2 values of 'task'"):
        PromptSampler(tasks(a=3, b=3), 1, 0, "task")
    with pytest.raises(DataError, match=r"a draw needs 4 prompts with task 'b', there are 3; lower grpo"):
        PromptSampler(tasks(a=9, b=3), 8, 0, "task")
    with pytest.raises(DataError, match="a draw needs 5 prompts, there are 3"):
        PromptSampler(tasks(a=3), 5, 0)


# Store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "trajectories"


class Conditioned(Pipeline):
    needs = OPTIONAL_INPUTS - {"layer_logprobs"}


def test_trajectories_survive_with_every_optional_entry(toy: ToyBackend, folder: Path):
    prompts = [
        Prompt("a", "w1", {"answer": "4", "valid": ["x", "ü"]}),
        Prompt("b", [{"role": "user", "content": "w2"}]),
    ]
    run = rollout(
        Conditioned([]),
        toy,
        prompts,
        RolloutConfig(max_new_tokens=5, head=8, tail=4),
        num_generations=2,
        conditions=torch.eye(2),
        probes={"largest": lambda logits, sketch, points: logits.amax(-1)},
    )
    save_trajectories(folder, run)
    loaded = load_trajectories(folder)
    assert loaded.prompts == run.prompts
    for name in ("sample", "prompt_ids", "completion_ids", "completions"):
        assert getattr(loaded, name) == getattr(run, name)
    for name in ("terminated", "points", "behaviour_logprobs", "base_logprobs", "lengths"):
        assert torch.equal(getattr(loaded, name), getattr(run, name))
    for name in ("context", *sorted(OPTIONAL_INPUTS - {"layer_logprobs"})):  # a table has no layers
        assert torch.equal(getattr(loaded.observations, name), getattr(run.observations, name))
    for name in ("log_mass", "log_count", "inner_entropy"):
        assert torch.equal(getattr(loaded.observations.sketch, name), getattr(run.observations.sketch, name))
    assert torch.equal(loaded.extras["largest"], run.extras["largest"])


def test_optional_entries_that_were_not_recorded_stay_absent(toy: ToyBackend, folder: Path):
    save_trajectories(folder, rollout(Pipeline([]), toy, [Prompt("a", "w1")], RolloutConfig(max_new_tokens=2)))
    loaded = load_trajectories(folder)
    assert loaded.observations.hidden is None
    assert loaded.extras == {}


def test_a_context_out_of_its_documented_range_is_named(toy: ToyBackend, folder: Path):
    out = rollout(Pipeline([]), toy, [Prompt("p", "w1")], RolloutConfig(max_new_tokens=4))
    out.observations.context[1, 2] = 25.0
    save_trajectories(folder, out)
    with pytest.raises(InvalidValue, match=r"context entry 'entropy' must be in \[0, 20\], nats.*, got 25"):
        load_trajectories(folder)
    with pytest.raises(InvalidValue, match=r"context shape must be"):
        check_context(torch.zeros(3, 2))


def test_stored_trajectories_that_are_damaged_are_refused(toy: ToyBackend, folder: Path):
    save_trajectories(folder, rollout(Pipeline([]), toy, [Prompt("a", "w1")], RolloutConfig(max_new_tokens=2)))
    tensors = folder / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged or missing"):
        load_trajectories(folder)
