"""Stored bytes to matrices: through safetensors' memory map, or from a buffer that a download filled.

A matrix comes in its stored dtype. As a view of a map it takes no memory of its own until a block of it is
upcast: its pages belong to the file, and the system may drop them at any time.
"""

import contextlib
import mmap
import os
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError
from .matrices import Matrix
from .sources import LocalShard

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# BLAS may round differently for another alignment, and a cache line is the coarsest that it looks at.
_LINE_NBYTES = 64


# Shared with no other process; Windows has nothing else.
_PRIVATE: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


class ShardReader:
    """An open shard; use it as a context manager."""

    def __init__(self, shard: LocalShard) -> None:
        """
        Raises:
            CheckpointError: unreadable, the file is gone or no safetensors; changed, it is not the one planned.
        """
        self._shard = shard
        with self._readable(), contextlib.ExitStack() as opened:
            self._bytes = opened.enter_context(shard.path.open("rb", buffering=0))
            self._file: Any = safe_open(shard.path, framework="pt", device="cpu")
            self._check()
            opened.pop_all()

    def matrix(self, matrix: Matrix) -> torch.Tensor:
        """The (n, m) tensor in its stored dtype, a view of the file; a vector is (1, k).

        Raises:
            CheckpointError: unreadable; changed, it has another shape than was planned.
        """
        with self._readable():
            stored: torch.Tensor = self._file.get_tensor(matrix.tensor)
        if matrix.expert is not None:
            stored = stored[matrix.expert]
        stored = stored.unsqueeze(0) if stored.ndim == 1 else stored
        if stored.shape != (matrix.n, matrix.m):
            raise CheckpointError(f"{matrix.tensor} changed its shape after it was planned", reason="changed")
        return stored

    def warm(self, start: int, nbytes: int, scratch: memoryview) -> None:
        """Bring a range of the file into the page cache.

        Sequential reads do this at the speed of the disk; page faults through the map would do it at the
        pace of its latency.

        Raises:
            CheckpointError: unreadable; changed.
        """
        with self._readable():
            self._bytes.seek(start)
            while nbytes > 0 and (got := self._bytes.readinto(scratch[:nbytes])):
                nbytes -= got
            self._check()

    def _check(self) -> None:
        # Behind the end of a file that was cut, a map has no pages, and to touch them ends the process.
        status = os.fstat(self._bytes.fileno())
        shard = self._shard
        if (status.st_size, status.st_mtime_ns, status.st_ino) != (shard.nbytes, shard.mtime_ns, shard.inode):
            raise CheckpointError(
                f"{shard.where} was changed after it was planned",
                reason="changed",
                hint="the same command starts over when the file is complete; earlier results are as they were",
            )

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._shard.where} cannot be read: {error}", reason="unreadable") from error

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.__exit__(*exc)
        self._bytes.close()


def empty_matrix(matrix: Matrix) -> tuple[torch.Tensor, memoryview]:
    """Memory for a matrix: the (n, m) tensor in its stored dtype, and its bytes to be filled.

    It is aligned as it would be in a memory map of its shard, so that the two ways give the same bits.
    """
    dtype = _DTYPES[matrix.dtype]
    # A tensor at an odd offset, which the format allows, is not aligned.
    offset = (matrix.start - matrix.start % dtype.itemsize) % _LINE_NBYTES
    # Pages of its own, which go back to the system at once; those of malloc would be kept for later.
    memory = mmap.mmap(-1, offset + matrix.nbytes, **_PRIVATE)
    tensor = torch.frombuffer(memory, dtype=dtype, count=matrix.n * matrix.m, offset=offset)
    return tensor.reshape(matrix.n, matrix.m), memoryview(memory)[offset:]
