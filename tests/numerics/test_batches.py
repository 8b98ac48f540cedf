"""Batches on two threads. The device is the CPU, which computes as a device does."""

import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from spectrum_stream.model.no_score import NoScore
from spectrum_stream.numerics import batches, costs
from spectrum_stream.numerics.dequantize import Weights
from spectrum_stream.numerics.device import CPU, Device, open_device
from spectrum_stream.numerics.precision import Precision
from spectrum_stream.numerics.schedule import Item, compute_all, compute_batch
from spectrum_stream.numerics.snr import TOLERANCE
from spectrum_stream.numerics.spectra import Spectrum, singular_values

from ..support.spectra import with_spectrum
from ..support.threads import Running, limit_threads
from .test_schedule import FP32, PRETENDED, items_of, random, score_of, when_all_wait

# No test waits this long, unless it fails.
PATIENCE_S = 60


def device_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("device ")]


def test_batches_run_two_at_once() -> None:
    together = threading.Barrier(costs.DEVICE_THREADS, timeout=PATIENCE_S)

    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        # This passes only if another batch gets here meanwhile.
        together.wait()
        return singular_values(ws, precision, device)

    ws = [random(24, 60, seed) for seed in range(2)]
    assert len(list(compute_all(items_of(ws), device=PRETENDED, precision=FP32, compute=compute))) == 2


def test_batches_yield_finished_matrices_while_another_batch_runs() -> None:
    may_end = threading.Event()

    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        if ws[0].shape[0] == 9:
            assert may_end.wait(PATIENCE_S)
        return singular_values(ws, precision, device)

    items = items_of([random(9, 60, 0), random(24, 60, 1), random(24, 60, 2)])
    stream = compute_all(items, device=PRETENDED, precision=FP32, compute=compute)
    assert {next(stream)[0].n for _ in range(2)} == {24}
    may_end.set()
    assert [m.n for m, _ in stream] == [9]


def test_batches_give_the_scores_of_a_cpu() -> None:
    shapes = [(24, 60), (60, 24), (130, 40), (1, 9), (300, 2100)] * 5
    ws = [random(n, m, seed) for seed, (n, m) in enumerate(shapes)]
    items, compute = when_all_wait(items_of(ws), singular_values)
    found = {m.module: score_of(c) for m, c in compute_all(items, device=PRETENDED, compute=compute)}
    expected = {m.module: score_of(c) for m, c in compute_all(items_of(ws), device=CPU)}
    assert found == pytest.approx(expected, rel=2 * TOLERANCE)


def test_batches_that_do_not_fit_together_run_one_after_another() -> None:
    running = Running()

    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        with running:
            time.sleep(0.01)
        return singular_values(ws, precision)

    ws = [random(64, 100, seed) for seed in range(9)]
    small = Device(torch.device("cpu"), costs.device_nbytes(64, 100, 4) + 1)
    assert len(list(compute_all(items_of(ws), device=small, precision=FP32, compute=compute))) == 9
    assert running.most == 1


def test_batches_compute_a_matrix_that_exceeds_the_memory() -> None:
    assert len(list(compute_all(items_of([random(64, 100, 0)] * 3), device=Device(torch.device("cpu"), 1)))) == 3


@pytest.mark.parametrize("bad", [0, 5])
def test_batches_raise_an_error_of_a_thread(bad: int) -> None:
    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        if any(float(w[:1, :1].max()) == 7 for w in ws):
            raise ZeroDivisionError
        return singular_values(ws, precision)

    ws = [random(24, 60, seed) for seed in range(9)]
    ws[bad][0, 0] = 7
    with pytest.raises(ZeroDivisionError):
        list(compute_all(items_of(ws), device=PRETENDED, compute=compute))
    assert not device_threads()


def test_batches_end_when_the_generator_is_closed() -> None:
    """The running batch is computed to its end, and waiting matrices are dropped."""
    calls: list[int] = []
    is_running = threading.Event()

    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        calls.append(len(ws))
        if len(calls) > 1:
            is_running.set()
            time.sleep(0.05)
        return singular_values(ws, precision)

    def items() -> Iterator[Item]:
        yield from items_of([random(24, 60, seed) for seed in range(2)])
        assert is_running.wait(PATIENCE_S)
        yield from items_of([random(24, 60, seed) for seed in range(40)])

    stream = compute_all(items(), device=PRETENDED, precision=FP32, compute=compute)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not device_threads()
    assert len(calls) <= 4


def test_batches_drop_tensors_before_their_matrices_are_yielded() -> None:
    tensors: dict[str, weakref.ref[torch.Tensor]] = {}

    def items() -> Iterator[Item]:
        for seed in range(30):
            matrix, w = items_of([random(24, 60, seed).clone()])[0]
            assert isinstance(w, torch.Tensor)
            tensors[f"m{seed}"] = weakref.ref(w)
            yield matrix, w
            del w

    seen = 0
    for _ in compute_all(items(), device=PRETENDED, precision=FP32):
        seen += 1
        assert sum(tensor() is None for tensor in tensors.values()) >= seen
    assert seen == 30


def test_batches_take_no_more_while_enough_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the pages of a large model leave the memory before they are computed."""
    ws = [random(24, 60, seed) for seed in range(20)]
    monkeypatch.setattr(batches, "_WAITING_NBYTES", 4 * ws[0].nbytes)
    taken = 0

    def items() -> Iterator[Item]:
        nonlocal taken
        for item in items_of(ws):
            taken += 1
            yield item

    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        started = time.monotonic()
        while taken < 6 and time.monotonic() < started + PATIENCE_S:
            time.sleep(0.001)
        # There is time to take more.
        time.sleep(0.02)
        return singular_values(ws, precision)

    stream = compute_all(items(), device=PRETENDED, precision=FP32, compute=compute)
    next(stream)
    # Two are computed, and four wait.
    assert taken == 6
    assert len(list(stream)) == 19


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_batches_work_if_the_system_allows_few_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_threads(monkeypatch, threads)
    found = dict(compute_all(items_of([random(24, 60, seed) for seed in range(20)]), device=PRETENDED))
    assert len(found) == 20
    assert all(computed.score is not None for computed in found.values())


def test_batches_measure_each_short_side_once_while_nothing_runs() -> None:
    running = Running()
    measured: list[int] = []

    class Unmeasured(Device):
        def is_measured(self, n: int) -> bool:
            return n in measured

        def measure(self, n: int) -> None:
            assert not running.now
            measured.append(n)

    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        with running:
            time.sleep(0.002)
        return singular_values(ws, precision, device)

    ws = [random(n, m, n) for n, m in [(24, 60), (60, 24), (7, 30), (24, 90), (9, 20)] * 6]
    pretended = Unmeasured(torch.device("cpu"), PRETENDED.batch_nbytes)
    assert len(list(compute_all(items_of(ws), device=pretended, precision=FP32, compute=compute))) == 30
    assert sorted(measured) == [7, 9, 24]


def test_batches_move_only_the_matrix_that_fails_to_the_next_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.linalg.eigvalsh

    def eigvalsh(k: torch.Tensor) -> torch.Tensor:
        if k.dtype is torch.float32 and bool((k[:, 0, 0] > 0.2).any()):
            raise LinAlgError("linalg.eigh: (Batch element 3): The algorithm failed to converge")
        found: torch.Tensor = right(k)
        return found

    monkeypatch.setattr(torch.linalg, "eigvalsh", eigvalsh)
    ws = [random(24, 60, seed).to(torch.float32) for seed in range(20)]
    ws[11] *= 4
    items, compute = when_all_wait(items_of(ws), singular_values)
    found = {m.module: c for m, c in compute_all(items, device=PRETENDED, compute=compute)}
    precisions = {name: c.spectrum.precision for name, c in found.items() if isinstance(c.spectrum, Spectrum)}
    assert precisions == {f"m{i}": Precision.FP64 if i == 11 else FP32 for i in range(20)}


def test_batches_multiply_exactly_in_every_thread() -> None:
    """A training program may have switched on TF32 for the whole process."""
    found: list[str] = []

    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        found.append(torch.backends.cuda.matmul.fp32_precision)
        found.append(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]
        return singular_values(ws, precision)

    list(compute_all(items_of([random(24, 60, 0)] * 2), device=PRETENDED, precision=FP32, compute=compute))
    assert found == ["ieee"] * 4


def test_batches_without_memory_on_the_device_move_to_the_cpu_one_at_a_time() -> None:
    running = Running()

    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        if not device.is_cpu:
            raise torch.OutOfMemoryError("CUDA out of memory")
        with running:
            time.sleep(0.005)
        return singular_values(ws, precision, device)

    full = Device(torch.device("meta"), PRETENDED.batch_nbytes)
    found = list(compute_all(items_of([random(24, 60, 0)] * 8), device=full, precision=FP32, compute=compute))
    assert [c.device for _, c in found] == ["cpu"] * 8
    assert running.most == 1


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP64])
@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize(("n", "m"), [(24, 60), (300, 200), (1100, 2500)])
def test_gpu_batches_find_known_singular_values(n: int, m: int, count: int, precision: Precision) -> None:
    known = torch.linspace(2, 1, min(n, m), dtype=torch.float64)
    ws: list[Weights] = [with_spectrum(n, m, known * (i + 1)).to(torch.float32) for i in range(min(count, 3))]
    found = compute_batch((ws * count)[:count], precision=precision, device=open_device("cuda"))
    for i, computed in enumerate(found):
        assert isinstance(computed.spectrum, Spectrum)
        assert computed.device == "cuda"
        # The rounding of the weights to float32 also moves the singular values.
        torch.testing.assert_close(
            torch.from_numpy(computed.spectrum.values), known * (i % len(ws) + 1), rtol=1e-5, atol=0
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gpu_two_threads_give_the_scores_of_one(dtype: torch.dtype) -> None:
    device = open_device("cuda")
    shapes = [(192, 576), (576, 192), (768, 2048), (1, 576), (2048, 768), (2500, 3000)] * 6
    ws = [random(n, m, seed).to(dtype) for seed, (n, m) in enumerate(shapes)]
    found = {m.module: score_of(c) for m, c in compute_all(items_of(ws), device=device)}
    alone = {f"m{i}": score_of(compute_batch([w], device=device)[0]) for i, w in enumerate(ws)}
    assert found == pytest.approx(alone, rel=2 * TOLERANCE)


@pytest.mark.gpu
def test_gpu_batches_out_of_memory_are_scored_nevertheless() -> None:
    device = open_device("cuda")
    free, _ = torch.cuda.mem_get_info()
    # The device was opened with all memory, and another program takes most of it.
    hog = torch.empty(max(0, free - 400_000_000), dtype=torch.uint8, device="cuda")
    ws = [random(2048, 2048, seed) for seed in range(12)]
    found = {m.module: score_of(c) for m, c in compute_all(items_of(ws), device=device)}
    del hog
    expected = {m.module: score_of(c) for m, c in compute_all(items_of(ws), device=CPU)}
    assert found == pytest.approx(expected, rel=2 * TOLERANCE)


@pytest.mark.gpu
def test_gpu_batches_stay_within_the_memory_of_the_device() -> None:
    opened = open_device("cuda")
    small = replace(opened, batch_nbytes=costs.DEVICE_THREADS * costs.device_nbytes(1024, 2048, 4, 5))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ws = [random(1024, 2048, seed) for seed in range(40)]
    assert len(list(compute_all(items_of(ws), device=small, precision=FP32))) == 40
    assert torch.cuda.max_memory_allocated() - before <= small.batch_nbytes
