"""Check a CUDA device: whether its eigenvalues are right and its float64 is fast."""

import time
from collections.abc import Callable

import torch

# The number and the side of the matrices: a few of middle size, and many small ones, because wrong values were
# reported for batches of hundreds of small matrices (pytorch issue 192483).
_SIZES = ((16, 256), (512, 32))
# Backward stable routines are wrong by a few units in the last place of the largest eigenvalue. The rounding of the
# matrix has the same effect.
_UNITS = 64
# The sizes of the memory that is filled with NaN. torch has one pool for at most 1 MiB, and another for larger sizes.
_DIRTY_NUMEL = (1 << 24, *(8 * [1 << 17]))
# On GPUs for data centers, float64 products take as long as float32 ones, or twice as long. On other GPUs, they take
# 32 or 64 times as long. If a program has switched on TF32, float32 products are 8 times faster on GPUs for data
# centers.
_SLOW = 16
_RATE_SIDE = 2048
_RATE_RUNS = 3


def finds_known_eigenvalues(eigvalsh: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> bool:
    """Whether a routine finds known eigenvalues, in float32 and float64.

    Args:
        eigvalsh: computes the eigenvalues, ascending, of (batch, n, n).
    """
    for count, n in _SIZES:
        matrices, known = make_known(count, n)
        for dtype in (torch.float32, torch.float64):
            k = matrices.to(device, dtype)
            # A routine that expects a workspace of zeros meets this memory, which torch recycles.
            dirty = [torch.full((numel,), torch.nan, device=device) for numel in _DIRTY_NUMEL]
            del dirty
            found = eigvalsh(k).to("cpu", torch.float64)
            tolerance = _UNITS * torch.finfo(dtype).eps * known[:, -1:]
            # NaN is within no tolerance.
            if not bool(((found - known).abs() <= tolerance).all()):
                return False
    return True


def make_known(count: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make semidefinite matrices with known eigenvalues, by Householder reflections.

    One third of the matrices have spread eigenvalues, one third have zeros for half of them, and one third have two
    narrow clusters and one large value. Diagonal matrices would not test a routine, because it finishes them early.

    Returns:
        The matrices (count, n, n) and their eigenvalues (count, n), ascending, both in float64 on the CPU.
    """
    generator = torch.Generator().manual_seed(n)
    spread = torch.linspace(0.5, 4, n, dtype=torch.float64).square()
    half_zeros = torch.where(torch.arange(n) < n // 2, 0.0, spread)
    clustered = torch.where(torch.arange(n) < n // 2, 1.0, 2.0) + 1e-6 * spread
    clustered[-1] = 100.0
    known = torch.stack([spread, half_zeros, clustered]).repeat(-(-count // 3), 1)[:count]
    k = torch.diag_embed(known)
    for _ in range(2):
        v = torch.randn(count, n, 1, generator=generator, dtype=torch.float64)
        v /= v.norm(dim=1, keepdim=True)
        k = k - 2 * v @ (v.mT @ k)
        k = k - 2 * (k @ v) @ v.mT
    return (k + k.mT) / 2, known


def has_fast_float64(device: torch.device) -> bool:
    """Whether products in float64 take about as long as in float32 on a CUDA device."""
    slow, fast = (_time_product(device, dtype) for dtype in (torch.float64, torch.float32))
    return slow < _SLOW * fast


def _time_product(device: torch.device, dtype: torch.dtype) -> float:
    """Return the shortest time of a few products, in seconds."""
    a = torch.ones(_RATE_SIDE, _RATE_SIDE, dtype=dtype, device=device)
    seconds = []
    # The first run loads the kernel.
    for _ in range(1 + _RATE_RUNS):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.mm(a, a)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)
