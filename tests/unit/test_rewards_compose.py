from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asn_rl.errors import AsnError, ConfigError, InvalidValue, RewardError, UnknownName
from asn_rl.rewards.compose import RewardConfig, RewardResult, RewardSuite, call_inputs, normalised
from asn_rl.rewards.waiting import told_while_it_takes
from asn_rl.types import Prompt

HELPERS = "slow_rewards"
PROCESS: dict[str, Any] = {"isolation": "process"}


@pytest.fixture(autouse=True)
def importable_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers import from the caller's sys.path. (A package `tests` in site-packages would hide `tests.helpers`.)"""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers"))


def helper(name: str, **options: Any) -> RewardConfig:
    return RewardConfig(f"{HELPERS}:{name}", **options)


LENGTH = f"{HELPERS}:length"


def run(configs: Sequence[RewardConfig], completions: Sequence[str] = ("a", "bbb"), ids: str = "pp") -> RewardResult:
    prompts = [Prompt(name, f"Say {name}.", {"answer": "1"}) for name in ids]
    with RewardSuite(configs) as suite:
        return suite(prompts, completions, [[1]] * len(completions), terminated=[True] * len(completions))


def same(tensor: torch.Tensor, values: Sequence[float]) -> bool:
    return torch.equal(tensor.nan_to_num(-999), torch.tensor(values, dtype=torch.float64).nan_to_num(-999))


def test_weighted_sum_of_raw_scores() -> None:
    result = run([RewardConfig("numeric_answer", weight=2.0), helper("length", weight=-0.5)], ("1", "two"))
    assert same(result.components["numeric_answer"], [1, 0])
    assert same(result.components[LENGTH], [1, 3])
    assert same(result.total, [1.5, -1.5])
    assert result.total.dtype == torch.float64


def test_masked_components_do_not_contribute() -> None:
    result = run([helper("masking_short"), helper("length", weight=10)], ("a", "bbb"))
    assert same(result.components[f"{HELPERS}:masking_short"], [math.nan, 1])
    assert same(result.total, [10, 31])
    assert result.counts[f"{HELPERS}:masking_short/masked"] == 1


def test_row_masked_by_all_is_nan() -> None:
    assert same(run([helper("masking_short")]).total, [math.nan, 1])


def test_arguments_and_repeated_functions() -> None:
    result = run([helper("length"), helper("length", arguments={"scale": 3.0})])
    assert same(result.components[LENGTH], [1, 3])
    assert same(result.components[f"{LENGTH}#2"], [3, 9])


def test_argument_wins_over_a_column_of_its_name() -> None:
    prompts = [Prompt("p", "Say it.", {"scale": 7.0})]
    result = RewardSuite([helper("length", arguments={"scale": 2.0})])(prompts, ["abc"], [[1]], terminated=[True])
    assert same(result.total, [6])


def test_group_normalisation() -> None:
    result = run([helper("length", normalize="group")], ("a", "bbb", "cc", "dd", "e"), ids="ppqqr")
    spread = 1 / (math.sqrt(2) + 1e-4)
    assert torch.allclose(result.total, torch.tensor([-spread, spread, 0, 0, 0], dtype=torch.float64))
    assert same(result.components[LENGTH], [1, 3, 2, 2, 1])


def test_batch_normalisation() -> None:
    result = run([helper("length", normalize="batch")], ("a", "bbb", "cc"), ids="pqr")
    expected = torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64) / (1 + 1e-4)
    assert torch.allclose(result.total, expected)


@given(
    st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(math.nan)), min_size=1, max_size=12), st.sampled_from([2, 3, 12])
)
def test_normalised_groups_are_centred_and_keep_their_masks(values: list[float], size: int) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    spans = [(low, min(low + size, len(values))) for low in range(0, len(values), size)]
    scaled = normalised(scores, "group", spans)
    assert torch.equal(scaled.isnan(), scores.isnan())
    for low, high in spans:
        part = scaled[low:high]
        assert abs(float(part.nansum())) < 1e-6
        assert float(part[~part.isnan()].square().sum()) <= high - low


def test_what_functions_are_handed() -> None:
    messages = [{"role": "user", "content": "7 + 8?"}]
    prompts = [Prompt("a", messages, {"answer": 15}), Prompt("b", "Name one.", {"valid": ["cat"]})]
    inputs = call_inputs(prompts, ["15", "cat"], [[1, 2], [3]], torch.tensor([True, False]).tolist())
    assert inputs == {
        "prompts": [messages, "Name one."],
        "completions": [[{"role": "assistant", "content": "15"}], "cat"],
        "completion_ids": [[1, 2], [3]],
        "answer": [15, None],
        "valid": [None, ["cat"]],
        "terminated": [True, False],
        "prompt_id": ["a", "b"],
    }


def test_mixture_of_answers_and_open_prompts() -> None:
    sums = Prompt("sum", "7 + 8?", {"answer": 15})
    name = Prompt("name", "Name an animal.", {"valid": ["cat", "dog"]})
    suite = RewardSuite([RewardConfig("numeric_answer"), RewardConfig("distinct_valid")])
    result = suite(
        [sums, sums, name, name], ["15", "16", "a cat", "the cat"], [[1]] * 4, terminated=[True, True, True, True]
    )
    assert same(result.total, [1, 0, 0.5, 0.5])


def test_functions_cannot_spoil_each_others_inputs() -> None:
    result = run([helper("greedy_for_inputs"), helper("length")])
    assert same(result.total, [2, 4])


@pytest.mark.parametrize("isolation", ["inline", "process"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", "one value a completion: got 1 values for 2 completions"),
        ("nan", "finite numbers, got nan for completion 0; return None where it does not apply"),
        ("infinite", "finite numbers, got -inf"),
        ("words", "numbers or None, got 'good' for completion 0"),
        ("single", "a list of numbers or None, got float"),
        ("refusing", "the judge has no key"),
        ("columnless", r"add '\*\*columns' to its signature"),
    ],
)
def test_broken_contracts_end_the_call(isolation: Any, name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        run([helper(name, isolation=isolation, retries=3)])


def test_tensor_instead_of_list() -> None:
    from asn_rl.rewards.contract import checked_scores

    with pytest.raises(RewardError, match=r"got Tensor; return values.tolist\(\)"):
        checked_scores("f", torch.ones(2), 2)


def test_raising_reward_is_masked_counted_and_warned_about_once() -> None:
    prompts = [Prompt("p", "Say it.")] * 2
    suite = RewardSuite([helper("raising", retries=2), helper("length")])
    with pytest.warns(RuntimeWarning, match=r"'slow_rewards:raising' failed \(error: ZeroDivisionError: no such score"):
        result = suite(prompts, ["a", "bbb"], [[1]] * 2, terminated=[True] * 2)
    assert same(result.total, [1, 3])
    assert same(result.components[f"{HELPERS}:raising"], [math.nan, math.nan])
    events = {key.removeprefix(f"{HELPERS}:raising/"): n for key, n in result.counts.items() if "raising" in key}
    assert events == {"error": 3, "timeout": 0, "retry": 2, "masked": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        suite(prompts, ["a", "bbb"], [[1]] * 2, terminated=[True] * 2)


@pytest.mark.parametrize("isolation", ["inline", "process"])
def test_retry_succeeds(isolation: Any) -> None:
    result = run([helper("raising_once", retries=1, isolation=isolation)])
    assert same(result.total, [1, 1])
    assert result.counts[f"{HELPERS}:raising_once/error"] == 1
    assert result.counts[f"{HELPERS}:raising_once/retry"] == 1
    assert result.counts[f"{HELPERS}:raising_once/masked"] == 0


def test_hanging_reward_is_killed() -> None:
    with pytest.warns(RuntimeWarning, match=r"hanging' failed \(timeout: no answer within 0\.3 s\)"):
        result = run([helper("hanging", time_limit=0.3, retries=1, **PROCESS), helper("length")])
    assert same(result.total, [1, 3])
    assert result.counts[f"{HELPERS}:hanging/timeout"] == 2
    assert result.counts[f"{HELPERS}:hanging/masked"] == 2


def test_what_takes_long_is_named_and_what_can_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    with told_while_it_takes("reward 'brief'"):
        pass
    assert capsys.readouterr().out == ""
    with told_while_it_takes("reward 'slow'", first_s=0.05):
        time.sleep(0.25)
    said = capsys.readouterr().out.replace("\n", " ")
    assert said.count("reward 'slow' has taken 0 s so far. If it hangs: Ctrl-C, give it isolation: process") == 2


def test_dying_reward_is_contained() -> None:
    with pytest.warns(RuntimeWarning, match=r"dying' failed \(died: its worker process ended with exit status 3\)"):
        result = run([helper("dying", **PROCESS), helper("length")])
    assert same(result.total, [1, 3])
    assert result.counts[f"{HELPERS}:dying/error"] == 1


def test_process_gives_what_inline_gives() -> None:
    builtin = RewardConfig("numeric_answer", time_limit=30, isolation="process")
    suite = [builtin, helper("length", arguments={"scale": 2.0}, **PROCESS)]
    assert same(run(suite, ("1", "two")).total, [3, 6])


def test_nothing_but_masks_is_an_error_that_says_why() -> None:
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(RewardError, match=r"nothing to learn from.*raising: error, ZeroDiv.*masking: the function ret"),
    ):
        run([helper("raising"), helper("masking")])


def test_functions_that_count_for_themselves() -> None:
    result = run([RewardConfig("math_answer"), helper("length")], ("10**10**10", "1"))
    assert result.counts["math_answer/astronomic"] == 1
    assert result.counts["math_answer/masked"] == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": math.inf}, InvalidValue, "weight must be a finite number"),
        ({"normalize": "row"}, InvalidValue, "normalize must be none, group or batch, got 'row'"),
        ({"isolation": "thread"}, InvalidValue, "isolation must be inline or process, got 'thread'"),
        ({"retries": -1}, InvalidValue, "retries must be >= 0, got -1"),
        ({"time_limit": 0.0, **PROCESS}, InvalidValue, "time_limit must be > 0 seconds"),
        ({"time_limit": 5.0}, ConfigError, "time_limit 5 needs isolation: process"),
    ],
)
def test_refused_configurations(options: dict[str, Any], error: type[AsnError], message: str) -> None:
    with pytest.raises(error, match=message):
        RewardConfig("numeric_answer", **options)


def test_refused_suites() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        RewardSuite([])
    with pytest.raises(UnknownName, match="Did you mean 'numeric_answer'"):
        RewardSuite([RewardConfig("numeric_anser")])
    with pytest.raises(UnknownName, match="Did you mean 'numeric_answer'"):
        RewardSuite([RewardConfig("numeric_anser", **PROCESS)])
    with pytest.raises(ConfigError, match="cannot import 'no_such_module'"):
        RewardSuite([RewardConfig("no_such_module:f")])
    with pytest.raises(RewardError, match="cannot import 'no_such_module'"):
        RewardSuite([RewardConfig("no_such_module:f", **PROCESS)])
    with pytest.raises(RewardError, match="module of its own"):
        RewardSuite([RewardConfig("__main__:f", **PROCESS)])
    with pytest.raises(RewardError, match="is a int, not a function"):
        RewardSuite([helper("calls")])


@pytest.mark.parametrize("isolation", ["inline", "process"])
def test_misspelt_argument(isolation: Any) -> None:
    with pytest.raises(AsnError, match="Did you mean 'pattern'"):
        RewardSuite([RewardConfig("format_match", arguments={"patern": "a"}, isolation=isolation)])


def test_refused_calls() -> None:
    suite = RewardSuite([helper("length")])
    with pytest.raises(RewardError, match="at least one; got 0, 0, 0, 0"):
        suite([], [], [], terminated=[])
    with pytest.raises(RewardError, match="got 1, 2, 1, 1"):
        suite([Prompt("p", "x")], ["a", "b"], [[1]], terminated=[True])
    with pytest.raises(RewardError, match="column 'terminated', a name reward functions use; rename"):
        suite([Prompt("p", "x", {"terminated": 1})], ["a"], [[1]], terminated=[True])
