"""K and its measured rounding, and the switch of the product mode."""

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrum_stream.numerics import gram as gram_module
from spectrum_stream.numerics.dequantize import QuantizedMatrix
from spectrum_stream.numerics.device import CPU, Device, one_thread_each
from spectrum_stream.numerics.gram import ProductQuality, Rounding, gram, measure_products
from spectrum_stream.numerics.precision import Precision
from spectrum_stream.numerics.schedule import compute_batch

from ..support.checkpoints import reference_score
from ..support.faults import FaultyDevice
from ..support.spectra import gaussian

U = 2.0**-24
MATMUL = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@pytest.fixture(autouse=True, scope="module")
def _on_one_thread() -> Iterator[None]:
    with one_thread_each():
        yield


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.MIXED, Precision.FP64])
@pytest.mark.parametrize("n", [1, 7, 127, 128, 131, 1031])
def test_gram_lower_triangle_is_complete(n: int, precision: Precision) -> None:
    w = gaussian(n, 2 * 2048 + 3)
    lower = torch.tril(gram([w], precision, CPU).k[0]).double()
    tolerance = 1e-12 if precision is Precision.FP64 else 1e-5
    torch.testing.assert_close(lower, torch.tril(w @ w.T), rtol=tolerance, atol=tolerance)


def full(k: torch.Tensor) -> torch.Tensor:
    lower = k.double().tril()
    return lower + lower.tril(-1).T


def test_gram_sums_are_those_of_the_whole_matrix() -> None:
    for n in (1, 50, 200):
        found = gram([gaussian(n, 300), gaussian(n, 300) * 3], Precision.FP32, CPU)
        for k, trace, square in zip(found.k, found.traces, found.squares, strict=True):
            assert trace == pytest.approx(float(full(k).trace()), rel=1e-14)
            assert square == pytest.approx(float((full(k) / trace).square().sum()), rel=U)


def scale_rows(w: torch.Tensor) -> torch.Tensor:
    order = torch.randperm(len(w), generator=torch.Generator().manual_seed(len(w)))
    return w * 10.0 ** torch.linspace(-2, 2, len(w), dtype=torch.float64)[order][:, None]


def enlarge_a_row(w: torch.Tensor) -> torch.Tensor:
    w = w.clone()
    w[len(w) // 3] *= 100
    return w


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": lambda w: w,
    "positive": torch.abs,
    "mean": lambda w: w + 0.05,
    "large mean": lambda w: w + 5,
    "rank one": lambda w: torch.outer(w[:, 0], w[0]) + 1e-3 * w,
    "rows of all sizes": scale_rows,
    "one large row": enlarge_a_row,
}


@settings(max_examples=80)
@given(
    st.sampled_from([(8, 9), (24, 60), (63, 64), (100, 100), (150, 700), (200, 200), (64, 5000)]),
    st.sampled_from([*KINDS]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    st.sampled_from([Precision.FP32, Precision.MIXED]),
)
def test_gram_measured_rounding_covers_the_norm_of_the_error(
    shape: tuple[int, int], kind: str, dtype: torch.dtype, precision: Precision
) -> None:
    w = KINDS[kind](gaussian(*shape)).to(dtype)
    found = gram([w], precision, CPU)
    exact = w.double() @ w.double().T
    (rounding,), trace = found.roundings, float(found.traces[0])
    error = float((full(found.k[0]) - exact).norm())
    # The diagonal is summed in float64. It is rounded to float32 if K or its blocks are in float32.
    rounded = U * float(exact.diagonal().norm()) * (precision is Precision.FP32 or dtype is torch.float64)
    assert error <= 1.5 * math.hypot(rounding.noise * trace, rounded) + 1e-14 * trace
    if precision is Precision.FP32 and min(shape) >= 24 and kind != "one large row":
        # The estimate is not far too large, either.
        assert rounding.noise * trace <= 3 * error + 1e-14 * trace


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gram_mixed_is_more_exact_than_fp32(kind: str, dtype: torch.dtype) -> None:
    w = KINDS[kind](gaussian(150, 5000)).to(dtype)
    exact = w.double() @ w.double().T
    scale = exact.diagonal().sqrt()
    errors = {}
    for precision in (Precision.FP32, Precision.MIXED, Precision.FP64):
        k = full(gram([w], precision, CPU).k[0])
        errors[precision] = float(((k - exact) / torch.outer(scale, scale)).norm())
    # All sums of a matrix in bfloat16 with a large mean are exact in float64.
    assert errors[Precision.FP64] <= errors[Precision.MIXED] <= 0.9 * errors[Precision.FP32]
    assert errors[Precision.FP64] <= 1e-6 * errors[Precision.FP32]


@pytest.mark.parametrize("zeros", [0, 3, 40])
def test_gram_rounding_of_rows_of_zeros_is_finite(zeros: int) -> None:
    w = gaussian(40, 60).float()
    w[:zeros] = 0
    (found,) = gram([w], Precision.FP32, CPU).roundings
    assert all(math.isfinite(value) for value in (found.noise, found.bias, found.shift, found.aligned))
    assert (found.noise > 0) is (zeros < 40)


@pytest.mark.parametrize("exponent", [-70, 70])
def test_gram_of_numbers_with_squares_out_of_range_has_a_finite_rounding(exponent: int) -> None:
    (found,) = gram([gaussian(40, 60).float() * 2.0**exponent], Precision.FP32, CPU).roundings
    assert all(math.isfinite(value) for value in (found.noise, found.bias, found.shift, found.aligned))


def test_gram_measures_each_matrix_of_a_batch() -> None:
    # The entries of the second are small integers, and all sums are exact.
    exact = torch.arange(100.0).remainder(3)[:, None] * torch.ones(1, 200)
    first, second = gram([gaussian(100, 200).float(), exact], Precision.FP32, CPU).roundings
    assert first.noise > 1e-9
    assert second == Rounding(noise=0.0, bias=0.0, shift=0.0, aligned=0.0)


# The second band of rows at this size. No row of it is sampled.
FULL_SIDE = 1024
UNSEEN_ROWS = slice(128, 256)


def spoil_unseen_rows(size: float) -> Device:
    """Make a device that is wrong by this relative size, in rows that are not sampled."""

    def wrong(product: torch.Tensor) -> torch.Tensor:
        return product * (1 + size) if product.shape[-1] == UNSEEN_ROWS.stop else product

    return FaultyDevice(torch_device=CPU.torch_device, wrong_product=wrong)


# In float32, smaller faults of these rows do not differ from the rounding of the product with signs.
@pytest.mark.parametrize(
    ("size", "precision"), [(1e-2, Precision.FP32), (1e-4, Precision.MIXED), (1e-4, Precision.FP64)]
)
def test_gram_finds_a_fault_outside_the_sampled_rows(size: float, precision: Precision) -> None:
    w = gaussian(FULL_SIDE, FULL_SIDE + 100).to(torch.bfloat16)
    found = gram([w], precision, spoil_unseen_rows(size))
    exact = w.double() @ w.double().T
    difference = full(found.k[0]) - exact
    # The fault is there, and only there.
    others = difference.clone()
    others[UNSEEN_ROWS] = others[:, UNSEEN_ROWS] = 0
    assert float(others.norm()) < 0.1 * float(difference.norm())
    estimate = found.roundings[0].noise * float(found.traces[0])
    assert estimate == pytest.approx(float(difference.norm()), rel=0.3)


def test_score_with_a_fault_outside_the_sampled_rows_is_not_exact() -> None:
    w = gaussian(FULL_SIDE, FULL_SIDE + 100).to(torch.bfloat16)
    (found,) = compute_batch([w], precision=Precision.FP32, device=spoil_unseen_rows(1e-2))
    assert found.score is not None
    assert not found.score.is_exact
    assert abs(found.score.snr / reference_score(w) - 1) <= found.score.error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gram_of_right_products_has_no_fault_outside_the_sampled_rows(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = KINDS[kind](gaussian(FULL_SIDE, FULL_SIDE + 100)).to(dtype)
    with_signs = gram([w], Precision.FP32, CPU)
    monkeypatch.setattr(gram_module, "_UNSEEN_FROM", FULL_SIDE + 1)
    assert gram([w], Precision.FP32, CPU).roundings == with_signs.roundings


class _Ones(QuantizedMatrix):
    """A quantized matrix of ones that remembers the product mode in which it was read."""

    modes: list[str]

    def _part(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        self.modes.append(MATMUL.fp32_precision)
        return torch.ones(bottom - top, right - left)

    def any(self) -> bool:
        return True


def modes_of(dtype: torch.dtype) -> set[str]:
    """Return the product modes while blocks of weights of this dtype are multiplied."""
    modes: list[str] = []

    class Watched(Device):
        def blocks(self, *args: object) -> Iterator[tuple[slice, torch.Tensor]]:
            for block in Device.blocks(self, *args):  # type: ignore[arg-type]
                modes.append(MATMUL.fp32_precision)
                yield block

    gram([gaussian(8, 9).to(dtype)], Precision.FP32, Watched(CPU.torch_device))
    return set(modes)


@pytest.fixture
def fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the processor has fast products of bfloat16 numbers."""
    monkeypatch.setattr(gram_module, "has_fast_bfloat16", lambda: True)


@pytest.fixture
def set_mode() -> Iterator[Callable[[str], None]]:
    """Return a function that sets the product mode until the end of the test."""
    before = MATMUL.fp32_precision

    def set_it(mode: str) -> None:
        MATMUL.fp32_precision = mode

    yield set_it
    set_it(before)


@pytest.mark.usefixtures("fast_bfloat16")
@pytest.mark.parametrize("before", ["none", "ieee", "bf16"])
def test_gram_uses_bfloat16_products_only_for_bfloat16_weights(before: str, set_mode: Callable[[str], None]) -> None:
    set_mode(before)
    assert modes_of(torch.bfloat16) == {"bf16"}
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert modes_of(dtype) == {"ieee"}
    quantized = _Ones(8, 9, 1)
    quantized.modes = []
    gram([quantized], Precision.FP32, CPU)
    # The sample for the rounding is read afterwards.
    assert quantized.modes[0] == "ieee"
    assert MATMUL.fp32_precision == before


@pytest.mark.usefixtures("fast_bfloat16")
def test_gram_leaves_the_product_mode_alone_for_a_device() -> None:
    class Elsewhere(Device):
        @property
        def is_cpu(self) -> bool:
            return False

        def blocks(self, *args: object) -> Iterator[tuple[slice, torch.Tensor]]:
            modes.append(MATMUL.fp32_precision)
            return Device.blocks(self, *args)  # type: ignore[arg-type]

    modes: list[str] = []
    before = MATMUL.fp32_precision
    gram([gaussian(8, 9).to(torch.bfloat16)], Precision.FP32, Elsewhere(CPU.torch_device))
    assert modes == [before]


@pytest.mark.usefixtures("fast_bfloat16")
def test_gram_restores_the_product_mode_after_an_exception() -> None:
    class Full(Device):
        def blocks(self, *args: object) -> Iterator[tuple[slice, torch.Tensor]]:
            raise torch.OutOfMemoryError

    before = MATMUL.fp32_precision
    for dtype in (torch.bfloat16, torch.float32):
        with pytest.raises(torch.OutOfMemoryError):
            gram([gaussian(8, 9).to(dtype)], Precision.FP32, Full(CPU.torch_device))
        assert MATMUL.fp32_precision == before
    # It still lets other threads multiply.
    assert modes_of(torch.bfloat16) == {"bf16"}
    assert modes_of(torch.float32) == {"ieee"}


@pytest.mark.usefixtures("fast_bfloat16")
def test_gram_in_threads_never_multiplies_in_the_mode_of_another() -> None:
    wrong: list[tuple[torch.dtype, str]] = []
    together: list[int] = []
    running, lock = 0, threading.Lock()
    expected = {torch.bfloat16: "bf16", torch.float32: "ieee"}

    class Watched(Device):
        def blocks(self, ws: list[torch.Tensor], *args: object) -> Iterator[tuple[slice, torch.Tensor]]:  # type: ignore[override]
            nonlocal running
            with lock:
                running += 1
                together.append(running)
            for block in Device.blocks(self, ws, *args):  # type: ignore[arg-type]
                for _ in range(3):
                    if MATMUL.fp32_precision != expected[ws[0].dtype]:
                        wrong.append((ws[0].dtype, MATMUL.fp32_precision))
                    threading.Event().wait(0.0005)
                yield block
            with lock:
                running -= 1

    def work(dtype: torch.dtype) -> None:
        for _ in range(6):
            gram([gaussian(8, 2100).to(dtype)], Precision.FP32, Watched(CPU.torch_device))

    before = MATMUL.fp32_precision
    threads = [threading.Thread(target=work, args=(dtype,)) for dtype in [*expected] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    # Threads of the same mode run together.
    assert max(together) > 1
    assert MATMUL.fp32_precision == before


def test_has_fast_bfloat16_is_false_without_support_and_measured_once() -> None:
    before = MATMUL.fp32_precision
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert not gram_module.has_fast_bfloat16()
    assert gram_module.has_fast_bfloat16() is gram_module.has_fast_bfloat16()
    assert MATMUL.fp32_precision == before


def test_measure_products_finds_their_error_and_restores_the_mode() -> None:
    before = MATMUL.fp32_precision
    found = measure_products("ieee")
    assert found.seconds > 0
    # Products of normal numbers with 2048 columns: the entries are about 45, their errors some 1e-6.
    assert 1e-8 < found.noise < 1e-4
    assert MATMUL.fp32_precision == before


def test_product_quality_is_better_if_faster_and_at_least_as_exact() -> None:
    ieee = ProductQuality(seconds=1.0, noise=1e-6)
    assert replace(ieee, seconds=0.5).is_better(ieee)
    assert replace(ieee, seconds=0.5, noise=1e-7).is_better(ieee)
    # A tenth is not worth a switch of the whole process.
    assert not replace(ieee, seconds=0.9).is_better(ieee)
    assert not replace(ieee, seconds=2.0, noise=1e-7).is_better(ieee)
    assert not replace(ieee, seconds=0.1, noise=1.1e-6).is_better(ieee)
    assert not replace(ieee, seconds=0.1, noise=np.nan).is_better(ieee)


def test_gram_bfloat16_products_are_as_exact_as_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU without bfloat16 products ignores the switch. On some CPUs these products are less exact, and the probe
    # rejects them.
    worse = 1.1 if gram_module.has_fast_bfloat16() else 100
    w = gaussian(300, 2000).to(torch.bfloat16)
    exact = w.double() @ w.double().T
    errors = []
    for is_fast in (False, True):
        monkeypatch.setattr(gram_module, "has_fast_bfloat16", lambda is_fast=is_fast: is_fast)
        errors.append(float((full(gram([w], Precision.FP32, CPU).k[0]) - exact).norm()))
    assert errors[1] <= worse * errors[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.MIXED, Precision.FP64])
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_gram_measured_rounding_covers_the_norm_of_the_error(
    kind: str, precision: Precision, dtype: torch.dtype
) -> None:
    w = KINDS[kind](gaussian(300, 5000)).to(dtype)
    found = gram([w], precision, Device(torch.device("cuda")))
    exact = w.double() @ w.double().T
    (rounding,), trace = found.roundings, float(found.traces[0])
    error = float((full(found.k[0].cpu()) - exact).norm())
    rounded = U * float(exact.diagonal().norm()) * (precision is Precision.FP32)
    assert error <= 1.5 * math.hypot(rounding.noise * trace, rounded) + 1e-14 * trace
