"""Other measures of a matrix, from the singular values that its record holds: no rescan, no weights.

Each is a pure function of the singular values S, (k,), and the matrix's shape n x m, k = min(n, m); neither the order
of S nor which of n and m is the larger matters. All but `spectrum` are the same for W and cW. None is "no measure",
and is ranked last; everything else is finite. On noise alone (independent normal entries) each has a value that
depends on beta = k / max(n, m), and some on k: `python -m benchmarks.noise` prints them.

Which end of a measure is worth training first is a judgement, so `MEASURES` has it as data, with the reason.
No published comparison that we know of shows that any of them chooses better than chance; `random` is there to
measure that against. Pure numpy.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from .snr import score


class Metric(StrEnum):
    """The name of a measure, as `--metric` takes it."""

    SPECTRUM = "spectrum"
    SCALE_FREE = "scale-free"
    MARCHENKO_PASTUR = "marchenko-pastur"
    STABLE_RANK = "stable-rank"
    EFFECTIVE_RANK = "effective-rank"
    CONDITION = "condition"
    ALPHA = "alpha"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure, and how modules are chosen by it.

    Attributes:
        of_spectrum: (S, n, m) to a finite value, or None for no measure; itself None for `random`, which looks at no
            spectrum.
        larger_first: whether the larger value is chosen first.
        why: the reason for that, a clause.
    """

    of_spectrum: Callable[[np.ndarray, int, int], float | None] | None
    larger_first: bool
    why: str

    def rank_key(self, value: float | None) -> float:
        """What a selection sorts by, the largest first: the value, negated where the smaller is chosen first."""
        return -math.inf if value is None else value if self.larger_first else -value


def spectrum(singular_values: np.ndarray, n: int, m: int) -> float:
    """Spectrum's score (see `snr`), the sum above tau over the sum below it, divided by S[0].

    Inversely proportional to the scale of W, but where nothing is below tau: there it is sum S / S[0] and scale-free.
    On noise it jumps at a beta of 0.27, below which nothing is under tau. 1.0 for a vector, 0.0 for zeros.
    """
    return score(_descending(singular_values), n, m).snr


def scale_free(singular_values: np.ndarray, n: int, m: int) -> float:
    """The share of sum S that is above Spectrum's tau, in [0, 1].

    Ranks as Spectrum's sum above tau over its sum below does, without the division by S[0] that makes that depend on
    the scale, and without the jump where the sum below is empty: the share is then 1.0. On noise it still grows as
    beta falls and is 1.0 below 0.27, since tau takes the spread of S for the noise in it.
    0.0 for zeros, 1.0 for a vector.
    """
    s = _relative(singular_values)
    return 0.0 if s is None else _share_above(s, score(s, n, m).tau)


def marchenko_pastur(singular_values: np.ndarray, n: int, m: int) -> float:
    """The share of sum S that is above the edge of the noise, in [0, 1]; the noise is estimated by the median of S.

        sigma = median(S) / sqrt(max(n, m) mu_beta)      (Gavish and Donoho, arXiv 1305.5870, section III.E)
        tau   = sigma (sqrt n + sqrt m)

    mu_beta is the median of the Marchenko-Pastur law, tau the largest singular value that a matrix of noise with
    standard deviation sigma has in the limit. That is not their threshold for the best reconstruction, which lies
    15 percent higher for a square matrix and up to 41 percent for a long one. tau is at least the median, so at
    least half of S is noise and no beta is degenerate. On noise alone it is 0 but for a value at the edge now and
    then, some 1 / k. A trained matrix's bulk is wider than the law, so that part of it counts as signal.

    0.0 for zeros and for a vector, whose one value is its own median; 1.0 where more than half of S is zero, since
    there is then no noise to be seen.
    """
    s = _relative(singular_values)
    if s is None:
        return 0.0
    beta = min(n, m) / max(n, m)
    return _share_above(s, float(np.median(s)) * (1 + math.sqrt(beta)) / math.sqrt(median_of_law(beta)))


def stable_rank(singular_values: np.ndarray, n: int, m: int) -> float | None:
    """sum S^2 / S[0]^2, in [1, k] (Rudelson and Vershynin, arXiv math/0503442). None for zeros.

    On noise k / (1 + sqrt beta)^2: a quarter of k for a square matrix, and more for a longer one.
    """
    s = _relative(singular_values)
    return None if s is None else max(1.0, float(np.square(s).sum()))


def effective_rank(singular_values: np.ndarray, n: int, m: int) -> float | None:
    """exp of the entropy of S / sum S, in [1, k] (Roy and Vetterli, EUSIPCO 2007). None for zeros.

    On noise nearly k, the more so the longer the matrix.
    """
    s = _relative(singular_values)
    if s is None:
        return None
    p = s[s > 0] / s.sum()
    return min(float(len(s)), max(1.0, math.exp(-float((p * np.log(p)).sum()))))


def condition(singular_values: np.ndarray, n: int, m: int) -> float | None:
    """S[0] / S[k-1], at least 1 (KappaTune, arXiv 2506.16289, chooses by it). None where that is infinite.

    On noise (1 + sqrt beta) / (1 - sqrt beta), and of the order of k where beta is 1. The smallest value is the one
    that a scan knows least exactly: what is above some 3e3 has to be from a scan with `--precision fp64`.
    """
    s = _relative(singular_values)
    if s is None or not s[-1]:
        return None
    found = float(1 / s[-1])
    return found if math.isfinite(found) else None


def alpha(singular_values: np.ndarray, n: int, m: int) -> float | None:
    """The exponent of a power law fitted to the larger half of the eigenvalues S^2, above 1: Hill's estimate.

        alpha = 1 + h / sum(ln(lambda / lambda_min)),  over the h eigenvalues that are at least lambda_min

    lambda_min is the eigenvalue in the middle, as in the estimate of AlphaPruning (arXiv 2410.10912); the formula
    is Clauset, Shalizi and Newman's (arXiv 0706.1062, 3.1). WeightWatcher searches for the lambda_min that fits
    best; that is another number. The larger half of noise has one too, which grows as beta falls.

    None where there is no tail: a vector, zeros, equal values, or more than half of them zero.
    """
    s = _relative(singular_values)
    if s is None or len(s) < 2 or not (least := float(s[(len(s) - 1) // 2])):
        return None
    tail = s[s >= least]
    # ln of squares, without the squares: those of small values would be zero.
    total = 2 * float(np.log(tail / least).sum())
    found = 1 + len(tail) / total if total else math.inf
    return found if math.isfinite(found) else None


def random_value(seed: int, module: str) -> float:
    """A number in [0, 1) that depends on the seed and the module's name alone, not on the order or on the others."""
    digest = hashlib.blake2b(f"{seed}:{module}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    # Of 64 bits the 53 that a float holds.
    return (int.from_bytes(digest, "big") >> 11) / 2**53


MEASURES = {
    Metric.SPECTRUM: Measure(spectrum, True, "more signal for the noise: Spectrum's choice"),
    Metric.SCALE_FREE: Measure(scale_free, True, "more signal for the noise, as in Spectrum"),
    Metric.MARCHENKO_PASTUR: Measure(marchenko_pastur, True, "more of the matrix is no noise, as in Spectrum"),
    Metric.STABLE_RANK: Measure(stable_rank, False, "noise has the highest, so a low one is far from noise"),
    Metric.EFFECTIVE_RANK: Measure(effective_rank, False, "noise has the highest, so a low one is far from noise"),
    Metric.CONDITION: Measure(condition, False, "the least specialized first, as KappaTune chooses"),
    Metric.ALPHA: Measure(
        alpha,
        False,
        "a heavy tail is much signal; AlphaDecay and TempBalance would train the larger ones harder, as less trained",
    ),
    Metric.RANDOM: Measure(None, True, "chance: what any other measure has to beat"),
}


@functools.lru_cache(maxsize=4096)
def median_of_law(beta: float) -> float:
    """mu_beta, the median of the Marchenko-Pastur law with ratio `beta` in (0, 1] and variance 1.

    At 1 + beta + 2 sqrt(beta) cos t, t from 0 to pi, the law has the density (2 / pi) sin^2 t / (that) in t, whose
    integral is elementary; what is left is a bisection.
    """
    root = math.sqrt(beta)

    def above(t: float) -> float:
        """The mass of the law between its upper edge and t."""
        bend = math.atan((1 - root) / (1 + root) * math.tan(t / 2))
        return (2 / math.pi) * ((1 + beta) * t / 2 - root * math.sin(t) - (1 - beta) * bend) / (2 * beta)

    low, high = 0.0, math.pi
    # Each step halves pi, to below the last bit.
    for _ in range(60):
        t = (low + high) / 2
        low, high = (t, high) if above(t) < 0.5 else (low, t)
    return 1 + beta + 2 * root * math.cos(low)


def _descending(singular_values: np.ndarray) -> np.ndarray:
    return np.sort(np.asarray(singular_values, dtype=np.float64))[::-1]


def _relative(singular_values: np.ndarray) -> np.ndarray | None:
    """S / S[0], descending, so that no square is out of range; None where there is nothing but zeros."""
    s = _descending(singular_values)
    return s / s[0] if len(s) and s[0] > 0 else None


def _share_above(s: np.ndarray, tau: float) -> float:
    # Two sums of the same values in another order can differ by a bit.
    return min(1.0, float(s[s > tau].sum() / s.sum()))
