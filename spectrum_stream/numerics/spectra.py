"""Singular values of matrices, with error estimates, in four precisions.

For an n x m matrix W with n <= m (the other case is its transpose, which has the same singular values):

    K = W Wᵀ,  singular values = sqrt(eigenvalues of K)

K and its eigenvalues take fewer flops than a bidiagonal SVD (n² m + 4/3 n³ instead of 4 n² m - 4/3 n³), and more
of these flops are in matrix products. Small singular values lose accuracy: an error d of an eigenvalue of K
makes a singular value s wrong by d / 2s. This is negligible for most values of an ordinary matrix, but large if
sigma_1 is thousands of times larger. So every singular value has an estimate of its error, from measured
roundings (`gram`, `eigenvalues`), and there are four precisions:

    fp32    K and its eigenvalues in float32. If a few values make the score inexact, these are refined (`refine`)
    mixed   K in float64 from float32 products of 256 columns, and its eigenvalues in float64
    fp64    K and its eigenvalues in float64
    svd     Householder QR of the blocks, then a bidiagonal SVD, in float64: wrong by at most 2^-52 max(n, m) sigma_1

Singular values are rejected if the sum of their squares or of their fourth powers disagrees with K. Those of svd are
rejected if the sum of their squares disagrees with W.

Matrices of one shape and dtype are computed as a batch, on any device. On a CPU a batch of more than one gains
nothing.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..model.no_score import NoScore
from .costs import BLOCK_COLUMNS
from .dequantize import Weights
from .device import CPU, Device
from .eigenvalues import Eigenvalues, estimate_errors, measure_routine
from .gram import Gram, gram, products_in
from .precision import Precision
from .refine import refine
from .snr import find_deciding_values
from .switches import Switches

# The rounding unit of the eigenvalues, and the trace of K below which small eigenvalues underflow.
_UNITS = {
    Precision.FP32: (2.0**-24, 2.0**-80),
    Precision.MIXED: (2.0**-53, 2.0**-80),
    Precision.FP64: (2.0**-53, 2.0**-900),
}


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values of one matrix.

    Attributes:
        values: float64, (min(n, m),), descending.
        errors: float64, of the same shape: the estimated absolute error of each value.
        drift: float64, of the same shape: the part of the error that neighbors share. A sum does not average it out.
        precision: the precision of the computation.
        refined: the number of values that were refined.
    """

    values: np.ndarray
    errors: np.ndarray
    drift: np.ndarray
    precision: Precision
    refined: int = 0


_EXACT = Switches()


def exact_products() -> AbstractContextManager[None]:
    """Switch off TF32 and bfloat16 in float32 products within the context.

    A training program may have switched them on. They would leave only three correct digits.
    """
    matmul = torch.backends.cuda.matmul
    return _EXACT.hold(
        (matmul, "fp32_precision", "ieee"),
        products_in("ieee"),
        (matmul, "allow_bf16_reduced_precision_reduction", False),
        (matmul, "allow_fp16_reduced_precision_reduction", False),
        # This also holds for float16 products with a float32 result.
        (matmul, "allow_fp16_accumulation", False),
    )


def singular_values(ws: Sequence[Weights], precision: Precision, device: Device = CPU) -> list[Spectrum | NoScore]:
    """Compute the singular values of each matrix of a batch.

    Args:
        ws: (n, m) matrices of one shape and floating dtype, on the CPU; upcast block by block.
        precision: FP32, MIXED, FP64 or SVD; see the docstring of this module. SVD always runs on the CPU.
        device: where to compute.

    Returns:
        For each matrix a spectrum or a reason: OUT_OF_RANGE if a weight is not finite, or if K overflows or
        underflows; NOT_CONVERGED; FAILED_CHECK.

    Raises:
        torch.OutOfMemoryError: on a device. A smaller batch may fit.
    """
    if ws[0].shape[0] > ws[0].shape[1]:
        ws = [w.T for w in ws]
    if precision is Precision.SVD:
        return [_by_svd(w) for w in ws]
    products = gram(ws, precision, device)
    # NaN and Inf in W reach the diagonal of K, where they cannot cancel, and fail this comparison.
    usable = [i for i, trace in enumerate(products.traces) if _UNITS[precision][1] < trace < np.inf]
    results: list[Spectrum | NoScore] = [NoScore.OUT_OF_RANGE] * len(ws)
    for i, trace in enumerate(products.traces):
        if trace == 0 and not ws[i].any():
            zeros = np.zeros(ws[i].shape[0])
            results[i] = Spectrum(zeros, zeros, zeros, precision)
    if usable:
        eigenvalues = device.eigvalsh(products.k if len(usable) == len(ws) else products.k[usable])
        for i, row in zip(usable, eigenvalues.flip(1).double().cpu().numpy(), strict=True):
            results[i] = _find_spectrum(products, i, row, ws[i].shape[1], precision, device)
    return results


def _find_spectrum(
    products: Gram, i: int, row: np.ndarray, m: int, precision: Precision, device: Device
) -> Spectrum | NoScore:
    """Check eigenvalues, and refine them if this makes the score exact enough."""
    # The row is NaN if the routine failed.
    if not np.isfinite(row).all():
        return NoScore.NOT_CONVERGED
    found = estimate_errors(
        row,
        float(products.traces[i]),
        float(products.squares[i]),
        _UNITS[precision][0],
        products.roundings[i],
        measure_routine(device),
    )
    if not found.are_right:
        return NoScore.FAILED_CHECK
    spectrum = _take_roots(found, precision)
    if precision is not Precision.FP32:
        return spectrum
    # Refined values keep the errors of K.
    best = _take_roots(replace(found, errors=found.gram_errors, drift=found.gram_drift), precision)
    deciding = find_deciding_values(
        spectrum.values,
        len(row),
        m,
        errors=spectrum.errors,
        drift=spectrum.drift,
        refined_errors=best.errors,
        refined_drift=best.drift,
    )
    if not deciding:
        return spectrum
    k = products.k[i]
    # Metal has no float64.
    refined = refine(k.cpu() if device.torch_device.type == "mps" else k, found, deciding)
    return spectrum if refined is None else _take_roots(refined, precision)


def _take_roots(found: Eigenvalues, precision: Precision) -> Spectrum:
    """Return the singular values and their errors.

    If an eigenvalue l is wrong by at most d, the true singular value is between sqrt(l - d) and sqrt(l + d).
    """
    s = np.sqrt(found.values)
    # No estimate is negative. So if the true values are zero, all estimates are too large, and their errors add up.
    drift = np.where(found.values <= found.errors, found.errors, found.drift)
    return Spectrum(s, _root_errors(s, found.errors), _root_errors(s, drift), precision, found.refined)


def _root_errors(s: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Return the errors of singular values, from the errors d of their squares."""
    square = np.square(s)
    # If the true root may be zero, the error is that of the side that is farther away.
    errors: np.ndarray = np.maximum(s, np.sqrt(square + d) - s)
    # Otherwise s - sqrt(s² - d) is larger. This form has no cancellation.
    is_positive = (square >= d) & (s > 0)
    np.divide(d, s + np.sqrt(np.maximum(square - d, 0.0)), out=errors, where=is_positive)
    return errors


def count_not_finite(w: Weights) -> int:
    """Count the entries of W that are NaN or infinite, block by block."""
    rows = max(1, BLOCK_COLUMNS * BLOCK_COLUMNS // w.shape[1])
    return sum(int((~torch.isfinite(w[i : i + rows])).sum()) for i in range(0, w.shape[0], rows))


def _find_norm(x: torch.Tensor) -> float:
    """Return the square root of the sum of squares, which may themselves overflow."""
    peak = float(x.abs().max())
    return peak * float(torch.linalg.vector_norm(x / peak)) if 0 < peak < np.inf else peak


def _by_svd(w: Weights) -> Spectrum | NoScore:
    n, m = w.shape
    # R of the QR of Wᵀ has the singular values of W. Built block by block, it does not need Wᵀ in memory.
    rows = max(n, BLOCK_COLUMNS)
    r = torch.empty(0, n, dtype=torch.float64)
    norm = 0.0
    for column in range(0, m, rows):
        block = w[:, column : column + rows].T.double()
        norm = float(np.hypot(norm, _find_norm(block)))
        r = torch.linalg.qr(torch.cat([r, block]), mode="r").R
    if not torch.isfinite(r).all():
        return NoScore.OUT_OF_RANGE
    try:
        values = torch.linalg.svdvals(r).numpy()
    except LinAlgError:
        return NoScore.NOT_CONVERGED
    # The rule of numpy.linalg.matrix_rank: a value below this is rounding, and the true one may be zero.
    rounding = np.finfo(np.float64).eps * max(n, m) * values[0]
    if abs(_find_norm(torch.from_numpy(values)) - norm) > np.sqrt(n) * rounding:
        return NoScore.FAILED_CHECK
    values = np.where(values > rounding, values, 0.0)
    errors = np.where(values > 0, rounding, 0.0)
    return Spectrum(values, errors, errors, Precision.SVD)
