"""Singular values of matrices, with error estimates, in three precisions.

For an n x m matrix W with n <= m (the other case is its transpose, which has the same singular values):

    K = W Wᵀ,  singular values = sqrt(eigenvalues of K)

K is n x n and is summed over blocks of columns, each upcast as it is read, so no float32 copy of W ever
exists. K and its eigenvalues cost less than half the flops of a bidiagonal SVD, and they run as products.

Small singular values lose accuracy. The error d of an eigenvalue of K is proportional to the rounding unit u and the
largest eigenvalue, and makes a singular value s wrong by d / 2s. This is negligible in the bulk of an ordinary
matrix, but large if sigma_1 is thousands of times the bulk. So every singular value has an estimate of its error, and
there are three precisions, each slower and more exact than the one before:

    fp32   K and its eigenvalues in float32
    fp64   the same in float64; products of bfloat16 and float16 numbers are exact in both
    svd    Householder QR of the blocks, then a bidiagonal SVD, in float64: wrong by u * sigma_1 at most

Matrices of one shape and dtype are computed as a batch, on any device; on a CPU a batch of more than one gains
nothing. On CUDA the products of 16-bit matrices run on tensor cores with a float32 result, and the next block is
copied while the last one is multiplied.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ..model.no_score import NoScore
from .costs import BLOCK_COLUMNS
from .dequantize import Weights
from .device import CPU, Device
from .precision import Precision

# The lower triangle of K is computed in this many bands of rows. 8 bands are 56 % of the full product, and more of
# them gain little. Below the second number the whole product takes no longer than its bands (measured with MKL).
_BANDS = 8
_BANDS_FROM = 128
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
# The dtype, its rounding unit, and the trace of K below which small eigenvalues underflow.
_ARITHMETIC = {
    Precision.FP32: (torch.float32, 2.0**-24, 2.0**-80),
    Precision.FP64: (torch.float64, 2.0**-53, 2.0**-900),
}


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values of one matrix.

    Attributes:
        values: float64, (min(n, m),), descending.
        errors: float64, of the same shape: the estimated absolute error of each value.
        drift: float64, of the same shape: the part of the error that neighbors share. A sum does not average it out.
        precision: the precision that they were computed with.
    """

    values: np.ndarray
    errors: np.ndarray
    drift: np.ndarray
    precision: Precision


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Switch off TF32 and bfloat16 in float32 products within the context.

    A training program may have switched them on. They would leave only three correct digits.
    """
    settings = [
        (torch.backends.cuda.matmul, "fp32_precision", "ieee"),
        (torch.backends.mkldnn.matmul, "fp32_precision", "ieee"),  # type: ignore[attr-defined]
        (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
        (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
        # This also holds for float16 products with a float32 result.
        (torch.backends.cuda.matmul, "allow_fp16_accumulation", False),
    ]
    before = [getattr(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, exact in settings:
            setattr(owner, name, exact)
        yield
    finally:
        for (owner, name, _), value in zip(settings, before, strict=True):
            setattr(owner, name, value)


def singular_values(ws: Sequence[Weights], precision: Precision, device: Device = CPU) -> list[Spectrum | NoScore]:
    """Compute the singular values of each matrix of a batch.

    Args:
        ws: (n, m) matrices of one shape and floating dtype, on the CPU; upcast block by block.
        precision: FP32, FP64 or SVD; see the docstring of this module. SVD always runs on the CPU.
        device: where to compute.

    Returns:
        For each matrix a spectrum; or OUT_OF_RANGE if a weight is not finite or K over- or underflows, NOT_CONVERGED.

    Raises:
        torch.OutOfMemoryError: on a device. A smaller batch may fit.
    """
    if ws[0].shape[0] > ws[0].shape[1]:
        ws = [w.T for w in ws]
    if precision is Precision.SVD:
        return [_by_svd(w) for w in ws]
    dtype, unit, smallest = _ARITHMETIC[precision]
    k = gram(ws, dtype, device)
    traces = k.diagonal(dim1=1, dim2=2).sum(1).tolist()
    # NaN and Inf in W reach the diagonal of K, where they cannot cancel, and fail this comparison.
    usable = [i for i, trace in enumerate(traces) if smallest < trace < torch.inf]
    results: list[Spectrum | NoScore] = [NoScore.OUT_OF_RANGE] * len(ws)
    for i, trace in enumerate(traces):
        if trace == 0 and not ws[i].any():
            zeros = np.zeros(k.shape[1])
            results[i] = Spectrum(zeros, zeros, zeros, precision)
    if usable:
        eigenvalues = device.eigvalsh(k if len(usable) == len(ws) else k[usable])
        for i, row in zip(usable, eigenvalues.flip(1).clamp_min(0).double().cpu().numpy(), strict=True):
            # The row of a matrix for which the routine fails is NaN.
            is_found = bool(np.isfinite(row).all())
            results[i] = Spectrum(*_from_gram(row, unit), precision) if is_found else NoScore.NOT_CONVERGED
    return results


def gram(ws: Sequence[Weights], dtype: torch.dtype, device: Device) -> torch.Tensor:
    """Compute K = W Wᵀ of each W (n, m), accumulated in `dtype`.

    Returns:
        (batch, n, n) on the device. Only the lower triangles are valid.
    """
    n = ws[0].shape[0]
    k = torch.zeros(len(ws), n, n, dtype=dtype, device=device.torch_device)
    bands = _BANDS if n >= _BANDS_FROM else 1
    edges = [n * i // bands for i in range(bands + 1)]
    on_tensor_cores = device.torch_device.type == "cuda" and dtype is torch.float32 and ws[0].dtype in _SIXTEEN_BITS
    for part, block in device.blocks(ws, None if on_tensor_cores else dtype):
        for top, bottom in pairwise(edges):
            rows, columns = block[:, top:bottom], block[:, :bottom].mT
            target = k[part, top:bottom, :bottom]
            if on_tensor_cores:
                # Without out_dtype the product of 16-bit factors would be rounded to 16 bits.
                target += torch.bmm(rows, columns, out_dtype=torch.float32)
            elif len(block) == 1:
                target[0].addmm_(rows[0], columns[0])
            else:
                target.baddbmm_(rows, columns)
    return k


def count_not_finite(w: Weights) -> int:
    """Count the entries of W that are NaN or infinite, block by block."""
    rows = max(1, BLOCK_COLUMNS * BLOCK_COLUMNS // w.shape[1])
    return sum(int((~torch.isfinite(w[i : i + rows])).sum()) for i in range(0, w.shape[0], rows))


def _from_gram(eigenvalues: np.ndarray, unit: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return singular values, their errors and their drift.

    The error d of an eigenvalue l was measured against float64, on bfloat16 matrices with sides of 256 to
    4096 and flat, spiked, mean-shifted and power-law spectra. It has two parts, in units of u:

        4 l_bulk + 8 l_1 / n    shared by all values: rounding of the products, and of the reduction of K
        5 l + 0.1 n l_bulk      different from value to value: the tridiagonal iteration

    Here l_bulk is the upper quartile, the term 0.1 n l_bulk is at most 0.1 n l, and there is a margin for small n.
    A singular value is then wrong by sqrt(l + d) - sqrt(l), which is d / 2s, and sqrt(d) where s vanishes. On those
    matrices the error of the score was 0.02 to 0.8 of the estimate that follows from this.

    Args:
        eigenvalues: of K, descending, float64.
        unit: the rounding unit u.
    """
    n = len(eigenvalues)
    bulk = eigenvalues[n // 4]
    s = np.sqrt(eigenvalues)
    shared = np.full(n, unit * (4 * bulk + 8 / n * (1 + 128 / n) * eigenvalues[0]))
    wandering = unit * np.minimum(5 * eigenvalues + 0.1 * n * bulk, (5 + 0.1 * n) * eigenvalues)

    return s, _root_errors(s, shared + wandering), _root_errors(s, shared)


def _root_errors(s: np.ndarray, d: np.ndarray) -> np.ndarray:
    # sqrt(s² + d) - s, without the cancellation.
    errors: np.ndarray = d / (s + np.sqrt(np.square(s) + d))
    return errors


def _by_svd(w: Weights) -> Spectrum | NoScore:
    n, m = w.shape
    # R of the QR of Wᵀ has the singular values of W. Built block by block, it does not need Wᵀ in memory.
    rows = max(n, BLOCK_COLUMNS)
    r = torch.empty(0, n, dtype=torch.float64)
    for column in range(0, m, rows):
        r = torch.linalg.qr(torch.cat([r, w[:, column : column + rows].T]), mode="r").R
    if not torch.isfinite(r).all():
        return NoScore.OUT_OF_RANGE
    try:
        values = torch.linalg.svdvals(r).numpy()
    except LinAlgError:
        return NoScore.NOT_CONVERGED
    # The rule of numpy.linalg.matrix_rank: a value below this is rounding, and the true one may be zero.
    rounding = np.finfo(np.float64).eps * max(n, m) * values[0]
    values = np.where(values > rounding, values, 0.0)
    errors = np.where(values > 0, rounding, 0.0)
    return Spectrum(values, errors, errors, Precision.SVD)
