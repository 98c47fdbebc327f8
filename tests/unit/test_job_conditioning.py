"""A policy that is conditioned on a score in distillation gives more of it when it is asked for more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_rewards import second_choice

from asn_policies import Asked, OrderStatisticsNetwork
from asn_rl.checkpoint import load_policy
from asn_rl.config import from_dict
from asn_rl.errors import ConfigError, DataError, InvalidValue, UnknownName
from asn_rl.job import Job, JobConfig, distil, reinforce
from asn_rl.labelling.selected import read_normalised, read_selected
from asn_rl.ops.context import CONTEXT_SIZE
from asn_rl.ops.sketch import SketchSize, build_sketch
from asn_rl.rollout import rollout
from asn_rl.testing import check_policy
from asn_rl.types import Observation

INNER = {"policy": "asn_policies:OrderStatisticsNetwork", "arguments": {"inputs": ["condition"], "condition_size": 2}}


def job(folder: Path, ask: float, **settings: Any) -> Job:
    rows = [json.dumps({"prompt": f"w{i}", "id": f"p{i}"}) + "\n" for i in range(1, 31)]
    (folder / "prompts.jsonl").write_text("".join(rows))
    config = {
        "backend": {"kind": "toy", "model": "random:32:0"},
        "data": {"source": "jsonl", "arguments": {"path": str(folder / "prompts.jsonl")}},
        "rewards": [{"function": "toy_rewards:second_choice"}],
        "rollout": {"max_new_tokens": 6, "head": 6, "tail": 5},
        "policy": {"arguments": {"inputs": ["condition"], "width": 16}},
        "heuristics": [{"name": "base"}],
        "generate": {"num_generations": 12, "train_prompts": 12, "selection_prompts": 2},
        "select": {"top_k": 12},
        "condition": {"label": "toy_rewards:second_choice", "ask": ask},
        "distill": {"target": "tokens", "epochs": 15, "minibatch_tokens": 48, "learning_rate": 1e-2},
        "grpo": {"steps": 1, "prompts_per_step": 2, "num_generations": 2},
        "threads": 1,
    }
    return Job(from_dict(JobConfig, config | settings), folder / f"run {ask}")


def test_more_is_given_where_more_is_asked_for(tmp_path: Path):
    means = {}
    for ask in (0.0, 0.6):
        made = job(tmp_path, ask)
        policy = distil(made)
        assert isinstance(policy, Asked)
        asked = load_policy(made.run / "distilled")
        assert not asked.needs
        prompts = made.prompts("test")
        out = rollout(asked, made.backend, prompts, made.config.rollout, num_generations=16, seed=1)
        means[ask] = np.mean(second_choice([str(p.content) for p in out.prompts], list(out.completions)))
    assert means[0.6] > means[0.0] + 0.1
    # The condition of a candidate is its own score, and what is asked for is in the same units.
    scores = read_normalised(made.run / "selected", "toy_rewards:second_choice")
    kept = read_selected(made.run / "selected")
    raw = second_choice([f"w{c.prompt_id[1:]}" for c in kept], [c.completion for c in kept])
    slope, start = np.polyfit(np.array(raw, float), np.array(scores, float), 1)
    assert policy.condition.item() == pytest.approx(slope * 0.6 + start, abs=1e-4)
    trained = reinforce(made)  # RL goes on under the same condition, and needs to know nothing of it
    assert isinstance(trained, Asked)
    assert trained.condition.item() == policy.condition.item()


def test_asked_is_the_inner_policy_under_its_condition():
    policy = Asked(INNER, [0.5, -1.0])
    with torch.no_grad():
        for part in policy.parameters():
            part.normal_()
    sketch = build_sketch(torch.randn(3, 40).log_softmax(-1), SketchSize(6, 4))[0]
    obs = Observation(sketch, torch.zeros(3, CONTEXT_SIZE))
    inner = OrderStatisticsNetwork(inputs=["condition"], condition_size=2)
    inner.load_state_dict(policy.inner.state_dict())
    expected = inner(Observation(sketch, obs.context, condition=torch.tensor([[0.5, -1.0]] * 3)))
    torch.testing.assert_close(policy(obs).logprobs, expected.logprobs)
    check_policy(policy)


def test_what_cannot_be_asked_is_refused(tmp_path: Path):
    for condition in ([], [float("nan")]):
        with pytest.raises(InvalidValue, match="condition"):
            Asked(INNER, condition)
    with pytest.raises(InvalidValue, match="reads the condition"):
        Asked({"policy": "asn_policies:OrderStatisticsNetwork", "arguments": {}}, [1.0])
    with pytest.raises(ConfigError, match=r"distill\.target tokens"):
        job(tmp_path, 1.0, distill={})
    with pytest.raises(UnknownName, match="labeller 'nobody'"):
        distil(job(tmp_path, 1.0, condition={"label": "nobody", "ask": 1.0}))
    constant = {"rewards": [{"function": "toy_rewards:constant"}]}
    with pytest.raises(DataError, match=r"Raise select\.top_k"):
        distil(job(tmp_path, 2.0, condition={"label": "toy_rewards:constant", "ask": 1.0}, **constant))
