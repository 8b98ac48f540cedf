"""Stored bytes to matrices: through safetensors' memory map, or from a buffer that a download filled.

A matrix comes in its stored dtype. As a view of a map it takes no memory of its own until a block of it is
upcast: its pages belong to the file, and the system may drop them at any time.
"""

import contextlib
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .costs import BLOCK_COLUMNS
from .errors import CheckpointError, ComputeError
from .matrices import Matrix
from .quantised import MXFP4, MXFP4_BLOCK
from .sources import LocalShard

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
}
# BLAS may round differently for another alignment, and a cache line is the coarsest that it looks at.
_LINE_NBYTES = 64


# Shared with no other process; Windows has nothing else.
_PRIVATE: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}


class Quantised(ABC):
    """A matrix that is stored as small numbers and scales; a part of it is multiplied out when it is read.

    It is to be used as a float32 tensor of two dimensions would be, as far as that is needed.
    """

    dtype = torch.float32

    def __init__(self, n: int, m: int) -> None:
        self.shape = torch.Size((n, m))

    @property
    @abstractmethod
    def T(self) -> "Quantised":  # noqa: N802
        """Its transpose."""

    @abstractmethod
    def _part(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        """Rows [top, bottom) and columns [left, right), as a float32 tensor of its own."""

    def __getitem__(self, part: slice | tuple[slice, slice]) -> torch.Tensor:
        rows, columns = part if isinstance(part, tuple) else (part, slice(None))
        (top, bottom, _), (left, right, _) = rows.indices(self.shape[0]), columns.indices(self.shape[1])
        return self._part(top, bottom, left, right)

    def any(self) -> bool:
        """Whether any weight is not zero."""
        height = max(1, BLOCK_COLUMNS * BLOCK_COLUMNS // self.shape[1])
        return any(bool(self[i : i + height].any()) for i in range(0, self.shape[0], height))


class Scaled(Quantised):
    """Numbers with a grid of scales over them.

    Args:
        stored: (n, m), of any floating dtype.
        scales: (rows, columns), float32.
        block: how many (rows, columns) of the matrix share a scale; the last ones may be fewer.
    """

    def __init__(self, stored: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> None:
        super().__init__(*stored.shape)
        self._stored, self._scales, self._block = stored, scales, block

    @property
    def T(self) -> "Scaled":  # noqa: N802
        return Scaled(self._stored.T, self._scales.T, (self._block[1], self._block[0]))

    def _part(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        result = self._stored[top:bottom, left:right].to(torch.float32, copy=True)
        height, width = self._block
        # Band by band of rows that share their scales, so that no grid of the size of the part is made.
        for first in range(top - top % height, bottom, height):
            scales = self._scales[first // height, left // width : (right - 1) // width + 1]
            along = scales.repeat_interleave(width)[left % width :][: right - left]
            result[max(first - top, 0) : first + height - top] *= along
        return result


class Mxfp4(Quantised):
    """Numbers of four bits, two a byte, with a power of two for each 32 of a row (OCP Microscaling, MXFP4).

    Args:
        stored: (n, m / 2), uint8; the even column is in the low four bits.
        exponents: (n, m / 32), uint8, plus 127; 255 is not a number.
        turned: whether this is the transpose of that.
    """

    _NUMBERS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    # A byte to its two numbers.
    _PAIRS = torch.stack([_NUMBERS.repeat(16), _NUMBERS.repeat_interleave(16)], 1)

    def __init__(self, stored: torch.Tensor, exponents: torch.Tensor, turned: bool = False) -> None:
        n, m = stored.shape[0], 2 * stored.shape[1]
        super().__init__(*((m, n) if turned else (n, m)))
        self._stored, self._exponents, self._turned = stored, exponents, turned

    @property
    def T(self) -> "Mxfp4":  # noqa: N802
        return Mxfp4(self._stored, self._exponents, not self._turned)

    def _part(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        if self._turned:
            return self.T._part(left, right, top, bottom).T
        first, last = left // MXFP4_BLOCK, -(-right // MXFP4_BLOCK)
        width = MXFP4_BLOCK // 2
        numbers = self._PAIRS[self._stored[top:bottom, first * width : last * width].int()]
        numbers = numbers.reshape(bottom - top, last - first, MXFP4_BLOCK)
        exponents = self._exponents[top:bottom, first:last].int()
        ones = torch.ones(exponents.shape)
        scales = torch.ldexp(ones, exponents - 127).masked_fill(exponents == 255, torch.nan)
        numbers *= scales[:, :, None]
        return numbers.reshape(bottom - top, -1)[:, left - first * MXFP4_BLOCK : right - first * MXFP4_BLOCK]


Weights = torch.Tensor | Quantised


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
            stored = stored[matrix.expert]
        # A vector is a row, and the groups of a row in MXFP4 are one after another.
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

    It is aligned as it would be in a memory map of its shard, so that the two ways give the same bits.
    """
    dtype = _DTYPES[matrix.dtype]
    # A tensor at an odd offset, which the format allows, is not aligned.
    offset = (matrix.start - matrix.start % dtype.itemsize) % _LINE_NBYTES
    # Pages of its own, which go back to the system at once; those of malloc would be kept for later.
    try:
        memory = mmap.mmap(-1, offset + matrix.nbytes, **_PRIVATE)
    except (OSError, OverflowError) as error:
        raise ComputeError(
            f"{matrix.tensor}, {matrix.nbytes} bytes, does not fit into memory",
            reason="too_little_memory",
            hint="--fetch shard needs none for it",
        ) from error
    stored = torch.frombuffer(memory, dtype=torch.uint8, offset=offset)
    return stored.view(dtype).reshape(matrix.stored_shape), memoryview(memory)[offset:]


def multiplied_out(matrix: Matrix, stored: torch.Tensor, scales: bytes) -> Quantised:
    """A quantised matrix with the bytes of its scales."""
    where = matrix.scales
    assert where is not None
    grid = torch.frombuffer(bytearray(scales), dtype=torch.uint8).view(_DTYPES[where.dtype]).reshape(where.shape)
    return Mxfp4(stored, grid) if where.scheme == MXFP4 else Scaled(stored, grid.to(torch.float32), where.block)
