"""Bradley-Terry fit of a Swiss tournament of 143 candidates, 9 rounds in both orders, from a noisy simulated judge.

The candidates' strengths are drawn from N(0, 1.5^2) nats; the fit does not know that and takes the labeller's default
prior, N(0, 1). The judge answers as a real one does, with a probability:

    P(first is better) = sigmoid(strength of first - strength of second + 0.3 + noise),  noise ~ N(0, 1)

with fresh noise for every answer and 0.3 nats in favour of whoever comes first. A pair's two answers are averaged. The
ratio is choix's time over ours for the fit of the same comparisons (choix knows no soft outcomes: for both sides a
comparison is won by who got more than one half). Three things must hold: our fit of the soft outcomes takes under 50
ms, Kendall's tau between fitted and generating strengths is at least 0.8 (mean over tournaments), and the ratio is at
least 3; where one of the first two fails the ratio is reported as 0. Harder judges are reported: more noise, and
answers that are a single letter drawn with that probability.
"""

from __future__ import annotations

import inspect
import sys

import choix
import numpy as np
from _benchmark import finish, options, seconds
from scipy.stats import kendalltau

from asn_rl.ops.pairwise import bradley_terry, swiss_pairs, swiss_rounds
from asn_rl.rewards.judge import pairwise_judge

PLAYERS = 143
SPREAD, BIAS, NOISE = 1.5, 0.3, 1.0
PRIOR: float = inspect.signature(pairwise_judge).parameters["prior"].default
JUDGES = (
    ("soft, noise 1 (the goal)", NOISE, False),
    ("soft, noise 2", 2.0, False),
    ("soft, noise 4", 4.0, False),
    ("one letter drawn, noise 0", 0.0, True),
    ("one letter drawn, noise 1", 1.0, True),
)
FIT_SECONDS, TAU, RATIO = 0.05, 0.8, 3.0


def main() -> int:
    args = options(__doc__ or "", "python scripts/benchmark_bradley_terry.py --quick", tournaments=20, repeats=50)
    tournaments, repeats = (5, 20) if args.quick else (args.tournaments, args.repeats)
    print(f"{PLAYERS} players, {swiss_rounds(PLAYERS)} rounds, both orders; {tournaments} tournaments a judge")
    print(f"{'judge':34} {'tau':>7} {'lowest':>7} {'in 90% stderr band':>19}")
    tau = {}
    for name, noise, hard in JUDGES:
        taus, covered = agreement(noise, hard, tournaments)
        tau[name] = float(np.mean(taus))
        print(f"{name:34} {tau[name]:7.3f} {min(taus):7.3f} {np.mean(covered):19.0%}")
    reached = tau[JUDGES[0][0]]

    wins, _ = tournament(0, NOISE, hard=False)
    soft = seconds(lambda: bradley_terry(wins, PRIOR), repeats)
    won = np.rint(np.where(wins > wins.T, wins + wins.T, 0.0))  # hard outcomes for both sides
    games = [(i, j) for i, j in np.argwhere(won > 0).tolist() for _ in range(int(won[i, j]))]
    ours = seconds(lambda: bradley_terry(won, PRIOR), repeats)
    theirs = seconds(lambda: choix.opt_pairwise(PLAYERS, games, alpha=PRIOR**-2 / 2), repeats)
    gap = np.abs(bradley_terry(won, PRIOR).strength - choix.opt_pairwise(PLAYERS, games, alpha=PRIOR**-2 / 2)).max()
    print(
        f"fit of the soft outcomes {1e3 * soft:.1f} ms (goal < {1e3 * FIT_SECONDS:.0f}), tau {reached:.3f} (goal {TAU})"
    )
    print(f"hard outcomes: ours {1e3 * ours:.1f} ms, choix {1e3 * theirs:.1f} ms; largest difference {gap:.1e} nats")
    if soft >= FIT_SECONDS or reached < TAU:
        print("too slow or too far from the generating strengths: the ratio below does not count")
        return finish("benchmark_bradley_terry", 0.0, RATIO, at_least=True)
    return finish("benchmark_bradley_terry", theirs / ours, RATIO, at_least=True)


def agreement(noise: float, hard: bool, tournaments: int) -> tuple[list[float], list[float]]:
    """Kendall's tau with the generating strengths, and the share of those inside the 90% band, of each tournament."""
    taus, covered = [], []
    for seed in range(tournaments):
        wins, truth = tournament(seed, noise, hard)
        found = bradley_terry(wins, PRIOR)
        taus.append(float(np.asarray(kendalltau(found.strength, truth))[0]))
        error = np.abs(found.strength - (truth - truth.mean()))
        covered.append(float((error < 1.645 * found.stderr).mean()))
    return taus, covered


def tournament(seed: int, noise: float, hard: bool) -> tuple[np.ndarray, np.ndarray]:
    """(n, n) averaged outcomes of a Swiss tournament, and the (n,) strengths behind them."""
    generator = np.random.default_rng(seed)
    strength = SPREAD * generator.standard_normal(PLAYERS)

    def answer(first: int, second: int) -> float:
        logit = strength[first] - strength[second] + BIAS + noise * generator.standard_normal()
        probability = 1 / (1 + np.exp(-logit))
        return float(generator.random() < probability) if hard else float(probability)

    wins, played, scores = np.zeros((PLAYERS, PLAYERS)), np.zeros((PLAYERS, PLAYERS), int), np.zeros(PLAYERS)
    for number in range(swiss_rounds(PLAYERS)):
        pairing = swiss_pairs(scores, played, number, seed)
        for i, j in pairing.pairs:
            share = (answer(i, j) + 1 - answer(j, i)) / 2
            wins[i, j] += share
            wins[j, i] += 1 - share
            played[i, j] = played[j, i] = played[i, j] + 1
            scores[i] += share
            scores[j] += 1 - share
        if pairing.bye is not None:
            scores[pairing.bye] += 0.5
    return wins, strength


if __name__ == "__main__":
    sys.exit(main())
