"""A dense matrix with given singular values, made without an SVD.

W = U diag(s) Vᵀ. U and V have columns picked at random from a Kronecker product of two small random orthogonal
matrices:

    Q = A ⊗ B,  A (a, a), B (b, b), a b = the side, a as near to b as the side's divisors allow

Q is orthogonal and dense, exists for every side (28672 = 128 * 224, 576 = 24 * 24), and is never formed. To apply it
costs a + b multiplications an entry. Its rows are outer products, so the rows of V are cheap, and W is made a strip
at a time. The arithmetic is in float64, so a float32 checkpoint holds W rounded once.
"""

import math

import numpy as np
import torch

from spectrum_stream.model.matrix import Matrix

# Lines of the long side that are made at a time.
_STRIP = 1024


class OrthonormalColumns:
    """Q (side, count) with QᵀQ = I: `count` columns of A ⊗ B in random order; float64."""

    def __init__(self, side: int, count: int, rng: np.random.Generator) -> None:
        a = next(d for d in range(math.isqrt(side), 0, -1) if side % d == 0)
        self.side, self.count = side, count
        self._a, self._b = _random_orthogonal(a, rng), _random_orthogonal(side // a, rng)
        self._picked = torch.from_numpy(rng.permutation(side)[:count])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows start to stop of Q: (stop - start, count)."""
        b = len(self._b)
        rows = torch.arange(start, stop)
        return self._a[rows // b][:, self._picked // b].mul_(self._b[rows % b][:, self._picked % b])

    def times_transpose(self, x: torch.Tensor) -> torch.Tensor:
        """Compute X Qᵀ: (k, count) to (k, side)."""
        spread = x.new_zeros(len(x), self.side)
        spread[:, self._picked] = x
        by_factor = spread.view(len(x), len(self._a), len(self._b))
        return (self._a @ by_factor @ self._b.T).view(len(x), self.side)


def matrix(s: np.ndarray, n: int, m: int, dtype: torch.dtype, rng: np.random.Generator) -> torch.Tensor:
    """Make a random W (n, m) in `dtype` with the singular values `s` (min(n, m),)."""
    short, long = min(n, m), max(n, m)
    u, v = OrthonormalColumns(short, short, rng), OrthonormalColumns(long, short, rng)
    w = torch.empty(n, m, dtype=dtype)
    by_long_side = w if n > m else w.T
    for start in range(0, long, _STRIP):
        stop = min(start + _STRIP, long)
        by_long_side[start:stop] = u.times_transpose(v.rows(start, stop).mul_(torch.from_numpy(s)))
    return w


def describe(module: str, dtype: str, n: int, m: int, *, nbytes: int, group: str = "") -> Matrix:
    """Describe a matrix in memory, as an item of `compute_all`."""
    weight = f"{module}.weight"
    return Matrix(
        module=module, parameter=weight, group=group, tensor=weight, shard="", start=0,
        dtype=dtype, n=n, m=m, nbytes=nbytes,
    )  # fmt: skip


def _random_orthogonal(side: int, rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(np.linalg.qr(rng.standard_normal((side, side)))[0])
