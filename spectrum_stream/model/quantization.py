"""The storage of a quantized weight, as data: its packed values, and the other tensors that are needed to read it."""

from dataclasses import dataclass
from enum import StrEnum

from .no_score import NoScore

# Published models have up to 512 experts a layer, and research models 2,048.
MAX_EXPERTS = 10_000


class Packing(StrEnum):
    """How values are packed in the stored tensor."""

    NONE = "none"  # one value an element
    FP4 = "fp4"  # two E2M1 values a byte, the even column in the low bits
    FP4_HIGH_FIRST = "fp4_high_first"  # the same with the even column in the high bits, as in comfy-kitchen
    FLOAT8 = "float8"  # four E4M3 values in a word of 32 bits, the first in the low bits, as in MLX
    ROWS = "rows"  # along a row, bit after bit, in words of 32 bits, as in compressed-tensors and MLX
    COLUMNS = "columns"  # the same down a column, as in GPTQ
    AWQ = "awq"  # along a row, eight values of four bits a word, in AWQ's own order


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stored tensor that is needed to read a weight, or one expert's part of it.

    Attributes:
        role: `scales`; `factor` or `divisor`, of the whole weight; `zeros`; `offsets`, which are added to the
            product; `groups`, the group of each column; `shape`; `marker`, which names the format.
        start, nbytes: its place in the shard.
        shape: the shape of the values to read.
    """

    role: str
    tensor: str
    shard: str
    start: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How one weight is stored.

    Attributes:
        scheme: the name of the format in a record.
        packing: how values are packed in the stored tensor.
        stored_shape: (rows, columns) of the stored tensor.
        shape: (n, m) of the weight. What is stored may be padded to more.
        block: (rows, columns) of the weight that share a scale.
        parts: the other tensors that are needed to read it.
        bits: the number of bits of a packed integer.
        zeros_offset: the number to add to a packed zero point; 1 in GPTQ's first format.
        symmetric: whether the config says that all zero points are half of the range; None if it does not say.
        tiled: whether the scales lie in tiles of 128 x 4, as cuBLAS reads them.
        marker: the format that the part `marker` must name, if there is one.
    """

    scheme: str
    packing: Packing
    stored_shape: tuple[int, int]
    shape: tuple[int, int]
    block: tuple[int, int]
    parts: tuple[Part, ...]
    bits: int = 0
    zeros_offset: int = 0
    symmetric: bool | None = None
    tiled: bool = False
    marker: str = ""

    @property
    def parts_nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def scales(self) -> int:
        """The number of scales, with the padding of tiles."""
        rows, columns = self.grid_shape
        return -(-rows // 128) * 128 * -(-columns // 4) * 4 if self.tiled else rows * columns

    @property
    def grid_shape(self) -> tuple[int, int]:
        """The shape of the scales without padding."""
        return -(-self.shape[0] // self.block[0]), -(-self.shape[1] // self.block[1])


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A quantized weight that cannot be read.

    Attributes:
        no_score: MISSING_SCALES, BAD_SCALES, UNSUPPORTED_DTYPE, NOT_UNDERSTOOD, STORED_TWICE, NOT_A_MATRIX or
            TOO_MANY_EXPERTS.
        detail: a few words about it.
    """

    no_score: NoScore
    detail: str = ""


TOO_MANY_EXPERTS = Unreadable(NoScore.TOO_MANY_EXPERTS)
