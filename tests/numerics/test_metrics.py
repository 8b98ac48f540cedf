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
from spectrum_stream.errors import UsageError
from spectrum_stream.numerics.metrics import METRICS, SPECTRUM, Metric, median_of_law, metric_of, random_value
from spectrum_stream.numerics.precision import Precision
from spectrum_stream.numerics.snr import score

from ..support.checkpoints import Save

OF_SPECTRUM = [name for name, metric in METRICS.items() if metric.of_spectrum is not None]
SCALE_FREE = [name for name in OF_SPECTRUM if name != "spectrum"]


def value(metric: str, s: np.ndarray, n: int | None = None, m: int | None = None) -> float | None:
    of_spectrum = METRICS[metric].of_spectrum
    assert of_spectrum is not None
    return of_spectrum(s, n or len(s), m or len(s))


# Some spectra have zeros, sometimes more than half of the values.
entries = st.floats(1e-6, 1e6) | st.just(0.0)
spectra = st.lists(entries, min_size=1, max_size=60).map(lambda v: np.array(sorted(v, reverse=True)))


def test_metrics_are_registered_by_their_names() -> None:
    assert all(metric.name == name for name, metric in METRICS.items())
    assert all((metric.of_spectrum is None) != (metric.of_name is None) for metric in METRICS.values())
    assert METRICS["spectrum"] is SPECTRUM


@pytest.mark.parametrize("name", METRICS)
def test_metric_of_finds_a_metric_by_its_name(name: str) -> None:
    assert metric_of(name) is METRICS[name]


def test_metric_of_parses_the_seed_of_random() -> None:
    drawn = metric_of("random:3")
    assert drawn.name == "random:3"
    assert drawn.of_name is not None
    assert drawn.of_name("a.b") == random_value(3, "a.b")
    plain = metric_of("random").of_name
    assert plain is not None
    assert plain("a.b") == random_value(0, "a.b")


@pytest.mark.parametrize(
    "name", ["", "nothing", "Spectrum", "alpha:1", "random:", "random:-1", "random:x", "random: 1"]
)
def test_metric_of_rejects_an_unknown_name_and_lists_all(name: str) -> None:
    with pytest.raises(UsageError) as error:
        metric_of(name)
    assert error.value.reason == "no_such_metric"
    assert all(known in (error.value.hint or "") for known in METRICS)


@pytest.mark.parametrize(
    ("precision", "expected"), [(Precision.FP32, None), (Precision.FP64, 4000.0), (Precision.SVD, 4000.0)]
)
def test_value_of_condition_is_none_beyond_float32(precision: Precision, expected: float | None) -> None:
    s = np.array([4.0, 2.0, 1e-3])
    assert METRICS["condition"].value_of(s, 3, 4, precision) == pytest.approx(expected)
    assert METRICS["condition"].value_of(s[:2], 2, 4, precision) == 2.0
    assert METRICS["stable-rank"].value_of(s * 1e9, 3, 4, precision) is not None


@pytest.mark.parametrize("metric", OF_SPECTRUM)
@given(s=spectra, more=st.integers(0, 100), power=st.sampled_from([0, -300, 250]))
def test_metric_is_finite_or_none_for_any_spectrum(metric: str, s: np.ndarray, more: int, power: int) -> None:
    found = value(metric, s * 10.0**power, len(s), len(s) + more)
    assert found is None or math.isfinite(found)


@pytest.mark.parametrize("metric", SCALE_FREE)
@given(s=spectra, more=st.integers(0, 100), exponent=st.integers(-40, 40))
def test_metric_does_not_depend_on_the_scale(metric: str, s: np.ndarray, more: int, exponent: int) -> None:
    plain = value(metric, s, len(s), len(s) + more)
    # A power of two causes no rounding, so no value can cross a threshold.
    scaled = value(metric, s * 2.0**exponent, len(s), len(s) + more)
    assert scaled == plain


@pytest.mark.parametrize("metric", OF_SPECTRUM)
@given(s=spectra, more=st.integers(0, 100), shuffler=st.randoms(use_true_random=False))
def test_metric_does_not_depend_on_orientation_and_order(
    metric: str, s: np.ndarray, more: int, shuffler: random.Random
) -> None:
    shuffled = s.tolist()
    shuffler.shuffle(shuffled)
    assert value(metric, np.array(shuffled), len(s) + more, len(s)) == value(metric, s, len(s), len(s) + more)


@given(s=spectra, more=st.integers(0, 100))
def test_metric_stays_within_its_limits(s: np.ndarray, more: int) -> None:
    n, m = len(s), len(s) + more
    for share in ("scale-free", "marchenko-pastur"):
        found = value(share, s, n, m)
        assert found is not None and 0 <= found <= 1
    for rank in ("stable-rank", "effective-rank"):
        found = value(rank, s, n, m)
        assert (found is None) == (not s.any())
        assert found is None or 1 <= found <= len(s) * (1 + 1e-12)
    for least_one in ("condition", "alpha"):
        found = value(least_one, s, n, m)
        assert found is None or found >= 1


@pytest.mark.parametrize(
    ("metric", "of_vector", "of_zeros", "of_half_zeros"),
    [
        ("spectrum", 1.0, 0.0, 1.0),
        ("scale-free", 1.0, 0.0, 1.0),
        ("marchenko-pastur", 0.0, 0.0, 1.0),
        ("stable-rank", 1.0, None, 1.0),
        ("effective-rank", 1.0, None, 1.0),
        ("condition", 1.0, None, None),
        ("alpha", None, None, None),
    ],
)
def test_metric_has_known_values_for_vectors_and_zeros(
    metric: str, of_vector: float, of_zeros: float | None, of_half_zeros: float | None
) -> None:
    assert value(metric, np.array([3.0]), 1, 64) == of_vector
    assert value(metric, np.zeros(5), 5, 5) == of_zeros
    assert value(metric, np.array([3.0, 0.0, 0.0, 0.0, 0.0]), 5, 5) == of_half_zeros


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_rank_key_is_highest_for_the_first_choice_and_lowest_for_none(metric: Metric) -> None:
    assert metric.rank_key(None) < metric.rank_key(1e300)
    assert metric.rank_key(None) < metric.rank_key(-1e300)
    assert (metric.rank_key(2.0) > metric.rank_key(1.0)) == metric.larger_first


def test_spectrum_is_the_score_of_a_scan() -> None:
    s = np.array([10.0, 4.0, 3.0, 2.0, 1.0])
    assert value("spectrum", s, 5, 9) == score(s, 5, 9).snr


@given(s=spectra.filter(lambda s: len(s) > 1), more=st.integers(0, 100))
def test_scale_free_ranks_like_the_ratio_of_spectrums_sums(s: np.ndarray, more: int) -> None:
    theirs = score(s, len(s), len(s) + more)
    found = value("scale-free", s, len(s), len(s) + more)
    if theirs.degeneracy is None and theirs.margin > 1e-9:
        ratio = theirs.snr * s[0]
        assert found == pytest.approx(ratio / (1 + ratio), rel=1e-9)


@pytest.mark.parametrize("beta", [1e-6, 1 / 32, 0.1, 0.25, 0.5, 0.75, 0.999, 1.0])
def test_median_of_law_has_half_of_the_law_below_it(beta: float) -> None:
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    above, _ = integrate.quad(
        lambda x: math.sqrt(max(0.0, (high - x) * (x - low))) / (2 * math.pi * beta * x), median_of_law(beta), high
    )
    assert above == pytest.approx(0.5, abs=1e-8)


@pytest.mark.parametrize(("beta", "omega"), [(0.1, 1.6089), (0.5, 2.1711), (1.0, 2.8582)])
def test_median_of_law_gives_gavish_and_donohos_thresholds(beta: float, omega: float) -> None:
    """Their table has omega(beta), the best hard threshold over the median."""
    best = math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1)))
    assert best / math.sqrt(median_of_law(beta)) == pytest.approx(omega, abs=2e-4)


@pytest.mark.parametrize("beta", BETAS, ids=str)
def test_marchenko_pastur_finds_no_signal_in_noise_of_any_ratio(beta: Fraction) -> None:
    """A spike of signal in the noise is found at any ratio."""
    long = round(128 / beta)
    s = noise(128, long, np.random.default_rng(0))
    found = value("marchenko-pastur", s, 128, long)
    assert found is not None and found < 3 / 128
    s[0] *= 10
    spiked = value("marchenko-pastur", s, 128, long)
    assert spiked == pytest.approx(s[0] / s.sum(), rel=0.3)


def test_metric_of_noise_has_the_value_in_its_docstring() -> None:
    """The docstrings give limits; 128 singular values are close to them."""
    rows = {row["beta"]: row for row in by_ratio(128, 3, 0)}
    for beta in BETAS:
        row, root = rows[str(beta)], math.sqrt(beta)
        assert row["stable-rank"] == pytest.approx(128 / (1 + root) ** 2, rel=0.06)
        if beta < 0.6:
            assert row["condition"] == pytest.approx((1 + root) / (1 - root), rel=0.15)
        assert (row["above tau"] == 1) == (beta < 0.27)
    found = [float(rows[str(beta)]["alpha"]) for beta in BETAS]
    assert found == sorted(found, reverse=True)


def test_alpha_equals_that_of_powerlaw() -> None:
    """powerlaw 2.0.0: `Fit(s**2, xmin=s[4]**2).power_law.alpha`."""
    s = np.array([9.0, 5.0, 4.0, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5])
    assert value("alpha", s) == pytest.approx(1.9518710352263169, rel=1e-14)


@given(st.lists(st.floats(0.5, 1e3), min_size=4, max_size=60, unique=True), st.integers(0, 9))
def test_alpha_is_the_likeliest_exponent_of_a_pareto_tail(values: list[float], more: int) -> None:
    s = np.array(sorted(values, reverse=True))
    tail = s[: (len(s) - 1) // 2 + 1] ** 2
    (slope, _, _) = stats.pareto.fit(tail, floc=0, fscale=tail[-1])
    if math.isfinite(slope):
        assert value("alpha", s, len(s), len(s) + more) == pytest.approx(1 + slope, rel=1e-6)


def test_alpha_finds_the_exponent_of_a_power_law() -> None:
    # Eigenvalues with a density of x^-3: s = sqrt of their quantiles.
    s = (1 - (np.arange(4000) + 0.5) / 4000)[::-1] ** -0.25
    assert value("alpha", np.sort(s)[::-1]) == pytest.approx(3, rel=0.01)


def test_random_value_is_repeatable_uniform_and_depends_on_the_seed() -> None:
    modules = [f"layers.{i}.up" for i in range(2000)]
    drawn = {module: random_value(0, module) for module in modules}
    assert drawn == {module: random_value(0, module) for module in reversed(modules)}
    other = [random_value(1, module) for module in modules]
    assert abs(np.corrcoef(list(drawn.values()), other)[0, 1]) < 0.1
    assert stats.kstest(list(drawn.values()), "uniform").pvalue > 0.001
    assert 0 <= random_value(0, "\ud800") < 1


def test_against_noise_counts_matrices_with_more_signal_than_noise(save: Save, working_folder: Path) -> None:
    """Noise has no more signal than noise, but noise with a spike has."""
    tensors = {f"layers.{i}.up.weight": torch.randn(24, 96, generator=torch.manual_seed(i)) for i in range(6)}
    for i in range(3):
        tensors[f"layers.{i}.up.weight"] += 2
    result = scan(str(save(tensors)), name="x").written[0]
    (row,) = against_noise(result, 3, 0)
    assert row["matrices"] == 6 and row["shape"] == "24 x 96"
    assert row["Marchenko-Pastur's: noise"] == 0 and row["Marchenko-Pastur's: more than noise"] in (3, 4)
    # In a matrix a quarter as wide as long, all noise is above Spectrum's threshold, so no matrix has more.
    assert row["Spectrum's tau: noise"] == 1 and row["Spectrum's tau: more than noise"] == 0
