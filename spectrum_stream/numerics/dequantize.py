"""Dequantize weights block by block, so that no whole matrix exists in float32."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import CheckpointError
from ..model.quantization import Packing, Quantization
from ..model.schemes.comfyui import check_marker
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
    "U32": torch.uint32,
    "I64": torch.int64,
}
_WORD_BITS = 32
# So many equal zero points are not equal by chance.
_MIN_CONSTANT_ZEROS = 32
# The order of the eight values in a word of AWQ, as its kernel requires it.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class QuantizedMatrix(ABC):
    """A matrix of quantized values and scales. Indexing it dequantizes that block.

    It has the parts of a 2-D float32 tensor that a scan uses: `shape`, `dtype`, `T`, slices with a step of 1, and
    `any`.

    Args:
        n, m: the shape.
        scales: the number of its scales.
    """

    dtype = torch.float32

    def __init__(self, n: int, m: int, scales: int) -> None:
        self.shape = torch.Size((n, m))
        self.scales = scales

    @property
    def T(self) -> "QuantizedMatrix":  # noqa: N802
        """The transpose."""
        return _Transposed(self)

    @abstractmethod
    def _part(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        """Dequantize a block of rows and columns into a new float32 tensor."""

    def __getitem__(self, part: slice | tuple[slice, slice]) -> torch.Tensor:
        rows, columns = part if isinstance(part, tuple) else (part, slice(None))
        (top, bottom, _), (left, right, _) = rows.indices(self.shape[0]), columns.indices(self.shape[1])
        return self._dequantize(top, bottom, left, right)

    def _dequantize(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        height = max(1, DECODED_NUMEL // max(1, right - left))
        if bottom - top <= height:
            return self._part(top, bottom, left, right)
        # Dequantizing takes several times the memory of its result, so it is done for a few rows at a time.
        block = torch.empty(bottom - top, right - left)
        for first in range(top, bottom, height):
            last = min(first + height, bottom)
            block[first - top : last - top] = self._part(first, last, left, right)
        return block

    def any(self) -> bool:
        """Whether any weight is not zero."""
        height = max(1, BLOCK_COLUMNS * BLOCK_COLUMNS // self.shape[1])
        return any(bool(self[i : i + height].any()) for i in range(0, self.shape[0], height))


class _Transposed(QuantizedMatrix):
    def __init__(self, inner: QuantizedMatrix) -> None:
        super().__init__(inner.shape[1], inner.shape[0], inner.scales)
        self._inner = inner

    @property
    def T(self) -> QuantizedMatrix:  # noqa: N802
        return self._inner

    def _dequantize(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        return self._inner._dequantize(left, right, top, bottom).T

    def _part(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        return self._inner._part(left, right, top, bottom).T


class Scaled(QuantizedMatrix):
    """Values with one scale for each block of the matrix: float8 and int8.

    Args:
        stored: (n, m), of any dtype of numbers.
        scales: (ceil(n / rows), ceil(m / columns)), float32.
        block: the (rows, columns) of the matrix that share a scale. Blocks at the edges may be smaller.
    """

    def __init__(self, stored: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> None:
        super().__init__(stored.shape[0], stored.shape[1], scales.numel())
        self._stored, self._scales, self._block = stored, scales, block

    def _part(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        result = self._stored[top:bottom, left:right].to(torch.float32, copy=True)
        height, width = self._block
        if height == 1 and width < self.shape[1]:
            # Every row has several scales, so the rows are not taken one by one.
            scales = self._scales[top:bottom, left // width : (right - 1) // width + 1]
            result *= scales.repeat_interleave(width, 1)[:, left % width :][:, : right - left]
            return result
        # Each band of rows shares its scales, so the scales are never expanded to the size of the block.
        for first in range(top - top % height, bottom, height):
            scales = self._scales[first // height, left // width : (right - 1) // width + 1]
            along = scales.repeat_interleave(width)[left % width :][: right - left]
            result[max(first - top, 0) : first + height - top] *= along
        return result


class Fp4(QuantizedMatrix):
    """Values of four bits (E2M1) with scales along the rows: MXFP4 and NVFP4.

    Args:
        stored: (n, m / 2), uint8.
        scales: (n, ceil(m / columns)), float8. In E8M0, a power of two, 255 is NaN.
        columns: the number of neighbors in a row that share a scale.
        factor: a factor of all weights.
        high_first: whether the even column is in the high four bits of a byte; default: in the low ones.
    """

    _NUMBERS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    # The two values of each byte, the low bits first.
    _PAIRS = torch.stack([_NUMBERS.repeat(16), _NUMBERS.repeat_interleave(16)], 1)

    def __init__(
        self,
        stored: torch.Tensor,
        scales: torch.Tensor,
        columns: int,
        factor: float = 1.0,
        *,
        high_first: bool = False,
    ) -> None:
        super().__init__(stored.shape[0], 2 * stored.shape[1], scales.numel())
        self._stored, self._scales, self._columns, self._factor = stored, scales, columns, factor
        self._pairs = self._PAIRS.flip(1) if high_first else self._PAIRS

    def _part(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        columns, (_, m) = self._columns, self.shape
        first, last = left // columns, -(-right // columns)
        start, stop = first * columns, min(last * columns, m)
        numbers = self._pairs[self._stored[top:bottom, start // 2 : stop // 2].int()].reshape(bottom - top, -1)
        scales = self._scales[top:bottom, first:last].to(torch.float32) * self._factor
        # The last scale of a row may belong to fewer columns.
        whole = (stop - start) // columns
        if whole:
            numbers[:, : whole * columns].view(bottom - top, whole, columns).mul_(scales[:, :whole, None])
        if whole < last - first:
            numbers[:, whole * columns :] *= scales[:, whole:]
        return numbers[:, left - start : right - start]


@dataclass(frozen=True, slots=True)
class ScaleGrid:
    """The scales of a matrix, with its zero points or its offsets.

    Attributes:
        scales: (rows, columns), float32.
        zeros: the zero points, of the same shape, float32; None if there are offsets.
        offsets: the weight that the integer 0 stands for, of the same shape, float32; None if there are zero points.
        row_groups: (n,), int64: the row of `scales` for each row of the matrix.
        column_groups: (m,), int64: the column of `scales` for each column of the matrix.
    """

    scales: torch.Tensor
    zeros: torch.Tensor | None
    offsets: torch.Tensor | None
    row_groups: torch.Tensor
    column_groups: torch.Tensor


class Integers(QuantizedMatrix):
    """Integers of a few bits in 32-bit words.

    w = (integer - zero point) * scale, or integer * scale + offset.

    Args:
        words: int32, as stored.
        shape: (n, m) of the matrix.
        packing: the order of the integers in the words.
        bits: the number of bits of an integer.
        grid: scales and zero points.
    """

    def __init__(
        self, words: torch.Tensor, shape: tuple[int, int], packing: Packing, bits: int, grid: ScaleGrid
    ) -> None:
        super().__init__(shape[0], shape[1], grid.scales.numel())
        self._words, self._packing, self._bits, self._grid = words, packing, bits, grid

    def _part(self, top: int, bottom: int, left: int, right: int) -> torch.Tensor:
        if self._packing is Packing.COLUMNS:
            numbers = unpack(self._words[:, left:right], self._bits, top, bottom, dim=0)
        elif self._packing is Packing.ROWS:
            numbers = unpack(self._words[top:bottom], self._bits, left, right, dim=1)
        else:
            numbers = unpack_awq(self._words[top:bottom], left, right)
        grid = self._grid
        rows, columns = grid.row_groups[top:bottom], grid.column_groups[left:right]

        def spread(values: torch.Tensor) -> torch.Tensor:
            # The grid is indexed first along the side where every line has its own scales: that result is smaller.
            along_rows = self._packing is Packing.ROWS
            return values[rows][:, columns] if along_rows else values[:, columns][rows]

        result = numbers.to(torch.float32)
        if grid.zeros is not None:
            result -= spread(grid.zeros)
        result *= spread(grid.scales)
        if grid.offsets is not None:
            result += spread(grid.offsets)
        return result


Weights = torch.Tensor | QuantizedMatrix


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized matrix as it was read, with scales that are not parsed yet.

    Attributes:
        stored: the quantized values, of `quantization.stored_shape`.
        quantization: the storage of the matrix.
        parts: the bytes of each of `quantization.parts`, by role.
    """

    stored: torch.Tensor
    quantization: Quantization
    parts: Mapping[str, bytes]

    def dequantize(self) -> QuantizedMatrix:
        """Return the matrix, which dequantizes the blocks that are indexed.

        Raises:
            CheckpointError: bad_scales, the parts do not fit the weight.
        """
        how, stored = self.quantization, self.stored
        if "marker" in self.parts and (problem := check_marker(self.parts["marker"], how)) is not None:
            raise _bad_scales(how, problem)
        found = {
            part.role: _parse_tensor(part.dtype, part.shape, self.parts[part.role])
            for part in how.parts
            if part.role != "marker"
        }
        # Plain numbers have no scales.
        scales = found.get("scales", torch.ones(1, 1))
        # Powers of two are also stored as plain bytes.
        if scales.dtype is torch.uint8:
            scales = scales.view(torch.float8_e8m0fnu)
        if how.tiled:
            scales = untile(scales, *how.grid_shape)
        if how.packing in (Packing.FP4, Packing.FP4_HIGH_FIRST):
            return self._dequantize_fp4(scales, found)
        if how.packing is Packing.FLOAT8:
            stored = stored.view(torch.float8_e4m3fn)
        if how.packing in (Packing.NONE, Packing.FLOAT8):
            w = Scaled(stored[: how.shape[0], : how.shape[1]], scales.to(torch.float32), how.block)
            return self._check_padding(w)
        if "shape" in found and tuple(found["shape"].tolist()) != how.shape:
            raise _bad_scales(how, f"its shape is {found['shape'].tolist()}, but its words hold {list(how.shape)}")
        return Integers(stored.view(torch.int32), how.shape, how.packing, how.bits, _make_grid(how, found))

    def _dequantize_fp4(self, scales: torch.Tensor, found: Mapping[str, torch.Tensor]) -> QuantizedMatrix:
        how = self.quantization
        (n, m), high_first = how.shape, how.packing is Packing.FP4_HIGH_FIRST
        stored = self.stored.view(torch.uint8)[:n, : m // 2]
        return self._check_padding(Fp4(stored, scales, how.block[1], _find_factor(found), high_first=high_first))

    def _check_padding(self, w: QuantizedMatrix) -> QuantizedMatrix:
        """Reject a weight with padding that the checkpoint does not mention.

        Weights with tiles of scales are padded with zeros, and rows of zeros would add singular values.
        """
        n, m = w.shape
        if self.quantization.tiled and not (w[n - 1 :].any() and w[:, m - 1 :].any()):
            raise _bad_scales(self.quantization, "its last row or column is zero, so it may be padding")
        return w


def untile(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return scales (rows, columns) that lie in the tiles of cuBLAS.

    A tile has 128 rows and 4 columns, and is stored whole: row r and column c of it are at the position
    16 (r mod 32) + 4 (r / 32) + c. The tiles of a band of 128 rows follow one another. The last tiles of a side are
    padded. (comfy-kitchen 0.2.40, float_utils.py, from_blocked; cuBLAS manual, 1D block scaling factors layout)

    Args:
        scales: as many elements as the tiles have, in any shape.
    """
    tall, wide = -(-rows // 128), -(-columns // 4)
    tiles = scales.view(torch.uint8).reshape(tall, wide, 32, 4, 4)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(128 * tall, 4 * wide)
    return plain[:rows, :columns].contiguous().view(scales.dtype)


def unpack(words: torch.Tensor, bits: int, start: int, stop: int, dim: int) -> torch.Tensor:
    """Unpack the unsigned integers [start, stop) of each line along `dim`.

    Args:
        words: int32; the integers of a line follow one another bit by bit, across the borders of words.
    """
    positions = torch.arange(start, stop) * bits
    index, shift = positions // _WORD_BITS, (positions % _WORD_BITS).to(torch.int32)
    along = shift.unsqueeze(1 - dim)
    # The words are signed, so a shift fills in the sign. The masks below remove it.
    numbers = words.index_select(dim, index) >> along
    if _WORD_BITS % bits:
        present = _WORD_BITS - along
        numbers &= torch.where(present < bits, (1 << present.clamp(max=bits)) - 1, -1).to(torch.int32)
        following = words.index_select(dim, (index + 1).clamp(max=words.shape[dim] - 1))
        numbers |= torch.where(present < bits, following << present.clamp(max=_WORD_BITS - 1), 0).to(torch.int32)
    return numbers & ((1 << bits) - 1)


def unpack_awq(words: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Unpack the four-bit integers [start, stop) of each row, in the order of AWQ."""
    columns = torch.arange(start, stop)
    shift = 4 * torch.tensor(_AWQ_ORDER, dtype=torch.int32)[columns % 8]
    return (words.index_select(1, columns // 8) >> shift) & 15


def _find_factor(found: Mapping[str, torch.Tensor]) -> float:
    """Return the factor of all weights; some formats store it as a divisor."""
    if "factor" in found:
        return float(found["factor"])
    divisor = float(found["divisor"]) if "divisor" in found else 1.0
    return 1 / divisor if divisor else torch.inf


def _make_grid(how: Quantization, found: Mapping[str, torch.Tensor]) -> ScaleGrid:
    scales = found["scales"].to(torch.float32)
    if "offsets" in found:
        zeros, offsets = None, found["offsets"].to(torch.float32)
    else:
        zeros, offsets = _read_zeros(how, found.get("zeros"), scales), None
    groups = [torch.arange(side) // share for side, share in zip(how.shape, how.block, strict=True)]
    if "groups" in found:
        dim = 1 if how.packing is Packing.ROWS else 0
        order = found["groups"].long()
        # compressed-tensors writes -1 for columns that are in order.
        if not bool((order == -1).all()):
            if int(order.min()) < 0 or int(order.max()) >= scales.shape[dim]:
                raise _bad_scales(how, "a column belongs to a group without a scale")
            groups[dim] = order
    return ScaleGrid(scales, zeros, offsets, *groups)


def _read_zeros(how: Quantization, packed: torch.Tensor | None, scales: torch.Tensor) -> torch.Tensor:
    """Return the zero points; without them, integers are symmetric."""
    if packed is None:
        return torch.full_like(scales, 1 << (how.bits - 1))
    if how.packing is Packing.AWQ:
        zeros = unpack_awq(packed, 0, scales.shape[1])
    else:
        dim = 0 if how.packing is Packing.ROWS else 1
        zeros = unpack(packed, how.bits, 0, scales.shape[dim], dim)
    zeros = ((zeros + how.zeros_offset) & ((1 << how.bits) - 1)).to(torch.float32)
    _check_zeros(how, zeros)
    return zeros


def _check_zeros(how: Quantization, zeros: torch.Tensor) -> None:
    """Check that zero points match a symmetric config and are not off by one.

    Only the config tells formats that store zero points less one from those that do not.
    """
    lowest, highest, half = int(zeros.min()), int(zeros.max()), 1 << (how.bits - 1)
    if how.symmetric and (lowest, highest) != (half, half):
        found = str(lowest) if lowest == highest else f"{lowest} to {highest}"
        raise _bad_scales(how, f"its zero points are {found}, but those of a symmetric weight are {half}")
    is_constant = lowest == highest and zeros.numel() >= _MIN_CONSTANT_ZEROS
    if how.packing is Packing.COLUMNS and is_constant and lowest == half + 2 * how.zeros_offset - 1:
        raise _bad_scales(
            how,
            f"all its zero points are {lowest} by the config, off by one from those of a symmetric weight, {half}; "
            "the config and the stored numbers contradict each other",
        )


def _parse_tensor(dtype: str, shape: tuple[int, ...], body: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(DTYPES[dtype]).reshape(shape)


def _bad_scales(how: Quantization, problem: str) -> CheckpointError:
    return CheckpointError(f"{how.parts[0].tensor}: {problem}", reason="bad_scales")
