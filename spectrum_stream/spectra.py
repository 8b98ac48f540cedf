"""Singular values of a matrix, as exact as the score needs and no slower.

For an n x m matrix W with n <= m (the other case is its transpose, which has the same singular values):

    K = W Wᵀ,  singular values = sqrt(eigenvalues of K)

K is n x n and is summed over blocks of columns, each upcast as it is read, so no float32 copy of W ever
exists. K and its eigenvalues cost less than half the flops of a bidiagonal SVD, and they run as products.

What it costs is accuracy at the small end. An eigenvalue of K is wrong by up to some d, proportional to the
rounding unit u and the largest eigenvalue, which makes a singular value s wrong by d / 2s: harmless in
the bulk of an ordinary matrix, ruinous when sigma_1 is thousands of times the bulk. So every singular value comes
with an estimate of its error, and there are three methods to choose from, each slower and safer:

    float32   K and its eigenvalues in float32
    float64   the same in float64; products of bfloat16 and float16 numbers are exact in both
    svd       Householder QR of the blocks, then a bidiagonal SVD, in float64: wrong by u * sigma_1 at most
"""

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import numpy as np
import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from .planning import BLOCK_COLUMNS

# K's lower triangle is computed in this many bands of rows: 8 bands are 56% of the full product.
_BANDS = 8
# Below this side the whole product is cheaper than its bands.
_BANDS_FROM = 1024


class Method(StrEnum):
    """How singular values were computed, in order of cost."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    SVD = "svd"


# Type, rounding unit, and the trace of K below which its smaller eigenvalues drown in underflow.
_ARITHMETIC = {
    Method.FLOAT32: (torch.float32, 2.0**-24, 2.0**-80),
    Method.FLOAT64: (torch.float64, 2.0**-53, 2.0**-900),
}


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values of one matrix.

    Attributes:
        values: float64, (min(n, m),), descending.
        errors: float64, the same shape: the estimated absolute error of each.
        drift: the part of the errors that neighbours share, so that a sum of values does not average it out.
        method: how they were computed.
    """

    values: np.ndarray
    errors: np.ndarray
    drift: np.ndarray
    method: Method


class OutOfRange(ArithmeticError):
    """W has NaN or Inf in it, or its squares are too large or too small for the method."""


class NotConverged(ArithmeticError):
    """LAPACK gave up."""


def singular_values(w: torch.Tensor, method: Method) -> Spectrum:
    """The singular values of W.

    Args:
        w: (n, m), any floating dtype; upcast block by block.
        method: see the module's head.

    Raises:
        OutOfRange: by the last method, because of NaN or Inf; by the others, for the next one to try.
        NotConverged: the method failed; the next one may not.
    """
    if w.shape[0] > w.shape[1]:
        w = w.T
    try:
        return _by_svd(w) if method is Method.SVD else _by_gram(w, method)
    except LinAlgError as error:
        raise NotConverged from error


def _by_gram(w: torch.Tensor, method: Method) -> Spectrum:
    dtype, unit, smallest = _ARITHMETIC[method]
    k = gram(w, dtype)
    # NaN and Inf in W reach the diagonal of K, where they cannot cancel, and fail the comparison as well.
    if not smallest < float(k.diagonal().sum()) < torch.inf:
        raise OutOfRange
    eigenvalues = torch.linalg.eigvalsh(k).flip(0).clamp_min(0).double().numpy()
    return Spectrum(*_from_gram(eigenvalues, unit), method)


def gram(w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """K = W Wᵀ accumulated in `dtype`, for W (n, m); the lower triangle of an (n, n) matrix is valid."""
    n, m = w.shape
    k = torch.zeros(n, n, dtype=dtype)
    bands = _BANDS if n >= _BANDS_FROM else 1
    edges = [n * i // bands for i in range(bands + 1)]
    for column in range(0, m, BLOCK_COLUMNS):
        block = w[:, column : column + BLOCK_COLUMNS].to(dtype)
        for top, bottom in pairwise(edges):
            k[top:bottom, :bottom].addmm_(block[top:bottom], block[:bottom].T)
    return k


def count_not_finite(w: torch.Tensor) -> int:
    """How many entries of W are NaN or infinite, counted block by block."""
    rows = max(1, BLOCK_COLUMNS * BLOCK_COLUMNS // w.shape[1])
    return sum(int((~torch.isfinite(w[i : i + rows])).sum()) for i in range(0, w.shape[0], rows))


def _from_gram(eigenvalues: np.ndarray, unit: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Singular values, their errors and their drift, from the eigenvalues of K in descending order.

    The error d of an eigenvalue l was measured against float64, on bfloat16 matrices with sides of 256 to
    4096 and flat, spiked, mean-shifted and power-law spectra. It has three parts, in units of u:

        4 l_bulk + 8 l_1 / n    shared by all: rounding of the products, and of the reduction of K
        5 l + 0.1 n l_bulk      wandering from one value to the next: the tridiagonal iteration

    with l_bulk the upper quartile, the second part at most 0.1 n l, and a margin for small n. A singular
    value is then wrong by sqrt(l + d) - sqrt(l), which is d / 2s, and sqrt(d) where s vanishes. On those
    matrices the error of the score was 0.02 to 0.8 of what follows from this, never more.
    """
    n = len(eigenvalues)
    bulk = eigenvalues[n // 4]
    s = np.sqrt(eigenvalues)
    shared = np.full(n, unit * (4 * bulk + 8 / n * (1 + 128 / n) * eigenvalues[0]))
    wandering = unit * np.minimum(5 * eigenvalues + 0.1 * n * bulk, (5 + 0.1 * n) * eigenvalues)

    return s, _root_errors(s, shared + wandering), _root_errors(s, shared)


def _root_errors(s: np.ndarray, d: np.ndarray) -> np.ndarray:
    # sqrt(s² + d) - s without its cancellation.
    errors: np.ndarray = d / (s + np.sqrt(np.square(s) + d))
    return errors


def _by_svd(w: torch.Tensor) -> Spectrum:
    n, m = w.shape
    # R of a QR of Wᵀ has W's singular values; block after block, it is found without Wᵀ in memory.
    rows = max(n, BLOCK_COLUMNS)
    r = torch.empty(0, n, dtype=torch.float64)
    for column in range(0, m, rows):
        r = torch.linalg.qr(torch.cat([r, w[:, column : column + rows].T]), mode="r").R
    if not torch.isfinite(r).all():
        raise OutOfRange
    values = torch.linalg.svdvals(r).numpy()
    # numpy.linalg.matrix_rank's rule: what is below is rounding, and the true value may well be zero.
    rounding = np.finfo(np.float64).eps * max(n, m) * values[0]
    values = np.where(values > rounding, values, 0.0)
    errors = np.where(values > 0, rounding, 0.0)
    return Spectrum(values, errors, errors, Method.SVD)
