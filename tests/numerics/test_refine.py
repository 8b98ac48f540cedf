"""The refined eigenvalues, compared with those of K in float64."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrum_stream.numerics.device import CPU, one_thread_each
from spectrum_stream.numerics.eigenvalues import Eigenvalues, estimate_errors, measure_routine
from spectrum_stream.numerics.gram import gram
from spectrum_stream.numerics.precision import Precision
from spectrum_stream.numerics.refine import refine

from ..support.spectra import gaussian, with_spectrum


@pytest.fixture(autouse=True, scope="module")
def _on_one_thread() -> Iterator[None]:
    with one_thread_each():
        yield


def find(w: torch.Tensor) -> tuple[torch.Tensor, Eigenvalues, np.ndarray]:
    """Return K of W (n, m) in float32, its found eigenvalues, and its exact ones."""
    found = gram([w], Precision.FP32, CPU)
    values = CPU.eigvalsh(found.k)[0].flip(0).double().numpy()
    trace, square = float(found.traces[0]), float(found.squares[0])
    eigenvalues = estimate_errors(values, trace, square, 2.0**-24, found.roundings[0], measure_routine(CPU))
    k = found.k[0]
    lower = k.double().tril()
    exact = torch.linalg.eigvalsh(lower + lower.tril(-1).T).flip(0).numpy()
    return k, eigenvalues, exact


def around(n: int, at: int) -> torch.Tensor:
    """Make a descending spectrum of n values that are well apart, from 3 to 1."""
    return torch.linspace(3, 1, n, dtype=torch.float64)


def clustered(n: int, at: int) -> torch.Tensor:
    s = around(n, at)
    s[at - 3 : at + 4] = s[at] * (1 + 1e-6 * torch.arange(3, -4, -1))
    return s


def doubled(n: int, at: int) -> torch.Tensor:
    s = around(n, at)
    s[at + 1] = s[at]
    return s


def spiked(n: int, at: int) -> torch.Tensor:
    s = around(n, at)
    s[0] = 300
    return s


SPECTRA: dict[str, Callable[[int, int], torch.Tensor]] = {
    "apart": around,
    "clustered": clustered,
    "doubled": doubled,
    "spiked": spiked,
}


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(
    "wanted",
    [[100], [49, 50, 149, 150], [98, 99, 100, 101], [*range(97, 104)], [0], [0, 100, 199], [199], [*range(188, 200)]],
    ids=lambda wanted: f"{len(wanted)} from {wanted[0]}",
)
def test_refine_finds_the_eigenvalues_of_k(kind: str, wanted: list[int]) -> None:
    k, found, exact = find(with_spectrum(200, 300, SPECTRA[kind](200, 100)).float())
    refined = refine(k, found, wanted)
    assert refined is not None
    assert refined.refined == len(wanted)
    # Corrections end when the error is below that of K itself.
    errors = np.abs(refined.values - exact)[wanted]
    assert np.all(errors <= 1e-9 * exact[wanted] + found.gram_errors[wanted])
    assert np.all(errors <= refined.errors[wanted])
    assert np.all(refined.values[:-1] >= refined.values[1:])


@pytest.mark.parametrize("n", [2, 3, 5, 9, 17, 40])
def test_refine_of_small_matrices_is_exact_or_none(n: int) -> None:
    for wanted in ([0], [n - 1], [n // 2], [*range(n)]):
        k, found, exact = find(gaussian(n, 3 * n).float())
        refined = refine(k, found, wanted)
        if refined is not None:
            assert np.all(np.abs(refined.values - exact)[wanted] <= 1e-9 * exact[wanted] + found.gram_errors[wanted])


@settings(max_examples=40)
@given(
    st.integers(40, 150),
    st.integers(0, 200),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.sets(st.floats(0, 1), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.02, 0.5]),
)
def test_refine_stays_within_its_estimates(
    n: int, more: int, dtype: torch.dtype, places: set[float], mean: float
) -> None:
    w = (gaussian(n, n + more) + mean).to(dtype)
    wanted = sorted({int(place * (n - 1)) for place in places})
    k, found, _ = find(w)
    refined = refine(k, found, wanted)
    true = torch.linalg.svdvals(w.double()).square().numpy()
    if refined is None:
        return
    # K itself is wrong by `gram_errors`, of which three standard deviations are counted.
    assert np.all(np.abs(refined.values - true)[wanted] <= 2 * refined.errors[wanted] + 1e-14 * true[0])
    assert np.all(refined.errors[wanted] <= 2 * found.gram_errors[wanted] + 2.0**-25 * true[0])
    np.testing.assert_array_equal(refined.drift[wanted], found.gram_drift[wanted])
    others = np.setdiff1d(np.arange(n), wanted)
    np.testing.assert_array_equal(refined.errors[others], found.errors[others])
    np.testing.assert_array_equal(refined.drift[others], found.drift[others])


def test_refine_reads_only_the_lower_triangle() -> None:
    k, found, exact = find(gaussian(150, 200).float())
    k += torch.full_like(k, torch.nan).triu(1).nan_to_num(nan=1e9)
    refined = refine(k, found, [0, 37, 75, 112])
    assert refined is not None
    np.testing.assert_allclose(refined.values[[0, 37, 75, 112]], exact[[0, 37, 75, 112]], rtol=1e-7)


def test_refine_keeps_the_order_of_the_others() -> None:
    k, found, exact = find(with_spectrum(200, 300, clustered(200, 100)).float())
    # The routine does not separate the values of the cluster.
    values = found.values.copy()
    values[97:104] = values[97:104].mean()
    refined = refine(k, replace(found, values=values, errors=np.maximum(found.errors, 5e-5)), [98, 102])
    assert refined is not None
    np.testing.assert_allclose(refined.values[[98, 102]], exact[[98, 102]], rtol=1e-7)
    assert values[97] < refined.values[98]
    assert refined.values[102] < values[103]
    assert np.all(refined.values[:-1] >= refined.values[1:])


def test_refine_does_not_exchange_values_that_the_routine_does_not_separate() -> None:
    # The largest value is 100,000 times the others, so the routine is wrong by more than the space between two.
    k, found, exact = find((gaussian(73, 111) + 0.5).float())
    for i in range(1, 73):
        refined = refine(k.clone(), found, [i])
        if refined is not None:
            assert abs(refined.values[i] - exact[i]) <= refined.errors[i]
    assert np.any(found.values[:-1] - found.values[1:] < found.errors[:-1])


@pytest.mark.parametrize("wanted", [[0], [60], [0, 60], [119]])
def test_refine_returns_none_for_values_that_are_not_there(wanted: Sequence[int]) -> None:
    k, found, _ = find(with_spectrum(120, 200, around(120, 0)).float())
    # They are off by a hundredth of the space between two values, and claim to be exact.
    off = 0.1 * (found.values[59] - found.values[60])
    wrong = replace(found, values=found.values + off, errors=np.full(120, 1e-3 * off))
    assert refine(k, wrong, wanted) is None


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("wanted", [[0], [60]])
def test_refine_returns_none_for_a_k_that_is_not_finite(wanted: Sequence[int], poison: float) -> None:
    k, found, _ = find(gaussian(120, 200).float())
    k[70, 3] = poison
    assert refine(k, found, wanted) is None


def test_refine_returns_none_for_a_largest_value_inside_a_dense_edge() -> None:
    # So many values are next to the largest that the Lanczos steps do not separate them.
    s = torch.cat([1 + 1e-7 * torch.arange(250, 0, -1, dtype=torch.float64), torch.linspace(0.9, 0.5, 50)])
    k, found, exact = find(with_spectrum(300, 400, s).float())
    refined = refine(k, found, [0])
    # Any of these values is within the error.
    assert refined is None or abs(refined.values[0] - exact[0]) <= refined.errors[0]


def test_refine_is_repeatable() -> None:
    k, found, _ = find(gaussian(150, 200).float())
    first, second = refine(k.clone(), found, [0, 75]), refine(k.clone(), found, [0, 75])
    assert first is not None
    assert second is not None
    np.testing.assert_array_equal(first.values, second.values)


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", [[0], [300], [150, 151, 449, 450]])
def test_gpu_refine_equals_cpu(wanted: list[int]) -> None:
    k, found, exact = find(gaussian(600, 800).float())
    refined = refine(k.cuda(), found, wanted)
    assert refined is not None
    np.testing.assert_allclose(refined.values[wanted], exact[wanted], rtol=1e-7)
