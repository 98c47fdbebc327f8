"""Stop strings end a completion in rollouts, in replays and on servers alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asn_policies import Pipeline
from asn_rl.backends.hf import HFBackend
from asn_rl.backends.server_generation import GenerationRequest, ServerGenerator
from asn_rl.backends.servers import ServersConfig
from asn_rl.backends.toy import ToyBackend
from asn_rl.errors import InvalidValue
from asn_rl.replay import replay
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.stopping import StopWatch, before_stop, has_ended
from asn_rl.types import Prompt

PROMPTS = [Prompt(str(i), f"w{i + 1}") for i in range(6)]


def test_a_stop_string_ends_a_completion_and_is_no_part_of_its_text(toy: ToyBackend) -> None:
    stop = ("w7 w3", "w9")
    plain, stopped = (
        rollout(Pipeline([]), toy, PROMPTS, RolloutConfig(40, stop=strings), num_generations=4, seed=1)
        for strings in ((), stop)
    )
    assert any(a != b for a, b in zip(plain.completion_ids, stopped.completion_ids, strict=True))
    for ids, cut, text, ended in zip(
        plain.completion_ids, stopped.completion_ids, stopped.completions, stopped.terminated.tolist(), strict=True
    ):
        # Brute force: the shortest beginning of the same draws that ends.
        length = next((n for n in range(1, len(ids) + 1) if has_ended(toy, ids[:n], stop)), len(ids))
        assert list(cut) == list(ids[:length])
        assert ended == has_ended(toy, cut, stop)
        assert text == before_stop(toy.decode(cut), stop)
        assert not any(string in text for string in stop)


def test_a_replay_ends_where_the_rollout_did(toy: ToyBackend) -> None:
    config = RolloutConfig(40, stop=("w9",))
    drawn = rollout(Pipeline([]), toy, PROMPTS, config, num_generations=2, seed=2)
    again, _ = replay(Pipeline([]), toy, drawn.prompts, drawn.completion_ids, config)
    assert again.completions == list(drawn.completions)
    assert torch.equal(again.terminated, drawn.terminated)


@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3))
def test_what_is_kept_is_the_longest_beginning_without_a_stop_string(text: str, stop: list[str]) -> None:
    kept = before_stop(text, stop)
    assert text.startswith(kept)
    assert not any(string in kept for string in stop)
    rest = text[len(kept) :]
    assert not rest or any(rest.startswith(string) for string in stop)


def test_a_stop_string_that_begins_and_ends_within_tokens_is_found(smollm: HFBackend) -> None:
    ids = smollm.tokenizer("The answer is 42.\n\nQuestion: What?", add_special_tokens=False)["input_ids"]
    watch = StopWatch(smollm, 1, ["\n\nQ"])
    ends = [bool(watch.ended(torch.tensor([0]), torch.tensor([token]))) for token in ids]
    first = ends.index(True)
    assert "\n\nQ" in smollm.decode(ids[: first + 1])
    assert "\n\nQ" not in smollm.decode(ids[:first])


def test_a_rollout_of_the_real_model_stops(smollm: HFBackend) -> None:
    config = RolloutConfig(24, stop=(".",))
    out = rollout(Pipeline([{"name": "greedy"}]), smollm, [Prompt("p", "Describe the sea.")], config)
    assert out.terminated.all()
    assert "." not in out.completions[0]
    assert "." in smollm.decode(out.completion_ids[0])


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidValue, match="at least one character"):
        RolloutConfig(stop=("",))


def test_servers_are_sent_the_stop_strings_in_their_words(toy: ToyBackend) -> None:
    request = GenerationRequest("w1", [], 0, 8)
    for kind in ("sglang", "vllm", "openai"):
        generator = ServerGenerator(
            ServersConfig(("http://127.0.0.1:1",)), kind, model="m", encode=toy.encode, decode=toy.decode, stop=("w9",)
        )
        body = generator.payload(request)
        assert (body["sampling_params"] if kind == "sglang" else body)["stop"] == ["w9"]
