"""Scheduling, escalation and errors, on the CPU and on a simulated device."""

import errno
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from spectrum_stream.model.matrix import Matrix
from spectrum_stream.model.no_score import NoScore
from spectrum_stream.numerics import costs
from spectrum_stream.numerics.dequantize import Weights
from spectrum_stream.numerics.device import CPU, Device, open_device
from spectrum_stream.numerics.precision import Precision
from spectrum_stream.numerics.schedule import Compute, Computed, Item, compute_all, compute_batch
from spectrum_stream.numerics.snr import TOLERANCE
from spectrum_stream.numerics.spectra import Spectrum, singular_values

from ..support.checkpoints import reference_score
from ..support.threads import Running, limit_threads

FP32 = Precision.FP32
# No test waits this long, unless it fails.
PATIENCE_S = 60
# It computes on the CPU, as a device does: in batches, on two threads, through buffers.
PRETENDED = Device(torch.device("cpu"), batch_nbytes=4_000_000_000)


@pytest.fixture(autouse=True)
def _on_many_cores() -> Iterator[None]:
    """Let torch use more threads than this machine has. It would limit the workers otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(64)
    yield
    torch.set_num_threads(before)


def matrix(w: torch.Tensor, name: str) -> Matrix:
    n, m = w.shape
    return Matrix(
        module=name,
        parameter=f"{name}.weight",
        group=name,
        tensor=f"{name}.weight",
        shard="download",
        start=0,
        dtype=str(w.dtype),
        n=n,
        m=m,
        nbytes=w.nbytes,
    )


def random(n: int, m: int, seed: int) -> torch.Tensor:
    return (torch.randn(n, m, generator=torch.Generator().manual_seed(seed)) * 0.02).to(torch.bfloat16)


def items_of(ws: Sequence[torch.Tensor]) -> list[Item]:
    return [(matrix(w, f"m{i}"), w) for i, w in enumerate(ws)]


def score_of(computed: Computed) -> float:
    assert computed.score is not None
    return computed.score.snr


def limit_device(limit: int, calls: list[int]) -> Compute:
    """Simulate a device with room for `limit` matrices; the CPU has room for all."""

    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        calls.append(len(ws))
        if device.torch_device.type == "meta" and len(ws) > limit:
            raise torch.OutOfMemoryError
        return singular_values(ws, precision)

    return compute


FULL_DEVICE = Device(torch.device("meta"), batch_nbytes=1 << 32)


def when_all_wait(items: Sequence[Item], compute: Compute) -> tuple[Iterator[Item], Compute]:
    """Let the device start when all items are read.

    It starts with two single matrices and computes the others in batches.
    """
    are_read = threading.Event()

    def read() -> Iterator[Item]:
        yield from items
        are_read.set()

    def compute_later(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        assert are_read.wait(60)
        return compute(ws, precision, device)

    return read(), compute_later


@pytest.mark.parametrize("device", [CPU, PRETENDED], ids=["cpu", "batches"])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_compute_all_scores_every_matrix_once(device: Device, workers: int) -> None:
    shapes = [(24, 60), (60, 24), (24, 60), (1, 9), (130, 40), (2100, 40), (24, 60), (40, 2100)] * 6
    ws = [random(n, m, seed) for seed, (n, m) in enumerate(shapes)]
    found = dict(compute_all(items_of(ws), device=device, workers=workers))
    assert len(found) == len(ws)
    for i, w in enumerate(ws):
        computed = next(computed for m, computed in found.items() if m.module == f"m{i}")
        assert score_of(computed) == pytest.approx(reference_score(w), rel=2 * TOLERANCE)


def test_compute_all_batches_one_shape_within_memory() -> None:
    calls: list[int] = []
    ws = [random(64, 100, seed) for seed in range(70)]
    nbytes = costs.DEVICE_THREADS * costs.device_nbytes(64, 100, 4, 30)
    items, compute = when_all_wait(items_of(ws), limit_device(0, calls))
    found = list(compute_all(items, device=Device(torch.device("cpu"), nbytes), compute=compute, precision=FP32))
    assert len(found) == 70
    assert sorted(calls) == [1, 1, 8, 30, 30]


def test_compute_all_does_not_mix_shapes_or_dtypes() -> None:
    ws = [random(1, 1, 0), random(1, 1, 0), random(8, 9, 0), random(9, 8, 1), random(8, 9, 2)]
    ws.append(random(8, 9, 3).to(torch.float32))
    calls: list[int] = []
    items, compute = when_all_wait(items_of(ws), limit_device(0, calls))
    list(compute_all(items, device=PRETENDED, precision=FP32, compute=compute))
    assert sorted(calls) == [1, 1, 1, 1, 2]


def test_compute_batch_halves_a_batch_that_does_not_fit() -> None:
    calls: list[int] = []
    ws = [random(24, 60, seed) for seed in range(8)]
    found = compute_batch(ws, device=FULL_DEVICE, precision=Precision.FP32, compute=limit_device(2, calls))
    assert calls == [8, 4, 2, 2, 4, 2, 2]
    assert {m.device for m in found} == {"meta"}
    for w, computed in zip(ws, found, strict=True):
        assert score_of(computed) == pytest.approx(reference_score(w), rel=1e-4)


def test_compute_batch_moves_a_matrix_that_does_not_fit_to_the_cpu() -> None:
    calls: list[int] = []
    found = compute_batch(
        [random(24, 60, seed) for seed in range(2)],
        device=FULL_DEVICE,
        precision=Precision.FP32,
        compute=limit_device(0, calls),
    )
    assert calls == [2, 1, 1, 1, 1]
    assert {m.device for m in found} == {"cpu"}


# The words of torch 2.13, numpy 2.4 and CUDA 12.
NO_MEMORY = [
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype(np.float32)),  # type: ignore[attr-defined]
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    RuntimeError("can't start new thread"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: f"{type(error).__name__} {str(error)[-20:]}")
@pytest.mark.parametrize("device", [CPU, FULL_DEVICE, PRETENDED], ids=["cpu", "full", "batches"])
@pytest.mark.parametrize("workers", [1, 2])
def test_compute_all_skips_only_the_matrix_without_memory(error: Exception, device: Device, workers: int) -> None:
    calls: list[int] = []

    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        calls.append(len(ws))
        if any(float(w[:1, :1].max()) == 7 for w in ws):
            raise error
        return singular_values(ws, precision)

    ws = [random(24, 60, seed) for seed in range(9)]
    ws[4][0, 0] = 7
    items: Iterable[Item] = items_of(ws)
    if device is not CPU:
        items, compute = when_all_wait(items_of(ws), compute)
    found = {m.module: c for m, c in compute_all(items, device=device, workers=workers, compute=compute)}
    assert len(found) == len(ws)
    assert [name for name, computed in found.items() if computed.score is None] == ["m4"]
    assert found["m4"].spectrum is NoScore.NO_MEMORY
    if device is not CPU:
        assert max(calls) > 1


@pytest.mark.parametrize("device", [CPU, PRETENDED], ids=["cpu", "batches"])
def test_compute_all_without_memory_holds_no_tensor_of_the_first_try(device: Device) -> None:
    """A traceback keeps the locals of all its functions alive."""
    block: list[weakref.ref[torch.Tensor]] = []

    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        assert not any(kept() is not None for kept in block)
        k = torch.zeros(len(ws), 9)
        block.append(weakref.ref(k))
        raise MemoryError

    ws = [random(24, 60, seed) for seed in range(4)]
    found = dict(compute_all(items_of(ws), device=device, workers=1, compute=compute))
    assert {computed.spectrum for computed in found.values()} == {NoScore.NO_MEMORY}
    assert len(block) >= 4


def test_compute_all_tries_a_matrix_again_when_others_have_given_their_memory_back() -> None:
    running = Running()

    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        with running:
            time.sleep(0.01)
            if running.now > 1:
                raise MemoryError
            return singular_values(ws, precision)

    ws = [random(24, 60, seed) for seed in range(20)]
    found = dict(compute_all(items_of(ws), workers=4, compute=compute))
    assert running.most > 1
    assert len(found) == 20
    assert all(computed.score is not None for computed in found.values())


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_compute_all_works_if_the_system_allows_few_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_threads(monkeypatch, threads)
    before = torch.get_num_threads()
    found = dict(compute_all(items_of([random(24, 60, seed) for seed in range(40)]), workers=4))
    assert len(found) == 40
    assert all(computed.score is not None for computed in found.values())
    assert torch.get_num_threads() == before


def test_compute_batch_without_memory_for_more_precision_keeps_the_score() -> None:
    calls: list[Precision] = []

    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        calls.append(precision)
        if precision is not Precision.FP32:
            raise MemoryError
        return singular_values(ws, precision)

    (found,) = compute_batch([hard(200, 300)], compute=compute)
    assert found.score is not None
    (none,) = compute_batch([hard(200, 300)], compute=compute, precision=Precision.FP64)
    assert none.spectrum is NoScore.NO_MEMORY


def hard(n: int, m: int) -> torch.Tensor:
    """Make a matrix with one singular value thousands of times the others."""
    return random(n, m, 1).to(torch.float32) + 20


def test_compute_batch_escalates_only_inexact_matrices() -> None:
    calls: list[int] = []
    ws = [random(200, 300, 0).to(torch.float32), hard(200, 300), random(200, 300, 5).to(torch.float32)]
    found = compute_batch(ws, compute=limit_device(0, calls))
    assert calls == [3, 1]
    assert [m.spectrum.precision for m in found if isinstance(m.spectrum, Spectrum)] == [
        Precision.FP32,
        Precision.FP64,
        Precision.FP32,
    ]


def test_compute_batch_memory_limit_keeps_an_inexact_score() -> None:
    w = hard(200, 300)
    (kept,) = compute_batch([w], limit_nbytes=1000)
    (exact,) = compute_batch([w])
    assert isinstance(kept.spectrum, Spectrum)
    assert kept.spectrum.precision is Precision.FP32
    assert kept.score is not None
    assert kept.score.error > TOLERANCE
    assert exact.score is not None
    assert exact.score.error < TOLERANCE


def test_compute_batch_failed_escalation_keeps_the_score() -> None:
    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        if precision is Precision.FP32:
            return singular_values(ws, precision)
        return [NoScore.NOT_CONVERGED] * len(ws)

    (found,) = compute_batch([hard(200, 300)], compute=compute)
    assert isinstance(found.spectrum, Spectrum)
    assert found.score is not None


def test_compute_batch_without_convergence_has_no_score() -> None:
    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        return [NoScore.NOT_CONVERGED] * len(ws)

    (found,) = compute_batch([random(4, 4, 0)], compute=compute)
    assert found.spectrum is NoScore.NOT_CONVERGED
    assert found.score is None
    assert found.not_finite == 0


def test_compute_batch_counts_nan() -> None:
    w = random(20, 30, 0)
    w[3, 4] = w[5, 6] = float("nan")
    (found,) = compute_batch([w])
    assert found.spectrum is NoScore.OUT_OF_RANGE
    assert found.not_finite == 2


def test_compute_all_restores_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    list(compute_all(items_of([random(24, 60, 0)] * 3), workers=2))
    assert torch.get_num_threads() == before
    stream = compute_all(items_of([random(24, 60, 0)] * 3), workers=2)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("count", "workers", "threads"),
    [(16, 8, 1), (5, 8, 1), (4, 8, 2), (3, 8, 2), (2, 8, 4), (1, 8, 4), (1, 3, 3), (33, 32, 1), (8, 64, 4)],
)
def test_compute_all_shares_the_cores_of_a_scan_with_few_matrices(count: int, workers: int, threads: int) -> None:
    """A matrix gets one core, or up to four if there are more cores than matrices."""
    at_once = min(count, workers)
    together = threading.Barrier(at_once, timeout=PATIENCE_S)
    found: list[int] = []

    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        found.append(torch.get_num_threads())
        # This passes only if as many matrices are computed at once.
        if len(found) <= at_once:
            together.wait()
        return singular_values(ws, precision)

    items = items_of([random(24, 60, seed) for seed in range(count)])
    assert len(list(compute_all(items, precision=FP32, workers=workers, count=count, compute=compute))) == count
    assert found == [threads] * count


@pytest.mark.parametrize("workers", [2, 8])
def test_compute_all_gives_a_remaining_matrix_the_same_bytes_as_a_whole_scan(workers: int) -> None:
    """The last digits depend on the number of threads."""
    items = items_of([random(192, 576, seed).bfloat16() for seed in range(workers)])
    whole = {m.module: found for m, found in compute_all(items, workers=workers, count=len(items))}
    for item in items:
        ((_, left),) = compute_all([item], workers=workers, count=len(items))
        expected = whole[item[0].module]
        assert isinstance(left.spectrum, Spectrum)
        assert isinstance(expected.spectrum, Spectrum)
        assert left.spectrum.values.tobytes() == expected.spectrum.values.tobytes()
        assert left.score == expected.score


@pytest.mark.parametrize(
    ("room", "workers", "threads"),
    [(1.5, 2, 2), (2.5, 2, 1), (2.5, 3, 1), (2.5, 8, 4), (4.5, 8, 2), (2.5, 32, 4)],
)
def test_compute_all_computes_no_more_at_once_than_the_memory_holds(room: float, workers: int, threads: int) -> None:
    """The cores that this leaves idle share the matrices."""
    running = Running()
    found: set[int] = set()

    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        found.add(torch.get_num_threads())
        with running:
            time.sleep(0.01)
            return singular_values(ws, precision)

    items = items_of([random(64, 100, seed) for seed in range(4 * workers)])
    limit = int(room * costs.compute_nbytes(64, 100, FP32))
    computed = compute_all(items, precision=FP32, workers=workers, together_nbytes=limit, compute=compute)
    assert len(list(computed)) == len(items)
    assert running.most == int(room)
    assert found == {threads}


def test_compute_all_uses_no_more_threads_than_cores() -> None:
    used: list[int] = []
    totals: list[int] = []
    thread_counts: list[set[int]] = []

    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        threads = torch.get_num_threads()
        used.append(threads)
        totals.append(sum(used))
        thread_counts.append(set(used))
        time.sleep(0.02)
        assert torch.get_num_threads() == threads
        used.remove(threads)
        return singular_values(ws, precision)

    # There is memory for two large ones, so each has four of the eight cores, and the small ones wait.
    items = items_of([random(n, 100, seed) for seed, n in enumerate([64, 64, 8, 8, 8, 8, 8, 8])])
    limit = int(2.5 * costs.compute_nbytes(64, 100, FP32))
    assert len(list(compute_all(items, precision=FP32, workers=8, together_nbytes=limit, compute=compute))) == 8
    assert max(totals) == 8
    # The number of threads is process-wide, so all matrices that are computed together have the same number.
    assert all(len(found) == 1 for found in thread_counts)


def test_compute_all_starts_with_the_matrix_that_takes_longest() -> None:
    sides: list[int] = []

    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        sides.append(min(ws[0].shape))
        return singular_values(ws, precision)

    items = items_of([random(n, 60, n) for n in (5, 40, 12, 60, 24)])
    assert len(list(compute_all(items, precision=FP32, workers=1, compute=compute))) == 5
    assert sides == [60, 40, 24, 12, 5]


CUDA = Device(torch.device("cuda"))


@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        (CPU, ["fp32", "fp64", "svd"]),
        (CUDA, ["fp32", "fp64", "svd"]),
        (replace(CUDA, has_fast_float64=False), ["fp32", "mixed", "fp64", "svd"]),
        # Metal has no float64, so K in float64 is computed on the CPU.
        (Device(torch.device("mps"), has_fast_float64=False), ["fp32", "fp64 on cpu", "svd"]),
    ],
    ids=["cpu", "cuda", "cuda with slow float64", "mps"],
)
def test_compute_batch_tries_mixed_only_on_a_card_with_slow_float64(asked: Device, steps: list[str]) -> None:
    tried: list[str] = []

    def compute(ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]:
        is_moved = device is not asked and precision is not Precision.SVD
        tried.append(f"{precision} on {device}" if is_moved else str(precision))
        # It is never exact enough.
        return singular_values(ws, FP32)

    compute_batch([hard(200, 300)], device=asked, compute=compute)
    assert tried == steps


@pytest.mark.gpu
def test_gpu_scores_equal_cpu_scores() -> None:
    device = open_device("cuda")
    shapes = [(192, 576), (768, 2048), (576, 576), (1, 576), (2500, 3000)] * 4
    ws = [random(n, m, seed) for seed, (n, m) in enumerate(shapes)]
    ws[3] = hard(*shapes[3])
    found = {m.module: computed for m, computed in compute_all(items_of(ws), device=device)}
    assert any(computed.device.startswith("cuda") for computed in found.values())
    for i, w in enumerate(ws):
        assert score_of(found[f"m{i}"]) == pytest.approx(reference_score(w), rel=2 * TOLERANCE)


@pytest.mark.gpu
def test_gpu_out_of_memory_falls_back() -> None:
    device = open_device("cuda")
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(int(free * 0.98), dtype=torch.uint8, device="cuda")
    ws = [random(2048, 2048, seed) for seed in range(8)]
    found = compute_batch(ws, device=device)
    del hog
    for w, computed in zip(ws, found, strict=True):
        assert score_of(computed) == pytest.approx(reference_score(w), rel=2 * TOLERANCE)
