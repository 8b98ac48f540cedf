"""The cost of a matrix in arithmetic, time and memory, from its shape alone.

The plan promises these numbers and the computation keeps to them, so this module has the sizes that both depend on.
"""

import os

from .precision import Precision

# Columns of the long side that are upcast and multiplied at a time.
BLOCK_COLUMNS = 2048
# The number of weights that are dequantized at a time.
DECODED_NUMEL = 1 << 20
# The limit of memory for scales and zero points that were read and are not used yet.
PARTS_AHEAD_NBYTES = 32_000_000
# A matrix with a short side up to this is computed by one core. All cores share a larger one, because of its memory.
SMALL_SIDE = 4096
# The memory of Python, numpy and torch before any weight is read (measured: 0.15 GB on Linux, CPU build), and the
# memory that BLAS and the allocator keep for every thread, without the arrays counted below (measured: 0.03 GB).
_RUNTIME_NBYTES = 200_000_000
_THREAD_NBYTES = 40_000_000
# Tridiagonalization is limited by memory bandwidth: about a fifth of the rate of matrix products.
_EIGENVALUE_SLOWDOWN = 5


def runtime_nbytes(threads: int) -> int:
    """Return the memory of the process without any matrix, in bytes."""
    return _RUNTIME_NBYTES + threads * _THREAD_NBYTES


def flops(n: int, m: int) -> float:
    """Count the flops of half of K = W Wᵀ and its tridiagonalization: s²l + 4/3 s³."""
    short, long = min(n, m), max(n, m)
    return short**2 * long + 4 / 3 * short**3


def work(n: int, m: int) -> float:
    """Estimate the time of a matrix, in flops of a matrix product.

    The remaining time is weighted by it.
    """
    short, long = min(n, m), max(n, m)
    return short**2 * long + _EIGENVALUE_SLOWDOWN * 4 / 3 * short**3


def gram_nbytes(n: int, m: int, itemsize: int) -> int:
    """Return the memory for the eigenvalues of K, in bytes.

    It holds K, the copy of K that the routine overwrites, and one block of columns, in numbers of `itemsize` bytes.
    The weights are mapped, and do not count.
    """
    short, long = min(n, m), max(n, m)
    return itemsize * short * (2 * short + min(long, BLOCK_COLUMNS))


def decoding_nbytes(scales: int) -> int:
    """Return the memory for dequantizing, in bytes, without the resulting block.

    It holds the values, zero points and scales of a few rows, and three copies of all scales and zero points: as
    stored, as read, and in float32.
    """
    return 24 * DECODED_NUMEL + 24 * scales


def svd_nbytes(n: int, m: int) -> int:
    """Return the memory for QR and SVD in float64, in bytes.

    It holds R, the stack of R and the next block, and LAPACK's copies."""
    short, long = min(n, m), max(n, m)
    block = min(long, max(short, BLOCK_COLUMNS))
    return 8 * short * (2 * short + 2 * (short + block))


def is_small(n: int, m: int) -> bool:
    """Whether a single core computes a matrix of this shape."""
    return min(n, m) <= SMALL_SIDE


def compute_nbytes(n: int, m: int, precision: Precision, scales: int | None = None) -> int:
    """Return the memory for the singular values of a stored matrix, in bytes.

    Args:
        precision: AUTO counts as its first step, FP32.
        scales: the number of scales of a quantized matrix; None for a plain one.
    """
    dequantizing = 0 if scales is None else decoding_nbytes(scales)
    if precision is Precision.SVD:
        return svd_nbytes(n, m) + dequantizing
    return gram_nbytes(n, m, 8 if precision is Precision.FP64 else 4) + dequantizing


def count_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
