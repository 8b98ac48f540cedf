"""The cost of a matrix in arithmetic, time and memory, from its shape alone.

The plan promises these numbers and the computation keeps to them, so both take the sizes from this module.
"""

import os
from dataclasses import dataclass

from .precision import Precision

# Columns of the long side that are upcast and multiplied at a time.
BLOCK_COLUMNS = 2048
# The number of weights that are dequantized at a time.
DECODED_NUMEL = 1 << 20
# The limit of memory for scales and zero points that were read and are not used yet.
PARTS_AHEAD_NBYTES = 32_000_000
# The most threads that share a matrix. More of them slow an eigenvalue routine down: OpenBLAS takes 4 s for n = 4096
# with 4 threads, and 259 s with 128 (openqp issue 307).
MAX_THREADS = 4
# The share of this machine's memory for the matrices that are computed at once, if there is no other limit.
_TOGETHER_SHARE = 0.5
# Each thread of a device copies blocks through two device buffers of this size, and two equal buffers on the host. A
# buffer holds 2048 columns of 8192 rows in float32.
STAGING_NBYTES = 1 << 26
STAGING_BUFFERS = 2
# The number of batches that a device computes at once, each by one thread: one copies and multiplies while the other
# computes eigenvalues.
DEVICE_THREADS = 2
# cuSOLVER's limit of n * lda * batch (cusolverDnXsyevBatched). Calls with about 32k matrices also fail (mjlab issue
# 732).
MAX_BATCH_NUMEL = 2**31 - 1
MAX_BATCH = 2**15 - 1
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

    Estimates of the remaining time use it as a weight.
    """
    short, long = min(n, m), max(n, m)
    return short**2 * long + _EIGENVALUE_SLOWDOWN * 4 / 3 * short**3


def itemsize_of(precision: Precision) -> int:
    """Return the bytes of a number of K; AUTO counts as its first step, FP32."""
    return 8 if precision in (Precision.MIXED, Precision.FP64) else 4


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


@dataclass(frozen=True, slots=True)
class Workspace:
    """The memory of an eigenvalue routine besides K, with its copy of K, in bytes.

    Attributes:
        fixed: for a batch of any size.
        each: for each matrix of the batch.
    """

    fixed: int
    each: int


def assumed_workspace(n: int, itemsize: int) -> Workspace:
    """Return the workspace before it is measured: the copy of K, and as much again."""
    return Workspace(0, 2 * itemsize * n * n)


def device_nbytes(n: int, m: int, itemsize: int, batch: int = 1, workspace: Workspace | None = None) -> int:
    """Return the device memory for a batch of n x m matrices of one thread, in bytes.

    It holds K; an array of the same size, first for the products of a block and later for a copy of K without the
    matrices that are not finite; the workspace of the eigenvalue routine; the buffers; and one block, converted to
    numbers of `itemsize` bytes.

    Args:
        itemsize: the bytes of a number of K.
        workspace: the measured workspace for this short side and itemsize; None to assume one.
    """
    short = min(n, m)
    workspace = workspace or assumed_workspace(short, itemsize)
    return _staged_nbytes(itemsize) + workspace.fixed + batch * _batched_nbytes(short, itemsize, workspace)


def batch_limit(n: int, m: int, itemsize: int, nbytes: int, workspace: Workspace | None = None) -> int:
    """Return the largest batch of n x m matrices for one thread, at least 1.

    The batch keeps the limits of cuSOLVER, and its `device_nbytes` is at most `nbytes`. A single matrix may exceed
    both.
    """
    short = min(n, m)
    workspace = workspace or assumed_workspace(short, itemsize)
    room = nbytes - _staged_nbytes(itemsize) - workspace.fixed
    fitting = room // _batched_nbytes(short, itemsize, workspace)
    return max(1, min(MAX_BATCH_NUMEL // short**2, MAX_BATCH, fitting))


def _batched_nbytes(short: int, itemsize: int, workspace: Workspace) -> int:
    return 2 * itemsize * short * short + workspace.each


def _staged_nbytes(itemsize: int) -> int:
    # Numbers in the buffers have at least two bytes, so a converted block is at most itemsize / 2 times as large.
    return STAGING_NBYTES * (STAGING_BUFFERS + itemsize // 2)


def count_together(nbytes: int, workers: int, limit_nbytes: int) -> int:
    """Return how many matrices are computed at once on a CPU, at least 1.

    Args:
        nbytes: the memory of one of them.
        workers: the number of cores.
        limit_nbytes: the limit of memory for all matrices together.
    """
    return max(1, min(workers, limit_nbytes // nbytes))


def usable_nbytes() -> int:
    """Return the memory for all matrices that are computed at once, in bytes."""
    if not hasattr(os, "sysconf"):
        return 1 << 62
    return int(_TOGETHER_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def compute_nbytes(n: int, m: int, precision: Precision, scales: int | None = None) -> int:
    """Return the memory for the singular values of a stored matrix, in bytes.

    Args:
        precision: AUTO counts as its first step, FP32.
        scales: the number of scales of a quantized matrix; None for a plain one.
    """
    dequantizing = 0 if scales is None else decoding_nbytes(scales)
    if precision is Precision.SVD:
        return svd_nbytes(n, m) + dequantizing
    return gram_nbytes(n, m, itemsize_of(precision)) + dequantizing


def count_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
