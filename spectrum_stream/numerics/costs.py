"""What a matrix costs: arithmetic, time and memory, from its shape alone.

The plan promises by these numbers and the engine keeps to them, so the sizes that both depend on are here.
"""

import os

from .precision import Precision

# Columns of the long side that are upcast and multiplied at a time.
BLOCK_COLUMNS = 2048
# Quantized weights that are multiplied out at a time.
DECODED_NUMEL = 1 << 20
# What scales and the like may take in memory that are read and not used up yet.
PARTS_AHEAD_NBYTES = 32_000_000
# Up to this short side a matrix is one core's work; above, memory counts for more and all cores share one matrix.
SMALL_SIDE = 4096
# What Python, numpy and torch take before any weight is read (measured: 0.15 GB on Linux, CPU build), and what
# BLAS and the allocator keep for every thread beside the arrays that are counted below (measured: 0.03 GB).
_RUNTIME_NBYTES = 200_000_000
_THREAD_NBYTES = 40_000_000
# Tridiagonalization is bound by memory and runs at about a fifth of the rate of matrix products.
_EIGENVALUE_SLOWDOWN = 5


def runtime_nbytes(threads: int) -> int:
    """Memory that the process takes whatever it computes, on so many threads."""
    return _RUNTIME_NBYTES + threads * _THREAD_NBYTES


def flops(n: int, m: int) -> float:
    """Half of K = W Wᵀ on the short side, and its reduction to tridiagonal form: s²l + 4/3 s³."""
    short, long = min(n, m), max(n, m)
    return short**2 * long + 4 / 3 * short**3


def work(n: int, m: int) -> float:
    """Expected time, in the time of one flop of a matrix product; weights the ETA."""
    short, long = min(n, m), max(n, m)
    return short**2 * long + _EIGENVALUE_SLOWDOWN * 4 / 3 * short**3


def gram_nbytes(n: int, m: int, itemsize: int) -> int:
    """Memory for the eigenvalues of K in numbers of `itemsize` bytes: K, the copy of K that the routine destroys,
    and one block of columns. The weights themselves are memory-mapped."""
    short, long = min(n, m), max(n, m)
    return itemsize * short * (2 * short + min(long, BLOCK_COLUMNS))


def decoding_nbytes(scales: int) -> int:
    """Memory to multiply out quantized weights, beside the block that comes of it: codes, zero points and scales of a
    few rows, and all scales and zero points as they are stored, read and in float32."""
    return 24 * DECODED_NUMEL + 24 * scales


def svd_nbytes(n: int, m: int) -> int:
    """Memory for QR and SVD in float64: R, the stack of R and the next block, and what LAPACK makes of them."""
    short, long = min(n, m), max(n, m)
    block = min(long, max(short, BLOCK_COLUMNS))
    return 8 * short * (2 * short + 2 * (short + block))


def is_small(n: int, m: int) -> bool:
    """Whether one core computes a matrix of this shape as fast as several would, each with a matrix of its own."""
    return min(n, m) <= SMALL_SIDE


def compute_nbytes(n: int, m: int, precision: Precision, scales: int | None = None) -> int:
    """Memory to compute the singular values of one matrix, the stored matrix itself not counted.

    Args:
        precision: AUTO counts as its first step, fp32.
        scales: the number of scales of a quantized matrix; None for a plain one.
    """
    dequantizing = 0 if scales is None else decoding_nbytes(scales)
    if precision is Precision.SVD:
        return svd_nbytes(n, m) + dequantizing
    return gram_nbytes(n, m, 8 if precision is Precision.FP64 else 4) + dequantizing


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
