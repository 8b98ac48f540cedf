"""Stored bytes to tensors: through safetensors' memory map, or from a buffer that a request fills.

A matrix keeps its stored dtype. A view of a map takes no private memory until a block of it is upcast: its pages
belong to the file, and the system may drop them at any time.
"""

import contextlib
import io
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..checkpoint import LocalShard
from ..errors import CheckpointError, is_out_of_memory
from ..files import open_regular
from ..model.matrix import Matrix
from ..model.no_score import NoScore
from ..numerics.dequantize import DTYPES, Packed

# A function to call when a matrix is computed and its tensor is gone.
Release = Callable[[], None]
# An item of a reader: a matrix as stored, with its parts if it is quantized, or NO_MEMORY if it does not fit.
Read = tuple[Matrix, torch.Tensor | Packed | NoScore, Release]

# BLAS may round differently for another alignment, up to the size of a cache line.
_LINE_NBYTES = 64

# Memory that no other process shares; on Windows an anonymous map is never shared.
_PRIVATE: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


class ShardReader:
    """An open shard and its map. A context manager.

    Raises:
        CheckpointError: unreadable, the file is gone or is not safetensors; changed, it is not the planned file.
        FileError: not_a_file, unreadable.
        MemoryError: the system does not map the whole file.
    """

    def __init__(self, shard: LocalShard) -> None:
        self._shard = shard
        with self._readable(), contextlib.ExitStack() as opened:
            self._bytes = opened.enter_context(open_regular(shard.path))
            self._check()
            self._file: Any = safe_open(_name_opened(self._bytes, shard.path), framework="pt", device="cpu")
            self._check()
            opened.pop_all()

    def read(self, matrix: Matrix) -> torch.Tensor:
        """Return the matrix as it is stored, a view of the map of `stored_shape`.

        A vector is (1, k).

        Raises:
            CheckpointError: unreadable; changed, its shape is not the planned one.
        """
        with self._readable():
            stored: torch.Tensor = self._file.get_tensor(matrix.tensor)
        if matrix.expert is not None:
            # The experts are stacked in a third dimension, or in the rows of a 2-D tensor.
            rows = slice(matrix.expert * matrix.n, (matrix.expert + 1) * matrix.n)
            stored = stored[matrix.expert] if stored.ndim > 2 else stored[rows]
        # A vector becomes a row. In MXFP4 the blocks of a row are an extra dimension.
        stored = stored.unsqueeze(0) if stored.ndim == 1 else stored.flatten(1)
        if stored.shape != matrix.stored_shape:
            raise CheckpointError(f"{matrix.tensor} changed its shape after it was planned", reason="changed")
        return stored

    def warm(self, start: int, nbytes: int, scratch: memoryview) -> None:
        """Read a range of the file, so that its pages are in the page cache.

        Sequential reads run at the bandwidth of the disk; page faults through the map would run at its latency.

        Args:
            scratch: memory to read into, at least one byte.

        Raises:
            CheckpointError: unreadable; changed.
        """
        with self._readable():
            self._bytes.seek(start)
            while nbytes > 0 and (got := self._bytes.readinto(scratch[:nbytes])):
                nbytes -= got
            self._check()

    def _check(self) -> None:
        # A map has no pages behind the end of a file that was cut. Touching them would end the process.
        status = os.fstat(self._bytes.fileno())
        shard = self._shard
        if (status.st_size, status.st_mtime_ns, status.st_ino) != (shard.nbytes, shard.mtime_ns, shard.inode):
            raise CheckpointError(
                f"{shard.where} was changed after it was planned",
                reason="changed",
                hint="run the same command again when the file is complete; earlier results are intact",
            )

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        # torch opens the file for safetensors, and raises RuntimeErrors.
        except (SafetensorError, OSError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise MemoryError(self._shard.name) from error
            raise CheckpointError(f"{self._shard.where} cannot be read: {error}", reason="unreadable") from error

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.__exit__(*exc)
        self._bytes.close()


def _name_opened(file: io.BufferedReader, path: Path) -> Path:
    """Return a path that leads to an open file, even if its name was replaced.

    Only Linux has such a path. safetensors opens a file by its path, and would wait forever at a FIFO.
    """
    opened = Path(f"/proc/self/fd/{file.fileno()}")
    return opened if opened.exists() else path


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Leave the block silently if an error means a lack of memory."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise


def empty_matrix(matrix: Matrix) -> tuple[torch.Tensor, memoryview]:
    """Allocate a stored matrix: a tensor of `stored_shape`, and its bytes to fill.

    The alignment is that of a memory map of the shard, so that both give the same bits.

    Raises:
        MemoryError.
    """
    dtype = DTYPES[matrix.dtype]
    # The format allows an offset that is not a multiple of the item size; torch does not.
    offset = (matrix.start - matrix.start % dtype.itemsize) % _LINE_NBYTES
    # A separate map goes back to the system at once, but malloc would keep the pages for later.
    try:
        memory = mmap.mmap(-1, offset + matrix.nbytes, **_PRIVATE)
    except (OSError, OverflowError) as error:
        raise MemoryError(matrix.tensor) from error
    stored = torch.frombuffer(memory, dtype=torch.uint8, offset=offset)
    return stored.view(dtype).reshape(matrix.stored_shape), memoryview(memory)[offset:]
