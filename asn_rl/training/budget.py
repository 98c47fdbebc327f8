"""What tokens cost: a fixed price, or the price that holds their mean number to a limit."""

from __future__ import annotations

from dataclasses import dataclass

from asn_rl.errors import InvalidValue, check_at_least, check_positive


@dataclass(frozen=True)
class BudgetConfig:
    """A price per token, taken off the reward: fixed, or found by dual ascent under a constraint. One of the two."""

    price: float | None = None
    """reward that every token costs"""
    max_mean_tokens: float | None = None
    """most tokens a completion may have in the mean; the price of a token rises and falls until that holds"""
    dual_learning_rate: float = 0.05
    """what the price of max_mean_tokens tokens moves by in a step with twice as many, in units of the reward"""
    dual_damping: float = 1.0
    """what is added to that price while a step has twice as many; 0, plain dual ascent, swings about the limit"""

    def __post_init__(self) -> None:
        if (self.price is None) == (self.max_mean_tokens is None):
            given = {"price": self.price, "max_mean_tokens": self.max_mean_tokens}
            raise InvalidValue("budget", given, "one of price and max_mean_tokens", "a constraint finds its own price")
        if self.price is not None:
            check_positive(self, "price")
        if self.max_mean_tokens is not None and not self.max_mean_tokens >= 1:
            raise InvalidValue("max_mean_tokens", self.max_mean_tokens, ">= 1", "a completion has at least one token")
        check_positive(self, "dual_learning_rate")
        check_at_least(self, 0, "dual_damping")

    def check_against(self, max_new_tokens: int) -> None:
        """`InvalidValue` for a limit that no completion can exceed."""
        if self.max_mean_tokens is not None and self.max_mean_tokens >= max_new_tokens:
            advice = "lower it, or leave the budget out"
            raise InvalidValue("max_mean_tokens", self.max_mean_tokens, f"< max_new_tokens ({max_new_tokens})", advice)


@dataclass(frozen=True)
class Price:
    """What a token costs in a step."""

    token: float = 0.0
    """reward taken off for each"""
    multiplier: float = 0.0
    """of the constraint, in reward for max_mean_tokens tokens; 0 under a fixed price"""


def first_price(budget: BudgetConfig | None) -> Price:
    """Before the first step."""
    return Price() if budget is None or budget.price is None else Price(budget.price)


def next_price(budget: BudgetConfig | None, price: Price, mean_tokens: float) -> Price:
    """After a step of completions with `mean_tokens` tokens in the mean.

    Under a constraint the multiplier m is that of the Lagrangian E[reward] - m (E[tokens] / limit - 1), moved by a
    projected step of dual ascent, m <- max(0, m + dual_learning_rate * excess) with excess = mean_tokens / limit - 1
    (Tessler et al. 2018, arXiv:1805.11074). A token costs max(0, m + dual_damping * excess) / limit: the proportional
    term answers at once and keeps price and policy from chasing each other (Stooke et al. 2020, arXiv:2007.03964,
    algorithm 2, without the derivative).
    """
    if budget is None or budget.max_mean_tokens is None:
        return price
    excess = mean_tokens / budget.max_mean_tokens - 1
    multiplier = max(0.0, price.multiplier + budget.dual_learning_rate * excess)
    return Price(max(0.0, multiplier + budget.dual_damping * excess) / budget.max_mean_tokens, multiplier)
