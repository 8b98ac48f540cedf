import pytest

from spectrum_stream.numerics.costs import count_cores, flops, gram_nbytes, runtime_nbytes, svd_nbytes, work


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
