"""How a quantized weight is stored: its numbers, what it needs beside them, and what config.json says of it."""

from dataclasses import dataclass
from enum import StrEnum

from .names import WEIGHT_SUFFIX

_COMPANION_SUFFIXES = (
    *("_scale_inv", "_scale", "_scales", "_global_scale", "_scale_2", "_zero_point", "_g_idx", "_shape"),
    *(".qzeros", ".scales", ".g_idx", ".SCB", ".absmax", ".quant_state.bitsandbytes__nf4"),
    ".quant_state.bitsandbytes__fp4",
)
# Names of the stored numbers, where they are no `.weight`.
_PACKED = {".qweight": WEIGHT_SUFFIX, ".weight_packed": WEIGHT_SUFFIX, "_blocks": ""}


class Packing(StrEnum):
    """How the numbers lie in what is stored."""

    NONE = "none"  # one a number
    FP4 = "fp4"  # two a byte, the even column in the low bits, as E2M1
    ROWS = "rows"  # a row's bits one after another in words of 32 bits, as compressed-tensors packs them
    COLUMNS = "columns"  # the same down a column, as GPTQ
    AWQ = "awq"  # eight of four bits a word, along a row, in an order of their own


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor that a weight needs beside its numbers, or the part of it that is one expert's.

    Attributes:
        role: `scales`; `factor` or `divisor`, of the whole weight; `zeros`; `groups`, of each column; `shape`.
    """

    role: str
    tensor: str
    shard: str
    start: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Quantization:
    """How one weight is stored.

    Attributes:
        scheme: what a record calls it.
        packing: how the numbers lie in what is stored.
        bits: of a packed integer.
        stored_shape: (rows, columns) of what is stored.
        shape: (n, m) of the weight that comes of it.
        block: (rows, columns) of the weight, as it lies, that share a scale.
        zeros_offset: what a packed zero point lacks: GPTQ's first format stores one less.
        parts: what it needs beside its numbers.
    """

    scheme: str
    packing: Packing
    stored_shape: tuple[int, int]
    shape: tuple[int, int]
    block: tuple[int, int]
    parts: tuple[Part, ...]
    bits: int = 0
    zeros_offset: int = 0

    @property
    def parts_nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def scales(self) -> int:
        """How many there are."""
        return -(-self.shape[0] // self.block[0]) * -(-self.shape[1] // self.block[1])


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A quantized weight that cannot be read.

    Attributes:
        why: `missing_scales`, `bad_scales` or `unsupported_dtype`.
        detail: a few words about it.
    """

    why: str
    detail: str = ""


def parameter_of(tensor: str) -> str:
    """The weight that a stored tensor holds the numbers of: `X.weight` for `X.qweight`."""
    for suffix, instead in _PACKED.items():
        if tensor.endswith(suffix):
            return tensor.removesuffix(suffix) + instead
    return tensor


def is_companion(tensor: str) -> bool:
    """Whether a tensor belongs to a quantized weight, by its name."""
    return tensor.endswith(_COMPANION_SUFFIXES)
