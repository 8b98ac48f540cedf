"""The accuracy benchmark: exact references, and estimates too small or too large."""

import math
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import accuracy
from benchmarks.accuracy import Error, Ratios, compare, measure, random_matrices, reference
from benchmarks.matrices import matrix
from benchmarks.spectra import Kind, draw
from spectrum_stream.model.no_score import NoScore
from spectrum_stream.numerics.schedule import Computed, compute_batch
from spectrum_stream.numerics.snr import score
from tests.support.dated import check_dated_file


@pytest.mark.parametrize("svd_side", [0, 1024])
@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_reference_is_within_its_errors(
    kind: Kind, shape: tuple[int, int], svd_side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "_SVD_SIDE", svd_side)
    rng = np.random.default_rng(0)
    known = draw(kind, 96, 160, rng)
    w = matrix(known, *shape, torch.float64, rng)
    values, errors = reference(w, tmp_path)
    # The matrix itself is as exact as a reference.
    assert (np.abs(values - known) <= 2 * errors).all()
    assert (errors < 1e-6 * known).all()
    (kept,) = tmp_path.iterdir()
    again, _ = reference(w, tmp_path)
    assert np.array_equal(again, values)
    assert [*tmp_path.iterdir()] == [kept]
    reference(w * 2, tmp_path)
    assert len([*tmp_path.iterdir()]) == 2


def test_ratio_is_unknown_below_the_error_of_the_reference() -> None:
    assert Error(true=2e-7, estimate=1e-6, uncertainty=1e-12).ratio == pytest.approx(0.2)
    assert Error(true=0.0, estimate=1e-6, uncertainty=0.0).ratio == 0
    assert Error(true=5e-13, estimate=1e-13, uncertainty=1e-12).ratio is None
    assert Error(true=5e-12, estimate=1e-12, uncertainty=1e-12).ratio == pytest.approx(4)
    assert Error(true=1e-6, estimate=0.0, uncertainty=1e-12).ratio == math.inf
    assert Error(true=1e-6, estimate=1e-7, uncertainty=math.inf).ratio is None


def test_ratios_of_nothing_to_judge_have_no_median() -> None:
    assert Ratios.of([Error(0.0, 0.0, 1e-12)]) == Ratios(0, 1)


def test_random_matrices_start_the_same_for_every_count() -> None:
    few, many = [*random_matrices(9)], [*random_matrices(40)]
    for (w, tensor), (same, same_tensor) in zip(few, many, strict=False):
        assert w == same
        assert torch.equal(tensor, same_tensor)
    assert {w.dtype for w, _ in many} == {"BF16", "F16", "F32"}
    assert {w.group for w, _ in many} == {*Kind, "normal", "mean"}
    assert all(16 <= side <= 1024 for w, _ in many for side in (w.n, w.m))


def compute_wrongly(w: torch.Tensor, values: np.ndarray, share: float) -> Computed:
    """Compute a matrix, and replace its values and relative estimates by these."""
    (found,) = compute_batch([w])
    assert not isinstance(found.spectrum, NoScore)
    return replace(
        found,
        spectrum=replace(found.spectrum, values=values, errors=share * values),
        score=replace(score(values, *w.shape), error=share),
    )


def test_compare_finds_the_wrong_value_and_the_wrong_score() -> None:
    w, tensor = next(iter(random_matrices(1)))
    values = torch.linalg.svdvals(tensor.double()).numpy()
    exact = np.full_like(values, 1e-14 * values[0])
    wrong = values.copy()
    wrong[0] *= 1 + 1e-3
    found = compare(w, compute_wrongly(tensor, wrong, 1e-4), values, exact)
    (largest,) = found.values["sigma_1"]
    assert largest.ratio == pytest.approx(10, rel=2e-3)
    assert all(error.ratio == 0 for at in ("q75", "q25") for error in found.values[at])
    assert found.score.ratio is not None
    assert found.score.ratio > 1
    assert found.is_hidden
    assert not compare(w, compute_wrongly(tensor, wrong, 1e-2), values, exact).is_hidden


def test_measure_judges_a_source(tmp_path: Path) -> None:
    result = measure("random", random_matrices(24), tmp_path, "cpu", jobs=2)
    assert result.matrices == len(result.comparisons) == sum(result.precisions.values()) == 24
    assert not result.no_score
    assert result.score.judged + result.score.unjudged == 24
    assert result.score.judged > 0
    assert result.hidden == 0
    assert result.score.max is not None
    assert result.score.median is not None
    assert result.score.max <= 1
    assert result.score.median >= 0.02
    assert set(result.values) == {"q75", "q25", "sigma_1", "nearest tau"}
    assert result.largest_error == max(c.score.true for c in result.comparisons)
    assert result.worst is not None
    assert result.worst.score.ratio == result.score.max
    check_dated_file(accuracy.markdown([result], "python -m benchmarks.accuracy random", date.today()), date.today())
