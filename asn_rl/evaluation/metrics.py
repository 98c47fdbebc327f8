"""Metrics of completions that were generated and scored once: one number a prompt and arm, in closed form.

A metric of k samples is the mean over all choices of k of those at hand, which is unbiased for k fresh samples; nothing
is drawn. NaN is masked: a masked sample is left out, and a prompt with fewer than k samples left is masked itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from asn_rl.errors import InvalidValue, UnknownName
from asn_rl.evaluation.samples import Samples, by_group, by_texts
from asn_rl.evaluation.statistics import masked_mean
from asn_rl.evaluation.voting import expected_best_of, pass_at_k, vote_at_k
from asn_rl.ops.ngrams import distinct_n, self_bleu


def accuracy(samples: Samples) -> np.ndarray:
    """(P, A) mean score."""
    return masked_mean(samples.scores)


def verified(samples: Samples, verifier: str) -> np.ndarray:
    """(P, A) mean score of a verifier by its name.

    Raises:
        UnknownName: no such verifier.
    """
    if verifier not in samples.verifiers:
        raise UnknownName("verifier", verifier, samples.verifiers)
    return masked_mean(samples.verifiers[verifier])


def pass_at(samples: Samples, k: int) -> np.ndarray:
    """(P, A) probability that one of k samples is correct (Chen et al. 2021, arXiv:2107.03374, eq. 1).

    Raises:
        InvalidValue: scores other than 0 and 1.
    """
    known = samples.scores[~np.isnan(samples.scores)]
    if not np.isin(known, (0, 1)).all():
        other = float(known[~np.isin(known, (0, 1))][0])
        raise InvalidValue("score", other, "0 or 1 for pass@k", "for graded scores take best_of@k")
    return by_group(samples, k, lambda i, kept: _pass_at(int(kept.sum()), int(samples.scores[i][kept].sum()), k))


_pass_at = lru_cache(maxsize=None)(pass_at_k)


def majority_at(samples: Samples, k: int) -> np.ndarray:
    """(P, A) probability that the majority vote of k samples is correct (self-consistency, Wang et al. 2022,
    arXiv:2203.11171), ties broken by an even draw. Votes without any answer are not correct."""
    assert samples.answers is not None
    return by_group(samples, k, lambda i, kept: vote_at_k(samples.answers[i][kept], k))  # type: ignore[index]


def best_of(samples: Samples, k: int, scorer: str) -> np.ndarray:
    """(P, A) mean score of the sample of k that `scorer` ranks first, equal ranks sharing their place
    (`voting.expected_best_of`). A sample that the verifier or the scorer masks is left out."""
    if scorer not in samples.scorers:
        raise UnknownName("scorer", scorer, samples.scorers)
    ranks = samples.scorers[scorer]
    return by_group(
        samples, k, lambda i, kept: expected_best_of(ranks[i][kept], samples.scores[i][kept], k), ~np.isnan(ranks)
    )


def win_rate(samples: Samples) -> np.ndarray:
    """(P, A) share of the comparisons with the reference that a judge decides for the arm, ties half."""
    return masked_mean(_array(samples.wins))


def tokens(samples: Samples) -> np.ndarray:
    """(P, A) mean length of a completion, tokens."""
    return masked_mean(_array(samples.tokens))


def truncated(samples: Samples) -> np.ndarray:
    """(P, A) share of the completions that the token limit cut off."""
    return masked_mean(_array(samples.truncated))


def cost(samples: Samples) -> np.ndarray:
    """(P, A) what all samples of a prompt cost: tokens times the price of one."""
    lengths = _array(samples.tokens)
    return np.where(np.isnan(lengths).all(-1), np.nan, np.nansum(lengths, -1)) * samples.price


def distinct(samples: Samples, n: int) -> np.ndarray:
    """(P, A) distinct-n over the completions of a prompt (`ops.ngrams.distinct_n`)."""
    return by_texts(samples, 1, lambda texts: distinct_n([text.split() for text in texts], n))


def mean_self_bleu(samples: Samples) -> np.ndarray:
    """(P, A) mean self-BLEU of a prompt's completions (`ops.ngrams.self_bleu`); masked for fewer than two."""
    return by_texts(samples, 2, lambda texts: float(np.mean(self_bleu([text.split() for text in texts]))))


def vendi(samples: Samples) -> np.ndarray:
    """(P, A) Vendi score of a prompt's completions: the effective number of different ones, by the cosine kernel of
    sentence embeddings (`ops.kernels.vendi_score`).

    Raises:
        RewardError: the encoder is not installed or cannot be loaded.
    """
    from asn_rl.ops.kernels import vendi_score
    from asn_rl.rewards.embedding_diversity import group_kernels, load_encoder

    assert samples.encoder is not None
    assert samples.texts is not None
    encoder = load_encoder(samples.encoder)
    found = np.full(samples.scores.shape[:2], np.nan)
    for prompt, groups in enumerate(samples.texts):  # a prompt at a time: its arms share many completions
        given = [[text for text in group if text is not None] for group in groups]
        for arm, kernel in enumerate(group_kernels(given, encoder)):
            if len(kernel):
                found[prompt, arm] = float(vendi_score(kernel))
    return found


@dataclass(frozen=True)
class Metric:
    """One kind of figure."""

    function: Callable[..., np.ndarray]
    """(samples[, k][, scorer]) -> (P, A) one number a prompt and arm; NaN: masked"""
    needs: tuple[str, ...]
    """fields of `Samples`"""
    better: Literal["higher", "lower"]
    title: str
    options: Literal["", "@k", "@k:scorer", ":verifier"] = ""
    """what its name goes on with: `pass@8`, `best_of@8:reward_model`, `score:strict`"""


METRICS: dict[str, Metric] = {
    "accuracy": Metric(accuracy, ("scores",), "higher", "mean score"),
    "score": Metric(verified, ("verifiers",), "higher", "mean score of a verifier", ":verifier"),
    "pass": Metric(pass_at, ("scores",), "higher", "any of k correct", "@k"),
    "maj": Metric(majority_at, ("scores", "answers"), "higher", "majority of k correct", "@k"),
    "best_of": Metric(best_of, ("scores", "scorers"), "higher", "score of the best of k by a scorer", "@k:scorer"),
    "win_rate": Metric(win_rate, ("wins",), "higher", "share won against the reference by a judge, ties half"),
    "tokens": Metric(tokens, ("tokens",), "lower", "tokens a completion"),
    "truncated": Metric(truncated, ("truncated",), "lower", "share cut off by the token limit"),
    "cost": Metric(cost, ("tokens",), "lower", "cost of all samples of a prompt"),
    "distinct_1": Metric(lambda s: distinct(s, 1), ("texts",), "higher", "distinct words"),
    "distinct_2": Metric(lambda s: distinct(s, 2), ("texts",), "higher", "distinct word pairs"),
    "distinct_3": Metric(lambda s: distinct(s, 3), ("texts",), "higher", "distinct word triples"),
    "self_bleu": Metric(mean_self_bleu, ("texts",), "lower", "self-BLEU"),
    "vendi": Metric(vendi, ("texts", "encoder"), "higher", "different completions (Vendi)"),
}
"""A name is `accuracy`, `pass@8`, `best_of@8:reward_model`."""


@dataclass(frozen=True)
class MetricName:
    """A metric's name, taken apart."""

    metric: Metric
    k: int = 1
    """samples that one answer takes"""
    which: str = ""
    """scorer or verifier"""


def parse_name(name: str) -> MetricName:
    """Take `pass@8` or `best_of@8:reward_model` apart.

    Raises:
        UnknownName: no such metric.
        InvalidValue: `@k` or `:scorer` where the metric has none, or the other way round.
    """
    found = re.fullmatch(r"(\w+)(?:@([1-9]\d*))?(?::(.+))?", name)
    stem, k, which = found.groups() if found else (re.split("[@:]", name)[0], None, None)
    if stem not in METRICS:
        raise UnknownName("metric", stem, METRICS)
    metric = METRICS[stem]
    if not found or (bool(k), bool(which)) != ("@k" in metric.options, ":" in metric.options):
        advice = " with k >= 1 samples" if "@k" in metric.options else ""
        raise InvalidValue("metric", name, repr(stem + metric.options) + advice)
    return MetricName(metric, int(k or 1), which or "")


def measure(samples: Samples, name: str) -> np.ndarray:
    """(P, A) a metric by its name, NaN: masked.

    Raises:
        UnknownName: no such metric or scorer.
        InvalidValue: a name that is not of the metric's form, samples that lack what it needs, or fewer than k of them.
    """
    found = parse_name(name)
    missing = [need for need in found.metric.needs if not _known(samples, need)]
    if missing:
        raise InvalidValue(f"samples for {name}", f"none with {', '.join(missing)}", f"with {found.metric.needs}")
    if found.k > samples.samples:
        raise InvalidValue(f"k of {name}", found.k, f"in [1, {samples.samples}], the samples of a prompt")
    options = {"": (), "@k": (found.k,), "@k:scorer": (found.k, found.which), ":verifier": (found.which,)}
    return found.metric.function(samples, *options[found.metric.options])


def available(samples: Samples, ks: Sequence[int] = ()) -> list[str]:
    """Names of all metrics that these samples allow, those of several samples for each k."""
    tails = {
        "": [""],
        "@k": [f"@{k}" for k in ks],
        "@k:scorer": [f"@{k}:{scorer}" for k in ks for scorer in samples.scorers],
        ":verifier": [f":{verifier}" for verifier in samples.verifiers],
    }
    return [
        stem + tail
        for stem, metric in METRICS.items()
        if all(_known(samples, need) for need in metric.needs)
        for tail in tails[metric.options]
    ]


def _known(samples: Samples, need: str) -> bool:
    value = getattr(samples, need)
    return value is not None and (need not in ("scorers", "verifiers") or bool(value))


def _array(values: np.ndarray | None) -> np.ndarray:
    assert values is not None
    return values.astype(np.float64)
