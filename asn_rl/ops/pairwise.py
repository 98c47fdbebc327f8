"""From pairwise comparisons to strengths: Bradley-Terry ratings, and the Swiss system that chooses whom to compare.

Own code where libraries exist, because outcomes are soft (a judge's probability), strengths need uncertainties, and
comparisons may be missing altogether.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from asn_rl.errors import InvalidValue

_NEWTON_STEPS = 200
_EXACT_PLAYERS = 12
"""up to this many players a pairing with rematches is replaced by the best one there is"""


@dataclass(frozen=True)
class Ratings:
    """Bradley-Terry strengths of n players."""

    strength: np.ndarray
    """(n,) nats, mean 0: P(i beats j) = sigmoid(strength[i] - strength[j])"""
    stderr: np.ndarray
    """(n,) standard deviations of the Gaussian approximation to the posterior; the prior's for who never played"""


def bradley_terry(wins: np.ndarray, prior: float = 1.0) -> Ratings:
    """Most probable strengths under a Gaussian prior (Bradley & Terry 1952, Biometrika 39:324), by Newton's method.

    The prior N(0, prior^2) makes the solution finite and unique whatever was compared: winners of every game, groups
    that never met and players who never played included. Each connected group has mean 0 by itself.

    Args:
        wins: (n, n) wins[i, j] >= 0 is how often i beat j; a soft outcome gives p to one side and 1 - p to the other,
            a tie one half to each. The diagonal is 0.
        prior: standard deviation of the strengths before any comparison, nats.

    Raises:
        InvalidValue: not a square matrix of finite counts >= 0 with a zero diagonal, or prior not above 0.
    """
    wins = _checked_wins(wins)
    if not 0 < prior < math.inf:
        raise InvalidValue("prior", prior, "a finite number > 0")
    posterior = _Posterior(wins, prior**-2)
    strength = np.zeros(len(wins))
    for _ in range(_NEWTON_STEPS):
        gradient, curvature = posterior.derivatives(strength)
        step = posterior.damped(strength, np.linalg.solve(curvature, gradient))
        strength = strength + step
        if np.abs(step).max(initial=0.0) < 1e-10:
            break
    covariance = np.linalg.inv(posterior.derivatives(strength)[1])
    centre = strength.mean() if len(strength) else 0.0  # 0 but for rounding
    return Ratings(strength - centre, np.sqrt(np.diag(covariance)))


def _checked_wins(wins: np.ndarray) -> np.ndarray:
    wins = np.asarray(wins, dtype=np.float64)
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1]:
        raise InvalidValue("wins shape", wins.shape, "(players, players)")
    if not (np.isfinite(wins).all() and (wins >= 0).all() and (np.diag(wins) == 0).all()):
        raise InvalidValue("wins", wins, "finite counts >= 0 with a zero diagonal: nobody plays themselves")
    return wins


class _Posterior:
    """Log-posterior of strengths, up to a constant. Only pairs that met are computed: a Swiss tournament has few."""

    def __init__(self, wins: np.ndarray, precision: float) -> None:
        self.players, self.precision = len(wins), precision
        self.winner, self.loser = np.nonzero(wins)
        self.weight = wins[self.winner, self.loser]

    def value(self, strength: np.ndarray) -> float:
        # log sigmoid(x) = -log(1 + exp(-x)), without overflow
        losses = np.logaddexp(0.0, strength[self.loser] - strength[self.winner])
        return float(-(self.weight @ losses) - 0.5 * self.precision * (strength @ strength))

    def derivatives(self, strength: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) gradient, and (n, n) minus the Hessian."""
        surprise = np.exp(-np.logaddexp(0.0, strength[self.winner] - strength[self.loser]))  # P(the loser wins)
        pull = self.weight * surprise
        gained, lost = (np.bincount(side, pull, self.players) for side in (self.winner, self.loser))
        information = np.zeros((self.players, self.players))
        information[self.winner, self.loser] = pull * (1 - surprise)
        information += information.T
        curvature = np.diag(information.sum(1) + self.precision) - information
        return gained - lost - self.precision * strength, curvature

    def damped(self, strength: np.ndarray, step: np.ndarray) -> np.ndarray:
        """A Newton step, halved until it does not lower the value: far from the top a full one may overshoot."""
        value = self.value(strength)
        lowest = value - 1e-12 * (1 + abs(value))  # near the top the change is smaller than the value's rounding
        while self.value(strength + step) < lowest:
            step = step / 2
        return step


@dataclass(frozen=True)
class Pairing:
    """Who meets whom in one round."""

    pairs: list[tuple[int, int]]
    """every player once, the one with the bye left out"""
    bye: int | None
    """who sits out; None for an even number of players"""


def swiss_rounds(players: int) -> int:
    """ceil(log2 n) + 1, the reference project's number of rounds (one more than finds an undisputed winner).

    0 where there is nobody to meet; never more than lets everyone meet everyone once.
    """
    if players < 2:
        return 0
    distinct = players - 1 if players % 2 == 0 else players
    return min(math.ceil(math.log2(players)) + 1, distinct)


def swiss_pairs(scores: np.ndarray, played: np.ndarray, round_number: int, seed: int) -> Pairing:
    """Pair players of similar score who have not met.

    From the highest score down, each player meets the closest below among those met least often; equal scores are in
    a random order that (seed, round_number) decides, so a first round with equal scores is a random pairing. What is
    left at the bottom may be rematches: then two pairs swap partners while that lowers the number of rematches. With m
    players paired this ends without any in the first m / 2 rounds (each of a rematch's two players has m - 1 - rounds
    opponents left, more than one in two, so some pair can take the swap). Later on, up to 12 players get the pairing
    with the fewest rematches that exists.

    With an odd number of players the bye goes to the lowest score among those who had the fewest: nobody has two
    before everyone had one.

    Args:
        scores: (n,) points so far, higher is better.
        played: (n, n) symmetric, how often two players met.
        round_number: rounds before this one. A player's byes are round_number minus their meetings.
        seed: decides the order of equal scores.

    Raises:
        InvalidValue: `played` has another shape, is not symmetric, or has more meetings than rounds.
    """
    scores = np.asarray(scores, dtype=np.float64)
    played = _checked_played(scores, played, round_number)
    tiebreak = np.random.default_rng([seed, round_number]).permutation(len(scores))
    order = np.lexsort((tiebreak, -scores)).tolist()
    bye = None
    if len(order) % 2:
        byes = round_number - played.sum(1)
        bye = min(reversed(order), key=lambda player: byes[player])
        order.remove(bye)
    place = {player: i for i, player in enumerate(order)}
    pairs = _greedy(order, played)
    pairs = _swapped(pairs, played, place)
    if len(order) <= _EXACT_PLAYERS and any(played[i, j] for i, j in pairs):
        pairs = _fewest_rematches(order, played)
    return Pairing(pairs, bye)


def _checked_played(scores: np.ndarray, played: np.ndarray, round_number: int) -> np.ndarray:
    played = np.asarray(played)
    if scores.ndim != 1 or played.shape != (len(scores), len(scores)):
        raise InvalidValue("played shape", played.shape, f"(players, players) for scores of shape {scores.shape}")
    if (played != played.T).any() or played.diagonal().any() or (played < 0).any():
        raise InvalidValue("played", played, "symmetric counts >= 0 with a zero diagonal")
    if (played.sum(1) > round_number).any():
        most = int(played.sum(1).max())
        raise InvalidValue("round_number", round_number, f">= {most}", "a player meets one opponent a round")
    return played.astype(np.int64)


def _greedy(order: list[int], played: np.ndarray) -> list[tuple[int, int]]:
    """From the top: the closest opponent below, of those met least often."""
    left, pairs = list(order), []
    while left:
        player = left.pop(0)
        opponent = min(left, key=lambda other: played[player, other])  # the first of equals is the closest
        left.remove(opponent)
        pairs.append((player, opponent))
    return pairs


def _swapped(pairs: list[tuple[int, int]], played: np.ndarray, place: dict[int, int]) -> list[tuple[int, int]]:
    """Pairs exchange partners while that lowers the number of earlier meetings; the closest such exchange first."""
    pairs = list(pairs)

    def cost(*chosen: tuple[int, int]) -> tuple[int, int]:
        return sum(int(played[i, j]) for i, j in chosen), sum(abs(place[i] - place[j]) for i, j in chosen)

    while True:
        exchanges = [
            (cost(first, second), k, other, first, second)
            for k, (a, b) in enumerate(pairs)
            if played[a, b]
            for other, (c, d) in enumerate(pairs)
            if other != k
            for first, second in (((a, c), (b, d)), ((a, d), (b, c)))
            if cost(first, second)[0] < cost((a, b), (c, d))[0]
        ]
        if not exchanges:
            return pairs
        _, k, other, first, second = min(exchanges)
        pairs[k], pairs[other] = first, second


def _fewest_rematches(order: list[int], played: np.ndarray) -> list[tuple[int, int]]:
    """The pairing with the fewest earlier meetings, of those the closest: dynamic programming over sets of players."""
    best: dict[int, tuple[int, int, list[tuple[int, int]]]] = {0: (0, 0, [])}

    def solve(left: int) -> tuple[int, int, list[tuple[int, int]]]:
        if left not in best:
            i = (left & -left).bit_length() - 1
            options = []
            for j in range(i + 1, len(order)):
                if left >> j & 1:
                    meetings, distance, rest = solve(left & ~(1 << i | 1 << j))
                    met = int(played[order[i], order[j]])
                    options.append((meetings + met, distance + (j - i) ** 2, [(order[i], order[j]), *rest]))
            best[left] = min(options)
        return best[left]

    return solve((1 << len(order)) - 1)[2]
