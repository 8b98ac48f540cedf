"""Matrices with known spectra, in float64; the same for every call."""

import torch

from spectrum_stream.numerics.snr import score


def orthogonal(n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    q: torch.Tensor = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
    return q


def with_spectrum(n: int, m: int, s: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n * 10_007 + m)
    k = min(n, m)
    return (orthogonal(n, k, generator) * s.to(torch.float64)) @ orthogonal(m, k, generator).T


def gaussian(n: int, m: int) -> torch.Tensor:
    return torch.randn(n, m, generator=torch.Generator().manual_seed(n * 10_007 + m), dtype=torch.float64) * 0.02


def near_tau(n: int, m: int, relative: float) -> torch.Tensor:
    """Make a matrix with one singular value at this relative distance from tau."""
    s = torch.linspace(3, 1, min(n, m), dtype=torch.float64)
    tau = score(s.numpy(), n, m).tau
    # It is far from the quartiles, so tau stays.
    s[(s - tau).abs().argmin()] = tau * (1 + relative)
    return with_spectrum(n, m, s)
