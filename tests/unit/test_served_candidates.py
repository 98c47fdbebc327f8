"""Candidates and evaluations from servers that decode with our rules and policies: a toy engine, asked by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toy_engine import ToyEngine

from asn_policies import OrderStatisticsNetwork, Pipeline
from asn_rl.backends.toy import ToyBackend
from asn_rl.checkpoint import load_policy, read_policy_config
from asn_rl.config import from_dict
from asn_rl.errors import BackendError, ConfigError, InvalidValue
from asn_rl.job import Job, JobConfig, evaluate, generate, verify
from asn_rl.job.servers import publish
from asn_rl.labelling.records import CANDIDATE, as_candidate, read_records
from asn_rl.rollout import RolloutConfig, rollout
from asn_rl.types import Candidate, Prompt

TOY = ToyBackend.random(32, seed=0)
HEURISTICS: list[dict[str, Any]] = [
    {"name": "greedy", "processors": [{"name": "greedy"}]},
    {
        "name": "EDT, then greedy",
        "processors": [{"name": "edt", "params": {"temperature": 1.0, "theta": 10.0}}, {"name": "greedy"}],
    },  # no engine has it
    {"name": "typical", "processors": [{"name": "typical", "params": {"mass": 0.8}}]},
]
QUESTIONS = [f"w{i} w{j}" for i in range(1, 9) for j in range(1, 4)]


def job(folder: Path, run: str, url: str | None, **changes: Any) -> Job:
    pool = {"urls": [url], "retries": 1, "backoff_s": 0.01, "no_server_s": 0.5, "concurrency": 8}
    servers = {"kind": "sglang", "policies": str(folder / "policies"), "pool": pool} if url else None
    rows = [{"id": f"p{i}", "prompt": text} for i, text in enumerate(QUESTIONS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "backend": {"kind": "toy", "model": "random:32:0"},
        "data": {"source": "jsonl", "arguments": {"path": str(folder / "prompts.jsonl")}},
        "rewards": [{"function": "length_budget", "arguments": {"budget": 3}}],
        "rollout": {"max_new_tokens": 5},
        "heuristics": HEURISTICS,
        "generate": {"num_generations": 2, "servers": servers},
        **changes,
    }
    return Job(from_dict(JobConfig, config), folder / run)


def candidates(folder: Path) -> dict[tuple[str, str, int], Candidate]:
    found = (as_candidate(record, where) for where, record in read_records(folder, CANDIDATE))
    return {candidate.key: candidate for candidate in found}


def test_every_rule_is_served_whether_an_engine_has_it_or_not(tmp_path: Path) -> None:
    with ToyEngine(TOY, tmp_path / "policies") as engine:
        served = job(tmp_path, "served", engine.url)
        generate(served)
        assert all(part.ok for part in verify(served).values())
        asked = len(engine.served)
        generate(job(tmp_path, "served", engine.url))
        assert len(engine.served) == asked  # what is there is passed over
    generate(job(tmp_path, "here", None))
    there, here = (candidates(tmp_path / run / "candidates/train") for run in ("served", "here"))
    assert there.keys() == here.keys()
    for key, candidate in there.items():
        if key[1] != "typical":
            assert candidate.completion_ids == here[key].completion_ids
            assert candidate.terminated == here[key].terminated
    assert {read_policy_config(p).sketch["head"] for p in (tmp_path / "policies").iterdir()} == {RolloutConfig(1).head}
    drawn = [candidate.completion for key, candidate in there.items() if key[1] == "typical"]
    assert len(set(drawn)) > len(drawn) / 2  # each prompt and seed has draws of its own


def test_a_policy_is_evaluated_on_the_servers_turn_by_turn(tmp_path: Path) -> None:
    talk = tmp_path / "talk.yaml"
    talk.write_text(yaml.safe_dump({
        "schema": "asn_rl.benchmark/1", "name": "talk", "version": 1, "title": "t", "paper": "p", "licence": "l",
        "files": {"test": {"path": "prompts.jsonl"}}, "id_field": "id", "max_new_tokens": 4,
        "prompt": {"text": "{{prompt}}", "follow_ups": ["w5 {{prompt}}"]}, "metrics": ["distinct_2"],
    }))  # fmt: skip
    learned = OrderStatisticsNetwork()
    torch.nn.init.normal_(next(learned.parameters()), generator=torch.Generator().manual_seed(0))
    learned.save_pretrained(tmp_path / "learned", fingerprint=TOY.fingerprint)
    changes = {"tasks": [str(talk)], "data": str(tmp_path), "num_generations": 2, "resamples": 100}
    changes["policies"] = {"rl": [str(tmp_path / "learned")]}
    with ToyEngine(TOY, tmp_path / "policies") as engine:
        made = job(tmp_path, "served", engine.url, evaluate=changes)
        record = evaluate(made)
        counts = engine.host.status.policies
    assert list(record["tasks"]) == ["talk", "talk turn 2"]
    assert list(record["tasks"]["talk"]["arms"]) == ["greedy", "T=1", "EDT, then greedy", "typical", "rl"]
    (name,) = [name for name in counts if name.startswith("rl-")]
    prompts = len(record["tasks"]["talk"]["prompts"])
    assert counts[name]["requests"] == 2 * 2 * prompts  # turns, samples
    assert counts[name]["failed"] == 0
    first, second = (candidates(made.run / f"evaluation/{turn}/test/candidates") for turn in record["tasks"])
    for key, candidate in second.items():
        assert candidate.history is not None
        assert candidate.history[-2] == {"role": "assistant", "content": first[key].completion}
        if key[1] == "greedy":
            asked = Prompt("any", candidate.history)
            alone = rollout(Pipeline([{"name": "greedy"}]), TOY, [asked], RolloutConfig(4))
            assert alone.completions == [candidate.completion]


def test_what_the_servers_cannot_read_ends_the_stage_with_the_reason(tmp_path: Path) -> None:
    with ToyEngine(TOY, tmp_path / "policies", refuses=lambda prompt: prompt[0] == 1) as engine:
        with pytest.raises(BackendError, match=r"this prompt is refused.*the same command tries the others again"):
            generate(job(tmp_path, "run", engine.url))
        kept = len(engine.served)
    with ToyEngine(TOY, tmp_path / "policies") as engine:
        whole = job(tmp_path, "run", engine.url)
        generate(whole)
        prompts = len((whole.run / "prompts.jsonl").read_text().splitlines())
        assert len(engine.served) + kept == prompts * (1 + 2 + 2)  # greedy is decoded once
    assert all(part.ok for part in verify(whole).values())


def test_a_policys_name_is_its_content(tmp_path: Path) -> None:
    cold = Pipeline([{"name": "temperature", "params": {"temperature": 0.5}}])
    name = publish("T=0.5 / cold!", cold, tmp_path, {"fingerprint": "f"})
    assert name.startswith("T-0.5-cold-")
    before = (tmp_path / name / "model.safetensors").stat().st_mtime_ns
    assert publish("T=0.5 / cold!", cold, tmp_path, {"fingerprint": "f"}) == name
    assert (tmp_path / name / "model.safetensors").stat().st_mtime_ns == before
    assert isinstance(load_policy(tmp_path / name), Pipeline)
    torch.manual_seed(0)
    weights = [publish("rl", OrderStatisticsNetwork(), tmp_path, {}) for _ in range(2)]
    assert len({name, publish("T=0.5 / cold!", cold, tmp_path, {"fingerprint": "g"}), *weights}) == 4
    assert publish("..", cold, tmp_path, {}).startswith("policy-")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    hidden = OrderStatisticsNetwork(inputs=["hidden"], hidden_size=4)
    with pytest.raises(InvalidValue, match=r"inputs of 'rl' must be some of .*got \['hidden'\]"):
        publish("rl", hidden, tmp_path, {})
    with pytest.raises(InvalidValue, match="the folder that the servers were started with"):
        publish("T=1", Pipeline([]), tmp_path / "none", {})
    bare = type("Bare", (), {"needs": frozenset()})()
    with pytest.raises(InvalidValue, match="one with save_pretrained, got 'Bare'"):
        publish("bare", bare, tmp_path, {})
    for servers, message in (
        ({"kind": "openai", "model": "m", "policies": "p"}, "generate.servers: kind must be sglang or vllm"),
        ({"kind": "sglang", "router": True}, "generate.servers: router must be false"),
        ({"kind": "vllm", "policies": "p", "router": True}, "generate.servers: router must be false"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_dict(JobConfig, {"generate": {"servers": {"pool": {"urls": ["http://x"]}, **servers}}})
