"""Devices: opening, eigenvalues of batches, and the sizes of batches."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from spectrum_stream.errors import UsageError
from spectrum_stream.numerics import costs, device, probe
from spectrum_stream.numerics.costs import Workspace
from spectrum_stream.numerics.device import CPU, Device, open_device

TORCH_CPU = torch.device("cpu")


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


def test_open_device_that_is_full_has_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(UsageError) as error:
        open_device("cuda")
    assert error.value.reason == "device_is_full"


# The first is torch's for CUSOLVER_STATUS_INVALID_VALUE, or for a matrix that does not converge.
FAILURES = [
    LinAlgError("linalg.eigh: (Batch element 3): The algorithm failed to converge"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnXsyevBatched(...)`"),
]


def fail_with(
    error: Exception, is_bad: Callable[[torch.Tensor], bool], calls: list[int]
) -> Callable[..., torch.Tensor]:
    right = torch.linalg.eigvalsh

    def eigvalsh(k: torch.Tensor) -> torch.Tensor:
        calls.append(len(k))
        if is_bad(k):
            raise error
        found: torch.Tensor = right(k)
        return found

    return eigvalsh


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_eigvalsh_halves_a_batch_until_only_the_bad_matrix_fails(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    k, known = probe.make_known(8, 6)
    k[5] *= -1
    calls: list[int] = []
    monkeypatch.setattr(torch.linalg, "eigvalsh", fail_with(error, lambda k: bool((k[:, 0, 0] < 0).any()), calls))
    found = CPU.eigvalsh(k)
    assert calls == [8, 4, 4, 2, 1, 1, 2]
    assert bool(found[5].isnan().all())
    others = [0, 1, 2, 3, 4, 6, 7]
    torch.testing.assert_close(found[others], known[others])


def test_eigvalsh_halves_a_batch_that_is_too_large_for_the_routine(monkeypatch: pytest.MonkeyPatch) -> None:
    k, known = probe.make_known(9, 6)
    calls: list[int] = []
    monkeypatch.setattr(torch.linalg, "eigvalsh", fail_with(FAILURES[0], lambda k: len(k) > 3, calls))
    torch.testing.assert_close(CPU.eigvalsh(k), known)
    assert max(n for n in calls if n <= 3) == 3


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: launch")])
def test_eigvalsh_raises_other_errors(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch.linalg, "eigvalsh", fail_with(error, lambda _: True, calls))
    with pytest.raises(type(error)):
        CPU.eigvalsh(torch.eye(3)[None])
    assert calls == [1]


@pytest.mark.parametrize("looped", [False, True])
def test_eigvalsh_keeps_the_limit_of_a_call(looped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "MAX_BATCH_NUMEL", 4 * 6**2 + 35)
    calls: list[int] = []
    monkeypatch.setattr(torch.linalg, "eigvalsh", fail_with(FAILURES[0], lambda _: False, calls))
    k, known = probe.make_known(10, 6)
    torch.testing.assert_close(Device(TORCH_CPU, looped=looped).eigvalsh(k), known)
    assert calls == ([1] * 10 if looped else [4, 4, 2])


@pytest.mark.parametrize("is_above_the_limit", [False, True])
def test_eigvalsh_moves_to_the_cpu_without_a_routine_or_above_the_limit(
    is_above_the_limit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subclass simulates a device without a right routine, or a too large matrix."""
    moved: list[bool] = []

    class OnDevice(torch.Tensor):
        def cpu(self, *_: object, **__: object) -> torch.Tensor:
            moved.append(True)
            return self.as_subclass(torch.Tensor)

    if is_above_the_limit:
        monkeypatch.setattr(costs, "MAX_BATCH_NUMEL", 35)
    k, known = probe.make_known(2, 6)
    used = Device(TORCH_CPU, eigenvalues_on_cpu=not is_above_the_limit)
    torch.testing.assert_close(used.eigvalsh(k.as_subclass(OnDevice)), known)
    assert moved


def test_limit_and_nbytes_follow_the_measured_workspace() -> None:
    used = Device(TORCH_CPU, 20_000_000_000)
    before = used.limit(1024, 4096, 4)
    assert before == costs.batch_limit(1024, 4096, 4, used.batch_nbytes // costs.DEVICE_THREADS)
    used._workspaces[1024, 4] = Workspace(1_000_000, 50_000_000)
    after = used.limit(1024, 4096, 4)
    assert after < before
    assert used.nbytes(1024, 4096, 4, after) <= 10_000_000_000 < used.nbytes(1024, 4096, 4, after + 1)
    assert used.limit(512, 4096, 4) == Device(TORCH_CPU, 20_000_000_000).limit(512, 4096, 4)


@pytest.mark.parametrize(
    ("peaks", "workspace"),
    [
        # A workspace for each matrix, one for the whole batch, and none that is counted.
        ({1: 30_000_000, 2: 50_000_000}, Workspace(10_000_000, 20_000_000)),
        ({1: 30_000_000, 2: 30_000_000}, Workspace(26_000_000, 4_000_000)),
        ({1: 0, 2: 0}, Workspace(0, 4_000_000)),
    ],
)
def test_measure_separates_what_a_batch_and_a_matrix_need(
    peaks: dict[int, int], workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "_measure_peak", lambda self, n, batch: peaks[batch])
    card = Device(torch.device("cuda"), 1 << 34)
    assert not card.is_measured(1000)
    card.measure(1000)
    assert card.is_measured(1000)
    assert not card.is_measured(1001)
    share = card.batch_nbytes // costs.DEVICE_THREADS
    assert card.limit(1000, 3000, 4) == costs.batch_limit(1000, 3000, 4, share, workspace)
    twice = Workspace(2 * workspace.fixed, 2 * workspace.each)
    assert card.limit(1000, 3000, 8) == costs.batch_limit(1000, 3000, 8, share, twice)


def test_measure_without_memory_assumes_a_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Device, "_measure_peak", fail)
    card = Device(torch.device("cuda"), 1 << 34)
    before = card.limit(1000, 3000, 4)
    card.measure(1000)
    assert card.is_measured(1000)
    assert card.limit(1000, 3000, 4) == before


def test_nothing_is_measured_where_eigenvalues_are_computed_on_the_cpu() -> None:
    assert CPU.is_measured(1000)
    assert Device(torch.device("cuda"), 1, eigenvalues_on_cpu=True).is_measured(1000)
    assert Device(torch.device("cuda"), 1).is_measured(50_000)


@pytest.mark.parametrize("is_right", [True, False])
def test_open_device_reports_the_probes_and_the_usable_memory(
    is_right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(probe, "finds_known_eigenvalues", lambda *_: is_right)
    monkeypatch.setattr(probe, "has_fast_float64", lambda _: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10_000_000_000, 24_000_000_000))
    card = open_device("cuda:1")
    assert str(card) == "cuda:1"
    assert card.batch_nbytes == 8_000_000_000
    assert not card.has_fast_float64
    assert card.eigenvalues_on_cpu is not is_right
    assert bool(card.problem) is not is_right


def test_open_device_without_memory_for_the_probe_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(probe, "finds_known_eigenvalues", fail)
    with pytest.raises(UsageError) as error:
        open_device("cuda")
    assert error.value.reason == "device_is_full"


def test_blocks_of_a_device_come_from_the_buffers_of_the_thread() -> None:
    used = Device(TORCH_CPU, 1)
    addresses: list[set[int]] = []

    def take() -> None:
        w = torch.ones(2, 5000)
        addresses.append({block.data_ptr() for _ in range(2) for _, block in used.blocks([w])})

    take()
    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert [len(found) for found in addresses] == [costs.STAGING_BUFFERS] * 2
    assert not addresses[0] & addresses[1]


@pytest.mark.gpu
def test_gpu_device_is_probed() -> None:
    opened = open_device("cuda")
    assert opened.batch_nbytes > 0
    assert not (opened.looped and opened.eigenvalues_on_cpu)
    assert bool(opened.problem) == (opened.looped or opened.eigenvalues_on_cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("count", "n"), [(1, 64), (1, 1024), (2, 31), (7, 300), (64, 512), (1000, 48), (40_000, 8)])
def test_gpu_eigenvalues_are_known(count: int, n: int, dtype: torch.dtype) -> None:
    k, known = probe.make_known(count, n)
    found = open_device("cuda").eigvalsh(k.to("cuda", dtype)).double().cpu()
    tolerance = 64 * torch.finfo(dtype).eps * known[:, -1:]
    assert bool(((found - known).abs() <= tolerance).all())


@pytest.mark.gpu
@pytest.mark.parametrize("beyond", [0, 1])
def test_gpu_eigenvalues_at_the_limit_of_a_call(beyond: int) -> None:
    n = 2048
    count = costs.MAX_BATCH_NUMEL // n**2 + beyond
    opened = open_device("cuda")
    free, _ = torch.cuda.mem_get_info()
    if free < 6 * 4 * n * n * count:
        pytest.skip("too little memory")
    one, known = probe.make_known(1, n)
    found = opened.eigvalsh(one.to("cuda", torch.float32).expand(count, n, n).contiguous()).double().cpu()
    assert bool(((found - known).abs() <= 64 * 2.0**-23 * known[:, -1:]).all())


@pytest.mark.gpu
@pytest.mark.parametrize("n", [64, 1024])
def test_gpu_workspace_is_measured(n: int) -> None:
    opened = open_device("cuda")
    assert not opened.is_measured(n)
    opened.measure(n)
    assert opened.is_measured(n)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    k = torch.eye(n, device="cuda").expand(16, n, n).contiguous()
    opened.eigvalsh(k)
    assert torch.cuda.max_memory_allocated() - before <= opened.nbytes(n, n, 4, 16)


@pytest.mark.gpu
def test_gpu_staging_buffers_are_pinned() -> None:
    opened = device.open_device("cuda")
    list(opened.blocks([torch.ones(2, 3)]))
    assert all(buffer.on_host.is_pinned() for buffer in opened._threads.staging._buffers)
