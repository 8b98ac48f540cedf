import pytest
import torch

from spectrum_stream.model.matrix import Matrix
from spectrum_stream.streaming.decode import empty_matrix


@pytest.mark.parametrize(
    ("dtype", "torch_dtype", "itemsize"), [("BF16", torch.bfloat16, 2), ("F64", torch.float64, 8)]
)
@pytest.mark.parametrize("start", [0, 8, 64, 1000, 1001, 12345])
def test_empty_matrix_is_aligned_like_the_map(
    dtype: str, torch_dtype: torch.dtype, itemsize: int, start: int
) -> None:
    matrix = Matrix(
        module="a",
        parameter="a.weight",
        group="a",
        tensor="a.weight",
        shard="s",
        start=start,
        dtype=dtype,
        n=3,
        m=5,
        nbytes=15 * itemsize,
    )
    tensor, buffer = empty_matrix(matrix)
    stored = torch.arange(15, dtype=torch_dtype).reshape(3, 5)
    buffer[:] = stored.view(torch.uint8).flatten().numpy().tobytes()
    assert torch.equal(tensor, stored)
    assert len(buffer) == matrix.nbytes
    assert tensor.data_ptr() % 64 == (start - start % itemsize) % 64
