"""Quantized weights to numbers, a part at a time: the whole matrix is never multiplied out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from ..model.quantization import Packing, Quantization
from .costs import BLOCK_COLUMNS, DECODED_NUMEL

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
_WORD_BITS = 32
# Where AWQ puts the eight numbers of a word, for the kernel that it was made for.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class Quantized(ABC):
    """A matrix that is stored as small numbers and scales; a part of it is multiplied out when it is read.

    It is to be used as a float32 tensor of two dimensions would be, as far as that is needed.
    """

    dtype = torch.float32

    def __init__(self, n: int, m: int, scales: int) -> None:
        self.shape = torch.Size((n, m))
        self.scales = scales

    @property
    def T(self) -> "Quantized":  # noqa: N802
        """Its transpose."""
        return _Turned(self)

    @abstractmethod
    def _part(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        """Rows [top, bottom) and columns [left, right), as a float32 tensor of its own."""

    def __getitem__(self, part: slice | tuple[slice, slice]) -> torch.Tensor:
        rows, columns = part if isinstance(part, tuple) else (part, slice(None))
        (top, bottom, _), (left, right, _) = rows.indices(self.shape[0]), columns.indices(self.shape[1])
        return self._banded(top, bottom, left, right)

    def _banded(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        height = max(1, DECODED_NUMEL // max(1, right - left))
        if bottom - top <= height:
            return self._part(top, bottom, left, right)
        # What a part takes on its way, several times itself, is then that of a few rows.
        block = torch.empty(bottom - top, right - left)
        for first in range(top, bottom, height):
            last = min(first + height, bottom)
            block[first - top : last - top] = self._part(first, last, left, right)
        return block

    def any(self) -> bool:
        """Whether any weight is not zero."""
        height = max(1, BLOCK_COLUMNS * BLOCK_COLUMNS // self.shape[1])
        return any(bool(self[i : i + height].any()) for i in range(0, self.shape[0], height))


class _Turned(Quantized):
    def __init__(self, inner: Quantized) -> None:
        super().__init__(inner.shape[1], inner.shape[0], inner.scales)
        self._inner = inner

    @property
    def T(self) -> Quantized:  # noqa: N802
        return self._inner

    def _banded(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        return self._inner._banded(left, right, top, bottom).T

    def _part(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        return self._inner._part(left, right, top, bottom).T


class Scaled(Quantized):
    """Numbers with a grid of scales over them.

    Args:
        stored: (n, m), of any dtype of numbers.
        scales: (rows, columns), float32.
        block: how many (rows, columns) of the matrix share a scale; the last ones may be fewer.
    """

    def __init__(self, stored: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> None:
        super().__init__(stored.shape[0], stored.shape[1], scales.numel())
        self._stored, self._scales, self._block = stored, scales, block

    def _part(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        result = self._stored[top:bottom, left:right].to(torch.float32, copy=True)
        height, width = self._block
        # Band by band of rows that share their scales, so that no grid of the size of the part is made.
        for first in range(top - top % height, bottom, height):
            scales = self._scales[first // height, left // width : (right - 1) // width + 1]
            along = scales.repeat_interleave(width)[left % width :][: right - left]
            result[max(first - top, 0) : first + height - top] *= along
        return result


class Fp4(Quantized):
    """Numbers of four bits (E2M1), two a byte, with a scale for each few of a row: MXFP4 and NVFP4.

    Args:
        stored: (n, m / 2), uint8; the even column is in the low four bits.
        scales: (n, m / columns), of a float8 dtype: E8M0 for powers of two, whose 255 is not a number.
        columns: how many share a scale.
        factor: that of all weights.
    """

    _NUMBERS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    # A byte to its two numbers.
    _PAIRS = torch.stack([_NUMBERS.repeat(16), _NUMBERS.repeat_interleave(16)], 1)

    def __init__(self, stored: torch.Tensor, scales: torch.Tensor, columns: int, factor: float = 1.0) -> None:
        super().__init__(stored.shape[0], 2 * stored.shape[1], scales.numel())
        self._stored, self._scales, self._columns, self._factor = stored, scales, columns, factor

    def _part(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        columns, (_, m) = self._columns, self.shape
        first, last = left // columns, -(-right // columns)
        start, stop = first * columns, min(last * columns, m)
        numbers = self._PAIRS[self._stored[top:bottom, start // 2 : stop // 2].int()].reshape(bottom - top, -1)
        scales = self._scales[top:bottom, first:last].to(torch.float32) * self._factor
        # The last scale of a row can be that of fewer.
        whole = (stop - start) // columns
        if whole:
            numbers[:, : whole * columns].view(bottom - top, whole, columns).mul_(scales[:, :whole, None])
        if whole < last - first:
            numbers[:, whole * columns :] *= scales[:, whole:]
        return numbers[:, left - start : right - start]


class Integers(Quantized):
    """Integers of a few bits in words of 32, each less a zero point and times a scale.

    Args:
        words: int32, as stored.
        shape: (n, m) of the matrix.
        packing: how the integers lie in the words.
        bits: of an integer.
        scales: (rows, columns), float32.
        zeros: the same shape, float32; what an integer is counted from.
        row_groups, column_groups: which row and column of `scales` those of the matrix belong to.
    """

    def __init__(
        self,
        words: torch.Tensor,
        shape: tuple[int, int],
        packing: Packing,
        bits: int,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        row_groups: torch.Tensor,
        column_groups: torch.Tensor,
    ) -> None:
        super().__init__(shape[0], shape[1], scales.numel())
        self._words, self._packing, self._bits = words, packing, bits
        self._scales, self._zeros = scales, zeros
        self._row_groups, self._column_groups = row_groups, column_groups

    def _part(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        if self._packing is Packing.COLUMNS:
            numbers = unpacked(self._words[:, left:right], self._bits, top, bottom, dim=0)
        elif self._packing is Packing.ROWS:
            numbers = unpacked(self._words[top:bottom], self._bits, left, right, dim=1)
        else:
            numbers = unpacked_awq(self._words[top:bottom], left, right)
        rows, columns = self._row_groups[top:bottom], self._column_groups[left:right]
        result = numbers.to(torch.float32)
        # Along the lines that share no scale first, which makes the smaller of the two.
        if self._packing is Packing.ROWS:
            result -= self._zeros[rows][:, columns]
            result *= self._scales[rows][:, columns]
        else:
            result -= self._zeros[:, columns][rows]
            result *= self._scales[:, columns][rows]
        return result


Weights = torch.Tensor | Quantized


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized matrix as it was read, with the bytes of what it needs; its scales are not spread out yet.

    Attributes:
        stored: its numbers, of `how.stored_shape`.
        parts: the bytes of each of `how.parts`, by role.
    """

    stored: torch.Tensor
    how: Quantization
    parts: Mapping[str, bytes]

    def opened(self) -> Quantized:
        """Raises CheckpointError: bad_scales, what the companions hold does not fit the weight."""
        return multiplied_out(self.stored, self.how, self.parts)


def unpacked(words: torch.Tensor, bits: int, start: int, stop: int, dim: int) -> torch.Tensor:
    """Unsigned integers [start, stop) of each line along `dim` of int32 words that hold them bit after bit."""
    positions = torch.arange(start, stop) * bits
    index, shift = positions // _WORD_BITS, (positions % _WORD_BITS).to(torch.int32)
    along = shift.unsqueeze(1 - dim)
    # Shifted as signed numbers; what the sign fills in is masked.
    numbers = words.index_select(dim, index) >> along
    if _WORD_BITS % bits:
        present = _WORD_BITS - along
        numbers &= torch.where(present < bits, (1 << present.clamp(max=bits)) - 1, -1).to(torch.int32)
        following = words.index_select(dim, (index + 1).clamp(max=words.shape[dim] - 1))
        numbers |= torch.where(present < bits, following << present.clamp(max=_WORD_BITS - 1), 0).to(torch.int32)
    return numbers & ((1 << bits) - 1)


def unpacked_awq(words: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Integers of four bits, [start, stop) of each row."""
    columns = torch.arange(start, stop)
    shift = 4 * torch.tensor(_AWQ_ORDER, dtype=torch.int32)[columns % 8]
    return (words.index_select(1, columns // 8) >> shift) & 15


def multiplied_out(stored: torch.Tensor, how: Quantization, parts: Mapping[str, bytes]) -> Quantized:
    """A quantized matrix.

    Args:
        stored: its numbers, of `how.stored_shape`.
        parts: the bytes of each of `how.parts`, by role.

    Raises:
        CheckpointError: bad_scales, what the companions hold does not fit the weight.
    """
    found = {part.role: _tensor(part.dtype, part.shape, parts[part.role]) for part in how.parts}
    scales = found["scales"]
    if how.packing is Packing.FP4:
        factor = 1.0
        for role, one in found.items():
            if role in ("factor", "divisor"):
                factor = float(one) if role == "factor" else 1 / float(one) if float(one) else torch.inf
        powers = scales.view(torch.float8_e8m0fnu) if scales.dtype is torch.uint8 else scales
        return Fp4(stored, powers, how.block[1], factor)
    if how.packing is Packing.NONE:
        if scales.dtype is torch.uint8:
            scales = scales.view(torch.float8_e8m0fnu)
        return Scaled(stored, scales.to(torch.float32), how.block)
    return _integers(stored, how, found, scales.to(torch.float32))


def _integers(
    words: torch.Tensor, how: Quantization, found: Mapping[str, torch.Tensor], scales: torch.Tensor
) -> Quantized:
    if "shape" in found and tuple(found["shape"].tolist()) != how.shape:
        raise _unfit(how, f"its true shape is {found['shape'].tolist()}, and its words hold {list(how.shape)}")
    zeros = torch.full_like(scales, 1 << (how.bits - 1))
    if "zeros" in found:
        packed = found["zeros"]
        if how.packing is Packing.AWQ:
            zeros = unpacked_awq(packed, 0, scales.shape[1])
        else:
            dim = 0 if how.packing is Packing.ROWS else 1
            zeros = unpacked(packed, how.bits, 0, scales.shape[dim], dim)
        zeros = ((zeros + how.zeros_offset) & ((1 << how.bits) - 1)).to(torch.float32)
    groups = [torch.arange(side) // share for side, share in zip(how.shape, how.block, strict=True)]
    if "groups" in found:
        dim = 1 if how.packing is Packing.ROWS else 0
        order = found["groups"].long()
        # compressed-tensors writes -1 where columns are in order.
        if not bool((order == -1).all()):
            if int(order.min()) < 0 or int(order.max()) >= scales.shape[dim]:
                raise _unfit(how, "a column in a group that has no scale")
            groups[dim] = order
    return Integers(words, how.shape, how.packing, how.bits, scales, zeros, *groups)


def _tensor(dtype: str, shape: tuple[int, ...], body: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(DTYPES[dtype]).reshape(shape)


def _unfit(how: Quantization, what: str) -> CheckpointError:
    return CheckpointError(f"{how.parts[0].tensor}: {what}", reason="bad_scales")
