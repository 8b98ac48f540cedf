"""The checks of a device, with routines that are wrong on purpose."""

import pytest
import torch

from spectrum_stream.numerics import probe
from spectrum_stream.numerics.device import CPU, Device, check_eigenvalues

TORCH_CPU = torch.device("cpu")


@pytest.mark.parametrize(("count", "n"), [(1, 2), (4, 32), (3, 100)])
def test_make_known_has_the_spectrum_and_is_not_diagonal(count: int, n: int) -> None:
    k, known = probe.make_known(count, n)
    assert k.shape == (count, n, n)
    torch.testing.assert_close(torch.linalg.eigvalsh(k), known, rtol=0, atol=1e-11)
    off_diagonal = k - torch.diag_embed(k.diagonal(dim1=1, dim2=2))
    assert bool((off_diagonal.abs().amax((1, 2)) > 1e-3 * known[:, -1]).all())


def test_make_known_has_low_rank_and_clusters() -> None:
    _, known = probe.make_known(3, 64)
    assert int((known[1] == 0).sum()) == 32
    assert float(known[2, 31] - known[2, 0]) < 1e-4


def test_finds_known_eigenvalues_accepts_a_right_routine() -> None:
    assert probe.finds_known_eigenvalues(CPU.eigvalsh, TORCH_CPU)


def one_value_wrong(k: torch.Tensor) -> torch.Tensor:
    found = CPU.eigvalsh(k)
    found[-1, len(found[-1]) // 2] *= 1.01
    return found


def one_matrix_is_nan(k: torch.Tensor) -> torch.Tensor:
    found = CPU.eigvalsh(k)
    found[len(found) // 2] = torch.nan
    return found


def wrong_in_float64(k: torch.Tensor) -> torch.Tensor:
    return CPU.eigvalsh(k.float()).to(k.dtype)


def wrong_for_small_ones(k: torch.Tensor) -> torch.Tensor:
    return CPU.eigvalsh(k) + (k.shape[-1] <= 40)


@pytest.mark.parametrize("routine", [one_value_wrong, one_matrix_is_nan, wrong_in_float64, wrong_for_small_ones])
def test_finds_known_eigenvalues_rejects_a_wrong_routine(routine: object) -> None:
    assert callable(routine)
    assert not probe.finds_known_eigenvalues(routine, TORCH_CPU)


@pytest.mark.parametrize(
    ("wrong_from", "looped", "on_cpu"), [(10**9, False, False), (2, True, False), (1, False, True)]
)
def test_check_eigenvalues_takes_the_first_way_that_is_right(
    wrong_from: int, looped: bool, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = torch.linalg.eigvalsh

    def eigvalsh(k: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = right(k)
        if len(k) >= wrong_from:
            found[-1, 0] = 7
        return found

    monkeypatch.setattr(torch.linalg, "eigvalsh", eigvalsh)
    checked = check_eigenvalues(Device(TORCH_CPU, 1000))
    assert (checked.looped, checked.eigenvalues_on_cpu, checked.batch_nbytes) == (looped, on_cpu, 1000)
    assert bool(checked.problem) == (looped or on_cpu)


@pytest.mark.parametrize(("times", "is_fast"), [(0.1, True), (1, True), (2, True), (32, False), (64, False)])
def test_has_fast_float64_compares_the_times_of_both(
    times: float, is_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {torch.float32: 1e-3, torch.float64: times * 1e-3}
    monkeypatch.setattr(probe, "_time_product", lambda device, dtype: seconds[dtype])
    assert probe.has_fast_float64(TORCH_CPU) is is_fast


@pytest.mark.gpu
def test_gpu_probes_accept_the_eigenvalues_of_single_matrices() -> None:
    device = torch.device("cuda")
    assert probe.finds_known_eigenvalues(Device(device, looped=True).eigvalsh, device)


@pytest.mark.gpu
def test_gpu_has_fast_float64_only_on_data_center_cards() -> None:
    # The CUDA C++ Programming Guide lists the float64 throughput of each compute capability.
    is_for_data_centers = torch.cuda.get_device_capability() in {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
    assert probe.has_fast_float64(torch.device("cuda")) is is_for_data_centers
