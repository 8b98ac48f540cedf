"""Other metrics of a matrix, from the singular values in its record.

They need no new scan and no weights.

A metric is a pure function of the singular values S, (k,), and of the shape n x m of the matrix, k = min(n, m).
Neither the order of S nor the orientation of the matrix matters. All metrics but `spectrum` are the same for W and
cW. A value is finite, or None where the metric is not defined; None ranks last. On noise alone (independent normal
entries) each metric has a value that depends on beta = k / max(n, m), and some depend on k:
`python -m benchmarks.noise` prints these values.

Which end of a metric is worth training first is a judgment, so the registry `METRICS` states it as data, with the
reason. We know of no published comparison that shows that any of them chooses better than chance. `random` makes such
a comparison possible. Pure numpy. To add a metric, write its function and give it a row in `METRICS`.
"""

import functools
import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..errors import UsageError
from .precision import Precision
from .snr import score

# Squares summed in float32 lose a singular value that is smaller than the largest one times the square root of
# float32's step, so a larger condition number is rounding.
_FP32_CONDITION = 2.0**11.5
_FLOAT32_PRODUCTS = (Precision.FP32, Precision.MIXED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A metric, and the end of it that is chosen first.

    Attributes:
        name: the value of `--metric`.
        of_spectrum: the function (S, n, m) -> value, finite or None. None for a metric that reads no spectrum.
        of_name: the function (module) -> value of a metric that reads no spectrum.
        larger_first: whether the larger value is chosen first.
        why: the reason for that, a clause.
        largest_in_fp32: a larger value is rounding if products were computed in float32, and counts as None.
    """

    name: str
    of_spectrum: Callable[[np.ndarray, int, int], float | None] | None = None
    of_name: Callable[[str], float] | None = None
    larger_first: bool
    why: str
    largest_in_fp32: float = math.inf

    def value_of(self, singular_values: np.ndarray, n: int, m: int, precision: Precision | None) -> float | None:
        """Compute the metric of an n x m matrix.

        Args:
            singular_values: (min(n, m),).
            precision: the precision with which they were computed.

        Returns:
            A finite number; None where the metric is not defined, not known exactly enough, or reads no spectrum.
        """
        value = None if self.of_spectrum is None else self.of_spectrum(singular_values, n, m)
        is_rounding = value is not None and precision in _FLOAT32_PRODUCTS and value > self.largest_in_fp32
        return None if is_rounding else value

    def rank_key(self, value: float | None) -> float:
        """Return the number to sort by, largest first: -inf for None."""
        return rank_key(value, self.larger_first)


def rank_key(value: float | None, larger_first: bool) -> float:
    """Return the number to sort by, largest first: the value or its negative, or -inf."""
    return -math.inf if value is None else value if larger_first else -value


def metric_of(text: str) -> Metric:
    """Find a metric by its name; `random:3` is `random` with seed 3.

    Raises:
        UsageError: no_such_metric.
    """
    if (metric := METRICS.get(text)) is not None:
        return metric
    if seeded := re.fullmatch(r"random:([0-9]{1,18})", text):
        return replace(METRICS["random"], name=text, of_name=functools.partial(random_value, int(seeded[1])))
    raise UsageError(
        f"unknown metric {text!r}", reason="no_such_metric", hint=f"use one of {', '.join(METRICS)}, random:SEED"
    )


def spectrum(singular_values: np.ndarray, n: int, m: int) -> float:
    """Compute Spectrum's score: the sum above tau over that below it, over S[0].

    It is inversely proportional to the scale of W, except where nothing is below tau: there it is sum S / S[0], and
    scale-free. On noise it jumps at beta = 0.27, because below that ratio every value is above tau. It is 1.0 for a
    vector and 0.0 for zeros.
    """
    return score(_descending(singular_values), n, m).snr


def scale_free(singular_values: np.ndarray, n: int, m: int) -> float:
    """Compute the share of sum S that is above Spectrum's tau, in [0, 1].

    It ranks as the ratio of Spectrum's two sums does, without the division by S[0] that makes the score depend on the
    scale, and without the jump where the sum below tau is empty: the share is then 1.0. On noise it still grows as
    beta falls, and it is 1.0 below 0.27, because tau uses the spread of S as the noise level. It is 0.0 for zeros and
    1.0 for a vector.
    """
    s = _relative(singular_values)
    return 0.0 if s is None else _share_above(s, score(s, n, m).tau)


def marchenko_pastur(singular_values: np.ndarray, n: int, m: int) -> float:
    """Compute the share of sum S that is above the edge of the noise, in [0, 1].

        sigma = median(S) / sqrt(max(n, m) mu_beta)      (Gavish and Donoho, arXiv 1305.5870, section III.E)
        tau   = sigma (sqrt n + sqrt m)

    The noise level comes from the median of S. mu_beta is the median of the Marchenko-Pastur law. tau is the limit of
    the largest singular value of a noise matrix with standard deviation sigma. It is not their threshold for the best
    reconstruction, which is 15 percent higher for a square matrix and up to 41 percent for a long one. tau is at
    least the median, so at least half of S is noise and no beta is degenerate. On noise alone the share is 0, except
    for an occasional value at the edge, about 1 / k. The bulk of a trained matrix is wider than the law, so a part of
    it counts as signal.

    It is 0.0 for zeros and for a vector, which has its one value as the median. It is 1.0 if more than half of S is
    zero, because no noise is visible then.
    """
    s = _relative(singular_values)
    if s is None:
        return 0.0
    beta = min(n, m) / max(n, m)
    return _share_above(s, float(np.median(s)) * (1 + math.sqrt(beta)) / math.sqrt(median_of_law(beta)))


def stable_rank(singular_values: np.ndarray, n: int, m: int) -> float | None:
    """Compute sum S^2 / S[0]^2, in [1, k].

    See Rudelson and Vershynin, arXiv math/0503442. None for zeros. On noise it is k / (1 + sqrt beta)^2: a quarter of
    k for a square matrix, more for a longer one.
    """
    s = _relative(singular_values)
    return None if s is None else max(1.0, float(np.square(s).sum()))


def effective_rank(singular_values: np.ndarray, n: int, m: int) -> float | None:
    """Compute exp of the entropy of S / sum S, in [1, k].

    See Roy and Vetterli, EUSIPCO 2007. None for zeros. On noise it is close to k, and closer for a longer matrix.
    """
    s = _relative(singular_values)
    if s is None:
        return None
    p = s[s > 0] / s.sum()
    return min(float(len(s)), max(1.0, math.exp(-float((p * np.log(p)).sum()))))


def condition(singular_values: np.ndarray, n: int, m: int) -> float | None:
    """Compute S[0] / S[k-1], at least 1 (KappaTune, arXiv 2506.16289, chooses by it).

    None where it is infinite. On noise it is (1 + sqrt beta) / (1 - sqrt beta), and of the order of k if beta is 1. A
    scan knows the smallest value least exactly, so a condition above 2900 needs `--precision fp64`.
    """
    s = _relative(singular_values)
    if s is None or not s[-1]:
        return None
    found = float(1 / s[-1])
    return found if math.isfinite(found) else None


def alpha(singular_values: np.ndarray, n: int, m: int) -> float | None:
    """Fit a power law to the larger half of S^2: Hill's estimate, above 1.

        alpha = 1 + h / sum(ln(lambda / lambda_min)),  over the h eigenvalues that are at least lambda_min

    lambda_min is the middle eigenvalue, as in the estimate of AlphaPruning (arXiv 2410.10912). The formula is from
    Clauset, Shalizi and Newman (arXiv 0706.1062, 3.1). WeightWatcher searches for the lambda_min that fits best,
    which gives another number. The larger half of noise has an exponent too, and it grows as beta falls.

    None where there is no tail: a vector, zeros, equal values, or more than half of them zero.
    """
    s = _relative(singular_values)
    if s is None or len(s) < 2 or not (least := float(s[(len(s) - 1) // 2])):
        return None
    tail = s[s >= least]
    # Twice the logarithm of the ratio, since the squares of small values would be zero.
    total = 2 * float(np.log(tail / least).sum())
    found = 1 + len(tail) / total if total else math.inf
    return found if math.isfinite(found) else None


def random_value(seed: int, module: str) -> float:
    """Draw a number in [0, 1) that depends only on the seed and the module's name."""
    digest = hashlib.blake2b(f"{seed}:{module}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    # A float holds 53 of the 64 bits.
    return (int.from_bytes(digest, "big") >> 11) / 2**53


SPECTRUM = Metric(
    name="spectrum", of_spectrum=spectrum, larger_first=True, why="more signal for the noise: Spectrum's choice"
)
METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        SPECTRUM,
        Metric(
            name="scale-free",
            of_spectrum=scale_free,
            larger_first=True,
            why="more signal for the noise, as in Spectrum",
        ),
        Metric(
            name="marchenko-pastur",
            of_spectrum=marchenko_pastur,
            larger_first=True,
            why="less of the matrix is noise, as in Spectrum",
        ),
        Metric(
            name="stable-rank",
            of_spectrum=stable_rank,
            larger_first=False,
            why="noise has the highest, so a low one is far from noise",
        ),
        Metric(
            name="effective-rank",
            of_spectrum=effective_rank,
            larger_first=False,
            why="noise has the highest, so a low one is far from noise",
        ),
        Metric(
            name="condition",
            of_spectrum=condition,
            larger_first=False,
            why="the least specialized first, as in KappaTune",
            largest_in_fp32=_FP32_CONDITION,
        ),
        Metric(
            name="alpha",
            of_spectrum=alpha,
            larger_first=False,
            why="a heavy tail is much signal; AlphaDecay and TempBalance consider larger values less trained, and "
            "train them harder",
        ),
        Metric(
            name="random",
            of_name=functools.partial(random_value, 0),
            larger_first=True,
            why="chance, as the baseline of all other metrics",
        ),
    )
}


@functools.lru_cache(maxsize=4096)
def median_of_law(beta: float) -> float:
    """Compute mu_beta, the median of the Marchenko-Pastur law for `beta` in (0, 1].

    At x = 1 + beta + 2 sqrt(beta) cos t, t from 0 to pi, the law of variance 1 has the density (2 / pi) sin^2 t / x
    in t. Its integral is elementary, and a bisection finds the t at which the integral is a half.
    """
    root = math.sqrt(beta)

    def above(t: float) -> float:
        """Return the mass of the law between its upper edge and t."""
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
    """Return S / S[0], descending, so that no square is out of range.

    Return None if all values are zero.
    """
    s = _descending(singular_values)
    return s / s[0] if len(s) and s[0] > 0 else None


def _share_above(s: np.ndarray, tau: float) -> float:
    # Two sums of the same values in another order can differ by a bit.
    return min(1.0, float(s[s > tau].sum() / s.sum()))
