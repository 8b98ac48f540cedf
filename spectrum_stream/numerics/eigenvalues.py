"""The eigenvalues of K, checked, with their errors.

**The check.** The sum of the eigenvalues is the trace of K, and the sum of their squares is its squared Frobenius
norm. Eigenvalues are rejected if one of these sums is off by more than a limit: twice the root of the sum of the
squared estimated errors of its terms, plus the share n / 16384 of the sum of these errors, because blocked routines
have systematic errors that grow with n. The check finds a faulty driver, and a single wrong eigenvalue if its error
is above the limit. It finds neither wrong eigenvalues that cancel in both sums, nor the error E of K.

**The errors.** An eigenvalue l of K is wrong by the sum of two errors. Both are measured, and no constant is fitted
to a machine. The slope b of E over the entries, the shift d of its diagonal and the Frobenius norm |E| of its random
part come from `gram.Rounding`. t is the trace of K, and u the rounding unit:

    E moves l by vᵀEv, with v the eigenvector. For a random E this has the standard deviation √2 |E| / n, and three
    standard deviations count. A slope moves l by b l, and a shift by d t / n. Sums of terms of one sign have a larger
    error, g, which is measured on the diagonal of the product before the separate sums replace that diagonal. It
    moves each l above the mean by up to g (l - t / n). The p eigenvalues below N = 2 |E| / √n count as zeros. They
    move by the norm of a p x p block of E (Wigner's semicircle law) and by a second-order term.

        3 √2 |E| / n + |b| l + |d| t / n + g (l - t / n)₊ + 2 √p |E| / n + (|E| / n)² (sum of 1 / l above N)
        + u max(l, t / n)

    The last term is the rounding of the diagonal when it is stored. If an eigenvector has only a few nonzero entries,
    the roundings of these few rows do not average out.

    The eigenvalue routine is measured on known matrices with 256 rows: K of a square W, K of a wide W, and matrices
    with one large eigenvalue. The largest errors, in units u, give two numbers. a is relative to the root mean square
    q of all eigenvalues, and comes from eigenvalues far below q. c is relative to l, and comes from the remaining
    errors of the first two matrices. c grows with the square root of n, as the sum of n independent roundings does.
    For the largest and the smallest sixteenth of the values, where the iteration starts and ends, c is measured
    separately and grows with n. a grows with a power of R, the largest value over the median. The power follows from
    the matrices with a large eigenvalue. The largest error differs from matrix to matrix, so the measured errors get
    a safety factor: 3 for c of the smallest sixteenth and for a of large R, and 1.5 for the rest of c and a.

        u (√(n / 256) c l + a(R) q) + |sum of the eigenvalues - t| / n

    The smallest eigenvalues have errors this small only if the spectrum falls to them gradually, as that of a square
    W does. If W is wide and has two equal rows, one eigenvalue is zero and all others are far above it. The routine
    finds such an isolated eigenvalue with a larger error, e. This error is measured relative to q, on two matrices K:
    the first W has one pair of equal rows, and the second has two pairs. e has a safety factor of 6, and grows with
    the square root of n. The routine cannot tell which eigenvalues are isolated, so the estimates are at least:

        e               for all zeros, and for the 2 smallest other eigenvalues. Eigenvalues up to e count as zeros if
                        no other eigenvalue is below 8 e
        u (n / 256) c l for the next 8 eigenvalues, with l the largest of them and c that of the smallest sixteenth

    For the smallest sixteenth, e also limits the term with c (the term with a is added to it). If n / 16 is less than
    2 or 8, that many eigenvalues are taken instead, but at least 1.

    W Wᵀ has no negative eigenvalue. If there is one, its size is added to all errors.

All values share a part of the error, the drift, and a sum does not average it out. The drift is the sum of |b| l,
|d| t / n, and the larger of two numbers: |sum of the eigenvalues - t| / n, and a share of the routine's error. The
share is the larger of two ratios, one for each sum in the check: its deviation, divided by the largest deviation that
the routine's errors can cause.
"""

import functools
import math
import threading
from dataclasses import dataclass

import numpy as np
import torch

from .device import Device, one_thread_each
from .gram import Rounding

# The side of the matrices on which the routine is measured, and the largest value of some of them over the bulk.
_KNOWN_SIDE = 256
_RATIOS = (1e3, 1e3, 1e6, 1e6)
# Each end is one of this many equal parts of the values. A value is far below the root mean square if it is at least
# _FAR times smaller.
_EDGE = 16
_FAR = 32
# The number of small eigenvalues, besides zeros, that may be isolated, and the number of eigenvalues above them that
# get the error of the largest among them. Small eigenvalues count as zeros only if the next one is at least _GAP
# times the error of an isolated one.
_ISOLATED = 2
_ABOVE_ISOLATED = 8
_GAP = 8
# Safety factors. The largest error differs from matrix to matrix, by more for small eigenvalues than for large ones.
_MARGIN = 1.5
_MARGIN_OF_SMALL = 3.0
_MARGIN_OF_ISOLATED = 6.0
# The number of rows for which all errors may be systematic.
_SYSTEMATIC = 16384
# The least error that counts, in units.
_LEAST_ERROR = 0.5
# A random error is estimated as this many standard deviations.
DEVIATIONS = 3
_MEASURING = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutineError:
    """The largest errors of an eigenvalue routine at 256 rows, in rounding units.

    They include the safety factors.

    Attributes:
        top, inner, bottom: relative to the eigenvalue, for the first sixteenth, the middle, and the last sixteenth.
        absolute: relative to the root mean square of all eigenvalues.
        ratio: the largest eigenvalue over the median for which `absolute` holds.
        power: `absolute` grows with this power of a larger ratio.
        isolated: relative to the root mean square, for isolated small eigenvalues.
    """

    top: float
    inner: float
    bottom: float
    absolute: float
    ratio: float
    power: float
    isolated: float

    def estimate(self, values: np.ndarray, unit: float) -> np.ndarray:
        """Return the absolute errors of eigenvalues, (n,).

        Args:
            values: the eigenvalues, (n,), descending.
            unit: the rounding unit of the routine.
        """
        n, edge = len(values), _count_edge(len(values))
        growth = max(1.0, n / _KNOWN_SIDE)
        largest = float(values[0])
        if not largest:
            return np.zeros(n)
        # The squares of valid numbers may overflow.
        root_mean_square = largest * math.sqrt(float(np.square(values / largest).mean()))
        isolated = math.sqrt(growth) * self.isolated * root_mean_square
        of_smallest = np.minimum(growth * self.bottom * values, isolated)
        own = math.sqrt(growth) * self.inner * values
        own[:edge] = growth * self.top * values[:edge]
        own[n - edge :] = np.maximum(own[n - edge :], of_smallest[n - edge :])
        spread = max(1.0, _find_ratio(values) / self.ratio) ** self.power
        errors: np.ndarray = own + self.absolute * spread * root_mean_square
        # The smallest eigenvalues may be isolated, so they get the larger error of isolated ones.
        zeros = int((values <= unit * isolated).sum())
        if zeros < n and values[n - zeros - 1] < _GAP * unit * isolated:
            zeros = 0
        first = max(0, n - zeros - min(_ISOLATED, edge))
        errors[first:] = np.maximum(errors[first:], isolated)
        above = max(0, first - min(_ABOVE_ISOLATED, edge))
        errors[above:] = np.maximum(errors[above:], of_smallest[above])
        return unit * errors


def _find_ratio(values: np.ndarray) -> float:
    """Return the largest eigenvalue over the median.

    The median counts as at least a rounding unit of the largest.
    """
    return float(values[0] / max(values[len(values) // 2], 2.0**-53 * values[0]))


def _count_edge(n: int) -> int:
    return max(1, n // _EDGE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Eigenvalues:
    """The eigenvalues of one K, with estimates of their errors.

    Attributes:
        values: float64, (n,), descending, not negative.
        errors: float64, (n,): the estimated absolute errors.
        drift: float64, (n,): the part of the errors that all values share.
        gram_errors: float64, (n,): the part of the errors that comes from K.
        gram_drift: float64, (n,): the part of the drift that comes from K.
        aligned: the relative error of sums of terms of one sign; see `Rounding`.
        are_right: whether the values pass the check.
        refined: the number of values that were refined.
    """

    values: np.ndarray
    errors: np.ndarray
    drift: np.ndarray
    gram_errors: np.ndarray
    gram_drift: np.ndarray
    aligned: float
    are_right: bool
    refined: int = 0


def estimate_errors(
    values: np.ndarray, trace: float, square: float, unit: float, rounding: Rounding, routine: RoutineError
) -> Eigenvalues:
    """Estimate the errors of eigenvalues, and check them.

    Args:
        values: float64, (n,), descending, as the routine returns them.
        trace: of K, the sum of the eigenvalues.
        square: the sum of the squared eigenvalues, in units of the squared trace.
        unit: the rounding unit of the routine.
    """
    n = len(values)
    mean = trace / n
    found = np.maximum(values, 0.0)
    # The squares of |w_i| |w_j| add up to the square of the trace.
    norm = rounding.noise * trace
    # If rows of W point in one direction, their products are sums of terms of one sign.
    aligned = rounding.aligned * np.maximum(found - mean, 0.0)
    entry = norm / n
    is_above = found > 2 * entry * math.sqrt(n)
    second = 2 * entry * math.sqrt(n - int(is_above.sum())) + entry * float((entry / found[is_above]).sum())
    gram_drift = abs(rounding.bias) * found + abs(rounding.shift) * mean
    gram_errors = DEVIATIONS * math.sqrt(2) * entry + second + gram_drift + aligned + unit * np.maximum(found, mean)
    # No eigenvalue of W Wᵀ is negative, so a negative value is wrong by at least its size.
    negative = max(0.0, -float(values[-1]))
    of_routine = routine.estimate(found, unit)
    # In units of the trace, because the squares of valid numbers may overflow.
    size = trace or 1.0
    scaled, off = found / size, of_routine / size
    missing = abs(float(values.sum()) - trace) / size, abs(float(np.square(values / size).sum()) - square)
    total = float(off.sum()), 2 * float((scaled * off).sum())
    typical = 2 * math.sqrt(float(np.square(off).sum())), 4 * math.sqrt(float(np.square(scaled * off).sum()))
    # Both sums are computed in float64, with this rounding.
    slack = n * 2.0**-52 if trace else 0.0
    are_right = bool(np.all(values[:-1] >= values[1:])) and all(
        x <= y + min(1.0, n / _SYSTEMATIC) * z + slack for x, y, z in zip(missing, typical, total, strict=True)
    )
    share = min(1.0, max(x / (y + slack) if y else 0.0 for x, y in zip(missing, total, strict=True)))
    missing_each = missing[0] * mean
    errors = gram_errors + of_routine + negative + missing_each
    return Eigenvalues(
        values=found,
        errors=errors,
        drift=gram_drift + np.maximum(share * (of_routine + negative), missing_each),
        gram_errors=gram_errors,
        gram_drift=gram_drift,
        aligned=rounding.aligned,
        are_right=are_right,
    )


def measure_routine(device: Device) -> RoutineError:
    """Measure the error of the eigenvalue routine of a device in float32.

    Only the first call for a device measures. The routine for float64 takes the same steps, so its errors count as
    equal in its own units.
    """
    with _MEASURING:
        return _measure_routine(device)


@functools.cache
@one_thread_each()
def _measure_routine(device: Device) -> RoutineError:
    n, edge = _KNOWN_SIDE, _count_edge(_KNOWN_SIDE)
    generator = torch.Generator().manual_seed(n)
    square, wide = (torch.randn(n, m, generator=generator, dtype=torch.float64) for m in (n, 3 * n))
    # One and two pairs of equal rows give as many isolated eigenvalues.
    pair, two_pairs = wide.clone(), wide.clone()
    pair[-1] = two_pairs[-1] = wide[0]
    two_pairs[n // 2] = wide[n // 3]
    ks = [w @ w.T / n for w in (square, wide, pair, two_pairs)]
    ordinary, isolated, spiked = slice(0, 2), slice(2, 4), slice(4, None)
    q = torch.linalg.qr(square).Q
    for i, ratio in enumerate(_RATIOS):
        bulk = torch.linspace(1, 2, n, dtype=torch.float64)
        bulk[i] = ratio
        ks.append(q * bulk @ q.T)
    k = torch.stack([(each + each.T) / 2 for each in ks]).float()
    exact = torch.linalg.eigvalsh(k.double()).flip(1).numpy()
    found = device.eigvalsh(k.to(device.torch_device)).flip(1).cpu().double().numpy()
    # If a value is infinite, the errors become NaN, and every check fails.
    units = np.abs(np.where(np.isfinite(found), found, np.nan) - exact) / 2.0**-24
    root_mean_squares = np.sqrt(np.square(exact).mean(1, keepdims=True))
    is_far = exact < root_mean_squares / _FAR
    # A measured error of zero is a coincidence.
    far = np.maximum(np.where(is_far, units / root_mean_squares, 0.0).max(1), _LEAST_ERROR)
    absolute, ratio = _MARGIN * float(far[0]), _find_ratio(exact[0])
    powers = [
        math.log(_MARGIN_OF_SMALL * largest / absolute) / math.log(_find_ratio(values) / ratio)
        for values, largest in zip(exact[spiked], far[spiked], strict=True)
    ]
    # The remaining errors of the two ordinary matrices are relative to each eigenvalue.
    remaining = units[ordinary] - far[ordinary, None] * root_mean_squares[ordinary]
    relative = np.maximum(remaining, 0.0) / exact[ordinary]
    return RoutineError(
        top=_MARGIN * float(relative[:, :edge].max()),
        inner=_MARGIN * float(relative[:, edge:-edge].max()),
        bottom=_MARGIN_OF_SMALL * float(relative[:, -edge:].max()),
        absolute=absolute,
        ratio=ratio,
        power=max(0.0, *powers),
        isolated=_MARGIN_OF_ISOLATED * float(far[isolated].max()),
    )
