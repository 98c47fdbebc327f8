"""The same policy in a rollout, in `generate` and in continuous batching of transformers, on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, LogitsProcessor, LogitsProcessorList

from asn_policies import OrderStatisticsNetwork, Pipeline, RecurrentPolicy
from asn_rl.backends.hf import HFBackend
from asn_rl.checkpoint import save_policy
from asn_rl.errors import CheckpointError, InvalidValue, ServingError
from asn_rl.ops.sketch import SketchSize
from asn_rl.replay import replay
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.serving import transformers as subject
from asn_rl.serving.transformers import decoding
from asn_rl.types import Prompt

PROMPTS = [Prompt("a", "Name an animal."), Prompt("b", "What is 3 + 4? Answer in one word.")]
TOKENS = 5
SIZE = SketchSize()
NEUTRAL: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": TOKENS}


def recurrent() -> RecurrentPolicy:
    torch.manual_seed(2)
    policy = RecurrentPolicy()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return policy


def inputs(backend: HFBackend) -> dict[str, torch.Tensor]:
    ids = [backend.encode(prompt.content) for prompt in PROMPTS]
    width = max(map(len, ids))
    padded = [[0] * (width - len(row)) + row for row in ids]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in ids]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


def test_logits_in_generate_are_the_policys(smollm: HFBackend) -> None:
    policy = recurrent()
    with decoding(smollm.model, policy, size=SIZE):
        torch.manual_seed(0)
        out = smollm.model.generate(
            **inputs(smollm), **NEUTRAL, pad_token_id=0, output_scores=True, return_dict_in_generate=True
        )
    width = inputs(smollm)["input_ids"].shape[1]
    for i, prompt in enumerate(PROMPTS):
        ids = out.sequences[i, width:].tolist()
        length = next((t + 1 for t, token in enumerate(ids) if token in smollm.eos_token_ids), len(ids))
        own, _ = replay(policy, smollm, [prompt], [ids[:length]], RolloutConfig(TOKENS))
        served = [float(out.scores[t][i].log_softmax(-1)[ids[t]]) for t in range(length)]
        torch.testing.assert_close(torch.tensor(served), own.behaviour_logprobs, atol=1e-3, rtol=1e-3)


def test_greedy_text_is_that_of_a_rollout(smollm: HFBackend) -> None:
    greedy = Pipeline([{"name": "greedy"}])
    own = rollout(greedy, smollm, PROMPTS, RolloutConfig(TOKENS))
    with decoding(smollm.model, greedy, size=SIZE):
        out = smollm.model.generate(**inputs(smollm), **NEUTRAL, pad_token_id=0)
    width = inputs(smollm)["input_ids"].shape[1]
    assert [smollm.decode(row[width:].tolist()) for row in out] == list(own.completions)


def test_greedy_text_is_that_of_continuous_batching(smollm: HFBackend) -> None:
    greedy = Pipeline([{"name": "greedy"}])
    own = rollout(greedy, smollm, PROMPTS, RolloutConfig(TOKENS))
    config = type(smollm.model.generation_config)(
        do_sample=True, top_k=0, max_new_tokens=TOKENS, eos_token_id=sorted(smollm.eos_token_ids), pad_token_id=0,
    )  # fmt: skip
    with decoding(smollm.model, greedy, size=SIZE):
        out = smollm.model.generate_batch(
            [smollm.encode(prompt.content) for prompt in PROMPTS],
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(per_request_processors=True, num_blocks=16),
            progress_bar=False,
        )
    texts = [smollm.decode(out[key].generated_tokens) for key in sorted(out, key=lambda k: int(k.rsplit("_")[-1]))]
    assert texts == list(own.completions)


class _Ban(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(-1, scores.argmax(-1), -torch.inf)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": False}, "do_sample=False"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"top_k": 50}, "TopKLogitsWarper"),
        ({"temperature": 0.7}, "TemperatureLogitsWarper"),
        ({"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor"),
    ],
)
def test_other_samplers_are_refused_by_name(smollm: HFBackend, settings: dict[str, Any], message: str) -> None:
    with decoding(smollm.model, Pipeline([]), size=SIZE), pytest.raises(ServingError, match=message):
        smollm.model.generate(**inputs(smollm), **(NEUTRAL | settings), pad_token_id=0)


def test_settings_of_the_model_do_not_leak_in_and_the_callers_masks_do(smollm: HFBackend) -> None:
    model, greedy = smollm.model, Pipeline([{"name": "greedy"}])
    model.generation_config.typical_p = 0.5
    try:
        with decoding(model, greedy, size=SIZE), pytest.raises(ServingError, match="TypicalLogitsWarper"):
            model.generate(**inputs(smollm), **NEUTRAL, pad_token_id=0)
    finally:
        model.generation_config.typical_p = None
    with decoding(model, greedy, size=SIZE):
        out = model.generate(
            **inputs(smollm), **NEUTRAL, pad_token_id=0, logits_processor=LogitsProcessorList([_Ban()])
        )
        plain = model.generate(**inputs(smollm), **NEUTRAL, pad_token_id=0)
    width = inputs(smollm)["input_ids"].shape[1]
    assert (out[:, width] != plain[:, width]).any()


def served_logprobs(backend: HFBackend, width: int) -> torch.Tensor:
    """(B, T, V) log-probs of what `generate` draws from, and the drawn ids in `sequences`."""
    torch.manual_seed(0)
    out = backend.model.generate(
        **inputs(backend), **NEUTRAL, pad_token_id=0, output_scores=True, return_dict_in_generate=True
    )
    assert out.sequences.shape[1] > width
    return torch.stack(out.scores, 1).log_softmax(-1)


def test_a_saved_policy_decodes_with_the_sketches_it_was_trained_on(smollm: HFBackend, tmp_path: Path) -> None:
    policy, width = recurrent(), inputs(smollm)["input_ids"].shape[1]
    save_policy(tmp_path / "policy", policy, fingerprint=smollm.fingerprint, sketch={"head": 8, "tail": 4})
    found = {}
    for name, given, size in (
        ("saved", tmp_path / "policy", None), ("small", policy, SketchSize(8, 4)), ("default", policy, SIZE),
    ):  # fmt: skip
        with decoding(smollm.model, given, size=size):
            found[name] = served_logprobs(smollm, width)[:, 0]
    assert torch.equal(found["saved"], found["small"])
    assert not torch.allclose(found["saved"], found["default"], atol=1e-3)


def test_a_saved_policy_of_another_base_model_is_refused_unless_told_otherwise(
    smollm: HFBackend, tmp_path: Path
) -> None:
    folder, model = tmp_path / "policy", smollm.model
    save_policy(folder, OrderStatisticsNetwork(), base_model="another", fingerprint="0" * 16)
    with pytest.raises(CheckpointError, match="trained on base model 'another'"), decoding(model, folder):
        pass
    with decoding(model, str(folder), any_base_model=True):
        model.generate(**inputs(smollm), **NEUTRAL, pad_token_id=0)
    save_policy(folder, OrderStatisticsNetwork(), fingerprint=smollm.fingerprint)
    with decoding(model, folder, tokenizer=smollm.tokenizer):
        model.generate(**inputs(smollm), **NEUTRAL, pad_token_id=0)


def test_what_cannot_be_checked_is_refused(smollm: HFBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = smollm.model, tmp_path / "policy"
    save_policy(folder, Pipeline([]), fingerprint=smollm.fingerprint)
    for given, changes, error, named in (
        (Pipeline([]), {}, InvalidValue, "size must be the SketchSize that the policy was trained on, got None"),
        (folder, {"size": SIZE}, InvalidValue, "size must be left out with a saved policy"),
        (tmp_path, {}, CheckpointError, "holds no policy"),
    ):
        with pytest.raises(error, match=named), decoding(model, given, **changes):  # type: ignore[arg-type]
            pass
    monkeypatch.setattr(model, "name_or_path", str(tmp_path))
    with pytest.raises(ServingError, match="give tokenizer=, or any_base_model=True"), decoding(model, folder):
        pass
    hidden = OrderStatisticsNetwork(inputs=["hidden"], hidden_size=8)
    with pytest.raises(InvalidValue, match="hand logits and tokens"), decoding(model, hidden, size=SIZE):
        pass


def test_there_is_no_processor_without_the_checks() -> None:
    """One passed to `generate` by hand would not see a temperature beside it."""
    own = {name for name, value in vars(subject).items() if getattr(value, "__module__", "") == subject.__name__}
    assert {name for name in own if not name.startswith("_")} == set(subject.__all__) == {"decoding"}


def test_the_model_is_as_it_was_afterwards(smollm: HFBackend) -> None:
    with pytest.raises(KeyError), decoding(smollm.model, Pipeline([]), size=SIZE):
        raise KeyError
    assert "_get_logits_processor" not in vars(smollm.model)
