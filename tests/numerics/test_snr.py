import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum_stream.numerics.snr import Degeneracy, score


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
