from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tiny_models import CONFIGS, tiny_backend, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from asn_rl.backends import BackendConfig
from asn_rl.backends.hf import HFBackend
from asn_rl.errors import CheckpointError, DataError, InvalidValue, RewardError
from asn_rl.rewards.frozen_features import bradley_terry_head, features, load_features, load_head
from asn_rl.testing import check_reward
from asn_rl.training.reward_model import RewardModelConfig, better_worse_pairs, fit_head, train_reward_model
from asn_rl.types import Prompt


def save_model(folder: Path, **settings: Any) -> BackendConfig:
    """A random causal language model without a chat template."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **ids, **settings}))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return BackendConfig(model=str(folder), dtype="float32", chat_template=False)


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> BackendConfig:
    return save_model(tmp_path_factory.mktemp("base"))


Scored = tuple[list[Prompt], list[list[int]], list[float]]


def candidates(prompts: int = 40, samples: int = 6, seed: int = 0) -> Scored:
    """Completions of random words, scored by how often word 7 occurs in them: what a head can learn."""
    generator = np.random.default_rng(seed)
    rows = [Prompt(f"p{i}", f"w{2 + i % 30} w{3 + i % 20}") for i in range(prompts) for _ in range(samples)]
    ids = [generator.choice([7, 8, 9, 10, 11], generator.integers(3, 9)).tolist() for _ in rows]
    return rows, ids, [float(np.mean(np.array(row) == 7)) for row in ids]


def by_hand(backend: HFBackend, prompt: list[int], completion: list[int], layer: int) -> torch.Tensor:
    """Features of one completion, straight from transformers."""
    with torch.no_grad():
        states = backend.model(torch.tensor([[*prompt, *completion]]), output_hidden_states=True).hidden_states
    return torch.cat([states[-1][0, -1], states[layer][0, len(prompt) :].mean(0)]).float()


@pytest.mark.parametrize("name", ["rotary", "learned positions", "sliding window", "convolutions"])
def test_features_in_any_batch(name: str) -> None:
    backend = tiny_backend(CONFIGS[name]())
    generator = np.random.default_rng(0)
    rows = [(generator.integers(2, 40, p).tolist(), generator.integers(2, 40, c).tolist())
            for p, c in [(3, 5), (9, 1), (1, 20), (7, 7)]]  # fmt: skip
    together = features(backend, rows, 1)
    assert together.shape == (4, 64)
    for row, found in zip(rows, together, strict=True):
        torch.testing.assert_close(features(backend, [row], 1)[0], found, atol=1e-5, rtol=0)
        torch.testing.assert_close(by_hand(backend, *row, layer=1), found, atol=1e-5, rtol=0)


def test_layers_out_of_range() -> None:
    with pytest.raises(InvalidValue, match=r"layer must be in \[0, 2\]"):
        features(tiny_backend(CONFIGS["rotary"]()), [([3], [4])], 3)


def test_head_is_the_minimum() -> None:
    generator = np.random.default_rng(0)
    inputs = torch.from_numpy(generator.standard_normal((30, 6)))
    pairs = torch.from_numpy(generator.integers(0, 30, (80, 2)))
    weight, loss = fit_head(inputs, pairs, l2=0.05)
    difference = (inputs[pairs[:, 0]] - inputs[pairs[:, 1]]).numpy()

    def objective(w: np.ndarray) -> float:
        return float(np.logaddexp(0, -difference @ w).mean() + 0.025 * w @ w)

    expected = minimize(objective, np.zeros(6), method="BFGS", options={"gtol": 1e-10})
    np.testing.assert_allclose(weight.numpy(), expected.x, atol=1e-6)
    assert loss == pytest.approx(objective(expected.x) - 0.025 * expected.x @ expected.x, abs=1e-7)


def test_pairs() -> None:
    scores = {0: 1.0, 1: 0.0, 2: 0.0, 4: 5.0, 5: 5.0, 6: 2.0, 7: 3.0}  # 3 has none
    found = better_worse_pairs(["a", "a", "a", "a", "b", "b", "c", "c"], scores, most=10, seed=0)
    assert {key: sorted(map(tuple, part.tolist())) for key, part in found.items()} == {
        "a": [(0, 1), (0, 2)], "c": [(7, 6)],
    }  # fmt: skip
    many = {i: float(i) for i in range(30)}
    some = better_worse_pairs(["a"] * 30, many, most=50, seed=0)["a"]
    assert len({tuple(pair) for pair in some.tolist()}) == 50
    assert all(many[better] > many[worse] for better, worse in some.tolist())
    np.testing.assert_array_equal(some, better_worse_pairs(["a"] * 30, many, most=50, seed=0)["a"])


def test_training_learns_saves_and_scores(base_model: BackendConfig, tmp_path: Path) -> None:
    prompts, ids, scores = candidates()
    report = train_reward_model(
        prompts, ids, scores, base_model=base_model, folder=tmp_path / "head", config=RewardModelConfig(l2=0.01)
    )
    assert report.accuracy > 0.8
    assert report.accuracy_low <= report.accuracy <= report.accuracy_high
    assert report.training_accuracy > 0.85
    assert (report.held_out_prompts, report.training_prompts, report.left_out) == (12, 28, 0)
    assert report.training_loss < math.log(2)
    saved = json.loads((tmp_path / "head" / "config.json").read_text())
    assert saved["notes"]["report"]["accuracy"] == report.accuracy
    assert saved["layer"] == 2
    assert saved["base_model"]["model"] == base_model.model

    def reward(prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> list[float | None]:
        return bradley_terry_head(prompts, completions, completion_ids, folder=str(tmp_path / "head"), **columns)

    fresh, fresh_ids, fresh_scores = candidates(prompts=6, seed=9)
    texts = [" ".join(f"w{i}" for i in row) for row in fresh_ids]
    contents = [prompt.content for prompt in fresh]
    found = check_reward(reward, contents, texts, completion_ids=fresh_ids)
    # Between prompts a head's scores mean nothing: only pairs within a prompt were compared.
    pairs = better_worse_pairs([prompt.id for prompt in fresh], dict(enumerate(fresh_scores)), 99, 0)
    rated = np.array(found, dtype=float)[np.concatenate(list(pairs.values()))]
    assert (rated[:, 0] > rated[:, 1]).mean() > 0.75
    alone = [reward([p], [t], [i])[0] for p, t, i in zip(contents, texts, fresh_ids, strict=True)]
    assert found == pytest.approx(alone, abs=1e-4)


def test_training_repeats_and_follows_its_seed(base_model: BackendConfig, tmp_path: Path) -> None:
    prompts, ids, scores = candidates(prompts=12)
    state = torch.get_rng_state()
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        train_reward_model(
            prompts, ids, scores, base_model=base_model, folder=tmp_path / name, config=RewardModelConfig(seed=seed)
        )
    one, two, other = (load_head(tmp_path / name) for name in ("one", "two", "other"))
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, other.weight)
    assert torch.equal(state, torch.get_rng_state())


def test_labels_without_meaning_are_not_learned(base_model: BackendConfig, tmp_path: Path) -> None:
    """Held-out prompts tell: the accuracy of a head on random scores is that of a coin."""
    prompts, ids, _ = candidates(prompts=60)
    scores = np.random.default_rng(1).random(len(ids)).tolist()
    report = train_reward_model(prompts, ids, scores, base_model=base_model, folder=tmp_path / "head")
    assert report.accuracy_low < 0.5 < report.accuracy_high
    assert report.training_accuracy > report.accuracy


def test_what_cannot_be_compared_is_left_out(base_model: BackendConfig, tmp_path: Path) -> None:
    prompts, ids, scores = candidates(prompts=10)
    masked: list[float | None] = [None, math.nan, *scores[2:]]
    given: list[list[int] | None] = [*ids[:2], None, [], [3] * 100, *ids[5:]]
    report = train_reward_model(prompts, given, masked, base_model=base_model, folder=tmp_path / "head")
    assert report.left_out == 5


@pytest.mark.parametrize("scores", [[1.0] * 12, [None] * 12, [0.0, 1.0, *[1.0] * 10]])
def test_nothing_to_compare(base_model: BackendConfig, tmp_path: Path, scores: list[float | None]) -> None:
    prompts, ids, _ = candidates(prompts=2)
    with pytest.raises(DataError, match="prompts have completions with different scores"):
        train_reward_model(prompts, ids, scores, base_model=base_model, folder=tmp_path / "head")
    assert not (tmp_path / "head").exists()


def test_lists_of_different_lengths(base_model: BackendConfig, tmp_path: Path) -> None:
    prompts, ids, scores = candidates(prompts=2)
    with pytest.raises(DataError, match="got 12, 12 and 11"):
        train_reward_model(prompts, ids, scores[1:], base_model=base_model, folder=tmp_path / "head")


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"l2": 0.0}, "l2"), ({"holdout": 0.0}, "holdout"), ({"holdout": 1.0}, "holdout"), ({"pairs_per_prompt": 0}, "p")],
)
def test_settings_out_of_range(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidValue, match=name):
        RewardModelConfig(**settings)


@pytest.fixture(scope="module")
def head(base_model: BackendConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads") / "head"
    train_reward_model(*candidates(prompts=6), base_model=base_model, folder=folder)
    return folder


def test_completions_without_ids_are_masked(head: Path) -> None:
    counts = bradley_terry_head.__dict__["counts"]
    counts.clear()
    scores = bradley_terry_head(["w2"] * 4, ["w7"] * 4, [[7], None, [], [7] * 64], folder=str(head))
    assert [score is None for score in scores] == [False, True, True, True]
    assert counts == {"without_ids": 2, "too_long": 1}
    assert bradley_terry_head(["w2"], ["w7"], None, folder=str(head)) == [None]


def test_another_base_model_is_refused(head: Path, tmp_path: Path) -> None:
    save_model(tmp_path, num_hidden_layers=2)
    with pytest.raises(CheckpointError, match="was trained on base model"):
        bradley_terry_head(["w2"], ["w7"], [[7]], folder=str(head), base_model=str(tmp_path))


def test_a_base_model_that_moved_is_found(head: Path, tmp_path: Path) -> None:
    save_model(tmp_path)
    here = bradley_terry_head(["w2"], ["w7"], [[7]], folder=str(head), base_model=str(tmp_path))
    assert here == bradley_terry_head(["w2"], ["w7"], [[7]], folder=str(head))


def test_backends_that_show_no_layers() -> None:
    with pytest.raises(RewardError, match="need the backend kind 'hf'"):
        load_features(BackendConfig(kind="toy"))


def test_prompts_are_encoded_as_in_training(base_model: BackendConfig, tmp_path: Path) -> None:
    from asn_rl.backends import Example

    folder = Path(base_model.model)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w2 {{ m['content'] }} {% endfor %}w3"
    tokenizer.save_pretrained(folder)
    chat = replace(base_model, chat_template=True, system_prompt="w9", examples=(Example("w4", "w5"),))
    assert load_features(chat).encode("w6") == [2, 9, 2, 4, 2, 5, 2, 6, 3]
    train_reward_model(*candidates(prompts=6), base_model=chat, folder=tmp_path / "head")
    assert replace(load_head(tmp_path / "head").base_model, dtype="float32") == chat


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("config.json", "{", "is damaged"),
        ("config.json", '{"kind": "bradley_terry_head", "format_version": 99}', "upgrade asn_rl"),
        ("config.json", '{"policy": "asn_policies:Local"}', "holds no bradley_terry_head but 'asn_policies:Local'"),
        ("config.json", '{"kind": "bradley_terry_head", "format_version": 1}', "is damaged"),
        ("model.safetensors", "short", "is damaged"),
    ],
)
def test_damaged_folders(head: Path, tmp_path: Path, name: str, text: str, match: str) -> None:
    for file in head.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=match):
        load_head(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="train one with train_reward_model"):
        load_head(tmp_path / "nothing")


def test_real_base_model(smollm: HFBackend) -> None:
    """Right answers against wrong ones on SmolLM2's features, a batch against one by one."""
    prompts = [smollm.encode(f"What is {a} + {b}?") for a, b in [(1, 2), (3, 4), (5, 2)]]
    rows = [(p, smollm.tokenizer(f"The answer is {n}.")["input_ids"]) for p in prompts for n in (3, 7)]
    rows.append((prompts[0], smollm.tokenizer("I think that it may be more than that.")["input_ids"]))
    together = features(smollm, rows, 20)
    assert together.shape == (7, 2 * 576)
    for row, found in zip(rows, together, strict=True):
        torch.testing.assert_close(by_hand(smollm, *row, layer=20), found, atol=1e-3, rtol=1e-4)
