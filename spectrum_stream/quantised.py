"""How a checkpoint's quantised weights are scaled, found by name: a weight, its scales, and what they belong to.

    X.weight            F8_E4M3 or F8_E5M2, (n, m)
    X.weight_scale_inv  a scale for each block of (b, b): (ceil(n / b), ceil(m / b)); DeepSeek-V3, GLM, Qwen3 FP8
    X.weight_scale      one for all, one for each row (n, 1), or one for each block; compressed-tensors, ModelOpt

    X_blocks            U8, (experts, n, m / 32, 16): two numbers of MXFP4 a byte, the even column in the low bits
    X_scales            U8, (experts, n, m / 32): the exponent of two, plus 127, of each 32 columns; gpt-oss

The weight is what is stored times its scale, in spite of `_inv`. The last blocks of a side may be cut. Scales can be
in another shard. A weight without the scales that it needs is refused: its stored numbers are not the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .checkpoint import Checkpoint
from .header import TensorInfo

FLOAT8_DTYPES = ("F8_E4M3", "F8_E5M2")
_SCALE_DTYPES = ("F32", "BF16", "F16", "F64")
SCALE_SUFFIXES = ("_scale_inv", "_scale", "_scales")
MXFP4 = "mxfp4"
MXFP4_BLOCK = 32
_DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True, slots=True)
class Scales:
    """Where the scales of a weight are, and how they lie on it.

    Attributes:
        tensor, shard, start, nbytes, dtype: the stored tensor.
        shape: (rows, columns) of the grid of scales.
        block: (rows, columns) of the weight that share a scale.
        scheme: what it is called in a record.
    """

    tensor: str
    shard: str
    start: int
    nbytes: int
    dtype: str
    shape: tuple[int, int]
    block: tuple[int, int]
    scheme: str


class ScaleIndex:
    """The scales of a checkpoint, whatever shards they are in."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors: Mapping[str, tuple[str, TensorInfo]] = {
            tensor.name: (shard.name, tensor)
            for shard, tensor in checkpoint.tensors
            if tensor.name.endswith(SCALE_SUFFIXES)
        }
        self._block = block_size(checkpoint.source.config)

    def find(self, weight: TensorInfo) -> Scales | str | None:
        """The scales of a float8 matrix, None where there are none, or what is wrong with them in a few words."""
        for suffix in SCALE_SUFFIXES[:2]:
            if (found := self._tensors.get(weight.name + suffix)) is not None:
                return self._fitted(weight, *found)
        return None

    def find_mxfp4(self, blocks: TensorInfo) -> list[Scales] | str | None:
        """The scales of each expert of a bank in MXFP4, None where there are none, or what is wrong with them."""
        found = self._tensors.get(blocks.name.removesuffix("_blocks") + "_scales")
        if found is None:
            return None
        shard, scale = found
        experts, rows, groups, _ = blocks.shape
        if scale.dtype != "U8" or scale.shape != (experts, rows, groups):
            return f"scales of {scale.dtype}{list(scale.shape)} for blocks of {list(blocks.shape)}"
        nbytes = rows * groups
        return [
            Scales(scale.name, shard, scale.start + e * nbytes, nbytes, "U8", (rows, groups), (1, MXFP4_BLOCK), MXFP4)
            for e in range(experts)
        ]

    def _fitted(self, weight: TensorInfo, shard: str, scale: TensorInfo) -> Scales | str:
        if scale.dtype not in _SCALE_DTYPES:
            return f"scales of dtype {scale.dtype}"
        n, m = weight.shape
        grids: dict[str, tuple[tuple[int, int], set[tuple[int, ...]]]] = {
            "float8 by tensor": ((n, m), {(), (1,), (1, 1)}),
            "float8 by row": ((1, m), {(n,), (n, 1)}),
            "float8 by block": (self._block, {(-(-n // self._block[0]), -(-m // self._block[1]))}),
        }
        for scheme, (block, shapes) in grids.items():
            if scale.shape in shapes:
                grid = (-(-n // block[0]), -(-m // block[1]))
                return Scales(scale.name, shard, scale.start, scale.nbytes, scale.dtype, grid, block, scheme)
        return f"scales of shape {list(scale.shape)} for a weight of {n} x {m}"


def block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, columns) of a float8 weight that share a scale, where they do so by blocks."""
    quantisation = config.get("quantization_config")
    block = quantisation.get("weight_block_size") if isinstance(quantisation, dict) else None
    if isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block):
        return block[0], block[1]
    return _DEFAULT_BLOCK
