"""The check of eigenvalues and the estimates of their errors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrum_stream.numerics.device import CPU, Device, one_thread_each
from spectrum_stream.numerics.eigenvalues import (
    Eigenvalues,
    RoutineError,
    estimate_errors,
    measure_routine,
)
from spectrum_stream.numerics.gram import Rounding, gram
from spectrum_stream.numerics.precision import Precision

from ..support.faults import FaultyDevice
from ..support.spectra import gaussian, orthogonal, with_spectrum

U = 2.0**-24
TORCH_CPU = torch.device("cpu")
EXACT = Rounding(noise=0.0, bias=0.0, shift=0.0, aligned=0.0)


@pytest.fixture(autouse=True, scope="module")
def _on_one_thread() -> Iterator[None]:
    with one_thread_each():
        yield


@dataclass(frozen=True)
class Case:
    """The eigenvalues of a K, descending, and the arguments of their check."""

    values: np.ndarray
    trace: float
    square: float
    unit: float
    rounding: Rounding
    exact: np.ndarray

    def check(self, values: np.ndarray | None = None) -> Eigenvalues:
        used = self.values if values is None else values
        return estimate_errors(used, self.trace, self.square, self.unit, self.rounding, measure_routine(CPU))


def case(w: torch.Tensor, precision: Precision = Precision.FP32) -> Case:
    """Compute K of W (n, m), n <= m, and its eigenvalues."""
    found = gram([w], precision, CPU)
    values = CPU.eigvalsh(found.k)[0].flip(0).double().numpy()
    exact = torch.linalg.svdvals(w.double()).square().numpy()
    unit = U if precision is Precision.FP32 else 2.0**-53
    return Case(values, float(found.traces[0]), float(found.squares[0]), unit, found.roundings[0], exact)


SPECTRA: dict[str, Callable[[int, int], torch.Tensor]] = {
    "normal": gaussian,
    "mean": lambda n, m: gaussian(n, m) + 0.05,
    "huge mean": lambda n, m: gaussian(n, m) + 20,
    "power law": lambda n, m: with_spectrum(n, m, torch.arange(1, n + 1) ** -1.0),
    "flat": lambda n, m: with_spectrum(n, m, torch.ones(n)),
    "steep": lambda n, m: with_spectrum(n, m, 10.0 ** torch.linspace(0, -9, n)),
    "half rank": lambda n, m: with_spectrum(n, m, torch.linspace(2, 1, n) * (torch.arange(n) < n / 2)),
    "two levels": lambda n, m: with_spectrum(n, m, 1.0 + (torch.arange(n) < n // 5)),
}


@settings(max_examples=80)
@given(
    st.sampled_from([*SPECTRA]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(1, 120),
    st.integers(0, 150),
    st.sampled_from([Precision.FP32, Precision.MIXED, Precision.FP64]),
)
def test_check_passes_for_right_eigenvalues(
    kind: str, dtype: torch.dtype, n: int, more: int, precision: Precision
) -> None:
    w = SPECTRA[kind](n, n + more).to(dtype)
    if w.any():
        assert case(w, precision).check().are_right


def test_check_passes_for_one_eigenvalue_and_for_zeros() -> None:
    assert case(torch.full((1, 5), 3.0)).check().are_right
    zeros = Case(np.zeros(4), 0.0, 0.0, U, EXACT, np.zeros(4))
    assert zeros.check().are_right
    assert not zeros.check(np.array([1e-30, 0.0, 0.0, 0.0])).are_right


GARBAGE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "another matrix": lambda values: values * 1.01,
    "a flatter spectrum of the same sum": lambda values: np.full_like(values, values.mean()),
    "zeros": np.zeros_like,
    "ones": np.ones_like,
    "NaN": lambda values: np.full_like(values, np.nan),
    "one NaN": lambda values: np.concatenate([values[:-1], [np.nan]]),
    "shuffled": lambda values: np.random.default_rng(0).permutation(values),
    "ascending": lambda values: values[::-1].copy(),
    "two exchanged": lambda values: np.concatenate([values[1::-1], values[2:]]),
    "negative": lambda values: -values[::-1],
    "shifted by one": lambda values: np.concatenate([values[1:], values[-1:]]),
}


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP64])
@pytest.mark.parametrize("kind", ["normal", "power law", "mean"])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_check_fails_for_garbage(garbage: str, kind: str, precision: Precision) -> None:
    found = case(SPECTRA[kind](60, 90).to(torch.bfloat16), precision)
    assert found.check().are_right
    assert not found.check(GARBAGE[garbage](found.values)).are_right


@settings(max_examples=60)
@given(
    st.integers(4, 100),
    st.integers(0, 100),
    st.floats(0, 1),
    st.sampled_from([-1, 1]),
    st.sampled_from([Precision.FP32, Precision.FP64]),
)
def test_check_finds_one_value_that_is_wrong_by_more_than_all_errors_together(
    n: int, more: int, position: float, sign: int, precision: Precision
) -> None:
    found = case(gaussian(n, n + more).float(), precision)
    right = found.check()
    at = int(position * (n - 1))
    # These are all estimated errors, the errors of the right values, and the roundings of the sums in float64.
    limit = float(right.errors.sum()) + abs(found.values.sum() - found.trace) + n * 2.0**-52 * found.trace
    values = found.values.copy()
    values[at] += sign * 2 * limit
    assert not found.check(np.sort(values)[::-1]).are_right


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP64])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("at", [0, 30, 150, 199])
@pytest.mark.parametrize("spectrum", ["normal", "mean", "power law"])
def test_check_finds_one_value_that_is_wrong_by_more_than_its_limit(
    spectrum: str, at: int, sign: int, precision: Precision
) -> None:
    found = case(SPECTRA[spectrum](200, 300).float(), precision)
    errors = measure_routine(CPU).estimate(np.maximum(found.values, 0), found.unit)
    # Twice the root of the sum of the squared errors, and the share n / 16384 of their sum.
    limit = 2 * np.sqrt(np.square(errors).sum()) + 200 / 16384 * errors.sum()
    # The sum of the right values is not exact.
    limit += abs(found.values.sum() - found.trace) + 200 * 2.0**-52 * found.trace
    values = found.values.copy()
    values[at] += sign * 1.01 * limit
    assert not found.check(np.sort(values)[::-1]).are_right


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP64])
@pytest.mark.parametrize("at", [0, 30, 150])
def test_check_finds_a_value_that_is_wrong_by_a_hundredth(at: int, precision: Precision) -> None:
    found = case(gaussian(200, 300).to(torch.bfloat16), precision)
    values = found.values.copy()
    values[at] *= 0.99
    assert not found.check(np.sort(values)[::-1]).are_right


def random_w(i: int) -> torch.Tensor:
    """Make the i-th random matrix (n, m), n <= m, of many sides, dtypes and spectra."""
    rng = np.random.default_rng(i)
    n = int(rng.integers(16, 200))
    m = n + int(rng.integers(0, 2 * n))
    generator = torch.Generator().manual_seed(i)
    w = torch.randn(n, m, generator=generator, dtype=torch.float64) * 0.02
    if i % 3 == 1:
        w += float(rng.choice([0.01, 0.1]))
    if i % 3 == 2:
        s = torch.arange(1, n + 1, dtype=torch.float64) ** -float(rng.uniform(0, 1.5))
        w = (orthogonal(n, n, generator) * s) @ orthogonal(m, n, generator).T
    return w.to([torch.bfloat16, torch.float16, torch.float32][i % 7 % 3])


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.MIXED, Precision.FP64])
def test_estimates_cover_the_true_errors_of_random_matrices(precision: Precision) -> None:
    ratios = []
    for i in range(210):
        found = case(random_w(i), precision)
        checked = found.check()
        assert checked.are_right
        # The reference is wrong by some units of float64.
        true = np.maximum(np.abs(checked.values - found.exact) - 2.0**-48 * found.exact[0], 0)
        ratios.append(true / checked.errors)
    largest = np.array([ratio.max() for ratio in ratios])
    # The estimate is three standard deviations, and there are more than 20,000 values.
    assert largest.max() <= 2
    assert (np.concatenate(ratios) > 1).mean() <= 0.01
    if precision is not Precision.FP64:
        # The estimates are useful: the largest true error of an ordinary matrix is not far below them.
        assert np.median(largest) > 0.05


def test_estimates_of_negative_values_grow_with_them() -> None:
    found = case(SPECTRA["half rank"](40, 60).float())
    values = found.values.copy()
    values[-1] = -1e-3 * values[0]
    wrong, right = found.check(values), found.check()
    assert wrong.values[-1] == 0
    assert np.all(wrong.errors >= right.errors + 1e-3 * values[0] * (1 - 1e-9))


def test_estimates_grow_with_each_measured_rounding() -> None:
    found = case(gaussian(60, 90).to(torch.bfloat16))
    routine = measure_routine(CPU)

    def errors(**roundings: float) -> np.ndarray:
        rounding = Rounding(**{"noise": 0.0, "bias": 0.0, "shift": 0.0, "aligned": 0.0, **roundings})
        return estimate_errors(found.values, found.trace, found.square, U, rounding, routine).errors

    none, mean = errors(), found.trace / len(found.values)
    # |b| l, and |d| t / n, whatever their signs.
    for sign in (-1, 1):
        np.testing.assert_allclose(errors(bias=sign * 1e-3) - none, 1e-3 * found.values, rtol=1e-2)
        np.testing.assert_allclose(errors(shift=sign * 1e-3) - none, 1e-3 * mean, rtol=1e-2)
    above = np.maximum(found.values - mean, 0)
    np.testing.assert_allclose(errors(aligned=1e-3) - none, 1e-3 * above, rtol=1e-2, atol=1e-9)
    # 3 sqrt(2) |E| / n, and the second-order term.
    noise = errors(noise=1e-3) - none
    assert np.all(noise >= 3 * np.sqrt(2) * 1e-3 * mean)
    assert np.all(noise <= 6 * np.sqrt(2) * 1e-3 * mean)


def noisy(times: float) -> Device:
    """Make a device with eigenvalues that have this many times the errors of the CPU."""

    def wrong(k: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        exact = torch.linalg.eigvalsh(k.double())
        result: torch.Tensor = (exact + times * (found.double() - exact)).to(found.dtype)
        return result

    return FaultyDevice(torch_device=TORCH_CPU, wrong_eigenvalues=wrong)


def test_measure_routine_scales_with_its_errors() -> None:
    right = measure_routine(noisy(1))
    assert right == measure_routine(CPU)
    tenfold = measure_routine(noisy(10))
    for name in ("top", "inner", "bottom", "absolute", "isolated"):
        assert getattr(tenfold, name) / getattr(right, name) == pytest.approx(10, rel=0.2), name
    values = case(gaussian(100, 200).float()).values
    np.testing.assert_allclose(tenfold.estimate(values, U), 10 * right.estimate(values, U), rtol=0.3)


WRONG: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "by 1e-3": lambda k, found: found * (1 + 1e-3),
    "zeros": lambda k, found: torch.zeros_like(found),
    "of other matrices": lambda k, found: found.roll(1, 0),
    "NaN": lambda k, found: torch.full_like(found, torch.nan),
    "infinite": lambda k, found: torch.full_like(found, torch.inf),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_measure_routine_of_a_wrong_routine_is_large_or_nan(wrong: str) -> None:
    device = FaultyDevice(torch_device=TORCH_CPU, wrong_eigenvalues=WRONG[wrong])
    measured, usual = measure_routine(device), measure_routine(CPU)
    assert not measured.inner <= 100 * usual.inner
    if wrong in ("NaN", "infinite"):
        # With such errors, even right eigenvalues fail the check.
        found = case(gaussian(60, 90).float())
        assert not estimate_errors(found.values, found.trace, found.square, U, EXACT, measured).are_right


def test_measure_routine_of_an_exact_routine_is_small() -> None:
    def round_exact(k: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        exact: torch.Tensor = torch.linalg.eigvalsh(k.double())
        return exact

    measured = measure_routine(FaultyDevice(torch_device=TORCH_CPU, wrong_eigenvalues=round_exact))
    assert measured.inner == 0
    assert 0 < measured.absolute <= 1
    assert measured.power >= 0


def test_routine_error_grows_with_the_side_and_the_ratio() -> None:
    routine = RoutineError(top=2.0, inner=1.0, bottom=3.0, absolute=0.5, ratio=4.0, power=0.5, isolated=100.0)
    bulk = np.linspace(2, 1, 256)
    # The smallest eigenvalues may have larger errors. The next test checks these.
    relative = routine.estimate(bulk, U)[:-12] / U - 0.5 * np.sqrt(np.square(bulk).mean())
    np.testing.assert_allclose(relative, (bulk * np.repeat([2.0, 1.0, 3.0], [16, 224, 16]))[:-12])
    larger = np.linspace(2, 1, 1024)
    relative = routine.estimate(larger, U)[:-12] / U - 0.5 * np.sqrt(np.square(larger).mean())
    # The largest and the smallest grow with n, and the others with its root.
    np.testing.assert_allclose(relative, (larger * np.repeat([8.0, 2.0, 12.0], [64, 896, 64]))[:-12])
    spiked = bulk.copy()
    spiked[0] = 16 * 4 * bulk[128]
    absolute = routine.estimate(spiked, U)[100] / U - spiked[100]
    assert absolute == pytest.approx(0.5 * 16**0.5 * np.sqrt(np.square(spiked).mean()))
    assert not routine.estimate(np.zeros(5), 1).any()


def test_routine_error_of_the_smallest_eigenvalues_is_that_of_isolated_ones() -> None:
    routine = RoutineError(top=2.0, inner=1.0, bottom=3.0, absolute=0.5, ratio=4.0, power=0.5, isolated=20.0)
    values = np.linspace(2, 1, 1024)
    # The last three count as zeros, and the two above them may be isolated.
    values[-10:-3], values[-3:] = 1e-3, 30 * U
    errors = routine.estimate(values, U) / U
    size = np.sqrt(np.square(values).mean())
    np.testing.assert_allclose(errors[-5:], 2 * 20 * size)
    # The eight above these may be as inexact as the first of them.
    np.testing.assert_allclose(errors[-13:-5], 12 * values[-13], rtol=0.1)
    assert errors[-14] < 13 * values[-14]
    # Without a gap above them, the last three do not count as zeros.
    values[-10:-3] = 100 * U
    errors = routine.estimate(values, U) / U
    np.testing.assert_allclose(errors[-2:], 2 * 20 * size)
    assert errors[-3] < 1


def test_routine_error_of_the_smallest_sixteenth_is_at_most_that_of_isolated_ones() -> None:
    routine = RoutineError(top=2.0, inner=1.0, bottom=300.0, absolute=0.5, ratio=4.0, power=0.5, isolated=40.0)
    # A wide matrix has such a spectrum: all eigenvalues are far from zero.
    values = np.linspace(2, 0.3, 8192)
    size = np.sqrt(np.square(values).mean())
    errors = routine.estimate(values, U) / U
    assert errors[-512:].max() <= 32**0.5 * 40 * size + 0.5 * size
    assert errors[-512:].min() >= 32**0.5 * 40 * size
    # The smallest of a square matrix have errors relative to their size.
    errors = routine.estimate(np.linspace(2, 0, 8192) ** 2, U) / U
    assert errors[-20] < 2
