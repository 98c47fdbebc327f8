"""Stock trainers of TRL on a wrapped policy: what of TRL is relied on, what they compute, and what is refused."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import likely_rewards
import pytest
import torch
import trl
from datasets import Dataset
from tiny_models import CONFIGS, tiny_backend
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head, create_model_from_path

from asn_policies import OrderStatisticsNetwork, Pipeline, RecurrentPolicy, TokenFeatureNetwork
from asn_rl.backends import BackendConfig
from asn_rl.backends.hf import HFBackend
from asn_rl.checkpoint import check_compatible, load_policy
from asn_rl.errors import AsnError, CheckpointError, ConfigError, InvalidValue, ServingError, TrainingError, UnknownName
from asn_rl.integrations.policy_lm import CUT, is_fused_forward
from asn_rl.integrations.trl import PolicyCausalLM, check_arguments, check_trainer, with_ends
from asn_rl.ops.sketch import SketchSize
from asn_rl.protocols import TrainablePolicy
from asn_rl.replay import replay
from asn_rl.rewards.compose import RewardConfig, RewardSuite, score
from asn_rl.rollout import rollout
from asn_rl.serving.decoder import PolicyDecoder, Row
from asn_rl.training.grpo import GRPOConfig, train
from asn_rl.types import Prompt

pytestmark = [
    # transformers says these of what TRL does, whoever's model it is.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
TOKENS, SIZE = 6, SketchSize(head=16, tail=8)
PROMPTS = ["w3 w4 w5", "w7", "w9 w10 w11 w12 w13", "w20 w21"]
TRAINERS = [(trl.GRPOTrainer, trl.GRPOConfig), (trl.RLOOTrainer, trl.RLOOConfig)]


def disturbed(policy: Any, size: float = 0.2) -> Any:
    """Weights away from the start, where every policy is the base model."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return policy


POLICIES: dict[str, Callable[[], Any]] = {
    "stateless": lambda: disturbed(OrderStatisticsNetwork(16, 8)),
    "cutting": lambda: disturbed(OrderStatisticsNetwork(16, 8, hard_cut=True), 1.0),
    "recurrent": lambda: disturbed(RecurrentPolicy(8)),
    "history": lambda: disturbed(TokenFeatureNetwork(16, 8)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BackendConfig:
    """A random model with learned positions, whose logits move when padding is counted."""
    folder = tmp_path_factory.mktemp("base")
    backend = tiny_backend(CONFIGS["learned positions"]())
    backend.model.save_pretrained(folder)
    backend.tokenizer.save_pretrained(folder)
    return BackendConfig(model=str(folder), dtype="float32", chat_template=False)


def wrapped(base: BackendConfig, policy: Any = None, **more: Any) -> PolicyCausalLM:
    policy = policy or POLICIES["stateless"]()
    return PolicyCausalLM.wrap(policy, base, max_new_tokens=TOKENS, size=SIZE, **more)


def trainer_of(kind: tuple[Any, Any], model: Any, folder: Path, reward: Any = None, **settings: Any) -> Any:
    make, configure = kind
    args = configure(**({
        "output_dir": str(folder), "per_device_train_batch_size": 16, "num_generations": 4, "use_cpu": True,
        "max_completion_length": TOKENS, "beta": 0.0, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
    } | settings))  # fmt: skip
    data = Dataset.from_dict({"prompt": PROMPTS})
    return make(model, reward or _lengths, args=args, train_dataset=data, processing_class=model.tokenizer)


def _lengths(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def batch(model: PolicyCausalLM) -> tuple[Tensor, Tensor, Tensor, list[tuple[list[int], list[int]]]]:
    """Ids, mask and labels of texts padded on both sides, and the texts."""
    pairs = [([3, 4, 5], [8, 9, 9, 2]), ([7], [6, 9, 30, 31, 32, 0]), ([10, 11, 12, 13, 14], [5])]
    width = max(len(prompt) for prompt, _ in pairs)
    rows, masks, labels = [], [], []
    for prompt, completion in pairs:
        left, right = width - len(prompt), TOKENS - len(completion)
        rows.append([1] * left + prompt + completion + [1] * right)
        masks.append([0] * left + [1] * (len(prompt) + len(completion)) + [0] * right)
        labels.append([-100] * width + completion + [-100] * right)
    return torch.tensor(rows), torch.tensor(masks), torch.tensor(labels), pairs


def served(model: PolicyCausalLM, prompt: list[int], completion: list[int]) -> Tensor:
    """(T, V) log-probs over the vocabulary, token after token from the unpadded text: what `generate` draws from."""
    logits = model.backend.score(prompt, completion)[0]
    decoder = PolicyDecoder(model.policy, size=SIZE)
    steps = [decoder(logits[t : t + 1], [Row(0, completion[:t], TOKENS)]) for t in range(len(completion))]
    return torch.cat(steps).log_softmax(-1)


def digest(module: torch.nn.Module) -> str:
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in module.state_dict().values())).hexdigest()


def test_what_of_trl_is_relied_on_is_there(base: BackendConfig) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base.model)
    assert not is_fused_forward(plain.forward)
    add_fused_lm_head(plain, temperature=0.7, outputs=("log_probs", "entropy"))
    assert is_fused_forward(plain.forward)
    assert inspect.getclosurevars(plain.forward.__func__).nonlocals["temperature"] == 0.7
    assert {"log_probs", "entropy", "aux_loss"} <= set(FusedCausalLMOutput.__dataclass_fields__)
    for trainer, configure in TRAINERS:
        scoring = list(inspect.signature(trainer._get_per_token_logps_and_entropies).parameters)
        assert scoring[:7] == [
            "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
        ]  # fmt: skip
        assert list(inspect.signature(trainer._tokenize_prompts).parameters) == ["self", "prompts"]
        assert "fused_lm_head=True" in inspect.getsource(trainer)
        names = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length", "beta"}
        assert names | {"use_vllm", "use_transformers_continuous_batching"} <= set(configure.__dataclass_fields__)


@pytest.mark.parametrize("name", POLICIES)
def test_log_probs_and_entropies_are_those_of_the_served_distribution(base: BackendConfig, name: str) -> None:
    model = wrapped(base, POLICIES[name]())
    ids, mask, labels, pairs = batch(model)
    fused = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    full = model(input_ids=ids, attention_mask=mask, labels=labels)
    assert fused.logits is None
    torch.testing.assert_close(full.loss, fused.loss)
    for row, (prompt, completion) in enumerate(pairs):
        expected = served(model, prompt, completion)
        at = slice(4, 4 + len(completion))  # five columns of prompts: the first token is drawn at column 4
        chosen = expected.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
        spread = -(expected.exp() * expected.clamp_min(-1e4)).sum(-1)
        torch.testing.assert_close(fused.log_probs[row, at], chosen.clamp_min(CUT), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fused.entropy[row, at], spread, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(full.logits[row, at], expected.clamp_min(CUT), atol=1e-4, rtol=1e-4)
        assert not fused.log_probs[row, : at.start].any()
        assert not full.logits[row, at.stop :].any()
    if name == "cutting":  # TRL's entropy is a sum of e * z, where 0 * -inf is NaN
        assert (full.logits == CUT).any()
        assert (fused.log_probs == CUT).any()
        assert torch.isfinite(-(full.logits.exp() * full.logits).sum()).all()


@pytest.mark.parametrize("logits", [False, True])
def test_gradients_reach_the_policy_alone(base: BackendConfig, logits: bool) -> None:
    model = wrapped(base)
    ids, mask, labels, pairs = batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=not logits)
    got = out.logits.gather(-1, ids.roll(-1, 1)[..., None]).sum() if logits else out.log_probs.sum()
    gradients = torch.autograd.grad(got, list(model.parameters()))
    text = torch.cat([served_with_gradient(model, *pair) for pair in pairs]).sum()
    for mine, expected in zip(gradients, torch.autograd.grad(text, list(model.policy.parameters())), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-3)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"policy"}
    assert all(p.grad is None and not p.requires_grad for p in model.backend.model.parameters())


def served_with_gradient(model: PolicyCausalLM, prompt: list[int], completion: list[int]) -> Tensor:
    own, _ = replay(model.policy, model.backend, [Prompt("p", _text(prompt))], [completion], model.config.rollout)
    return model.policy(own.per_token()).logprobs.gather(-1, own.points[:, None])


def _text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def test_gaps_and_rows_without_labels(base: BackendConfig) -> None:
    model = wrapped(base)
    ids, mask, labels, _ = batch(model)
    whole = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
    gap = labels.clone()
    gap[0], gap[1, 6] = -100, -100
    part = model(input_ids=ids, attention_mask=mask, labels=gap, fused_lm_head=True).log_probs
    torch.testing.assert_close(part, torch.where(gap[:, 1:] == -100, 0.0, whole))
    none = model(input_ids=ids, attention_mask=mask, labels=torch.full_like(ids, -100), fused_lm_head=True)
    none.log_probs.sum().backward()
    assert not none.log_probs.any()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", TRAINERS, ids=["GRPO", "RLOO"])
@pytest.mark.parametrize("name", ["cutting", "recurrent"])
def test_the_loss_of_trl_scores_what_replay_scores(base: BackendConfig, tmp_path: Path, kind: Any, name: str) -> None:
    model = wrapped(base, POLICIES[name]())
    trainer = trainer_of(kind, model, tmp_path)
    before = torch.get_rng_state()
    mismatch = check_trainer(trainer)
    assert torch.equal(before, torch.get_rng_state())
    assert 2 <= mismatch.tokens <= 2 * TOKENS
    assert mismatch.largest < 1e-4
    torch.manual_seed(0)
    out = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS for _ in range(4)])
    whole = [torch.cat([out[f"prompt_{part}"], out[f"completion_{part}"]], 1) for part in ("ids", "mask")]
    kept = out["completion_mask"].bool()
    scored = trainer._get_per_token_logps_and_entropies(model, *whole, kept.shape[1])[0]
    texts = [row[real].tolist() for row, real in zip(out["completion_ids"], kept, strict=True)]
    prompts = [Prompt(f"{i}", PROMPTS[i // 4]) for i in range(16)]
    own, _ = replay(model.policy, model.backend, prompts, texts, model.config.rollout)
    torch.testing.assert_close(scored[kept].detach(), own.behaviour_logprobs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", TRAINERS, ids=["GRPO", "RLOO"])
def test_stock_trainers_learn_and_change_the_policy_only(base: BackendConfig, tmp_path: Path, kind: Any) -> None:
    start = wrapped(base, OrderStatisticsNetwork(16, 8))
    start.save_pretrained(tmp_path / "start")
    model = wrapped(base, load_policy(tmp_path / "start" / "policy"), reference=tmp_path / "start")
    backend, frozen = model.backend, digest(model.backend.model)

    def likely(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float | None]:
        return likely_rewards.likely(prompts, completions, completion_ids, model=base.model)

    settings = {"learning_rate": 0.004, "max_steps": 10, "logging_steps": 1, "beta": 1e-3, "save_strategy": "steps"}
    trainer = trainer_of(kind, model, tmp_path, likely, **settings, save_steps=10, lr_scheduler_type="constant")
    reference = trainer.ref_model
    assert isinstance(reference, PolicyCausalLM)
    assert reference.backend is backend
    check_trainer(trainer)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3
    assert digest(backend.model) == frozen
    assert digest(reference.policy) == digest(start.policy)
    assert check_trainer(trainer).largest < 1e-4

    last = tmp_path / "checkpoint-10"
    assert (last / "model.safetensors").stat().st_size < 10_000
    assert digest(AutoModelForCausalLM.from_pretrained(last)) == digest(model)
    more = trainer_of(kind, wrapped(base, OrderStatisticsNetwork(16, 8)), tmp_path, likely, max_steps=10)
    more.train(resume_from_checkpoint=str(last))  # nothing is left to do: the weights are those of the checkpoint
    assert digest(more.model) == digest(model)

    own = load_policy(tmp_path / "start" / "policy")
    suite = RewardSuite([RewardConfig("likely_rewards:likely", arguments={"model": base.model})])
    config = GRPOConfig(
        steps=10, prompts_per_step=4, num_generations=4, num_iterations=1, learning_rate=0.004, beta=1e-3
    )  # fmt: skip
    prompts = [Prompt(text, text) for text in PROMPTS]
    train(own, start.policy, backend, prompts, suite, model.config.rollout, config, tmp_path / "own")
    rewards = [
        score(suite, rollout(policy, backend, prompts, model.config.rollout, num_generations=64)).total.mean()
        for policy in (start.policy, model.policy, own)
    ]
    assert min(rewards[1:]) > rewards[0] + 0.4
    assert abs(rewards[1] - rewards[2]) < 0.1


def test_several_epochs_and_a_moving_reference(base: BackendConfig, tmp_path: Path) -> None:
    wrapped(base).save_pretrained(tmp_path / "start")
    model = wrapped(base, reference=tmp_path / "start")
    frozen = digest(model.backend.model)
    trainer = trainer_of(
        TRAINERS[0], model, tmp_path, max_steps=4, beta=0.1, num_iterations=2, sync_ref_model=True,
        ref_model_sync_steps=1, ref_model_mixup_alpha=1.0, mask_truncated_completions=True, entropy_coef=0.01,
        gradient_accumulation_steps=1, learning_rate=0.05,
    )  # fmt: skip
    trainer.train()
    assert digest(model.backend.model) == frozen  # alpha 1 would have zeroed weights that both models share
    assert digest(trainer.ref_model.policy) == digest(model.policy)
    assert all(entry["grad_norm"] > 0 for entry in trainer.state.log_history if "grad_norm" in entry)


def test_save_and_load(base: BackendConfig, tmp_path: Path) -> None:
    model = wrapped(base)
    model.save_pretrained(tmp_path / "m")
    assert sum(path.stat().st_size for path in (tmp_path / "m").rglob("*") if path.is_file()) < 20_000
    again = create_model_from_path(str(tmp_path / "m"), dtype=model.dtype, attn_implementation="eager")  # as TRL does
    assert isinstance(again, PolicyCausalLM)
    assert again.backend is model.backend
    assert again.config.rollout == model.config.rollout
    assert again.config._name_or_path == str(tmp_path / "m")
    ids, mask, labels, _ = batch(model)
    scored = [m(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True) for m in (model, again)]
    assert torch.equal(scored[0].log_probs, scored[1].log_probs)
    assert digest(load_policy(tmp_path / "m" / "policy")) == digest(model.policy)  # type: ignore[arg-type]
    check_compatible(tmp_path / "m" / "policy", fingerprint=model.backend.fingerprint)

    other = tiny_backend(CONFIGS["sliding window"]())
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    elsewhere = BackendConfig(model=str(tmp_path / "other"), dtype="float32", chat_template=False)
    with pytest.raises(CheckpointError, match="fingerprint"):
        PolicyCausalLM.from_pretrained(tmp_path / "m", base=elsewhere)
    with pytest.raises(InvalidValue, match="dtype must be float32"):
        PolicyCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    with pytest.raises(UnknownName, match="quantization_config"):
        PolicyCausalLM.from_pretrained(tmp_path / "m", quantization_config={})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.9}, "temperature must be 1.0"),
        ({"top_p": 0.9}, "top_p must be 1.0"),
        ({"top_k": 20}, "top_k must be 0"),
        ({"min_p": 0.1}, "min_p must be"),
        ({"repetition_penalty": 1.2}, "repetition_penalty must be"),
        ({"max_completion_length": 9}, "max_completion_length must be 6"),
        ({"generation_kwargs": {"typical_p": 0.5}}, "setting typical_p must be"),
        ({"generation_kwargs": {"num_beams": 2}}, "setting num_beams must be"),
        ({"use_transformers_continuous_batching": True}, "use_transformers_continuous_batching must be False"),
    ],
)
def test_settings_that_sample_otherwise_are_refused(
    base: BackendConfig, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(AsnError, match=message):  # a temperature already by the trainer's own constructor
        check_trainer(trainer_of(TRAINERS[0], wrapped(base), tmp_path, **settings))


def test_settings_that_trl_acts_on_at_once_are_refused_before(base: BackendConfig, tmp_path: Path) -> None:
    model = wrapped(base)
    for settings, message in (
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32 must be False"),
        ({"beta": 0.1}, "reference=FOLDER"),
        ({"use_vllm": True}, "use_vllm must be False"),
    ):
        args = trl.GRPOConfig(str(tmp_path), max_completion_length=TOKENS, use_cpu=True, **settings)
        with pytest.raises((ConfigError, InvalidValue), match=message):
            check_arguments(args, model)


def test_leaks_of_generation_configs_are_refused_or_do_not_act(base: BackendConfig, tmp_path: Path) -> None:
    model = wrapped(base)
    trainer = trainer_of(TRAINERS[0], model, tmp_path)
    model.backend.model.generation_config.typical_p = 0.5
    try:
        assert check_trainer(trainer).largest < 1e-4
    finally:
        model.backend.model.generation_config.typical_p = None
    model.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(InvalidValue, match="no_repeat_ngram_size"):
        check_trainer(trainer)
    with pytest.raises(ServingError, match="NoRepeatNGram"):  # and again by every call
        model.generate(torch.tensor([[3, 4]]), generation_config=trainer.generation_config)
    model.generation_config.no_repeat_ngram_size = None
    trainer.tools = [print]
    with pytest.raises(InvalidValue, match="tools"):
        check_trainer(trainer)


def test_rewards_are_told_what_was_truncated(base: BackendConfig) -> None:
    def numbers(prompts: Any, completions: Any, completion_ids: Any = None, **columns: Any) -> list[float | None]:
        return [float(done) for done in columns["terminated"]]

    told = with_ends(numbers, wrapped(base))
    assert told.__name__ == "numbers"
    assert told(prompts=["w3"] * 2, completions=["", ""], completion_ids=[[4, 0], [4, 5]], answer=[1, 2]) == [1.0, 0.0]


def test_a_loss_of_another_distribution_is_found(base: BackendConfig, tmp_path: Path) -> None:
    model = wrapped(base)
    trainer = trainer_of(TRAINERS[0], model, tmp_path)
    own = trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = lambda *given: (own(*given)[0].detach(), None, None)
    with pytest.raises(TrainingError, match="no gradient"):
        check_trainer(trainer)
    trainer._get_per_token_logps_and_entropies = lambda *given: (own(*given)[0] / 0.7, None, None)
    with pytest.raises(TrainingError, match="differ by"):
        check_trainer(trainer)


def test_policies_that_cannot_be_shown_what_they_read_are_refused(base: BackendConfig) -> None:
    with pytest.raises(InvalidValue, match="hidden"):
        wrapped(base, OrderStatisticsNetwork(inputs=("hidden",), hidden_size=32))
    with pytest.raises(TrainingError, match="no trainable parameter"):
        wrapped(base, Pipeline([]))
    with pytest.raises(InvalidValue, match=r"base\.kind"):
        wrapped(BackendConfig(kind="toy", model="random:32:0"))
    model = wrapped(base)
    with pytest.raises(InvalidValue, match="max_new_tokens must be 6"):
        model.generate(torch.tensor([[3, 4]]), do_sample=True, max_new_tokens=5)


def test_the_embedded_model(smollm: HFBackend, tmp_path: Path) -> None:
    policy: TrainablePolicy = OrderStatisticsNetwork()
    model = PolicyCausalLM.wrap(policy, BackendConfig(dtype="float32"), max_new_tokens=4)
    assert model.backend.model is smollm.model
    args = trl.GRPOConfig(
        str(tmp_path), per_device_train_batch_size=4, num_generations=2, max_completion_length=4, max_steps=1,
        report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True, learning_rate=1e-2,
    )  # fmt: skip
    chats = [[{"role": "user", "content": text}] for text in ("Name an animal.", "What is 3 + 4? Answer in one word.")]
    data = Dataset.from_dict({"prompt": chats})
    reward = lambda completions, **_: [float(len(row[0]["content"])) for row in completions]  # noqa: E731
    trainer = trl.GRPOTrainer(model, reward, args=args, train_dataset=data, processing_class=model.tokenizer)
    before = digest(policy)  # type: ignore[arg-type]
    assert check_trainer(trainer).largest < 1e-3
    assert set(trainer.eos_token_ids) == smollm.eos_token_ids
    trainer.train()
    assert digest(policy) != before  # type: ignore[arg-type]
