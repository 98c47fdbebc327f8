"""The batched, cached, row-dropping backend computes what one plain forward pass per sequence computes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, VOCAB, tiny_backend, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedConfig

from asn_policies import LocalTransform, Pipeline
from asn_rl.backends import BackendConfig, hf, load_backend
from asn_rl.backends.embedded import resolve_model
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.kv_cache import is_row_cache
from asn_rl.backends.weight_layout import PackedLinear, pack_weights
from asn_rl.errors import BackendError, DataError, InvalidValue, UnknownName
from asn_rl.replay import replay
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Observation, Prompt

# Differences of logits between batch shapes, float32, one thread. Measured: 1.5e-4 on SmolLM2 (logits up to 39),
# 1.3e-6 on the tiny models.
SMOLLM_ATOL, TINY_ATOL = 5e-4, 1e-5

CHAT = ["What is 3 + 4?", "Name an animal.", "Say hello to the whole world in five words, please.", "Hi"]
RAW = ["The", "Once upon a time there was", "1, 2, 3,", "Paris is the capital of"]
PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(CHAT)]
CONFIG = RolloutConfig(max_new_tokens=12)
BASE = Pipeline([])
GREEDY = Pipeline([{"name": "greedy"}])


@torch.no_grad()
def plain_forward(backend: HFBackend, ids: Sequence[int]) -> Any:
    return backend.model(input_ids=torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True)


def decode(
    backend: HFBackend,
    prompt_ids: Sequence[Sequence[int]],
    drops: dict[int, list[int]],
    steps: int,
    repeats: int = 2,
    choices: int = 5000,
    seed: int = 0,
) -> tuple[list[list[int]], dict[tuple[int, int], tuple[Tensor, Tensor]]]:
    """Feed random tokens, one of `choices`, and drop rows, `drops[t]` being the rows (by position) that end before
    step t. Rows that have the same text are to be computed once.

    Returns the token ids of every row, and logits and hidden states by (row, length of its sequence).
    """
    generator = torch.Generator().manual_seed(seed)
    sequences = [list(ids) for ids in prompt_ids for _ in range(repeats)]
    rows = torch.arange(len(sequences))
    session = backend.start(prompt_ids, repeats=repeats, hidden=True)
    seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for t in range(steps + 1):
        assert session.hidden is not None
        assert len(session.position) == len({tuple(sequences[row]) for row in rows.tolist()})
        for r, row in enumerate(rows.tolist()):
            seen[row, len(sequences[row])] = (session.logits[r].clone(), session.hidden[r].clone())
        if t == steps:
            break
        if t in drops:
            finished = torch.zeros(len(rows), dtype=torch.bool)
            finished[drops[t]] = True
            rows = rows[session.drop(finished)]
        tokens = torch.randint(2, min(backend.vocab_size, 2 + choices), (len(rows),), generator=generator)
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            sequences[row].append(token)
        session.step(tokens)
    return sequences, seen


def assert_equals_plain_forward(
    backend: HFBackend,
    prompt_ids: Sequence[Sequence[int]],
    drops: dict[int, list[int]],
    steps: int,
    atol: float,
    **choices: int,
) -> None:
    sequences, seen = decode(backend, prompt_ids, drops, steps, **choices)
    expected = [plain_forward(backend, ids) for ids in sequences]
    for (row, length), (logits, hidden) in seen.items():
        torch.testing.assert_close(logits, expected[row].logits[0, length - 1], atol=atol, rtol=0)
        torch.testing.assert_close(hidden, expected[row].hidden_states[-1][0, length - 1], atol=atol, rtol=1e-4)


# The embedded model


@pytest.mark.parametrize("kind", ["chat, shared beginning", "raw, nothing shared"])
@pytest.mark.parametrize("chunk", [2048, 24])
def test_a_ragged_batch_equals_single_forward_passes(
    smollm: HFBackend, monkeypatch: pytest.MonkeyPatch, kind: str, chunk: int
):
    monkeypatch.setattr(hf, "_PREFILL_TOKENS", chunk)
    if kind.startswith("chat"):
        ids = [smollm.encode(text) for text in CHAT]
        assert len(smollm._shared_prefix(ids)) > 8
    else:
        ids = [smollm.tokenizer(text)["input_ids"] for text in RAW]
        assert smollm._shared_prefix(ids) == ()
    assert len({len(row) for row in ids}) == len(ids), "ragged"
    assert_equals_plain_forward(smollm, ids, {1: [0, 5], 3: [5], 4: [0, 1, 2]}, 5, SMOLLM_ATOL)


def test_completions_that_part_late_equal_single_forward_passes(smollm: HFBackend):
    ids = [smollm.encode(text) for text in CHAT]
    assert_equals_plain_forward(smollm, ids, {1: [0, 5], 3: [5], 4: [0, 1, 2]}, 5, SMOLLM_ATOL, repeats=4, choices=2)


def test_the_fast_cache_equals_the_one_of_transformers(smollm: HFBackend, monkeypatch: pytest.MonkeyPatch):
    ids, drops = [smollm.encode(text) for text in CHAT], {1: [0], 2: [2, 6]}
    assert is_row_cache(smollm.start(ids[:2]).cache)
    sequences, fast = decode(smollm, ids, drops, 4)
    monkeypatch.setattr(hf, "row_cache", lambda config: DynamicCache(config=config))
    assert not is_row_cache(smollm.start(ids[:2]).cache)
    again, slow = decode(smollm, ids, drops, 4)
    assert sequences == again
    assert fast.keys() == slow.keys()
    for key in fast:
        torch.testing.assert_close(fast[key][0], slow[key][0], atol=SMOLLM_ATOL, rtol=0)


def test_a_greedy_rollout_is_greedy_generation(smollm: HFBackend):
    run = rollout(GREEDY, smollm, PROMPTS, CONFIG)
    for prompt_ids, completion_ids in zip(run.prompt_ids, run.completion_ids, strict=True):
        ids = torch.tensor([list(prompt_ids)])
        generated = smollm.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=CONFIG.max_new_tokens,
            eos_token_id=sorted(smollm.eos_token_ids),
            pad_token_id=smollm.tokenizer.pad_token_id,
        )
        assert completion_ids == generated[0, ids.shape[1] :].tolist()


def test_the_same_seed_repeats_bit_for_bit_and_nothing_else_acts(smollm: HFBackend, monkeypatch: pytest.MonkeyPatch):
    def draw() -> Any:
        return rollout(BASE, smollm, PROMPTS, CONFIG, num_generations=2, seed=5)

    plain = draw()
    planted = GenerationConfig(
        do_sample=True, typical_p=0.2, no_repeat_ngram_size=1, temperature=0.1, top_k=1, repetition_penalty=3.0,
        eos_token_id=99, suppress_tokens=[28, 260],
    )  # fmt: skip
    monkeypatch.setattr(smollm.model, "generation_config", planted)
    again = draw()
    assert again.completion_ids == plain.completion_ids
    assert torch.equal(again.behaviour_logprobs, plain.behaviour_logprobs)
    assert torch.equal(again.observations.sketch.log_mass, plain.observations.sketch.log_mass)


class Reading(LocalTransform):
    """A trainable policy that asks for hidden states."""

    needs = frozenset({"hidden", "prompt_embedding"})


def test_replaying_a_rollout_finds_what_it_recorded(smollm: HFBackend):
    policy = Reading(8)
    run = rollout(policy, smollm, PROMPTS, CONFIG, seed=1, probes={"logits": lambda logits, sketch, points: logits})
    recorded = [part.tolist() for part in run.behaviour_logprobs.split(run.lengths.tolist())]
    again, mismatch = replay(policy, smollm, PROMPTS, run.completion_ids, CONFIG, logprobs=recorded)
    assert mismatch is not None
    # Measured over 85 tokens: 3e-6 nats on average, 3e-5 at most.
    assert mismatch.largest < 3e-4
    torch.testing.assert_close(again.base_logprobs, run.base_logprobs, atol=5e-4, rtol=0)
    for name in ("hidden", "prompt_embedding"):
        ours, theirs = getattr(again.observations, name), getattr(run.observations, name)
        torch.testing.assert_close(ours, theirs, atol=SMOLLM_ATOL, rtol=1e-4)

    starts = (run.lengths.cumsum(0) - run.lengths).tolist()
    for start, prompt_ids, ids in zip(starts, run.prompt_ids, run.completion_ids, strict=True):
        logits, none = smollm.score(prompt_ids, ids)
        assert none is None
        torch.testing.assert_close(logits, run.extras["logits"][start : start + len(ids)], atol=SMOLLM_ATOL, rtol=0)


def test_what_a_rollout_or_a_single_replay_recorded_can_be_trained_on(smollm: HFBackend):
    class Linear(Reading):
        def __init__(self) -> None:
            super().__init__(8)
            self.read = nn.Linear(smollm.hidden_size, 1)

        def shift(self, obs: Observation) -> Tensor:
            assert obs.hidden is not None
            assert obs.prompt_embedding is not None
            return super().shift(obs) * self.read(obs.hidden + obs.prompt_embedding)

    policy = Linear()
    config = RolloutConfig(max_new_tokens=3)
    run = rollout(policy, smollm, PROMPTS[:1], config)
    again, _ = replay(policy, smollm, PROMPTS[:1], run.completion_ids, config)
    for trajectories in (run, again):
        assert not any(
            tensor.requires_grad for tensor in (trajectories.behaviour_logprobs, trajectories.observations.context)
        )
        policy.zero_grad()
        logprobs = policy(trajectories.per_token()).logprobs.gather(-1, trajectories.points.unsqueeze(-1))
        logprobs.sum().backward()
        assert policy.slope.grad is not None


class Listening(LocalTransform):
    """Asks for everything that is known of a token."""

    needs = frozenset({"last_point", "history", "layer_logprobs"})


def test_earlier_layers_speak_through_the_models_own_head(smollm: HFBackend):
    config = replace(CONFIG, layers=(10, 29), tracked=8)
    recorder = {"logits": lambda logits, sketch, points: logits}
    run = rollout(Listening(8), smollm, PROMPTS, config, seed=2, probes=recorder)
    found = run.observations.layer_logprobs
    assert found is not None
    model, ids = smollm.model, [*run.prompt_ids[0], *run.completion_ids[0]]
    states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    first = slice(0, len(run.completion_ids[0]))
    for place, layer in enumerate(config.layers):
        at = states[layer][0, len(run.prompt_ids[0]) - 1 : -1]
        expected = torch.log_softmax(model.lm_head(model.model.norm(at)), -1)
        top = run.extras["logits"][first].argmax(-1, keepdim=True)
        head = run.observations.sketch.log_count[first, 0] == 0
        torch.testing.assert_close(
            found[first, 0, place][head], expected.gather(-1, top).squeeze(-1)[head], atol=1e-3, rtol=1e-3
        )
        mass = (found[first, :, place] + run.observations.sketch.log_count[first]).exp()
        total = torch.where(run.observations.sketch.mask[first], mass, 0.0).sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-3, rtol=0)

    again, _ = replay(Listening(8), smollm, PROMPTS, run.completion_ids, config)
    # Equal logits share a point. Where rounding parts two, the points behind them move up, and there is one more.
    alike = (again.observations.sketch.mask == run.observations.sketch.mask).all(-1)
    assert (~alike).sum() <= 1
    ours, theirs = run.observations, again.observations
    assert ours.history is not None
    assert theirs.history is not None
    assert ours.last_point is not None
    assert theirs.last_point is not None
    assert theirs.layer_logprobs is not None
    torch.testing.assert_close(theirs.history[alike], ours.history[alike])
    after = alike.roll(1)
    assert torch.equal(theirs.last_point[after], ours.last_point[after])
    torch.testing.assert_close(theirs.layer_logprobs[alike], found[alike], atol=5e-3, rtol=1e-2)


@pytest.mark.parametrize(("layers", "message"), [((), "at least one layer"), ((30,), r"in \[1, 29\]")])
def test_layers_that_are_not_there_are_refused(smollm: HFBackend, layers: tuple[int, ...], message: str):
    with pytest.raises(InvalidValue, match=message):
        rollout(Listening(8), smollm, PROMPTS, replace(CONFIG, layers=layers))


def test_the_base_model_is_frozen(smollm: HFBackend):
    assert not smollm.model.training
    assert not any(parameter.requires_grad for parameter in smollm.model.parameters())
    with torch.enable_grad():
        session = smollm.start([smollm.encode("Hi")], hidden=True)
        session.step(torch.tensor([28]))
        logits, hidden = smollm.score([1, 2], [3], hidden=True)
    for tensor in (session.logits, session.hidden, logits, hidden):
        assert tensor is not None
        assert tensor.grad_fn is None
    assert all(parameter.grad is None for parameter in smollm.model.parameters())


def test_packed_weights_are_the_models_own(smollm: HFBackend):
    assert smollm.model.dtype == torch.float32
    model = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2-135m-instruct"), dtype=torch.float32)
    packed = [layer for layer in smollm.model.modules() if isinstance(layer, PackedLinear)]
    assert len(packed) == 7 * 30 + 1
    ours, theirs = smollm.model.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    pack_weights(smollm.model)
    assert packed == [layer for layer in smollm.model.modules() if isinstance(layer, PackedLinear)]
    ids = torch.tensor([smollm.encode("Name an animal.")])
    with torch.inference_mode():
        torch.testing.assert_close(smollm.model(ids).logits, model(ids).logits, atol=SMOLLM_ATOL, rtol=0)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (0, 3, 5), (2, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_is_the_layer(shape: tuple[int, ...], bias: bool):
    torch.manual_seed(0)
    linear = nn.Linear(5, 7, bias=bias)
    model = nn.ModuleDict({"first": linear, "again": linear})
    pack_weights(model)
    packed = model["first"]
    assert isinstance(packed, PackedLinear)
    assert packed is model["again"]
    inputs = torch.randn(shape)
    with torch.inference_mode():
        for layer in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            torch.testing.assert_close(layer(inputs), linear(inputs))
            assert layer.state_dict().keys() == linear.state_dict().keys()
            assert torch.equal(layer.state_dict()["weight"], linear.weight)


def test_bf16_weights_stay_as_they_lie():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5)).to(torch.bfloat16)
    layers = list(model)
    pack_weights(model)
    assert list(model) == layers


def test_turn_markers_end_a_completion(smollm: HFBackend):
    markers = smollm.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "<|im_start|>"])
    assert smollm.eos_token_ids == set(markers)


def test_the_fingerprint_does_not_depend_on_the_precision(smollm: HFBackend):
    half = load_backend(BackendConfig(dtype="bfloat16"))
    assert isinstance(half, HFBackend)
    assert half.model.dtype == torch.bfloat16
    assert half.fingerprint == smollm.fingerprint


def test_a_system_prompt_takes_the_place_of_the_templates_own(smollm: HFBackend):
    brief = HFBackend(smollm.model, smollm.tokenizer, system_prompt="Be brief.")
    text = smollm.tokenizer.decode(brief.encode("Hi"))
    assert "Be brief." in text
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert brief.encode(messages) == brief.encode("Hi") == smollm.encode(messages)


def test_examples_are_turns_before_a_text_prompt(smollm: HFBackend):
    backend = HFBackend(smollm.model, smollm.tokenizer, system_prompt="Be brief.", examples=[("Two?", "2")])
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Three?"},
    ]
    assert backend.encode("Three?") == smollm.encode(turns)
    assert backend.encode(turns) == smollm.encode(turns)


def test_turns_without_a_chat_template_are_refused(smollm: HFBackend):
    with pytest.raises(BackendError, match=r"need backend.chat_template=true"):
        HFBackend(smollm.model, smollm.tokenizer, chat_template=False, examples=[("Two?", "2")])


def test_a_prompt_longer_than_the_context_is_refused(smollm: HFBackend):
    with pytest.raises(DataError, match=r"exceeds the base model's context of 8192. Shorten the prompt"):
        rollout(BASE, smollm, [Prompt("long", "word " * 8200)], CONFIG)


# Any causal language model


@pytest.fixture(params=CONFIGS)
def tiny(request: pytest.FixtureRequest) -> HFBackend:
    return tiny_backend(CONFIGS[request.param]())


def ragged(shared: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    beginning = list(range(2, 2 + shared))
    return [beginning + torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in (1, 5, 12, 3)]


@pytest.mark.parametrize("shared", [0, 9])
def test_any_architecture_equals_its_single_forward_passes(tiny: HFBackend, shared: int):
    # 14 tokens more: windows of 6 slide, learned positions move on, rows end.
    assert_equals_plain_forward(tiny, ragged(shared), {2: [0, 4], 5: [1, 5], 9: [0]}, 14, TINY_ATOL)


def test_completions_of_any_architecture_part_late(tiny: HFBackend):
    drops = {2: [0, 9, 17], 5: [1, 5], 9: [0, 3]}
    assert_equals_plain_forward(tiny, ragged(0), drops, 14, TINY_ATOL, repeats=6, choices=2)


ROTARY = tiny_backend(CONFIGS["rotary"]())


@given(
    repeats=st.integers(1, 6),
    choices=st.integers(1, 3),
    ends=st.lists(st.sets(st.integers(0, 5)), max_size=9),
    same=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=30)
def test_rows_part_and_end_in_any_order(repeats: int, choices: int, ends: list[set[int]], same: bool, seed: int):
    ids = [[2, 3], [4, 5, 6], [2, 3] if same else [7]]
    drops, left = {}, 3 * repeats
    for t, rows in enumerate(ends):
        drops[t] = [row for row in rows if row < left - 1]
        left -= len(drops[t])
    assert_equals_plain_forward(ROTARY, ids, drops, 9, TINY_ATOL, repeats=repeats, choices=choices, seed=seed)


def test_any_architecture_rolls_out_and_replays(tiny: HFBackend):
    prompts = [Prompt("a", "w2 w3"), Prompt("b", "w9"), Prompt("c", "w5 w6 w7 w8 w9 w10 w11")]
    config = RolloutConfig(max_new_tokens=10, head=8, tail=4)
    run = rollout(BASE, tiny, prompts, config, num_generations=8, capture=["hidden"])
    assert len(set(run.lengths.tolist())) > 1, "rows end at different times"
    assert tiny.hidden_size == 32
    assert tiny.max_context in (64, 1 << 20)  # unlimited where positions are biases by distance
    again, _ = replay(Reading(8), tiny, run.prompts, run.completion_ids, config)
    torch.testing.assert_close(again.base_logprobs, run.base_logprobs, atol=TINY_ATOL, rtol=0)
    torch.testing.assert_close(again.observations.hidden, run.observations.hidden, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2), "differently from single"),
        (transformers.RwkvConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2), "no transformers cache"),
    ],
)
def test_an_architecture_that_cannot_decode_padded_batches_is_refused(config: PreTrainedConfig, message: str):
    with pytest.raises(BackendError, match=message):
        tiny_backend(config)


def test_the_shared_beginning_is_recomputed_when_it_changes():
    backend = tiny_backend(CONFIGS["rotary"]())
    for first in (2, 20, 2):
        ids = [[*range(first, first + 9), 5], [*range(first, first + 9), 6, 7]]
        assert_equals_plain_forward(backend, ids, {}, 1, TINY_ATOL)


def test_the_cache_grows_past_its_first_allocation():
    config = transformers.Qwen2Config(**{**CONFIGS["rotary"]().to_dict(), "max_position_embeddings": 256})
    assert_equals_plain_forward(tiny_backend(config), [[2, 3], [4]], {70: [1]}, 140, TINY_ATOL)


# Loading


def saved(backend: HFBackend, folder: str) -> None:
    backend.model.save_pretrained(folder)
    backend.tokenizer.save_pretrained(folder)


def test_a_folder_takes_the_place_of_the_embedded_model(tmp_path: Any):
    original = tiny_backend(CONFIGS["learned positions"]())
    saved(original, tmp_path)
    loaded = load_backend(BackendConfig(model=str(tmp_path), dtype="float32", chat_template=False))
    assert loaded.fingerprint == original.fingerprint
    assert loaded.encode("w2 w3") == [2, 3]
    assert loaded.decode([2, 3, 0]) == "w2 w3"
    torch.testing.assert_close(loaded.score([2], [3])[0], original.score([2], [3])[0], atol=1e-6, rtol=1e-5)


def test_another_architecture_or_vocabulary_has_another_fingerprint():
    backends = [tiny_backend(CONFIGS[name]()) for name in ("rotary", "learned positions")]
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    backends.append(HFBackend(copy.deepcopy(backends[0].model), tokenizer, chat_template=False))
    assert len({backend.fingerprint for backend in backends}) == 3


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_folder_is_refused(tmp_path: Any, damage: str):
    saved(tiny_backend(CONFIGS["rotary"]()), tmp_path)
    path = tmp_path / damage
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(BackendError, match="cannot load the base model"):
        load_backend(BackendConfig(model=str(tmp_path), dtype="float32", chat_template=False))


def test_a_hub_model_that_is_not_there_says_that_the_machine_is_offline():
    with pytest.raises(BackendError, match=r"cannot load the base model 'nobody/nothing' \(HF_HUB_OFFLINE is set\)"):
        load_backend(BackendConfig(model="nobody/nothing"))


NO_TEMPLATE = r"no chat template; set backend\.chat_template=false"
REFUSALS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: load_backend(BackendConfig(kind="hff")), UnknownName, "unknown backend 'hff'. Did you mean 'hf'"),
    (lambda: load_backend(BackendConfig(device="cudda")), BackendError, "backend.device 'cudda' cannot be used here"),
    (lambda: HFBackend(tiny_backend(CONFIGS["rotary"]()).model, tiny_tokenizer()), BackendError, NO_TEMPLATE),
    (
        lambda: tiny_backend(CONFIGS["rotary"]()).encode([{"role": "user", "content": "w2"}]),
        InvalidValue,
        "prompt must be text when backend.chat_template is false",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSALS)
def test_settings_that_cannot_be_used_are_refused(make: Callable[[], object], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        make()
