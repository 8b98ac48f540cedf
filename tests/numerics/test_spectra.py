"""Singular values compared with those of LAPACK in float64."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrum_stream.model.no_score import NoScore
from spectrum_stream.numerics.device import CPU, Device, one_thread_each
from spectrum_stream.numerics.precision import Precision
from spectrum_stream.numerics.schedule import compute_batch
from spectrum_stream.numerics.snr import TOLERANCE, Degeneracy, Score, score
from spectrum_stream.numerics.spectra import Spectrum, count_not_finite, singular_values

from ..support.checkpoints import reference_score
from ..support.spectra import gaussian, near_tau, orthogonal, with_spectrum


@pytest.fixture(autouse=True, scope="module")
def _on_one_thread() -> Iterator[None]:
    with one_thread_each():
        yield


PRECISIONS = [precision for precision in Precision if precision is not Precision.AUTO]
SHAPES = [(1, 1), (1, 64), (64, 1), (2, 3), (48, 48), (48, 200), (200, 48), (31, 4100), (1100, 40)]


def compute(w: torch.Tensor, precision: Precision = Precision.AUTO) -> tuple[Spectrum, Score]:
    (computed,) = compute_batch([w], precision=precision)
    assert isinstance(computed.spectrum, Spectrum)
    assert computed.score is not None
    return computed.spectrum, computed.score


def spectrum_of(w: torch.Tensor, precision: Precision) -> Spectrum:
    (found,) = singular_values([w], precision)
    assert isinstance(found, Spectrum)
    return found


SPECTRA: dict[str, Callable[[int, int], torch.Tensor]] = {
    "gaussian": gaussian,
    "outlier": lambda n, m: gaussian(n, m) + 0.05,
    "power law": lambda n, m: with_spectrum(n, m, torch.arange(1, min(n, m) + 1) ** -1.0),
    "flat": lambda n, m: with_spectrum(n, m, torch.ones(min(n, m))),
    "huge sigma_1": lambda n, m: with_spectrum(
        n, m, torch.cat([torch.tensor([1e4]), torch.linspace(2, 1, min(n, m) - 1)])
    ),
    "steep": lambda n, m: with_spectrum(n, m, 10.0 ** torch.linspace(0, -7, min(n, m))),
    "half rank": lambda n, m: with_spectrum(
        n, m, torch.linspace(2, 1, min(n, m)) * (torch.arange(min(n, m)) < (min(n, m) + 1) // 2)
    ),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_singular_values_of_each_precision_equal_lapack(n: int, m: int, precision: Precision) -> None:
    w = gaussian(n, m).to(torch.bfloat16)
    found = spectrum_of(w, precision)
    exact = torch.linalg.svdvals(w.to(torch.float64)).numpy()
    assert found.values.shape == (min(n, m),)
    assert found.values.dtype == np.float64
    assert np.all(np.diff(found.values) <= 0)
    assert found.precision is precision
    tolerance = 1e-5 if precision in (Precision.FP32, Precision.MIXED) else 1e-9
    np.testing.assert_allclose(found.values, exact, rtol=tolerance, atol=tolerance * exact[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_compute_batch_score_equals_the_formula_in_float64(n: int, m: int, spectrum: str, dtype: torch.dtype) -> None:
    w = SPECTRA[spectrum](n, m).to(dtype)
    found, result = compute(w)
    s = torch.linalg.svdvals(w.to(torch.float64)).numpy()
    exact = score(s, n, m)
    noise = s[s <= exact.tau].sum()
    # Scores that rounding decides are not a reference: a flat spectrum has no interquartile range, and in a
    # half-rank one q25, or all noise, is zero except for rounding.
    if exact.sigma < 1e-7 * s[0] or exact.margin < 1e-12 or 0 < noise < 1e-9 * s[0]:
        assert math.isfinite(result.snr)
        return
    assert result.snr == pytest.approx(reference_score(w), rel=2 * TOLERANCE)
    assert abs(result.snr - exact.snr) <= (result.error + 1e-11) * exact.snr
    assert result.error <= TOLERANCE or found.precision is Precision.SVD


def test_compute_batch_escalates_where_float32_is_inexact() -> None:
    easy = SPECTRA["gaussian"](48, 200).to(torch.bfloat16)
    hard = SPECTRA["huge sigma_1"](48, 48).to(torch.float32)
    rank_one = torch.outer(torch.arange(1.0, 49), torch.arange(1.0, 65))
    assert compute(easy)[0].precision is Precision.FP32
    assert compute(hard)[0].precision is Precision.FP64
    assert compute(rank_one)[0].precision is Precision.SVD


def test_compute_batch_fixed_fp32_reports_its_error() -> None:
    hard = SPECTRA["huge sigma_1"](200, 200).to(torch.float32)
    _, result = compute(hard, Precision.FP32)
    wrong_by = abs(result.snr / reference_score(hard) - 1)
    assert wrong_by > 1e-3
    assert result.error > wrong_by


def test_compute_batch_refines_values_next_to_tau() -> None:
    refined = 0
    for bits in range(16, 28):
        for sign in (-1, 1):
            w = near_tau(150, 220, sign * 2.0**-bits)
            found, result = compute(w)
            assert abs(result.snr / score(torch.linalg.svdvals(w).numpy(), 150, 220).snr - 1) <= result.error
            assert result.is_exact
            assert not found.refined or found.precision is Precision.FP32
            refined += found.refined > 0
    assert refined > 0


def test_compute_batch_refines_only_where_this_makes_the_score_exact() -> None:
    # The neighbors of the quartiles, which determine tau, and the value next to tau.
    counts = {compute(near_tau(150, 220, 2.0**-bits))[0].refined for bits in range(16, 24)}
    assert counts <= {0, 5}
    assert compute(gaussian(150, 220))[0].refined == 0
    assert compute(SPECTRA["huge sigma_1"](150, 150))[0].refined == 0


def test_singular_values_refines_only_some_matrices_of_a_batch() -> None:
    ws = [near_tau(150, 220, 2.0**-bits) for bits in range(17, 24)]
    ws = [w for near in ws for w in (near, gaussian(150, 220))]
    found = singular_values(ws, Precision.FP32)
    for w, batched in zip(ws, found, strict=True):
        alone = spectrum_of(w, Precision.FP32)
        assert isinstance(batched, Spectrum)
        assert batched.refined == alone.refined
        np.testing.assert_allclose(batched.values, alone.values, rtol=1e-5)
    assert {spectrum.refined for spectrum in found if isinstance(spectrum, Spectrum)} == {0, 5}


@pytest.mark.parametrize(("n", "m"), [(150, 220), (200, 100), (96, 300)])
def test_compute_batch_refines_a_value_close_to_tau_instead_of_using_float64(n: int, m: int) -> None:
    found = [compute(near_tau(n, m, 2.0**-bits).float()) for bits in range(12, 21)]
    assert {spectrum.precision for spectrum, _ in found} == {Precision.FP32}
    assert any(spectrum.refined for spectrum, _ in found)
    assert all(result.is_exact for _, result in found)


@pytest.mark.parametrize("precision", [Precision.MIXED, Precision.FP64])
def test_singular_values_refines_only_in_float32(precision: Precision) -> None:
    assert all(spectrum_of(near_tau(150, 220, 2.0**-bits), precision).refined == 0 for bits in range(18, 26))


@settings(max_examples=60)
@given(st.integers(2, 40), st.integers(2, 80), st.floats(-3, 0), st.floats(1, 1e5), st.integers(0, 2**31))
def test_compute_batch_error_estimate_covers_the_true_error(
    n: int, m: int, slope: float, top: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = min(n, m)
    s = torch.arange(1, k + 1, dtype=torch.float64) ** slope * (1 + 0.1 * torch.rand(k, generator=generator))
    s[0] *= top
    w = ((orthogonal(n, k, generator) * s) @ orthogonal(m, k, generator).T).to(torch.float32)
    exact = score(torch.linalg.svdvals(w.to(torch.float64)).numpy(), n, m)
    if exact.sigma > 0 and exact.snr > 0 and exact.degeneracy in (None, Degeneracy.EMPTY_NOISE):
        for precision in (Precision.FP32, Precision.MIXED, Precision.FP64):
            found = compute(w, precision)[1]
            assert abs(found.snr / exact.snr - 1) <= 2 * found.error + 1e-11


ISOLATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "two equal rows": lambda w: w.index_copy(0, torch.tensor([len(w) // 2]), w[:1]),
    "two pairs of equal rows": lambda w: w.index_copy(0, torch.tensor([len(w) // 2, len(w) - 1]), w[:2]),
    "two similar rows": lambda w: w.index_copy(0, torch.tensor([len(w) // 2]), w[:1] * (1 + 1e-4) + 1e-4 * w[1:2]),
    "a row in the span of the others": lambda w: torch.cat([w[:-1], w[:-1].sum(0, keepdim=True) / len(w) ** 0.5]),
    "a row of zeros": lambda w: w.index_fill(0, torch.tensor([len(w) // 2]), 0.0),
}


@pytest.mark.parametrize("kind", ISOLATED)
@settings(max_examples=25)
@given(st.integers(16, 250), st.integers(0, 250), st.integers(0, 2**31), st.booleans())
def test_compute_batch_error_estimate_covers_isolated_small_eigenvalues(
    kind: str, n: int, more: int, seed: int, is_bfloat16: bool
) -> None:
    w = torch.randn(n, n + more, generator=torch.Generator().manual_seed(seed))
    w = ISOLATED[kind](w).to(torch.bfloat16 if is_bfloat16 else torch.float32)
    exact = score(torch.linalg.svdvals(w.double()).numpy(), n, n + more)
    found = compute(w)[1]
    # If only zeros are below tau, the score is degenerate.
    if found.degeneracy is None:
        assert abs(found.snr / exact.snr - 1) <= found.error + 1e-11


def test_compute_batch_rank_one_has_zero_noise() -> None:
    # Products up to 240 are exact in bfloat16, so that the stored matrix still has rank one.
    w = torch.outer(torch.arange(1.0, 16), torch.arange(1.0, 17)).to(torch.bfloat16)
    found, result = compute(w)
    assert np.all(found.values[1:] == 0)
    assert result.degeneracy is Degeneracy.ZERO_NOISE
    assert result.snr == pytest.approx(1.0)


@pytest.mark.parametrize(("n", "m"), [(3, 5), (1, 7), (64, 64)])
def test_compute_batch_of_zeros_is_degenerate(n: int, m: int) -> None:
    _, result = compute(torch.zeros(n, m, dtype=torch.bfloat16))
    assert result.degeneracy is (Degeneracy.VECTOR if n == 1 else Degeneracy.ZERO)


def test_compute_batch_ties_at_tau_follow_the_formula() -> None:
    # The diagonal has the singular values, and tau equals one of them exactly.
    tau = 2 * (2.0 - 1.0) / 1.349
    w = torch.diag(torch.tensor([2.0, 2.0, tau, 1.0, 1.0], dtype=torch.float64))
    assert compute(w)[1].snr == pytest.approx(reference_score(w), rel=1e-9)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("n", "m"), [(1, 8), (16, 3000), (3000, 16), (1100, 1100)])
def test_compute_batch_finds_nan_and_infinity_anywhere(n: int, m: int, poison: float) -> None:
    w = torch.ones(n, m, dtype=torch.bfloat16)
    w[n - 1, m // 2] = poison
    for precision in PRECISIONS:
        assert singular_values([w], precision) == [NoScore.OUT_OF_RANGE]
    assert count_not_finite(w) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-120, 100, 125])
def test_compute_batch_tiny_and_huge_weights_escalate(dtype: torch.dtype, exponent: int) -> None:
    w = (gaussian(24, 60) * 50).to(torch.bfloat16).to(dtype)
    found, result = compute(w * 2.0**exponent)
    assert found.precision is not Precision.FP32
    assert result.snr * 2.0**exponent == pytest.approx(reference_score(w), rel=1e-5)


@pytest.mark.parametrize("exponent", [-440, -400, -250, 250, 257, 300, 400, 500])
def test_compute_batch_is_right_if_squares_of_eigenvalues_overflow_float64(exponent: int) -> None:
    # A warning would be an error.
    found, result = compute(gaussian(24, 60) * 50 * 2.0**exponent)
    assert found.precision is Precision.FP64
    assert result.snr * 2.0**exponent == pytest.approx(reference_score(gaussian(24, 60) * 50), rel=1e-9)


def test_compute_batch_takes_the_svd_if_squares_overflow_float64() -> None:
    w = gaussian(24, 60) * 50
    assert compute(w * 2.0**600)[0].precision is Precision.SVD


@pytest.mark.parametrize("looped", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n", "m"), [(1, 9), (24, 60), (60, 24), pytest.param(1030, 1100, marks=pytest.mark.slow)])
def test_singular_values_of_a_batch_equal_those_alone(n: int, m: int, precision: Precision, looped: bool) -> None:
    ws = [(gaussian(n, m) * (i + 1)).to(torch.bfloat16) for i in range(3)]
    ws.insert(1, torch.full((n, m), float("nan"), dtype=torch.bfloat16))
    found = singular_values(ws, precision, replace(CPU, looped=looped))
    assert found[1] is NoScore.OUT_OF_RANGE
    for i in (0, 2, 3):
        batched = found[i]
        assert isinstance(batched, Spectrum)
        np.testing.assert_allclose(batched.values, spectrum_of(ws[i], precision).values, rtol=1e-4, atol=1e-9)


ROUNDING = {
    "legacy": "torch.set_float32_matmul_precision('medium')",
    "new": "torch.backends.cuda.matmul.fp32_precision = 'tf32'; torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "float16": "torch.backends.cuda.matmul.allow_fp16_accumulation = True",
    "none": "pass",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ROUNDING)
def test_exact_products_restores_settings(how: str) -> None:
    # This runs in a separate process, since torch does not allow to mix and undo both ways to set this.
    code = f"""
import torch
from spectrum_stream.numerics.spectra import exact_products
matmul = torch.backends.cuda.matmul
def state():
    return matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision, \\
        matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction, \\
        matmul.allow_fp16_accumulation
{ROUNDING[how]}
before = state()
try:
    with exact_products():
        assert state() == ("ieee", "ieee", False, False, False), state()
        1 / 0
except ZeroDivisionError:
    pass
assert state() == before, (state(), before)
first, second = exact_products(), exact_products()
first.__enter__()
second.__enter__()
first.__exit__(None, None, None)
assert state() == ("ieee", "ieee", False, False, False), state()
second.__exit__(None, None, None)
assert state() == before, (state(), before)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.MIXED, Precision.FP64])
@pytest.mark.parametrize(("n", "m"), [(24, 60), (512, 512), (1536, 5000), (5000, 1536)])
def test_gpu_singular_values_equal_cpu(n: int, m: int, precision: Precision, dtype: torch.dtype) -> None:
    ws = [(gaussian(n, m) * (i + 1)).to(dtype) for i in range(3)]
    for looped in (False, True):
        for w, found in zip(
            ws, singular_values(ws, precision, Device(torch.device("cuda"), looped=looped)), strict=True
        ):
            assert isinstance(found, Spectrum)
            exact = score(torch.linalg.svdvals(w.to(torch.float64)).numpy(), n, m)
            assert score(found.values, n, m).snr == pytest.approx(exact.snr, rel=TOLERANCE)
