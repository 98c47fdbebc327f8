"""Truncation rules on points: which points a sampling heuristic keeps.

Each function takes the current distribution over points in descending order of token probability (as sketches are)
and returns a keep mask. `logprobs` (..., N) are normalised log-probabilities of the points, `log_count` (..., N) the
log number of tokens in each; a token of point j has log-probability `logprobs[j] - log_count[j]`.

Head points hold one token (or exact ties), so a cut that falls in the head is exact. A tail point spans a range of
probability and is kept or cut whole: a cut that falls inside one keeps the whole point, as the rules keep ties. The
mass kept or cut in error is thus less than the mass of that one point.

Every rule keeps at least `min_tokens` tokens, counted in the rule's own order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asn_rl.ops.logprobs import entropy, expectation, normalize


def token_logprobs(logprobs: Tensor, log_count: Tensor) -> Tensor:
    """(..., N) log-probability of one token of each point."""
    return logprobs - log_count


def token_entropy(logprobs: Tensor, log_count: Tensor) -> Tensor:
    """(...) entropy over tokens, nats, tokens of a point taken as equally likely."""
    return entropy(logprobs) + expectation(logprobs, log_count)


def exclusive_cumsum(values: Tensor) -> Tensor:
    """(..., N) sum of all entries before each; in float64, because small probabilities follow large ones."""
    total = values.double().cumsum(-1)
    return total - values


def _counts(logprobs: Tensor, log_count: Tensor) -> Tensor:
    return torch.where(logprobs > -math.inf, log_count.exp(), 0.0)


def _at_least(keep: Tensor, logprobs: Tensor, log_count: Tensor, min_tokens: int) -> Tensor:
    return keep | (exclusive_cumsum(_counts(logprobs, log_count)).round() < min_tokens)


def top_k(logprobs: Tensor, log_count: Tensor, k: int, min_tokens: int = 1) -> Tensor:
    """The k most probable tokens, and ties of the k-th (Fan et al. 2018, arXiv:1805.04833)."""
    return _at_least(torch.zeros_like(logprobs, dtype=torch.bool), logprobs, log_count, max(k, min_tokens))


def top_p(logprobs: Tensor, log_count: Tensor, p: float, min_tokens: int = 1) -> Tensor:
    """The smallest set of most probable tokens whose mass reaches p (Holtzman et al. 2020, arXiv:1904.09751)."""
    # Rounded probabilities may add up to 1 before the last point; p = 1 must keep that one too.
    keep = exclusive_cumsum(logprobs.exp()) < p if p < 1 else torch.isfinite(logprobs)
    return _at_least(keep, logprobs, log_count, min_tokens)


def min_p(logprobs: Tensor, log_count: Tensor, ratio: float, min_tokens: int = 1) -> Tensor:
    """Tokens with at least `ratio` times the largest probability (Nguyen et al. 2024, arXiv:2407.01082)."""
    tokens = token_logprobs(logprobs, log_count)
    keep = tokens >= math.log(ratio) + tokens.amax(-1, keepdim=True) if ratio > 0 else torch.isfinite(tokens)
    return _at_least(keep, logprobs, log_count, min_tokens)


def epsilon(logprobs: Tensor, log_count: Tensor, threshold: float, min_tokens: int = 1) -> Tensor:
    """Tokens with probability at least `threshold` (Hewitt et al. 2022, arXiv:2210.15191, section 4.1)."""
    keep = token_logprobs(logprobs, log_count) >= math.log(threshold)
    return _at_least(keep, logprobs, log_count, min_tokens)


def eta(logprobs: Tensor, log_count: Tensor, threshold: float, min_tokens: int = 1) -> Tensor:
    """p >= min(eps, sqrt(eps) exp(-H)) (Hewitt et al. 2022, arXiv:2210.15191, equation 5)."""
    log_eps = math.log(threshold)
    bound = (0.5 * log_eps - token_entropy(logprobs, log_count)).clamp_max(log_eps).unsqueeze(-1)
    return _at_least(token_logprobs(logprobs, log_count) >= bound, logprobs, log_count, min_tokens)


def typical(logprobs: Tensor, log_count: Tensor, mass: float, min_tokens: int = 1) -> Tensor:
    """Tokens whose surprise is closest to the entropy, until `mass` is reached (Meister et al. 2023,
    arXiv:2202.00666). May drop the most probable token."""
    surprise = -token_logprobs(logprobs, log_count)
    distance = (surprise - token_entropy(logprobs, log_count).unsqueeze(-1)).abs()
    order = torch.argsort(distance, dim=-1, stable=True)  # empty points are infinitely far
    sorted_logprobs, sorted_count = logprobs.gather(-1, order), log_count.gather(-1, order)
    keep = _at_least(exclusive_cumsum(sorted_logprobs.exp()) < mass, sorted_logprobs, sorted_count, min_tokens)
    # Ties of the last kept distance stay, as in transformers' warper.
    bound = torch.where(keep, distance.gather(-1, order), -math.inf).amax(-1, keepdim=True)
    return distance <= bound


def top_n_sigma(logprobs: Tensor, log_count: Tensor, n: float, min_tokens: int = 1) -> Tensor:
    """Logits within n standard deviations of the largest (Tang et al. 2024, arXiv:2411.07641). The deviation is that
    of all finite logits (population form), so the kept set does not depend on the temperature.

    A sketch has no spread inside its tail points: with 64 + 32 of them the deviation was up to 6 % off on
    SmolLM2 rows (a larger tail lessens it).
    """
    tokens = token_logprobs(logprobs, log_count)
    count = _counts(logprobs, log_count).double()
    safe = torch.where(count > 0, tokens, 0.0).double()
    total = count.sum(-1, keepdim=True)
    mean = (count * safe).sum(-1, keepdim=True) / total
    deviation = ((count * (safe - mean).square()).sum(-1, keepdim=True) / total).sqrt()
    return _at_least(tokens >= tokens.amax(-1, keepdim=True) - n * deviation, logprobs, log_count, min_tokens)


def top_h(logprobs: Tensor, log_count: Tensor, alpha: float, min_tokens: int = 1) -> Tensor:
    """The longest prefix of most probable tokens whose renormalised entropy is at most `alpha` times that of the
    whole distribution (Baghaei Potraghloo et al. 2025, arXiv:2509.02510, algorithm 1).

    This is the paper's rule. The authors' code and transformers' warper compare partial sums of -p log p instead.
    """
    wide, wide_count = normalize(logprobs.double()), log_count.double()
    probs, one = wide.exp(), token_logprobs(wide, wide_count).exp()
    surprise = torch.where(probs > 0, wide_count - wide, 0.0)
    # A point stays if its first token fits.
    kept = exclusive_cumsum(probs) + one
    prefix_entropy = kept.log() + (exclusive_cumsum(probs * surprise) + one * surprise) / kept
    bound = alpha * token_entropy(wide, wide_count).unsqueeze(-1)
    # Grows along the prefix; cumulative rounding may not, so a prefix ends at its first violation.
    violated = (kept > 0) & (prefix_entropy > bound + 1e-9)
    return _at_least(violated.int().cumsum(-1) == 0, logprobs, log_count, min_tokens)


def zipf_top_k(logprobs: Tensor, log_count: Tensor, tied: Tensor, target_bits: Tensor, tokens: int = 100) -> Tensor:
    """(...) the k of Mirostat (Basu et al. 2021, arXiv:2007.14966, equations 20-30): the number of most probable
    tokens whose surprise stays below `target_bits` (...) under a Zipf fit of the `tokens` most probable ones.

    Args:
        tied: (..., N) bool, True where all tokens of a point are equally likely. The fit ends at the first point of
            unequal tokens, so with a head smaller than `tokens` it uses as many as there are.
    """
    point, count = token_logprobs(logprobs, log_count), _counts(logprobs, log_count).double()
    last_rank = count.cumsum(-1).round()
    in_order = (tied | (count == 0)).int().cummin(-1).values.bool()
    fitted = torch.where(in_order, last_rank, 0.0).amax(-1, keepdim=True).clamp(1, tokens)
    # Equation 26 in sums over points: between tied tokens b_i = 0.
    log_ratios = (1 + 1 / torch.arange(1, tokens, dtype=torch.float64, device=point.device)).log()
    squares = torch.cat([log_ratios.new_zeros(1), log_ratios.square().cumsum(0)])[fitted.long() - 1]
    following = torch.roll(point.flip(-1).cummax(-1).values.flip(-1), -1, -1)
    used = (count > 0) & (last_rank < fitted)
    t = torch.where(used, (1 + 1 / last_rank.clamp_min(1)).log(), 0.0)
    b = torch.where(used, point - torch.where(used, following, 0.0), 0.0).double()
    exponent = ((t * b).sum(-1) / squares.squeeze(-1).clamp_min(1e-12)).clamp_min(1e-3)
    # (1 - N^-e) / e with e = exponent - 1, also where e is 0 or negative.
    vocabulary = count.sum(-1)
    surplus = torch.where((exponent - 1).abs() < 1e-9, 1e-9, exponent - 1)
    harmonic = -torch.expm1(-surplus * vocabulary.log()) / surplus
    k = (torch.exp2(target_bits.double()) / harmonic).pow(1 / exponent)
    return k.round().clamp(torch.ones_like(k), vocabulary)
