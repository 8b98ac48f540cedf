"""Spectrum's score of a matrix, its estimated error, and its diagnostics.

W is an n x m matrix, and S are its singular values in descending order. q25 and q75 are the 25 % and 75 % quantiles
of S, linearly interpolated:

    sigma = (q75 - q25) / 1.349
    beta  = min(n, m) / max(n, m)
    tau   = sigma (1 + sqrt(beta))
    snr   = (sum S[S > tau] / sum S[S <= tau]) / S[0]

This is the score of Spectrum's code at commit 0ed1756. Its paper (arXiv 2406.06623) differs: the pseudocode leaves
out the division by S[0], and its tau has a factor 1/sqrt(n). This module needs only numpy.
"""

import math
import sys
from dataclasses import dataclass
from enum import StrEnum
from itertools import product

import numpy as np

# A score with an estimated relative error above this is computed with the next precision, or reported as inexact.
TOLERANCE = 1e-5
# `find_deciding_values` leaves this share of the tolerance for errors that are known only after the refinement.
_SPARE = 0.25
# If all errors are below this, their products are negligible.
_SMALL = 1e-3
# The largest number of values that are worth refining, and the numbers of smallest values that are tried.
_MAX_DECIDING = 32
_SMALLEST = (0, 4, 12)
# The interquartile range of a normal distribution, in standard deviations, as Spectrum rounds it.
_IQR = 1.349


class Degeneracy(StrEnum):
    """Why a score does not measure signal against noise.

    Attributes:
        sentence: the reason in words, a clause after the name of the matrix.
    """

    sentence: str

    def __new__(cls, code: str, sentence: str = "") -> "Degeneracy":
        member = str.__new__(cls, code)
        member._value_ = code
        member.sentence = sentence
        return member

    VECTOR = "vector", "has one singular value, so its score is 1.0 by definition"
    ZERO = "zero", "is all zeros, so its score is 0.0"
    # In both cases below, the noise sum counts as 1.0.
    EMPTY_NOISE = "empty_noise", "has no singular value at or below the noise threshold"
    ZERO_NOISE = "zero_noise", "has only zeros at or below the noise threshold"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A score and its diagnostics.

    Attributes:
        snr: the score, finite.
        error: its estimated relative error.
        sigma, beta, tau: as in the formula; sigma and tau in the unit of the weights.
        above: the number of singular values above tau.
        margin: min |S - tau| / tau, the relative distance of the nearest value from tau; inf if tau is 0.
        sigma1_over_q25: S[0] / q25; inf if q25 is 0.
        degeneracy: None for a score that compares signal with noise.
    """

    snr: float
    error: float
    sigma: float
    beta: float
    tau: float
    above: int
    margin: float
    sigma1_over_q25: float
    degeneracy: Degeneracy | None

    @property
    def is_degenerate(self) -> bool:
        """Whether the score does not compare signal with noise.

        The score of a norm is 1.0 by definition and does not count.
        """
        return self.degeneracy not in (None, Degeneracy.VECTOR)

    @property
    def is_exact(self) -> bool:
        """Whether its estimated error is within the tolerance."""
        return self.error <= TOLERANCE


def score(
    singular_values: np.ndarray,
    n: int,
    m: int,
    *,
    errors: np.ndarray | None = None,
    drift: np.ndarray | None = None,
) -> Score:
    """Compute Spectrum's score of an n x m matrix, with its error and diagnostics.

    Args:
        singular_values: (min(n, m),), descending, finite, not negative.
        n, m: the shape of the matrix.
        errors: the estimated absolute error of each singular value; None for exact ones.
        drift: the part of the errors that neighbors share; None for none.
    """
    s = np.asarray(singular_values, dtype=np.float64)
    exact = np.zeros_like(s)
    q75, q25 = _find_quartiles(s)
    sigma = (q75 - q25) / _IQR
    beta = min(n, m) / max(n, m)
    tau = sigma * (1 + math.sqrt(beta))
    # Strictly above, as in Spectrum: if sigma is 0, every positive value is signal and every zero is noise.
    is_signal = s > tau
    degeneracy = _find_degeneracy(s, is_signal)
    if degeneracy is Degeneracy.VECTOR:
        # A vector has one singular value. It is above tau = 0, and (S[0] / 1.0) / S[0] is 1.
        snr, error = 1.0, 0.0
    elif degeneracy is Degeneracy.ZERO:
        snr, error = 0.0, 0.0
    else:
        # In units of S[0], because the sum of valid numbers may overflow.
        signal, noise = (float((s[part] / s[0]).sum()) for part in (is_signal, ~is_signal))
        snr = min(signal / noise / float(s[0]), sys.float_info.max) if noise else signal
        error = _find_error(s, exact if errors is None else errors, exact if drift is None else drift, beta)
    return Score(
        snr=snr,
        error=error,
        sigma=sigma,
        beta=beta,
        tau=tau,
        above=int(is_signal.sum()),
        margin=float(np.abs(s - tau).min() / tau) if tau > 0 else math.inf,
        sigma1_over_q25=float(s[0] / q25) if q25 > 0 else math.inf,
        degeneracy=degeneracy,
    )


def is_score_of(found: Score, singular_values: np.ndarray, n: int, m: int, *, rounding: float) -> bool:
    """Check a score against singular values that were rounded after it was computed.

    Everything but the error is checked. A rounded value can be on the other side of tau. So the number of values
    above tau is taken from the score, and must be possible. This takes a tenth of the time of `score`.

    Args:
        singular_values: float64, (min(n, m),), descending, finite, not negative.
        n, m: the shape of the matrix.
        rounding: the largest relative error of each singular value.
    """
    s, count, above = singular_values, len(singular_values), found.above
    root = 1 + math.sqrt(min(n, m) / max(n, m))
    q75, q25 = _find_quartiles(s)
    # The smallest float32 number is 1.4e-45. Values below half of it become zero.
    error75, error25 = (rounding * float(s[int(at)]) + 1e-45 for at in _locate_quartiles(count))
    sigma, sigma_error = (q75 - q25) / _IQR, 1.01 * (error75 + error25) / _IQR
    tau, tau_error = sigma * root, sigma_error * root
    lowest_above = float(s[above - 1]) * (1 + rounding) if 0 < above <= count else math.inf
    highest_below = float(s[above]) * (1 - rounding) if 0 <= above < count else -math.inf
    nearest = min(abs(lowest_above - tau), abs(highest_below - tau))
    margin_error = (2 * tau_error + rounding * (nearest + tau)) / tau * (1 + nearest / tau) if tau else math.inf
    signal, noise = (float(part.sum()) for part in (s[:above], s[above:]))
    largest = float(s[0])
    if count == 1:
        degeneracy, snr = Degeneracy.VECTOR, 1.0
    elif largest == 0:
        degeneracy, snr = Degeneracy.ZERO, 0.0
    elif noise:
        degeneracy, snr = None, min(signal / noise / largest, sys.float_info.max)
    else:
        degeneracy, snr = Degeneracy.EMPTY_NOISE if above == count else Degeneracy.ZERO_NOISE, signal / largest
    return (
        0 <= above <= count
        and found.degeneracy is degeneracy
        # The errors of both sums and of the largest value.
        and math.isclose(found.snr, snr, rel_tol=4 * rounding)
        and abs(found.sigma - sigma) <= sigma_error
        and abs(found.tau - tau) <= tau_error
        and lowest_above > tau - tau_error
        and highest_below <= tau + tau_error
        # With a tau that rounds to zero, the margin can have any value.
        and (tau <= 2 * tau_error or abs(found.margin - nearest / tau) <= margin_error)
        and _is_ratio(found.sigma1_over_q25, largest, q25, rounding, error25)
    )


def _is_ratio(ratio: float, largest: float, q25: float, rounding: float, q25_error: float) -> bool:
    if math.isinf(ratio):
        return q25 <= q25_error
    return abs(ratio * q25 - largest) <= 2 * (ratio * q25_error + rounding * largest)


def _find_quartiles(s: np.ndarray) -> tuple[float, float]:
    """Return the upper and the lower quartile of values in descending order.

    They are those of `numpy.quantile` to the last bit, in a tenth of its time.
    """
    upper, lower = _locate_quartiles(len(s))
    return _interpolate(s, upper), _interpolate(s, lower)


def _locate_quartiles(count: int) -> tuple[float, float]:
    """Return the positions of both quartiles, which may lie between two values."""
    return (count - 1) * 0.25, (count - 1) * 0.75


def _interpolate(s: np.ndarray, at: float) -> float:
    first = int(at)
    high, low = float(s[first]), float(s[min(first + 1, len(s) - 1)])
    # From the nearer one, as numpy does.
    return high - (high - low) * (at - first) if at - first <= 0.5 else low + (high - low) * (first + 1 - at)


def _find_degeneracy(s: np.ndarray, is_signal: np.ndarray) -> Degeneracy | None:
    if len(s) == 1:
        return Degeneracy.VECTOR
    if s[0] == 0:
        return Degeneracy.ZERO
    if is_signal.all():
        return Degeneracy.EMPTY_NOISE
    return None if s[~is_signal].any() else Degeneracy.ZERO_NOISE


def find_deciding_values(
    singular_values: np.ndarray,
    n: int,
    m: int,
    *,
    errors: np.ndarray,
    drift: np.ndarray,
    refined_errors: np.ndarray,
    refined_drift: np.ndarray,
) -> list[int]:
    """Find the few singular values that make the score of an n x m matrix inexact.

    They are the values that may be on the other side of tau and, if there are such values, the neighbors of the
    quantiles that determine tau. S[0] and the smallest values are added if their errors are too large. Once all of
    these are refined, the estimated error of the score is expected to be within the tolerance.

    Args:
        singular_values, errors, drift: as for `score`.
        refined_errors, refined_drift: those that each value would have after its refinement.

    Returns:
        Their positions, ascending. [] if there are none or too many, or if the score would remain inexact.
    """
    s, count = singular_values, len(singular_values)
    if count < 2 or s[0] <= 0:
        return []
    # In units of S[0], because the squares of valid numbers may overflow.
    s, errors, drift, refined_errors, refined_drift = (
        x / s[0] for x in (s, errors, drift, refined_errors, refined_drift)
    )
    tau, tau_error = _find_tau(s, errors, drift, min(n, m) / max(n, m))
    doubtful = _find_doubtful(s, errors, drift, tau, tau_error)
    chosen = set(doubtful.tolist())
    if chosen:
        chosen |= {f(position) for position in _locate_quartiles(count) for f in (math.floor, math.ceil)}
    for smallest, largest in product(_SMALLEST, (0, 1)):
        refined = sorted(chosen | {*range(largest), *range(max(1, count - smallest), count)})
        own, shared = errors.copy(), drift.copy()
        own[refined], shared[refined] = refined_errors[refined], refined_drift[refined]
        sums = [_find_sum_error(s[part], own[part], shared[part]) for part in (s > tau, s <= tau)]
        # The refinement adds the errors of its eigenvectors. They are not known yet, so a share of the tolerance is
        # left for them.
        if math.hypot(*sums, float(own[0])) <= TOLERANCE * (1 - _SPARE if refined else 1):
            return refined if len(refined) <= _MAX_DECIDING else []
    return []


def _find_tau(s: np.ndarray, errors: np.ndarray, drift: np.ndarray, beta: float) -> tuple[float, float]:
    """Return tau and its error."""
    q75, q25 = _find_quartiles(s)
    slope = (1 + math.sqrt(beta)) / _IQR
    # A quartile between two values has at most the error of the less exact one.
    edges = _locate_quartiles(len(s))
    own = [max(errors[math.floor(x)], errors[math.ceil(x)]) for x in edges]
    shared = [max(drift[math.floor(x)], drift[math.ceil(x)]) for x in edges]
    # The errors of both quantiles are independent, except for the drift.
    independent = math.hypot(*(float(a - b) for a, b in zip(own, shared, strict=True)))
    return slope * (q75 - q25), slope * (independent + float(sum(shared)))


def _find_doubtful(s: np.ndarray, errors: np.ndarray, drift: np.ndarray, tau: float, tau_error: float) -> np.ndarray:
    """Return the positions of the values that may be on the other side of tau."""
    window = np.hypot(errors - drift, tau_error) + drift
    return np.flatnonzero(np.abs(s - tau) < window)


def _find_sum_error(s: np.ndarray, errors: np.ndarray, drift: np.ndarray, doubtful: float = 0.0) -> float:
    """Return the relative error of a sum of values.

    The drift of the terms adds up. The rest of their errors is independent.

    Args:
        doubtful: the sum of the values that may enter or leave the sum.
    """
    total = float(s.sum())
    absolute = float(drift.sum() + np.sqrt(np.square(errors - drift).sum())) + doubtful
    # A sum of zeros can be wrong by any factor if the zeros are inexact.
    return absolute / total if total else math.inf if absolute else 0.0


def _find_error(s: np.ndarray, errors: np.ndarray, drift: np.ndarray, beta: float) -> float:
    """Return the relative error of the score.

    The errors of the two sums and of S[0] count as independent, although S[0] is a term of one sum and a drift may
    affect all three. But a value that may be on the other side of tau moves the score by a step: it may leave one sum
    and enter the other. So the whole value counts as an error, and the errors add up.
    """
    # In units of S[0], because the squares of valid numbers may overflow.
    s, errors, drift = (x / s[0] for x in (s, errors, drift))
    tau, tau_error = _find_tau(s, errors, drift, beta)
    doubtful = float(s[_find_doubtful(s, errors, drift, tau, tau_error)].sum())
    signal, noise = (_find_sum_error(s[part], errors[part], drift[part], doubtful) for part in (s > tau, s <= tau))
    top = float(errors[0])
    if not doubtful and max(signal, noise, top) < _SMALL:
        return math.hypot(signal, noise, top)
    if max(signal, noise, top) >= 1:
        return math.inf
    return max((1 + signal) / ((1 - noise) * (1 - top)), (1 + noise) * (1 + top) / (1 - signal)) - 1
