"""Wrong products and eigenvalues are found, recorded, and computed in another way."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from spectrum_stream.model.no_score import NoScore
from spectrum_stream.numerics.device import one_thread_each
from spectrum_stream.numerics.precision import Precision
from spectrum_stream.numerics.schedule import Computed, compute_all, compute_batch
from spectrum_stream.numerics.snr import TOLERANCE
from spectrum_stream.numerics.spectra import Spectrum, singular_values

from ..support.checkpoints import reference_score
from ..support.faults import FaultyDevice, WrongEigenvalues, WrongProduct, off_at_random, off_by_a_factor
from ..support.spectra import gaussian
from .test_schedule import items_of

TORCH_CPU = torch.device("cpu")
# The side of the known matrices on which the routine is measured.
KNOWN_SIDE = 256


@pytest.fixture(autouse=True, scope="module")
def _on_one_thread() -> Iterator[None]:
    with one_thread_each():
        yield


def weights(count: int = 4, n: int = 120, m: int = 200) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, m, generator=generator) * 0.02 * (1 + i / 10)).to(torch.bfloat16) for i in range(count)]


def check_scores(ws: Sequence[torch.Tensor], found: Sequence[Computed]) -> None:
    """Check that each score is right within its estimate, and exact."""
    for w, computed in zip(ws, found, strict=True):
        assert computed.score is not None
        exact = reference_score(w)
        assert abs(computed.score.snr / exact - 1) <= computed.score.error + 1e-11
        assert computed.score.error <= TOLERANCE


PRODUCTS: dict[str, Callable[[], WrongProduct]] = {
    "at random": lambda: off_at_random(1e-4),
    "by a factor": lambda: off_by_a_factor(1e-4),
}


@pytest.mark.parametrize("fault", PRODUCTS)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.MIXED, Precision.FP64])
def test_wrong_products_are_in_the_estimate(fault: str, precision: Precision) -> None:
    ws = weights()
    device = FaultyDevice(torch_device=TORCH_CPU, wrong_product=PRODUCTS[fault]())
    for w, computed in zip(ws, compute_batch(ws, precision=precision, device=device), strict=True):
        assert computed.score is not None
        wrong_by = abs(computed.score.snr / reference_score(w) - 1)
        assert computed.score.error > TOLERANCE
        assert wrong_by <= computed.score.error


@pytest.mark.parametrize("is_apart", [False, True])
@pytest.mark.parametrize("fault", PRODUCTS)
def test_wrong_products_are_computed_with_another_precision(fault: str, is_apart: bool) -> None:
    ws = weights()
    device = FaultyDevice(torch_device=TORCH_CPU, wrong_product=PRODUCTS[fault](), is_apart=is_apart)
    found = compute_batch(ws, device=device)
    check_scores(ws, found)
    for computed in found:
        # K has the fault in both precisions, so only the SVD remains, which always runs on the CPU.
        assert isinstance(computed.spectrum, Spectrum)
        assert computed.spectrum.precision is Precision.SVD
        assert computed.device == "cpu"


@pytest.mark.parametrize("fault", PRODUCTS)
def test_wrong_products_of_float32_only_are_computed_in_float64(fault: str) -> None:
    wrong = PRODUCTS[fault]()
    device = FaultyDevice(
        torch_device=TORCH_CPU, wrong_product=lambda product: wrong(product) if product.itemsize == 4 else product
    )
    found = compute_batch(weights(), device=device)
    check_scores(weights(), found)
    assert {c.spectrum.precision for c in found if isinstance(c.spectrum, Spectrum)} == {Precision.FP64}


def one_wrong(k: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    found = found.clone()
    at = found.shape[1] * 3 // 4
    found[:, at] *= 1.01
    return found.sort(dim=1).values


EIGENVALUES: dict[str, WrongEigenvalues] = {
    "one": one_wrong,
    "of other matrices": lambda k, found: found.roll(1, 0),
    "zeros": lambda k, found: torch.zeros_like(found),
    "NaN": lambda k, found: torch.full_like(found, torch.nan),
    "infinite": lambda k, found: torch.full_like(found, torch.inf),
    "shuffled": lambda k, found: found[:, torch.randperm(found.shape[1], generator=torch.Generator().manual_seed(0))],
    "negative": lambda k, found: -found.flip(1),
    "scaled": lambda k, found: found * (1 + 1e-4),
}


def only_unknown(wrong: WrongEigenvalues, dtype: torch.dtype | None = None) -> WrongEigenvalues:
    """Let a fault begin after the routine was measured, in one dtype or in all."""

    def begin(k: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        is_known = k.shape[1] == KNOWN_SIDE or dtype not in (None, k.dtype)
        return found if is_known else wrong(k, found)

    return begin


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.MIXED, Precision.FP64])
@pytest.mark.parametrize("fault", EIGENVALUES)
def test_wrong_eigenvalues_of_a_measured_routine_fail_the_check(fault: str, precision: Precision) -> None:
    device = FaultyDevice(torch_device=TORCH_CPU, wrong_eigenvalues=only_unknown(EIGENVALUES[fault]))
    expected = NoScore.NOT_CONVERGED if fault in ("NaN", "infinite") else NoScore.FAILED_CHECK
    assert singular_values(weights(), precision, device) == [expected] * 4


@pytest.mark.parametrize("is_apart", [False, True])
@pytest.mark.parametrize("fault", EIGENVALUES)
@pytest.mark.parametrize("begins", ["early", "late"])
def test_wrong_eigenvalues_are_computed_on_the_cpu_or_with_another_precision(
    begins: str, fault: str, is_apart: bool
) -> None:
    """A fault from the start makes the measured errors large.

    Only the check finds a later one.
    """
    wrong = EIGENVALUES[fault] if begins == "early" else only_unknown(EIGENVALUES[fault])
    device = FaultyDevice(torch_device=TORCH_CPU, wrong_eigenvalues=wrong, is_apart=is_apart)
    ws = weights()
    found = compute_batch(ws, device=device)
    check_scores(ws, found)
    for computed in found:
        assert isinstance(computed.spectrum, Spectrum)
        assert computed.device == "cpu" or fault == "one"
        if begins == "late" and fault not in ("NaN", "infinite"):
            # On the CPU itself the next precisions have the fault. A separate device is not used again.
            assert computed.spectrum.precision is (Precision.FP32 if is_apart else Precision.SVD)
            assert ("fp32 on faulty" in computed.detail) is is_apart
            assert ("fp32 on cpu" in computed.detail) is not is_apart
            assert ("fp64" in computed.detail) is not is_apart


@pytest.mark.parametrize("fault", ["one", "zeros", "of other matrices"])
def test_wrong_eigenvalues_of_one_dtype_are_computed_with_the_next_precision(fault: str) -> None:
    ws = weights()
    # If only float32 is wrong, float64 follows.
    device = FaultyDevice(torch_device=TORCH_CPU, wrong_eigenvalues=only_unknown(EIGENVALUES[fault], torch.float32))
    found = compute_batch(ws, device=device)
    check_scores(ws, found)
    assert {c.spectrum.precision for c in found if isinstance(c.spectrum, Spectrum)} == {Precision.FP64}
    assert {c.detail for c in found} == {"fp32 on cpu failed the check"}
    # A fault of float64 is found in matrices that need float64.
    hard = [gaussian(120, 200).float() + 30, gaussian(120, 200).float() - 30]
    device = FaultyDevice(torch_device=TORCH_CPU, wrong_eigenvalues=only_unknown(EIGENVALUES[fault], torch.float64))
    found = compute_batch(hard, device=device)
    check_scores(hard, found)
    assert {c.spectrum.precision for c in found if isinstance(c.spectrum, Spectrum)} == {Precision.SVD}
    assert {c.detail for c in found} == {"fp64 on cpu failed the check"}


def test_wrong_eigenvalues_of_one_matrix_leave_the_others_alone() -> None:
    def wrong(k: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        found = found.clone()
        found[2] = found[1]
        return found

    ws = weights()
    device = FaultyDevice(torch_device=TORCH_CPU, wrong_eigenvalues=only_unknown(wrong, torch.float32), is_apart=True)
    found = compute_batch(ws, device=device)
    check_scores(ws, found)
    assert [c.detail for c in found] == ["", "", "fp32 on faulty failed the check", ""]
    assert [c.device for c in found] == ["faulty", "faulty", "cpu", "faulty"]


def test_compute_all_with_a_device_that_is_always_wrong_has_all_scores() -> None:
    device = FaultyDevice(
        torch_device=TORCH_CPU,
        batch_nbytes=1 << 32,
        wrong_eigenvalues=only_unknown(EIGENVALUES["zeros"]),
        is_apart=True,
    )
    ws = weights(12)
    found = {m.module: c for m, c in compute_all(items_of(ws), device=device)}
    check_scores(ws, [found[f"m{i}"] for i in range(12)])
    assert all("fp32 on faulty failed the check" in c.detail for c in found.values())


def test_a_fixed_precision_that_fails_the_check_has_no_score() -> None:
    device = FaultyDevice(torch_device=TORCH_CPU, wrong_eigenvalues=only_unknown(EIGENVALUES["zeros"]))
    (found,) = compute_batch(weights(1), precision=Precision.FP32, device=device)
    assert found.spectrum is NoScore.FAILED_CHECK
    assert found.score is None
    assert found.detail
