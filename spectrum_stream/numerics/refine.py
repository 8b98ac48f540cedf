"""Refine the few eigenvalues of K that decide a score.

Refining these avoids computing all of them again in float64. The deciding eigenvalues are the neighbors of the
quantiles, the eigenvalues next to tau, the largest one, and sometimes the smallest ones. The eigenvalue routine finds
them with an error of a few rounding units of the largest eigenvalue. Their Rayleigh quotients vᵀKv, in float64, have
an error that is quadratic in the error of the eigenvector v. The eigenvectors come from these methods:

    the largest one     Lanczos steps, with the basis orthogonalized in float64
    others              inverse iteration: a block of vectors, multiplied several times by (K - x I)^-1, with one LU
                        factorization in float32 for a cluster of eigenvalues around x. The Rayleigh-Ritz values of
                        the block are the eigenvalues next to x, even if these are close to each other. The block
                        must include every eigenvalue that may equal a wanted one within the errors of the routine.
                        Only a block of the smallest eigenvalues may leave some out

The error of a Rayleigh quotient is at most the norm r of its residual Kv - lv, and at most r² / gap, where gap is the
distance to the other eigenvalues (Parlett, The Symmetric Eigenvalue Problem, sections 4.5 and 11.7).
The error of K itself remains. It is small and measured (`gram.Rounding`). If W has nearly parallel rows, it is
larger, and `_weigh_parallel_rows` estimates the difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from .eigenvalues import DEVIATIONS, Eigenvalues
from .gram import bands_of

# The largest number of positions that a cluster spans, and the least number of additional vectors in its block. With
# more vectors, fewer iterations are enough. Corrections follow until the errors are below that of K.
_WIDTH = 16
_GUARDS = 8
_ITERATIONS = 3
_CORRECTIONS = 12
# The largest number of Lanczos steps. An isolated eigenvalue takes about 15, one at the edge of a dense bulk about
# 60.
_MAX_STEPS = 80
_CHECK_EVERY = 5
# A Rayleigh quotient is exact enough with this relative error.
_ENOUGH = 2.0**-26


@dataclass(frozen=True, slots=True)
class _Refined:
    """Refined eigenvalues and the errors of their Rayleigh quotients, by position."""

    values: dict[int, float]
    errors: dict[int, float]


def refine(k: torch.Tensor, found: Eigenvalues, wanted: Sequence[int]) -> Eigenvalues | None:
    """Refine eigenvalues of K.

    Args:
        k: (n, n), float32, on a device with float64. Only the lower triangle is valid. It is overwritten.
        found: its eigenvalues.
        wanted: positions in `found`, ascending.

    Returns:
        The eigenvalues with the wanted ones refined; None if one of them is not found.
    """
    _symmetrize(k)
    refined = _Refined({}, {})
    for cluster in _split(found.values, wanted):
        part = _refine_largest(k, found) if cluster == [0] else _refine_cluster(k, found, cluster)
        if part is None:
            return None
        refined.values.update(part.values)
        refined.errors.update(part.errors)
    values, errors, drift = found.values.copy(), found.errors.copy(), found.drift.copy()
    for i, value in refined.values.items():
        values[i], errors[i], drift[i] = value, found.gram_errors[i] + refined.errors[i], found.gram_drift[i]
    for i in refined.values:
        # The values that were not refined stay in descending order.
        values[:i] = np.maximum(values[:i], values[i])
        values[i + 1 :] = np.minimum(values[i + 1 :], values[i])
    return replace(found, values=values, errors=errors, drift=drift, refined=len(refined.values))


def _split(values: np.ndarray, wanted: Sequence[int]) -> list[list[int]]:
    """Split positions into clusters that a block of vectors covers."""
    clusters: list[list[int]] = []
    for i in wanted:
        if clusters and clusters[-1] != [0] and i - clusters[-1][0] < _WIDTH:
            clusters[-1].append(i)
        else:
            clusters.append([i])
    return clusters


def _refine_largest(k: torch.Tensor, found: Eigenvalues) -> _Refined | None:
    n = len(k)
    v = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    last = min(_MAX_STEPS, n)
    basis, images = (torch.empty(last, n, dtype=torch.float64, device=k.device) for _ in range(2))
    basis[0] = (v / v.norm()).to(k.device)
    outside = found.values[1:2] + found.errors[1:2]
    for step in range(1, last + 1):
        new = images[step - 1].copy_(k @ basis[step - 1].to(k.dtype)).clone()
        for _ in range(2):
            new -= (basis[:step] @ new) @ basis[:step]
        norm = float(new.norm())
        is_last = step == last or not norm > 0
        if step % _CHECK_EVERY == 0 or is_last:
            small = basis[:step] @ images[:step].T
            theta, z = (y[..., -1] for y in torch.linalg.eigh((small + small.T) / 2))
            # The residual of the Ritz vector, up to the rounding of the products in float32.
            residual = norm * abs(float(z[-1]))
            gap = max(float(theta - outside[0]), residual)
            if is_last or residual**2 <= _ENOUGH * float(theta) * gap:
                x = (z @ basis[:step])[:, None]
                (ritz,), (error,), _, residuals = _find_ritz(k, x / x.norm(), outside)
                if ritz <= outside[0]:
                    # The value is not clearly above the second one, so there may be no gap to divide by.
                    error = float(residuals.norm())
                if error <= max(_ENOUGH * ritz, found.gram_errors[0]):
                    is_same = abs(ritz - found.values[0]) <= found.errors[0] + error
                    return _Refined({0: ritz}, {0: error}) if is_same else None
        if is_last:
            break
        basis[step] = new / norm
    return None


def _refine_cluster(k: torch.Tensor, found: Eigenvalues, wanted: Sequence[int]) -> _Refined | None:
    n, values = len(k), found.values
    low, high = wanted[0], wanted[-1] + 1
    # At the lower end, the smallest Ritz values of the block always belong to the smallest eigenvalues. Elsewhere
    # `_match` counts the Ritz values within the errors, so the range must include all eigenvalues there.
    if high < n:
        low, high = _find_neighborhood(found, low, high)
    if high - low > 2 * _WIDTH:
        return None
    guards = max(_GUARDS, high - low)
    width = min(n, high - low + guards)
    shift = float(values[wanted[0]] + values[wanted[-1]]) / 2
    if len(wanted) == 1 and wanted[0] + 1 < n:
        # Exactly at an eigenvalue, the factors would be singular.
        shift += float(values[wanted[0] + 1] - values[wanted[0]]) / 4
    diagonal = k.diagonal()
    kept = diagonal.clone()
    diagonal -= shift
    factors, pivots, _ = torch.linalg.lu_factor_ex(k)
    diagonal.copy_(kept)
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(n)).to(k.device)
    for _ in range(_ITERATIONS):
        x = torch.linalg.qr(torch.linalg.lu_solve(factors, pivots, x)).Q
    # The eigenvalues next to the range, as near to it as their errors allow.
    above, below = slice(max(0, low - 1), low), slice(high, high + 1)
    outside = np.concatenate([values[above] - found.errors[above], values[below] + found.errors[below]])
    basis = x.double()
    for _ in range(_CORRECTIONS):
        if not bool(torch.isfinite(basis).all()):
            return None
        ritz, errors, vectors, residuals = _find_ritz(k, torch.linalg.qr(basis).Q, outside)
        matched = _match(found, low, high, ritz, errors)
        if matched is not None:
            columns = matched[np.subtract(wanted, low)]
            if np.all(errors[columns] <= found.gram_errors[wanted]):
                errors = errors[columns] + DEVIATIONS * found.aligned * _weigh_parallel_rows(k, vectors[:, columns])
                return _Refined(dict(zip(wanted, ritz[columns], strict=True)), dict(zip(wanted, errors, strict=True)))
        # This is one more inverse iteration. It is computed as a correction, so its rounding in float32 is
        # negligible.
        basis = vectors - torch.linalg.lu_solve(factors, pivots, residuals.to(k.dtype)).double()
    return None


def _find_ritz(
    k: torch.Tensor, x: torch.Tensor, outside: np.ndarray
) -> tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]:
    """Find the Rayleigh-Ritz values of K in the span of X.

    Args:
        x: (n, p), float64, with orthonormal columns.
        outside: the eigenvalues next to the wanted ones.

    Returns:
        The values, descending, and their errors, (p,); the Ritz vectors and their residuals, (n, p).
    """
    kx, bands = torch.empty_like(x), bands_of(len(k))
    # Each band is converted to float64 in the same memory.
    wide = torch.empty(max(b - a for a, b in bands), len(k), dtype=torch.float64, device=k.device)
    for a, b in bands:
        torch.mm(wide[: b - a].copy_(k[a:b]), x, out=kx[a:b])
    small = x.T @ kx
    ritz, rotation = (y.flip(-1) for y in torch.linalg.eigh((small + small.T) / 2))
    vectors = x @ rotation
    residuals = kx @ rotation - vectors * ritz
    # Rounding can make a zero negative.
    theta, r = ritz.clamp_min(0).cpu().numpy(), residuals.norm(dim=0).cpu().numpy()
    if len(outside):
        gaps = np.abs(theta[:, None] - outside[None]).min(1)
        r = np.divide(r, gaps, out=np.ones_like(r), where=gaps > r) * r
    return theta, r, vectors, residuals


def _weigh_parallel_rows(k: torch.Tensor, vectors: torch.Tensor) -> np.ndarray:
    """Return the part of Rayleigh quotients that comes from parallel rows of W.

    Two nearly parallel rows of W give K a small eigenvalue. Their product K_ij is a sum of terms that mostly have one
    sign, and such sums have a larger rounding error. The diagonal of K is summed separately and does not have this
    error, so the errors do not cancel in the small eigenvalue. The larger error applies to a product in proportion to
    |cos_ij|, with cos_ij = K_ij / (|w_i| |w_j|). So the result is the absolute value of the sum of
    v_i v_j K_ij |cos_ij| over all i ≠ j.

    Args:
        vectors: (n, p), float64.

    Returns:
        float64, (p,), not negative.
    """
    x = vectors.to(k.dtype)
    diagonal = k.diagonal()
    lengths = diagonal.sqrt()
    total = -(diagonal[:, None] * x.square()).sum(0)
    for top, bottom in bands_of(len(k)):
        rows = k[top:bottom]
        # A row of zeros gives NaN.
        cosines = (rows / lengths[top:bottom, None] / lengths).abs_().nan_to_num_(0)
        total += (x[top:bottom] * (cosines.mul_(rows) @ x)).sum(0)
    return total.abs().double().cpu().numpy()


def _find_neighborhood(found: Eigenvalues, low: int, high: int) -> tuple[int, int]:
    """Extend a range by the eigenvalues that overlap with it within their errors."""
    values, errors = found.values, found.errors
    is_close = values[:-1] - values[1:] <= errors[:-1] + errors[1:]
    while low > 0 and is_close[low - 1]:
        low -= 1
    while high < len(values) and is_close[high - 1]:
        high += 1
    return low, high


def _match(found: Eigenvalues, low: int, high: int, ritz: np.ndarray, errors: np.ndarray) -> np.ndarray | None:
    """Match the values of a block with the positions from `low` to `high`.

    Return the index of the value of each position; None if a position has no value. K has exactly as many eigenvalues
    within the errors of these positions, or more at the lower end of the spectrum. Values of the block that have not
    converged do not count.
    """
    values, allowed = found.values[low:high], found.errors[low:high]
    is_one = (ritz <= values[0] + allowed[0] + errors) & (ritz >= values[-1] - allowed[-1] - errors)
    at: np.ndarray = np.flatnonzero(is_one & (errors <= allowed.min()))
    if high == len(found.values):
        at = at[-(high - low) :]
    if len(at) != high - low or np.any(np.abs(ritz[at] - values) > allowed + errors[at]):
        return None
    return at


def _symmetrize(k: torch.Tensor) -> None:
    """Copy the lower triangle of K into the upper one."""
    for top, bottom in bands_of(len(k)):
        block = k[top:bottom, top:bottom]
        block.copy_(block.tril() + block.tril(-1).T)
        k[:top, top:bottom] = k[top:bottom, :top].T
