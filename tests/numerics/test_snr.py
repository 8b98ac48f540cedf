import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum_stream.numerics.snr import TOLERANCE, Degeneracy, find_deciding_values, score


def test_score_equals_a_value_computed_by_hand() -> None:
    # q75 = 4, q25 = 2: sigma = 2 / 1.349; beta = 1: tau = 2.9652; 10 and 4 are signal, 3 too.
    result = score(np.array([10.0, 4.0, 3.0, 2.0, 1.0]), 5, 5)
    assert result.sigma == pytest.approx(2 / 1.349)
    assert result.tau == pytest.approx(4 / 1.349)
    assert result.above == 3
    assert result.snr == pytest.approx((17 / 3) / 10)
    assert result.margin == pytest.approx((3 - 4 / 1.349) / (4 / 1.349))
    assert result.sigma1_over_q25 == pytest.approx(5)
    assert result.degeneracy is None
    assert result.error == 0


def test_score_tau_follows_the_aspect_ratio() -> None:
    s = np.array([4.0, 3.0, 2.0, 1.0])
    assert score(s, 4, 16).tau == pytest.approx(score(s, 16, 4).tau)
    assert score(s, 4, 4).tau / score(s, 4, 16).tau == pytest.approx(2 / 1.5)


@pytest.mark.parametrize("length", [1, 2, 4096])
@pytest.mark.parametrize("norm", [0.0, 1e-30, 1.0, 1e30])
def test_score_of_a_vector_is_one(length: int, norm: float) -> None:
    result = score(np.array([norm]), 1, length)
    assert result.snr == 1.0
    assert result.degeneracy is Degeneracy.VECTOR


def test_score_empty_noise_sums_to_one() -> None:
    result = score(np.array([3.0, 3.0, 3.0]), 3, 12)
    assert result.snr == pytest.approx(9.0 / 1.0 / 3.0)
    assert result.degeneracy is Degeneracy.EMPTY_NOISE


def test_score_noise_of_zeros_sums_to_one() -> None:
    result = score(np.array([3.0, 0.0, 0.0, 0.0, 0.0]), 5, 5)
    assert result.snr == pytest.approx(1.0)
    assert result.degeneracy is Degeneracy.ZERO_NOISE
    assert result.sigma1_over_q25 == math.inf


def test_score_of_zeros_is_zero() -> None:
    result = score(np.zeros(4), 4, 4)
    assert result.snr == 0.0
    assert result.degeneracy is Degeneracy.ZERO


def test_score_counts_a_value_equal_to_tau_as_noise() -> None:
    # With beta = 1, tau is 2 (q75 - q25) / 1.349 = 1.48. The value in the middle does not affect the quartiles.
    tau = 2 * ((2.0 - 1.0) / 1.349)
    result = score(np.array([2.0, 2.0, tau, 1.0, 1.0]), 5, 5)
    assert result.tau == tau
    assert result.above == 2
    assert result.margin == 0


def test_score_without_signal_is_zero() -> None:
    result = score(np.array([1.0, 1.0, 0.0, 0.0]), 4, 4)
    assert result.above == 0
    assert result.snr == 0.0
    assert result.error == 0.0


def test_score_error_counts_values_near_tau_whole() -> None:
    s = np.linspace(2.0, 0.1, 50)
    tau = score(s, 50, 50).tau
    s[np.argmin(np.abs(s - tau))] = tau * (1 + 1e-9)
    near = score(s, 50, 50, errors=np.full(50, 1e-7), drift=np.zeros(50))
    sure = score(s, 50, 50, errors=np.full(50, 1e-12), drift=np.zeros(50))
    assert near.error > 1e-2 > 1e-6 > sure.error


spectra = st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=60).map(lambda v: np.array(sorted(v, reverse=True)))


@given(spectra, st.integers(0, 100))
def test_score_is_finite_for_every_spectrum(s: np.ndarray, more: int) -> None:
    result = score(s, len(s), len(s) + more)
    assert math.isfinite(result.snr)
    assert result.snr >= 0
    assert 0 <= result.above <= len(s)


@given(spectra, st.floats(0.01, 100))
def test_score_is_inversely_proportional_to_the_scale(s: np.ndarray, factor: float) -> None:
    plain, scaled = score(s, len(s), len(s)), score(s * factor, len(s), len(s))
    if plain.degeneracy is None and plain.margin > 1e-9:
        assert scaled.snr == pytest.approx(plain.snr / factor, rel=1e-6)


@given(spectra, st.floats(1e-9, 1e-4), st.integers(0, 2**32 - 1))
def test_score_error_covers_drift(s: np.ndarray, size: float, seed: int) -> None:
    errors = np.full(len(s), size * s[-1])
    exact = score(s, len(s), 2 * len(s), errors=errors, drift=errors)
    shifted = s + np.random.default_rng(seed).choice([-1, 1]) * errors
    found = score(shifted, len(s), 2 * len(s))
    if exact.snr > 0 and exact.degeneracy is None and found.degeneracy is None:
        assert abs(found.snr / exact.snr - 1) <= 3 * exact.error + 1e-9


def deciding(s: np.ndarray, errors: np.ndarray | float, drift: np.ndarray | float = 0.0, more: int = 0) -> list[int]:
    errors, drift = (np.broadcast_to(x, s.shape).astype(float) for x in (errors, drift))
    zeros = np.zeros_like(errors)
    return find_deciding_values(
        s, len(s), len(s) + more, errors=errors, drift=drift, refined_errors=zeros, refined_drift=zeros
    )


def away_from_tau(count: int) -> np.ndarray:
    """Make an even spectrum from 10 to 1 without a value within a thousandth of tau."""
    s = np.linspace(10, 1, count)
    tau = score(s, count, count).tau
    return s[np.abs(s / tau - 1) > 1e-3] if count > 1 else s


def near_tau(count: int, relative: float, at: int | None = None) -> tuple[np.ndarray, int]:
    """Make an even spectrum with one value next to tau, and return its position.

    Its distance from tau is `relative`.
    """
    s = np.linspace(10, 1, count)
    tau = score(s, count, count).tau
    nearest = int(np.argmin(np.abs(s - tau)))
    s[nearest] = tau * (1 + relative)
    return s, nearest


def test_find_deciding_values_of_an_exact_score_finds_none() -> None:
    s = away_from_tau(101)
    assert deciding(s, 0.0) == []
    assert deciding(s, 1e-9 * s) == []


@pytest.mark.parametrize("relative", [1e-7, -1e-7, 0.0])
def test_find_deciding_values_are_the_neighbors_of_the_quantiles_and_the_doubtful_value(relative: float) -> None:
    s, nearest = near_tau(102, relative)
    # (102 - 1) / 4 = 25.25
    expected = sorted({25, 26, 75, 76, nearest})
    assert deciding(s, 3e-7 * s) == expected
    # If these are exact, the score is exact.
    errors = 3e-7 * s
    assert score(s, 102, 102, errors=errors).error > TOLERANCE
    errors[expected] = 0
    assert score(s, 102, 102, errors=errors).error <= TOLERANCE or relative == 0.0


def test_find_deciding_values_takes_one_value_for_a_quantile_at_a_position() -> None:
    s, nearest = near_tau(101, 1e-7)
    assert deciding(s, 3e-7 * s) == sorted({25, 75, nearest})


def test_find_deciding_values_adds_the_largest_if_its_error_is_large() -> None:
    s = away_from_tau(101)
    errors = 1e-9 * s
    errors[0] = 1e-4 * s[0]
    assert deciding(s, errors) == [0]


@pytest.mark.parametrize(("bad", "found"), [(1, 4), (4, 4), (5, 12), (12, 12)])
def test_find_deciding_values_adds_the_smallest_if_their_errors_are_large(bad: int, found: int) -> None:
    s = away_from_tau(101)
    errors = 1e-9 * s
    errors[-bad:] = 0.1
    count = len(s)
    assert deciding(s, errors) == [*range(count - found, count)]


@pytest.mark.parametrize(("refined_error", "found"), [(0.0, 4), (1e-4, 4), (2e-3, 0)])
def test_find_deciding_values_finds_none_if_refined_values_remain_inexact(refined_error: float, found: int) -> None:
    s = away_from_tau(101)
    count = len(s)
    errors = 1e-9 * s
    errors[-4:] = 0.1
    zeros = np.zeros(count)
    chosen = find_deciding_values(
        s,
        count,
        count,
        errors=errors,
        drift=zeros,
        refined_errors=np.full(count, refined_error),
        refined_drift=zeros,
    )
    assert chosen == [*range(count - found, count)]


def test_find_deciding_values_of_many_inexact_values_finds_none() -> None:
    s = away_from_tau(101)
    # The other values would remain inexact.
    assert deciding(s, 1e-3 * s) == []
    assert deciding(s, 1e-4 * s, 1e-4 * s) == []
    # More than 32 may be on the other side of tau.
    s, nearest = near_tau(201, 0.0)
    s[nearest - 20 : nearest + 20] = s[nearest]
    assert deciding(np.sort(s)[::-1], 1e-7) == []


@pytest.mark.parametrize("s", [np.array([3.0]), np.zeros(5), np.array([])])
def test_find_deciding_values_of_a_vector_or_zeros_finds_none(s: np.ndarray) -> None:
    assert deciding(s, 0.1) == []


@given(spectra, st.floats(1e-9, 1e-5), st.integers(0, 50), st.integers(-200, 200))
def test_find_deciding_values_make_the_score_exact(s: np.ndarray, size: float, more: int, exponent: int) -> None:
    s = s * 2.0**exponent
    errors = size * s
    found = deciding(s, errors, errors / 10, more)
    assert found == sorted(set(found))
    assert len(found) <= 32
    if found:
        refined, drift = errors.copy(), errors / 10
        refined[found] = drift[found] = 0.0
        tau = score(s, len(s), len(s) + more).tau
        # A value that is exactly at tau stays in doubt.
        if np.abs(s - tau).min() > 1e-6 * s[0]:
            assert score(s, len(s), len(s) + more, errors=refined, drift=drift).error <= TOLERANCE
