import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from spectrum_stream.checkpoint import LocalShard
from spectrum_stream.errors import FileError
from spectrum_stream.model.matrix import Matrix
from spectrum_stream.streaming.decode import ShardReader, empty_matrix

from ..support.checkpoints import Save


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


def put_fifo(path: Path) -> None:
    path.rename(f"{path}.away")
    os.mkfifo(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_fifo_that_replaced_a_shard_does_not_block(save: Save) -> None:
    shard = LocalShard.at("model", save({"a": torch.ones(2, 3)}) / "model.safetensors")
    put_fifo(shard.path)
    with pytest.raises(FileError) as error:
        shard.read(0, 8)
    assert error.value.reason == "not_a_file"
    with pytest.raises(FileError) as error:
        ShardReader(shard)
    assert error.value.reason == "not_a_file"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux only")
def test_fifo_that_replaces_a_shard_while_it_is_opened_does_not_block(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = LocalShard.at("model", save({"a": torch.ones(2, 3)}) / "model.safetensors")

    def open_late(*args: Any, **options: Any) -> Any:
        put_fifo(shard.path)
        return safe_open(*args, **options)

    monkeypatch.setattr("spectrum_stream.streaming.decode.safe_open", open_late)
    with ShardReader(shard) as reader:
        assert reader._file.get_tensor("a").equal(torch.ones(2, 3))
