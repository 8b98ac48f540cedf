"""Stored bytes to matrices: through safetensors' memory map, or from a buffer that a download filled.

A matrix comes in its stored dtype. As a view of a map it takes no memory of its own until a block of it is
upcast: its pages belong to the file, and the system may drop them at any time.
"""

import contextlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..checkpoint import LocalShard, Shard
from ..errors import CheckpointError, ComputeError
from ..model.matrix import Matrix
from ..model.quantization import Part
from ..numerics.dequantize import DTYPES
from .fetch import requests

# BLAS may round differently for another alignment, and a cache line is the coarsest that it looks at.
_LINE_NBYTES = 64
_PARTS_NBYTES = 8 << 20


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
        """The matrix as it is stored, of `stored_shape`, a view of the file; a vector is (1, k).

        Raises:
            CheckpointError: unreadable; changed, it has another shape than was planned.
        """
        with self._readable():
            stored: torch.Tensor = self._file.get_tensor(matrix.tensor)
        if matrix.expert is not None:
            # One of a stack, or of those that lie one above the other.
            rows = slice(matrix.expert * matrix.n, (matrix.expert + 1) * matrix.n)
            stored = stored[matrix.expert] if stored.ndim > 2 else stored[rows]
        # A vector is a row, and the blocks of a row in MXFP4 are one after another.
        stored = stored.unsqueeze(0) if stored.ndim == 1 else stored.flatten(1)
        if stored.shape != matrix.stored_shape:
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
    """Memory for a matrix as it is stored, of `stored_shape`, and its bytes to be filled.

    It is aligned as it would be in a memory map of its shard, so that both give the same bits.
    """
    dtype = DTYPES[matrix.dtype]
    # A tensor at an odd offset, which the format allows, is not aligned.
    offset = (matrix.start - matrix.start % dtype.itemsize) % _LINE_NBYTES
    # Pages of its own, which go back to the system at once; those of malloc would be kept for later.
    try:
        memory = mmap.mmap(-1, offset + matrix.nbytes, **_PRIVATE)
    except (OSError, OverflowError) as error:
        raise ComputeError(
            f"{matrix.tensor}, {matrix.nbytes} bytes, does not fit into memory",
            reason="too_little_memory",
            hint="--fetch download needs none for it",
        ) from error
    stored = torch.frombuffer(memory, dtype=torch.uint8, offset=offset)
    return stored.view(dtype).reshape(matrix.stored_shape), memoryview(memory)[offset:]


class PartReader:
    """What quantized matrices of a shard need beside their numbers, in their order, a few megabytes at a time.

    Args:
        shards: by name; the parts may be in another one.
        here: the shard of the matrices, where it can be read now.
        count: told how many bytes came over the network.
    """

    def __init__(
        self,
        shards: Mapping[str, Shard],
        here: Shard,
        matrices: Sequence[Matrix],
        count: Callable[[int], None],
    ) -> None:
        self._count = count
        self._shards = shards
        self._here = here
        self._left = deque((w.key, w.quantization.parts) for w in matrices if w.quantization is not None)
        self._read: dict[str, dict[str, bytes]] = {}

    def of(self, matrix: Matrix) -> Mapping[str, bytes]:
        """Each part's bytes, by its role. Raises SourceError; CheckpointError: changed."""
        if matrix.key not in self._read:
            self._read = self._next()
        return self._read[matrix.key]

    def _next(self) -> dict[str, dict[str, bytes]]:
        batch: list[tuple[str, Part]] = []
        nbytes = 0
        while self._left and (not batch or nbytes + sum(part.nbytes for part in self._left[0][1]) <= _PARTS_NBYTES):
            key, parts = self._left.popleft()
            batch += [(key, part) for part in parts]
            nbytes += sum(part.nbytes for part in parts)
        found: dict[str, dict[str, bytes]] = {}
        for name in {part.shard for _, part in batch}:
            mine = [(key, part) for key, part in batch if part.shard == name]
            # A shard that was downloaded is read where it is now.
            shard = self._here if name == self._here.name else self._shards[name]
            extents = requests([(p.start, p.start + p.nbytes) for _, p in mine])
            read = [(start, stop, shard.read(start, stop)) for start, stop in extents]
            if not isinstance(shard, LocalShard):
                self._count(sum(len(body) for _, _, body in read))
            for key, p in mine:
                body = b"".join(
                    chunk[max(p.start, start) - start : min(p.start + p.nbytes, stop) - start]
                    for start, stop, chunk in read
                    if start < p.start + p.nbytes and p.start < stop
                )
                if len(body) != p.nbytes:
                    raise CheckpointError(f"{shard.where} was cut after it was planned", reason="changed")
                found.setdefault(key, {})[p.role] = body
        return found
