"""Scheduling, escalation and errors, on the CPU and on a simulated device with little memory."""

from collections.abc import Sequence

import pytest
import torch

from spectrum_stream.errors import UsageError
from spectrum_stream.model.matrix import Matrix
from spectrum_stream.model.no_score import NoScore
from spectrum_stream.numerics.dequantize import Weights
from spectrum_stream.numerics.device import CPU, Device, open_device
from spectrum_stream.numerics.precision import Precision
from spectrum_stream.numerics.schedule import Compute, Computed, compute_all, compute_batch
from spectrum_stream.numerics.snr import TOLERANCE
from spectrum_stream.numerics.spectra import Spectrum, singular_values

from ..support.checkpoints import reference_score

PRETENDED = Device(torch.device("cpu"), batch_nbytes=2_000_000)


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


def items_of(ws: Sequence[torch.Tensor]) -> list[tuple[Matrix, torch.Tensor]]:
    return [(matrix(w, f"m{i}"), w) for i, w in enumerate(ws)]


def score_of(computed: Computed) -> float:
    assert computed.score is not None
    return computed.score.snr


def limit_device(limit: int, calls: list[int]) -> Compute:
    """Simulate a device with room for `limit` matrices; the CPU has room for all."""

    def compute(
        ws: Sequence[Weights], precision: Precision, device: torch.device, *, looped: bool
    ) -> list[Spectrum | NoScore]:
        calls.append(len(ws))
        if device.type == "meta" and len(ws) > limit:
            raise torch.OutOfMemoryError
        return singular_values(ws, precision, torch.device("cpu"), looped=looped)

    return compute


FULL_DEVICE = Device(torch.device("meta"), batch_nbytes=1 << 30)


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
    each = 4 * 64 * (2 * 64 + 100)
    list(compute_all(items_of(ws), device=Device(torch.device("cpu"), 30 * each), compute=limit_device(0, calls)))
    assert [n for n in calls if n > 9] == [30, 30, 10]


def test_compute_all_does_not_mix_shapes_or_dtypes() -> None:
    ws = [random(8, 9, 0), random(9, 8, 1), random(8, 9, 2), random(8, 9, 3).to(torch.float32)]
    calls: list[int] = []
    list(compute_all(items_of(ws), device=PRETENDED, precision=Precision.FP32, compute=limit_device(0, calls)))
    assert sorted(calls) == [1, 1, 2]


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


def test_compute_batch_raises_when_the_cpu_is_out_of_memory() -> None:
    def compute(*args: object, **options: object) -> list[Spectrum | NoScore]:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        compute_batch([random(4, 4, 0)], compute=compute)


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
    def compute(
        ws: Sequence[Weights], precision: Precision, device: torch.device, *, looped: bool
    ) -> list[Spectrum | NoScore]:
        if precision is Precision.FP32:
            return singular_values(ws, precision)
        return [NoScore.NOT_CONVERGED] * len(ws)

    (found,) = compute_batch([hard(200, 300)], compute=compute)
    assert isinstance(found.spectrum, Spectrum)
    assert found.score is not None


def test_compute_batch_without_convergence_has_no_score() -> None:
    def compute(
        ws: Sequence[Weights], precision: Precision, device: torch.device, *, looped: bool
    ) -> list[Spectrum | NoScore]:
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


@pytest.mark.parametrize("name", ["cuda:99", "mps", "xpu:0", "tpu", "", "meta", "cuda:x"])
def test_open_device_rejects_missing_devices(name: str) -> None:
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    with pytest.raises(UsageError) as error:
        open_device(name)
    assert error.value.reason == "no_such_device"
    assert error.value.exit_code == 2


def test_open_device_auto_picks_the_best() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert open_device().torch_device.type == expected


def test_compute_all_restores_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    list(compute_all(items_of([random(24, 60, 0)] * 3), workers=2))
    assert torch.get_num_threads() == before
    stream = compute_all(items_of([random(24, 60, 0)] * 3), workers=2)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert torch.get_num_threads() == before


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
