import math
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from benchmarks.noise import BETAS, against_noise, by_ratio, noise
from spectrum_stream import scan
from spectrum_stream.numerics.metrics import MEASURES, Metric, median_of_law, random_value
from spectrum_stream.numerics.snr import score

from ..support.checkpoints import Save

OF_SPECTRUM = [metric for metric in Metric if metric is not Metric.RANDOM]
SCALE_FREE = [metric for metric in OF_SPECTRUM if metric is not Metric.SPECTRUM]


def value(metric: Metric, s: np.ndarray, n: int | None = None, m: int | None = None) -> float | None:
    of_spectrum = MEASURES[metric].of_spectrum
    assert of_spectrum is not None
    return of_spectrum(s, n or len(s), m or len(s))


# Zeros too, and more than half of them at times.
entries = st.floats(1e-6, 1e6) | st.just(0.0)
spectra = st.lists(entries, min_size=1, max_size=60).map(lambda v: np.array(sorted(v, reverse=True)))


def test_every_measure_has_a_name_that_can_be_asked_for() -> None:
    assert list(MEASURES) == list(Metric)


@pytest.mark.parametrize("metric", OF_SPECTRUM)
@given(s=spectra, more=st.integers(0, 100), power=st.sampled_from([0, -300, 250]))
def test_a_value_is_finite_whatever_the_spectrum(metric: Metric, s: np.ndarray, more: int, power: int) -> None:
    found = value(metric, s * 10.0**power, len(s), len(s) + more)
    assert found is None or math.isfinite(found)


@pytest.mark.parametrize("metric", SCALE_FREE)
@given(s=spectra, more=st.integers(0, 100), exponent=st.integers(-40, 40))
def test_the_scale_of_the_weights_changes_nothing(metric: Metric, s: np.ndarray, more: int, exponent: int) -> None:
    plain = value(metric, s, len(s), len(s) + more)
    # A power of two rounds nothing, so nothing can change sides.
    scaled = value(metric, s * 2.0**exponent, len(s), len(s) + more)
    assert scaled == plain


@pytest.mark.parametrize("metric", OF_SPECTRUM)
@given(s=spectra, more=st.integers(0, 100), shuffler=st.randoms(use_true_random=False))
def test_neither_orientation_nor_order_matters(
    metric: Metric, s: np.ndarray, more: int, shuffler: random.Random
) -> None:
    shuffled = s.tolist()
    shuffler.shuffle(shuffled)
    assert value(metric, np.array(shuffled), len(s) + more, len(s)) == value(metric, s, len(s), len(s) + more)


@given(s=spectra, more=st.integers(0, 100))
def test_bounds(s: np.ndarray, more: int) -> None:
    n, m = len(s), len(s) + more
    for share in (Metric.SCALE_FREE, Metric.MARCHENKO_PASTUR):
        found = value(share, s, n, m)
        assert found is not None and 0 <= found <= 1
    for rank in (Metric.STABLE_RANK, Metric.EFFECTIVE_RANK):
        found = value(rank, s, n, m)
        assert (found is None) == (not s.any())
        assert found is None or 1 <= found <= len(s) * (1 + 1e-12)
    for least_one in (Metric.CONDITION, Metric.ALPHA):
        found = value(least_one, s, n, m)
        assert found is None or found >= 1


@pytest.mark.parametrize(
    ("metric", "of_vector", "of_zeros", "of_half_zeros"),
    [
        (Metric.SPECTRUM, 1.0, 0.0, 1.0),
        (Metric.SCALE_FREE, 1.0, 0.0, 1.0),
        (Metric.MARCHENKO_PASTUR, 0.0, 0.0, 1.0),
        (Metric.STABLE_RANK, 1.0, None, 1.0),
        (Metric.EFFECTIVE_RANK, 1.0, None, 1.0),
        (Metric.CONDITION, 1.0, None, None),
        (Metric.ALPHA, None, None, None),
    ],
)
def test_what_is_no_ordinary_matrix(
    metric: Metric, of_vector: float, of_zeros: float | None, of_half_zeros: float | None
) -> None:
    assert value(metric, np.array([3.0]), 1, 64) == of_vector
    assert value(metric, np.zeros(5), 5, 5) == of_zeros
    assert value(metric, np.array([3.0, 0.0, 0.0, 0.0, 0.0]), 5, 5) == of_half_zeros


def test_no_measure_is_ranked_last_whichever_end_comes_first() -> None:
    for measure in MEASURES.values():
        assert measure.rank_key(None) < measure.rank_key(1e300) and measure.rank_key(None) < measure.rank_key(-1e300)
        assert (measure.rank_key(2.0) > measure.rank_key(1.0)) == measure.larger_first


def test_spectrums_score_is_that_of_the_scan() -> None:
    s = np.array([10.0, 4.0, 3.0, 2.0, 1.0])
    assert value(Metric.SPECTRUM, s, 5, 9) == score(s, 5, 9).snr


@given(s=spectra.filter(lambda s: len(s) > 1), more=st.integers(0, 100))
def test_the_scale_free_share_ranks_as_spectrums_two_sums_do(s: np.ndarray, more: int) -> None:
    theirs = score(s, len(s), len(s) + more)
    found = value(Metric.SCALE_FREE, s, len(s), len(s) + more)
    if theirs.degeneracy is None and theirs.margin > 1e-9:
        ratio = theirs.snr * s[0]
        assert found == pytest.approx(ratio / (1 + ratio), rel=1e-9)


@pytest.mark.parametrize("beta", [1e-6, 1 / 32, 0.1, 0.25, 0.5, 0.75, 0.999, 1.0])
def test_half_of_the_law_is_below_its_median(beta: float) -> None:
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    above, _ = integrate.quad(
        lambda x: math.sqrt(max(0.0, (high - x) * (x - low))) / (2 * math.pi * beta * x), median_of_law(beta), high
    )
    assert above == pytest.approx(0.5, abs=1e-8)


@pytest.mark.parametrize(("beta", "omega"), [(0.1, 1.6089), (0.5, 2.1711), (1.0, 2.8582)])
def test_the_median_gives_gavish_and_donohos_thresholds(beta: float, omega: float) -> None:
    """Their table of omega(beta), the best hard threshold over the median, to the four digits that they print."""
    best = math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1)))
    assert best / math.sqrt(median_of_law(beta)) == pytest.approx(omega, abs=2e-4)


@pytest.mark.parametrize("beta", BETAS, ids=str)
def test_noise_is_no_signal_by_marchenko_pastur_at_any_ratio(beta: Fraction) -> None:
    """Where Spectrum's threshold takes all of it for signal, or none; and one spike of signal is seen in it."""
    long = round(128 / beta)
    s = noise(128, long, np.random.default_rng(0))
    found = value(Metric.MARCHENKO_PASTUR, s, 128, long)
    assert found is not None and found < 3 / 128
    s[0] *= 10
    spiked = value(Metric.MARCHENKO_PASTUR, s, 128, long)
    assert spiked == pytest.approx(s[0] / s.sum(), rel=0.3)


def test_noise_has_the_values_that_the_formulas_say() -> None:
    """The limits that the docstrings give, within what 128 values differ from them."""
    rows = {row["beta"]: row for row in by_ratio(128, 3, 0)}
    for beta in BETAS:
        row, root = rows[str(beta)], math.sqrt(beta)
        assert row["stable-rank"] == pytest.approx(128 / (1 + root) ** 2, rel=0.06)
        if beta < 0.6:
            assert row["condition"] == pytest.approx((1 + root) / (1 - root), rel=0.15)
        assert (row["above tau"] == 1) == (beta < 0.27)
    found = [float(rows[str(beta)]["alpha"]) for beta in BETAS]
    assert found == sorted(found, reverse=True)


def test_alpha_is_powerlaws() -> None:
    """powerlaw 2.0.0: `Fit(s**2, xmin=s[4]**2).power_law.alpha`."""
    s = np.array([9.0, 5.0, 4.0, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5])
    assert value(Metric.ALPHA, s) == pytest.approx(1.9518710352263169, rel=1e-14)


@given(st.lists(st.floats(0.5, 1e3), min_size=4, max_size=60, unique=True), st.integers(0, 9))
def test_alpha_is_the_likeliest_exponent_of_a_pareto_tail(values: list[float], more: int) -> None:
    s = np.array(sorted(values, reverse=True))
    tail = s[: (len(s) - 1) // 2 + 1] ** 2
    (slope, _, _) = stats.pareto.fit(tail, floc=0, fscale=tail[-1])
    if math.isfinite(slope):
        assert value(Metric.ALPHA, s, len(s), len(s) + more) == pytest.approx(1 + slope, rel=1e-6)


def test_alpha_finds_the_exponent_of_a_power_law() -> None:
    # Eigenvalues with a density of x^-3: s = sqrt of their quantiles.
    s = (1 - (np.arange(4000) + 0.5) / 4000)[::-1] ** -0.25
    assert value(Metric.ALPHA, np.sort(s)[::-1]) == pytest.approx(3, rel=0.01)


def test_chance_is_the_same_every_time_and_another_for_every_seed() -> None:
    modules = [f"layers.{i}.up" for i in range(2000)]
    drawn = {module: random_value(0, module) for module in modules}
    assert drawn == {module: random_value(0, module) for module in reversed(modules)}
    other = [random_value(1, module) for module in modules]
    assert abs(np.corrcoef(list(drawn.values()), other)[0, 1]) < 0.1
    assert stats.kstest(list(drawn.values()), "uniform").pvalue > 0.001
    assert 0 <= random_value(0, "\ud800") < 1


def test_matrices_are_held_against_noise_of_their_shape(save: Save, working_folder: Path) -> None:
    """Noise is not more than noise; a spike in it is, by the threshold that sees it."""
    tensors = {f"layers.{i}.up.weight": torch.randn(24, 96, generator=torch.manual_seed(i)) for i in range(6)}
    for i in range(3):
        tensors[f"layers.{i}.up.weight"] += 2
    result = scan(str(save(tensors)), name="x").written[0]
    (row,) = against_noise(result, 3, 0)
    assert row["matrices"] == 6 and row["shape"] == "24 x 96"
    assert row["Marchenko-Pastur's: noise"] == 0 and row["Marchenko-Pastur's: more than noise"] in (3, 4)
    # A quarter as wide as long, all of noise is signal to the other, so that nothing can be more.
    assert row["Spectrum's tau: noise"] == 1 and row["Spectrum's tau: more than noise"] == 0
