"""Settings of a job: one frozen dataclass a stage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from asn_rl.backends import BackendConfig
from asn_rl.backends.server_generation import Kind
from asn_rl.backends.servers import ServersConfig
from asn_rl.config import OPERATIONAL
from asn_rl.data import DataConfig
from asn_rl.errors import InvalidValue, check_at_least
from asn_rl.evaluation.benchmarking import EvaluateConfig
from asn_rl.evaluation.promotion import PromotionConfig
from asn_rl.labelling.select import SelectConfig
from asn_rl.rewards.compose import RewardConfig
from asn_rl.rollout import RolloutConfig
from asn_rl.training.bandit import BanditConfig
from asn_rl.training.distill import DistillConfig
from asn_rl.training.grpo import GRPOConfig
from asn_rl.training.lpo import LPOConfig
from asn_rl.training.ppo import PPOConfig
from asn_rl.training.served import ServeConfig

DISTILLED, RL = "distilled", "rl"
SHUFFLED = "shuffled context"
"""control: the policy when it sees the context of another completion"""
CONTROLS = ("even mixture", "context-free", SHUFFLED)
"""names of the learned policies and of the controls in comparisons"""


@dataclass(frozen=True)
class PolicySpec:
    """The policy to train."""

    name: str = "asn_policies:OrderStatisticsNetwork"
    """policy class as module:attribute"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """constructor arguments; where the class takes them, hidden_size is that of the base model, and strategies are the
    heuristics"""


@dataclass(frozen=True)
class ConditionConfig:
    """A score that the policy is conditioned on: it learns what candidates of every score look like, and is then asked
    for one (reward-conditioned policies, Kumar et al. 2019, arXiv:1912.13465). The score may be a style."""

    label: str
    """labeller, by its name among `labellers` (else `rewards`), whose normalised score of a candidate is the condition
    under which its tokens are taught; one with weight 0 is only for this"""
    ask: float
    """score, as the labeller gives it, that is asked for afterwards: in RL, in comparisons, wherever the policy runs"""
    policy: str = "asn_policies:Asked"
    """class that holds the conditioned policy and asks"""


@dataclass(frozen=True)
class HeuristicSpec:
    """One static rule of the declared grid."""

    name: str
    """how tables and plots call it"""
    processors: list[dict[str, Any]] = field(default_factory=list)
    """steps {name, params}, in order; none: the base model"""


@dataclass(frozen=True)
class HeuristicGrid:
    """Static rules made by a function: a list of entries {name, processors}, as `asn-rl grid` writes them."""

    function: str = "asn_policies.heuristics:grid"
    """module:function"""
    arguments: dict[str, Any] = field(default_factory=dict)
    """keyword arguments, for example {kind: filtered, family: llama}"""


@dataclass(frozen=True)
class GenerationServers:
    """Inference servers that generate the candidates."""

    pool: ServersConfig = field(metadata=OPERATIONAL)
    """their addresses, and how they are asked"""
    kind: Kind = "sglang"
    """what they speak"""
    model: str | None = None
    """name under which they serve the base model; needed by openai"""
    policies: str | None = None
    """folder of policies that they were started with (`asn_rl.serving`): every rule and policy is written there and
    asked for by name, and evaluations ask the servers, too. Rules that read the generated text count as many of its
    tokens as the servers' --tracked says. null: the servers' own sampling, for the rules it has"""
    router: bool = False
    """the addresses are those of SGLang's router"""

    def __post_init__(self) -> None:
        if self.policies is not None and self.kind == "openai":
            raise InvalidValue("kind", self.kind, "sglang or vllm, with policies")
        if self.router and (self.kind != "sglang" or self.policies is None):
            raise InvalidValue("router", True, "false without policies, or with kind vllm or openai")


@dataclass(frozen=True)
class GenerateConfig:
    """Candidates: every training and selection prompt under every heuristic and seed."""

    num_generations: int = 8
    """completions of every prompt under every heuristic, each with a seed of its own; rewards that compare a group need
    the size they are used at"""
    train_prompts: int | None = None
    """training prompts to label, drawn at random and alike from every stratum; null: all"""
    selection_prompts: int | None = None
    """selection prompts on which the best static rule is chosen, drawn likewise; null: all"""
    seed: int = 1000
    """seed of the first completion; the others count on from it"""
    servers: GenerationServers | None = None
    """servers of the base model, for example {kind: vllm, pool: {urls: ["http://127.0.0.1:8000"]}}; null: in this
    process"""

    def __post_init__(self) -> None:
        if self.num_generations < 2:
            raise InvalidValue("num_generations", self.num_generations, ">= 2", "headroom is measured on split halves")
        for name in ("train_prompts", "selection_prompts"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise InvalidValue(name, count, ">= 1", "null takes all prompts of the split")

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seed, self.seed + self.num_generations))


@dataclass(frozen=True)
class CompareConfig:
    """The comparison on held-out prompts."""

    num_generations: int = 8
    """completions of every prompt under every arm"""
    stratify_by: str | None = None
    """prompt column whose values weigh the same in every mean; null: all prompts weigh the same"""
    resamples: int = 10_000
    """bootstrap resamples of the prompts"""
    level: float = 0.95
    """coverage of the intervals"""
    seed: int = 2000
    """keys the draws"""
    controls: bool = False
    """also compare with an even mixture of the heuristics; with a mixture that sees no context, begins at the best
    static rule and is trained like the policy; and with the policy when it sees the context of another completion"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_generations", "resamples")
        if not 0 < self.level < 1:
            raise InvalidValue("level", self.level, "in (0, 1)")


@dataclass(frozen=True)
class GuardConfig:
    """A static rule behind the trained policy (`asn-rl guard`)."""

    policy: str = "asn_policies:Fallback"
    """class that holds both; its `around(folder, processors, limits)` makes one"""
    prompts: int = 64
    """training prompts at most whose completions show the range of contexts"""
    num_generations: int = 4
    """completions of each"""
    seed: int = 4000
    """keys their draws"""
    cut: float = 0.001
    """share of tokens left out at either end of each context entry"""
    margin: float = 0.05
    """what is added at either end, as a share of the range"""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "prompts", "num_generations")
        check_at_least(self, 0, "margin")
        if not 0 <= self.cut < 0.5:
            raise InvalidValue("cut", self.cut, "in [0, 0.5)")


@dataclass(frozen=True)
class JobConfig:
    """The whole job: generate, label and select candidates, distil, improve by RL, compare on held-out prompts."""

    backend: BackendConfig = field(default_factory=BackendConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rewards: tuple[RewardConfig, ...] = ()
    """reward functions, {function, weight, ...}"""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    policy: PolicySpec = field(default_factory=PolicySpec)
    condition: ConditionConfig | None = None
    """score that the policy is conditioned on in distillation, for example {label: numeric_answer, ask: 1}; needs
    distill.target tokens, policy.arguments with inputs [condition], and select.top_k that keeps bad candidates, too.
    null: none"""
    warm_start: bool = True
    """begin RL at what the distillation made; off: at the policy's own start, and nothing is distilled"""
    init: str | None = None
    """policy folder that RL begins at instead"""
    reference: str | None = None
    """policy folder that the KL penalty holds to; null: where RL begins"""
    algorithm: Literal["grpo", "ppo", "lpo"] = "grpo"
    """grpo, ppo: RL on fresh completions, and how it estimates its gradient; lpo: preferences among the labelled
    training candidates, by the rewards; settings in the section of the same name"""
    pipeline: str = "asn_policies:Pipeline"
    """class that makes a policy of a heuristic's processors"""
    mixture: str = "asn_policies:TokenStrategy"
    """class that mixes heuristics: what the controls of the comparison are made of"""
    heuristics: tuple[HeuristicSpec, ...] = ()
    """the declared grid of static rules"""
    grid: HeuristicGrid | None = None
    """static rules made by a function, after those of `heuristics`"""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    labellers: tuple[RewardConfig, ...] = ()
    """what candidates are rated by, {function, weight, ...}; none: the rewards"""
    select: SelectConfig = field(default_factory=SelectConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    lpo: LPOConfig = field(default_factory=LPOConfig)
    serve: ServeConfig | None = None
    """inference servers that sample the completions of grpo and ppo, for example {engine: vllm, policies: policies,
    pool: {urls: ["http://127.0.0.1:8000"]}}; null: in this process"""
    compare: CompareConfig = field(default_factory=CompareConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    promotion: PromotionConfig = field(default_factory=PromotionConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    bandit: BanditConfig = field(default_factory=BanditConfig)
    threads: int | None = None
    """threads for tensor operations; null: OMP_NUM_THREADS, or all cores"""

    def __post_init__(self) -> None:
        check_heuristic_names([heuristic.name for heuristic in self.heuristics])
        if self.threads is not None and self.threads < 1:
            raise InvalidValue("threads", self.threads, ">= 1", "null takes all cores")
        if self.condition is not None and (self.distill.target != "tokens" or not self.warm_start):
            found = f"with distill.target {self.distill.target}, warm_start {str(self.warm_start).lower()}"
            raise InvalidValue("condition", found, "with distill.target tokens, warm_start true", "or null")
        if len(self.grpo.pass_k) > 1:
            advice = (
                "its comparison has no parallel samples; scripts/parallel_samples.py trains and compares for several"
            )
            raise InvalidValue("grpo.pass_k", list(self.grpo.pass_k), "one number in a job", advice)
        if self.serve is not None and self.algorithm == "lpo":
            raise InvalidValue("serve", self.serve.engine, "null with algorithm lpo", "it learns from candidates alone")


def check_heuristic_names(names: Sequence[str]) -> None:
    """`InvalidValue` unless the names differ, are those of no learned policy, and can be those of folders."""
    for name in names:
        if not re.fullmatch(r"[\w=.,:+-]+( [\w=.,:+-]+)*", name) or name.startswith("."):
            raise InvalidValue("heuristic name", name, "letters, digits and = . , : + - with single spaces")
    if len(set(names)) != len(names):
        raise InvalidValue("heuristics", list(names), "names that differ")
    reserved = {DISTILLED, RL, *CONTROLS} & set(names)
    if reserved:
        raise InvalidValue("heuristics", sorted(reserved), "names other than those of the learned policies")
