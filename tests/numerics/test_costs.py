import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum_stream.numerics import costs
from spectrum_stream.numerics.costs import (
    Workspace,
    batch_limit,
    count_cores,
    device_nbytes,
    flops,
    gram_nbytes,
    runtime_nbytes,
    svd_nbytes,
    work,
)


def test_flops_of_a_llama_8b_layer() -> None:
    assert flops(4096, 14336) == flops(14336, 4096) == pytest.approx(4096**2 * 14336 + 4 / 3 * 4096**3)
    assert work(4096, 14336) > flops(4096, 14336)


@pytest.mark.parametrize(("n", "m"), [(8192, 28672), (128_256, 8192)])
def test_memory_of_70b_matrices_is_below_a_gigabyte_and_a_half(n: int, m: int) -> None:
    assert runtime_nbytes(4) + gram_nbytes(n, m, 4) < 1.5 * 2**30


def test_memory_grows_with_the_precision() -> None:
    for n, m in [(1, 1), (64, 64), (192, 576), (4096, 14336), (128_256, 8192)]:
        assert gram_nbytes(n, m, 4) < gram_nbytes(n, m, 8) < svd_nbytes(n, m)


def test_count_cores_is_positive() -> None:
    assert count_cores() >= 1


workspaces = st.none() | st.builds(Workspace, st.integers(0, 10**10), st.integers(0, 10**10))


@given(st.integers(1, 10**5), st.integers(1, 10**6), st.sampled_from([4, 8]), st.integers(0, 10**13), workspaces)
def test_batch_limit_keeps_the_limits_of_cusolver_and_memory(
    n: int, m: int, itemsize: int, nbytes: int, workspace: Workspace | None
) -> None:
    count, side = batch_limit(n, m, itemsize, nbytes, workspace), min(n, m)
    assert 1 <= count <= costs.MAX_BATCH
    # A single matrix may be above any limit. It is then computed in another way.
    if count > 1:
        assert count * side**2 <= 2**31 - 1
        assert device_nbytes(n, m, itemsize, count, workspace) <= nbytes
    # One matrix more would break a limit.
    more = count + 1
    assert (
        more > costs.MAX_BATCH
        or more * side**2 > 2**31 - 1
        or device_nbytes(n, m, itemsize, more, workspace) > nbytes
    )


@pytest.mark.parametrize(
    ("n", "most"), [(512, 8191), (768, 3640), (1024, 2047), (2048, 511), (4096, 127), (8192, 31)]
)
def test_batch_limit_with_unlimited_memory_is_that_of_cusolver(n: int, most: int) -> None:
    assert batch_limit(n, 3 * n, 4, 10**15) == batch_limit(3 * n, n, 8, 10**15) == most
    assert batch_limit(1, n, 4, 10**15) == costs.MAX_BATCH


def test_device_memory_of_a_70b_matrix_is_small() -> None:
    assert device_nbytes(8192, 28672, 4) < 2e9
    assert device_nbytes(8192, 28672, 8) < 4e9


def test_device_memory_grows_with_the_batch_and_its_workspace() -> None:
    one, two = device_nbytes(1024, 4096, 4), device_nbytes(1024, 4096, 4, 2)
    assert two - one >= 3 * 4 * 1024**2
    assert device_nbytes(1024, 4096, 4, 2, Workspace(5, 7)) == device_nbytes(1024, 4096, 4, 2, Workspace(0, 0)) + 19
