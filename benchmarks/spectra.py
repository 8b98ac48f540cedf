"""Singular values worth testing.

They are chosen and not computed, so they are known exactly.

The spectrum of a trained weight matrix is a random bulk with a few larger values on top. The bulk is Marchenko and
Pastur's, somewhat wider: its quantiles times those of a lognormal distribution with a width of 0.1 to 0.2. (0.12 fits
the middle 80 percent of the MLPs and the embedding of SmolLM2-135M within a few percent. Without it, matrices four
times as long as wide would have no values below the score's threshold, but trained ones have many.)

The other kinds are hard for a scan that works with squares of singular values: the eigenvalues of W Wᵀ are all wrong
by about the same amount, and those far below the largest lose their accuracy.
"""

from enum import StrEnum
from statistics import NormalDist

import numpy as np

# Standard deviation of the entries of a random bulk, as in a trained model.
_WEIGHT_STD = 0.02


class Kind(StrEnum):
    """A family of spectra, from which each matrix draws one."""

    BULK_AND_SPIKES = "bulk_and_spikes"  # a bulk, and 3 to 12 values up to 10 times its edge
    POWER_LAW = "power_law"  # s_i ~ i^-a with a of 0.5 to 0.8, without a bulk
    NEAR_LOW_RANK = "near_low_rank"  # a sixteenth of the values is large; the rest is a bulk 2000 times smaller
    HUGE_SIGMA1_1E2 = "huge_sigma1_1e2"  # a bulk, and one value 100 times q25
    HUGE_SIGMA1_1E3 = "huge_sigma1_1e3"
    HUGE_SIGMA1_1E4 = "huge_sigma1_1e4"


_SIGMA1_OVER_Q25 = {Kind.HUGE_SIGMA1_1E2: 1e2, Kind.HUGE_SIGMA1_1E3: 1e3, Kind.HUGE_SIGMA1_1E4: 1e4}


def draw(kind: Kind, short: int, long: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a spectrum for `short` x `long`: float64, (short,), descending, positive."""
    # A score is inversely proportional to the scale of the weights, so different scales avoid ties in a group.
    scale = _WEIGHT_STD * np.sqrt(long) * np.exp(rng.uniform(-0.3, 0.3))
    edge = 1 + np.sqrt(short / long)
    s = bulk_quantiles(short, short / long) * _lognormal_quantiles(short, rng.uniform(0.1, 0.2))
    if kind is Kind.BULK_AND_SPIKES:
        spikes = min(int(rng.integers(3, 13)), max(1, short // 4))
        s[:spikes] = edge * np.exp(rng.uniform(np.log(1.2), np.log(10), spikes))
    elif kind is Kind.POWER_LAW:
        s = edge * np.arange(1, short + 1, dtype=np.float64) ** -rng.uniform(0.5, 0.8)
    elif kind is Kind.NEAR_LOW_RANK:
        carriers = max(1, short // 16)
        s /= 2000
        s[:carriers] = edge * np.geomspace(1, 0.1, carriers)
    else:
        s[0] = _SIGMA1_OVER_Q25[kind] * np.quantile(s, 0.25)
    return np.asarray(scale * np.sort(s)[::-1])


def bulk_quantiles(count: int, beta: float) -> np.ndarray:
    """Return the limit of a random matrix's singular values, as even quantiles.

    With independent entries of variance 1 / long, the eigenvalues of W Wᵀ fill [(1 - √beta)², (1 + √beta)²].
    At 1 + beta + 2 √beta cos t their density in t is (2/pi) sin² t / (that), smooth also where beta is 1.

    Args:
        count: the number of values, the short side.
        beta: short / long, in (0, 1].

    Returns:
        float64, (count,), descending: the quantiles (i + 1/2) / count of the square root's distribution.
    """
    t = np.linspace(0, np.pi, 200_001)
    eigenvalues = 1 + beta + 2 * np.sqrt(beta) * np.cos(t)
    # At beta = 1 both vanish at t = pi, where the limit of the quotient is 1/2.
    density = np.divide(np.sin(t) ** 2, eigenvalues, out=np.full_like(t, 0.5), where=eigenvalues > 1e-12)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    # t grows as the eigenvalues fall, so equal steps of mass give descending values.
    angles = np.interp((np.arange(count) + 0.5) / count * mass[-1], mass, t)
    return np.asarray(np.sqrt(1 + beta + 2 * np.sqrt(beta) * np.cos(angles)))


def _lognormal_quantiles(count: int, width: float) -> np.ndarray:
    normal = NormalDist()
    return np.exp(width * np.array([normal.inv_cdf(1 - (i + 0.5) / count) for i in range(count)]))
