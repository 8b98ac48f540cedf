"""Spectrum's score of a spectrum, its estimated error, and its diagnostics.

W is n x m, S its singular values in descending order, q25 and q75 linearly interpolated quantiles of S:

    sigma = (q75 - q25) / 1.349
    beta  = min(n, m) / max(n, m)
    tau   = sigma (1 + sqrt(beta))
    snr   = (sum S[S > tau] / sum S[S <= tau]) / S[0]

This is the score of Spectrum's code at commit 0ed1756. Its paper (arXiv 2406.06623) differs: the pseudocode leaves
out the division by S[0], and its tau has a factor 1/sqrt(n). Pure numpy.
"""

import math
import sys
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

# A score with an estimated relative error above this is computed with the next precision, or reported as inexact.
TOLERANCE = 1e-5
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
        margin: min |S - tau| / tau, the relative distance of the nearest one from tau; inf if tau is 0.
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
        """Whether it does not compare signal with noise.

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
    q75, q25 = (float(q) for q in np.quantile(s, [0.75, 0.25]))
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
        tau_error = _find_tau_error(exact if errors is None else errors, beta)
        error = _find_error(s, exact if errors is None else errors, exact if drift is None else drift, tau, tau_error)
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
    q75, q25 = (_interpolate(s, (count - 1) * share) for share in (0.25, 0.75))
    # The smallest float32 number is 1.4e-45. Values below half of it become zero.
    error75, error25 = (rounding * float(s[int((count - 1) * share)]) + 1e-45 for share in (0.25, 0.75))
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


def _interpolate(s: np.ndarray, at: float) -> float:
    below = int(at)
    return float(s[below]) + (float(s[min(below + 1, len(s) - 1)]) - float(s[below])) * (at - below)


def _find_degeneracy(s: np.ndarray, is_signal: np.ndarray) -> Degeneracy | None:
    if len(s) == 1:
        return Degeneracy.VECTOR
    if s[0] == 0:
        return Degeneracy.ZERO
    if is_signal.all():
        return Degeneracy.EMPTY_NOISE
    return None if s[~is_signal].any() else Degeneracy.ZERO_NOISE


def _find_tau_error(errors: np.ndarray, beta: float) -> float:
    # The values are in descending order, so the upper quartile is at a quarter of them.
    count = len(errors)
    return float(errors[count // 4] + errors[count * 3 // 4]) / _IQR * (1 + math.sqrt(beta))


def _find_error(s: np.ndarray, errors: np.ndarray, drift: np.ndarray, tau: float, tau_error: float) -> float:
    """Return the relative error of the score to first order.

    It is the sum of the errors of the two sums and of S[0].

    A sum adds up the drift of its terms and averages the rest. A value that may be on the other side of tau moves the
    score by a step, so it counts whole: it may leave one sum and enter the other.
    """
    # In units of S[0], because the squares of valid numbers may overflow.
    s, errors, drift, tau, tau_error = (x / s[0] for x in (s, errors, drift, tau, tau_error))
    # Twice the estimates: they describe the typical error, and one in many values has a larger one.
    doubtful = float(s[np.abs(s - tau) < 2 * (errors + tau_error)].sum())

    def sum_error(part: np.ndarray) -> float:
        total = float(s[part].sum())
        absolute = float(drift[part].sum() + np.sqrt(np.square(errors[part]).sum())) + doubtful
        # A sum of zeros can be wrong by any factor if the zeros are inexact.
        return absolute / total if total else math.inf if absolute else 0.0

    return sum_error(s > tau) + sum_error(s <= tau) + float(errors[0])
