"""The schemes of quantized weights, found by name: the numbers, their scales, and what they belong to.

    float8       X.weight F8 (n, m)             X.weight_scale_inv or X.weight_scale: one, one a row, one a block
    int8         X.weight I8 (n, m)             X.weight_scale
    mxfp4        X_blocks U8 (e, n, m/32, 16)   X_scales U8 (e, n, m/32); the experts of gpt-oss
                 X.weight_packed U8 (n, m/2)    X.weight_scale U8 (n, m/32); compressed-tensors
    nvfp4        X.weight_packed U8 (n, m/2)    X.weight_scale F8_E4M3 (n, m/16), X.weight_global_scale: divides
                 X.weight U8 (n, m/2)           X.weight_scale F8_E4M3 (n, m/16), X.weight_scale_2; ModelOpt
    int4, int8   X.weight_packed I32 (n, mb/32) X.weight_scale, _zero_point, _g_idx; compressed-tensors
    gptq         X.qweight I32 (mb/32, n)       X.scales (g, n), X.qzeros I32 (g, nb/32), X.g_idx (m,)
    awq          X.qweight I32 (m, n/8)         X.scales (g, n), X.qzeros I32 (g, n/8)

A float8 weight is what is stored times its scale, in spite of `_inv`; the last blocks of a side may be cut. A bank of
experts in float8 has its scales in a bank too. Companions can be in another shard. A weight without the companions
that it needs is refused, and so is any other scheme: its stored numbers are not the weights.
GPTQ and AWQ store the transpose; the shape of such a matrix is as it is stored.
"""

from collections.abc import Callable, Mapping
from math import prod

from ..checkpoint import LocalShard
from ..checkpoint.header import TensorInfo
from ..checkpoint.tensors import Checkpoint
from .config import QuantizationConfig
from .names import WEIGHT_SUFFIX, is_fused_experts, module_of
from .quantization import (
    Packing,
    Part,
    Quantization,
    Unreadable,
    is_companion,
    parameter_of,
)

FLOAT8_DTYPES = ("F8_E4M3", "F8_E5M2")
_FLOAT_DTYPES = ("F32", "BF16", "F16", "F64")
# A power of two, as its exponent plus 127.
_EXPONENT_DTYPES = ("U8", "F8_E8M0")
_MX_COLUMNS, _NV_COLUMNS = 32, 16
_WORD_BITS = 32

# One for a weight, one for each expert of a bank; None for what is not quantized.
Found = Quantization | list[Quantization] | Unreadable | None


class QuantizationIndex:
    """The quantized weights of a checkpoint, whatever shards their parts are in."""

    def __init__(self, checkpoint: Checkpoint, config: QuantizationConfig) -> None:
        self._tensors: Mapping[str, tuple[str, TensorInfo]] = {
            tensor.name: (shard.name, tensor) for shard, tensor in checkpoint.tensors if is_companion(tensor.name)
        }
        self._shards = {shard.name: shard for shard in checkpoint.source.shards}
        self._config = config

    def find(self, tensor: TensorInfo) -> Found:
        """How a tensor that may hold a weight is to be read."""
        if is_companion(tensor.name) or 0 in tensor.shape:
            return None
        readers: list[tuple[bool, Callable[[TensorInfo], Found]]] = [
            (tensor.name.endswith(".qweight"), self._by_words),
            (tensor.name.endswith(".weight_packed") and tensor.dtype == "I32", self._packed_integers),
            (tensor.name.endswith(".weight_packed") and tensor.dtype == "U8", self._fp4),
            (tensor.name.endswith("_blocks") and tensor.dtype == "U8" and len(tensor.shape) == 4, self._mxfp4_bank),
            (self._is_bank(tensor), self._scaled_bank),
            (not tensor.name.endswith(WEIGHT_SUFFIX), self._unknown),
            (tensor.dtype == "U8" and f"{tensor.name}_scale_2" in self._tensors, self._fp4),
            (tensor.dtype in (*FLOAT8_DTYPES, "I8") and len(tensor.shape) == 2, self._scaled),
        ]
        for fits, read in readers:
            if fits:
                return read(tensor)
        return self._unknown(tensor)

    def _is_bank(self, tensor: TensorInfo) -> bool:
        return len(tensor.shape) == 3 and tensor.dtype in FLOAT8_DTYPES and is_fused_experts(module_of(tensor.name))

    def _unknown(self, tensor: TensorInfo) -> Found:
        if tensor.dtype in (*_FLOAT_DTYPES, "I64", "BOOL"):
            return None
        packed = tensor.name.endswith((WEIGHT_SUFFIX, ".qweight", ".weight_packed"))
        # A bare parameter of integers beside experts is a bank of them; elsewhere it is a buffer, unless the config
        # says that weights are quantized: other schemes call them `B`, `W_q`, `codes` or `weight:qdata`.
        bank = len(tensor.shape) >= 3 and is_fused_experts(parameter_of(tensor.name))
        # Older models keep a mask of theirs as a `bias` of bytes.
        other = len(tensor.shape) >= 2 and self._config.quant_method is not None and not tensor.name.endswith("bias")
        return self._refused(tensor) if packed or bank or other else None

    def _refused(self, tensor: TensorInfo) -> Unreadable:
        name = tensor.name.removesuffix(WEIGHT_SUFFIX)
        method = self._config.quant_method or ""
        if any(f"{name}{suffix}" in self._tensors for suffix in (".weight.absmax", ".SCB")):
            method = "bitsandbytes"
        return Unreadable("unsupported_dtype", method[:100])

    def _scaled(self, weight: TensorInfo) -> Found:
        n, m = weight.shape
        what = "int8" if weight.dtype == "I8" else "float8"
        if f"{weight.name}_zero_point" in self._tensors:
            return self._refused(weight)
        for suffix in ("_scale_inv", "_scale"):
            if (found := self._tensors.get(weight.name + suffix)) is not None:
                return self._with_grid(*found, (n, m), what, found[1].shape, None)
        # Float8 has one owner; integers of eight bits without these scales are another scheme.
        return Unreadable("missing_scales") if what == "float8" else self._refused(weight)

    def _scaled_bank(self, bank: TensorInfo) -> Found:
        for suffix in ("_scale_inv", "_scale"):
            if (found := self._tensors.get(bank.name + suffix)) is not None:
                shard, scale = found
                experts, n, m = bank.shape
                if not scale.shape or scale.shape[0] != experts:
                    return _misfit(scale, bank.shape)
                grids = [
                    self._with_grid(shard, scale, (n, m), "float8", scale.shape[1:], (e, experts))
                    for e in range(experts)
                ]
                quantizations = [grid for grid in grids if isinstance(grid, Quantization)]
                return quantizations if len(quantizations) == experts else grids[0]
        return Unreadable("missing_scales")

    def _with_grid(
        self,
        shard: str,
        scale: TensorInfo,
        shape: tuple[int, int],
        what: str,
        scale_shape: tuple[int, ...],
        expert: tuple[int, int] | None,
    ) -> Quantization | Unreadable:
        if scale.dtype not in (*_FLOAT_DTYPES, *_EXPONENT_DTYPES):
            return Unreadable("bad_scales", f"scales of dtype {scale.dtype}")
        n, m = shape
        block = min(self._config.block_size[0], n), min(self._config.block_size[1], m)
        grids: dict[str, tuple[tuple[int, int], set[tuple[int, ...]]]] = {
            "tensor": ((n, m), {(), (1,), (1, 1)}),
            "row": ((1, m), {(n,), (n, 1)}),
            "block": (block, {(-(-n // block[0]), -(-m // block[1]))}),
        }
        for by, (sides, shapes) in grids.items():
            if scale_shape in shapes:
                grid = (-(-n // sides[0]), -(-m // sides[1]))
                part = _part("scales", shard, scale, grid, expert)
                return Quantization(f"{what} by {by}", Packing.NONE, shape, shape, sides, (part,))
        return _misfit(scale, shape)

    def _mxfp4_bank(self, blocks: TensorInfo) -> Found:
        experts, n, groups, width = blocks.shape
        if width != _MX_COLUMNS // 2:
            return self._unknown(blocks)
        found = self._tensors.get(blocks.name.removesuffix("_blocks") + "_scales")
        if found is None:
            return Unreadable("missing_scales")
        shard, scale = found
        if scale.dtype not in _EXPONENT_DTYPES or scale.shape != (experts, n, groups):
            return _misfit(scale, blocks.shape)
        return [
            Quantization(
                "mxfp4", Packing.FP4, (n, groups * width), (n, groups * _MX_COLUMNS), (1, _MX_COLUMNS),
                (_part("scales", shard, scale, (n, groups), (e, experts)),),
            )
            for e in range(experts)
        ]  # fmt: skip

    def _fp4(self, weight: TensorInfo) -> Found:
        name = parameter_of(weight.name)
        if (found := self._tensors.get(f"{name}_scale")) is None:
            return Unreadable("missing_scales")
        if len(weight.shape) != 2:
            return self._unknown(weight)
        shard, scale = found
        n, m = weight.shape[0], 2 * weight.shape[1]
        columns, scheme = (_NV_COLUMNS, "nvfp4") if scale.dtype == "F8_E4M3" else (_MX_COLUMNS, "mxfp4")
        if scale.dtype not in ("F8_E4M3", *_EXPONENT_DTYPES) or scale.shape != (n, -(-m // columns)):
            return _misfit(scale, (n, m))
        parts = [_part("scales", shard, scale, scale.shape)]
        if scheme == "nvfp4":
            # The one is the reciprocal of the other.
            roles = {f"{name}_global_scale": "divisor", f"{name}_scale_2": "factor"}
            whole = [(role, *self._tensors[key]) for key, role in roles.items() if key in self._tensors]
            if not whole:
                return Unreadable("missing_scales", "no global scale")
            role, shard, one = whole[0]
            if one.dtype not in _FLOAT_DTYPES or prod(one.shape) != 1:
                return _misfit(one, (n, m))
            parts.append(_part(role, shard, one, (1,)))
        return Quantization(scheme, Packing.FP4, (n, m // 2), (n, m), (1, columns), tuple(parts))

    def _packed_integers(self, weight: TensorInfo) -> Found:
        name, bits = parameter_of(weight.name), self._config.bits
        if (found := self._tensors.get(f"{name}_scale")) is None:
            return Unreadable("missing_scales")
        if len(weight.shape) != 2 or bits is None:
            return Unreadable("unsupported_dtype", "no one number of bits in config.json" if bits is None else "")
        shard, scale = found
        n, words = weight.shape
        # Its true width is in a tensor of its own, which is compared when that is read.
        m = words * _WORD_BITS // bits
        groups = scale.shape[1] if len(scale.shape) == 2 else 1
        size = self._config.group_size
        if groups > 1 and size is None:
            return Unreadable("unsupported_dtype", "no one group_size in config.json")
        m = self._true_width(f"{name}_shape", m, words, bits)
        width = m if size is None or groups == 1 else min(size, m)
        if -(-m // width) != groups:
            return _misfit(scale, (n, m))
        rows = 1 if scale.shape[:1] == (n,) else n
        if scale.dtype not in _FLOAT_DTYPES or prod(scale.shape) != groups * (n if rows == 1 else 1):
            return _misfit(scale, (n, m))
        parts = [_part("scales", shard, scale, (-(-n // rows), groups))]
        zeros, order = self._tensors.get(f"{name}_zero_point"), self._tensors.get(f"{name}_g_idx")
        if zeros is not None:
            if zeros[1].dtype != "I32" or zeros[1].shape != (-(-n * bits // _WORD_BITS), groups) or rows != 1:
                return _misfit(zeros[1], (n, m))
            parts.append(_part("zeros", *zeros, zeros[1].shape))
        if order is not None:
            if order[1].dtype not in ("I32", "I64") or order[1].shape != (m,):
                return _misfit(order[1], (n, m))
            parts.append(_part("groups", *order, (m,)))
        if (true := self._tensors.get(f"{name}_shape")) is not None:
            if true[1].dtype not in ("I32", "I64") or true[1].shape != (2,):
                return _misfit(true[1], (n, m))
            parts.append(_part("shape", *true, (2,)))
        return Quantization(f"int{bits}", Packing.ROWS, (n, words), (n, m), (rows, width), tuple(parts), bits)

    def _true_width(self, name: str, most: int, words: int, bits: int) -> int:
        """How many integers a row has, of which the last word may have room for more."""
        if (found := self._tensors.get(name)) is None:
            return most
        name, shape = found
        # A request a matrix would be too many; of a repo, a width that fills no word is found out when it is read.
        if isinstance(shard := self._shards.get(name), LocalShard) and shape.shape == (2,):
            body = shard.read(shape.start, shape.start + shape.nbytes)
            width = int.from_bytes(body[len(body) // 2 :], "little")
            if -(-width * bits // _WORD_BITS) == words:
                return width
        return most

    def _by_words(self, weight: TensorInfo) -> Found:
        """GPTQ and AWQ: both store the transpose, in words of 32 bits."""
        module = weight.name.removesuffix(".qweight")
        scale, zeros, order = (self._tensors.get(f"{module}.{name}") for name in ("scales", "qzeros", "g_idx"))
        if scale is None:
            return Unreadable("missing_scales")
        bits = self._config.bits
        if weight.dtype != "I32" or len(weight.shape) != 2 or len(scale[1].shape) != 2 or bits is None:
            return self._refused(weight)
        rows, columns = weight.shape
        groups, out = scale[1].shape
        awq = columns != out
        if awq and (bits != 4 or columns * 8 != out or self._config.version != "gemm"):
            return Unreadable("unsupported_dtype", "awq, but not of the version gemm with 4 bits")
        if not awq and bits not in (2, 4, 8):
            return Unreadable("unsupported_dtype", f"gptq of {bits} bits")
        inner = rows if awq else rows * _WORD_BITS // bits
        size = min(self._config.group_size or inner, inner)
        if zeros is None and not awq:
            return Unreadable("missing_scales", "no zero points")
        if scale[1].dtype not in _FLOAT_DTYPES or groups != -(-inner // size):
            return _misfit(scale[1], (out, inner))
        parts = [_part("scales", *scale, (groups, out))]
        if zeros is not None:
            if zeros[1].dtype != "I32" or zeros[1].shape != (groups, -(-out * bits // _WORD_BITS)):
                return _misfit(zeros[1], (out, inner))
            parts.append(_part("zeros", *zeros, zeros[1].shape))
        if order is not None and not awq:
            if order[1].dtype not in ("I32", "I64") or order[1].shape != (inner,):
                return _misfit(order[1], (out, inner))
            parts.append(_part("groups", *order, (inner,)))
        first_format = not awq and self._config.checkpoint_format != "gptq_v2"
        return Quantization(
            "awq" if awq else f"gptq, {bits} bits",
            Packing.AWQ if awq else Packing.COLUMNS,
            (rows, columns),
            (inner, out),
            (size, 1),
            tuple(parts),
            bits,
            int(first_format),
        )


def _part(
    role: str, shard: str, tensor: TensorInfo, shape: tuple[int, ...], expert: tuple[int, int] | None = None
) -> Part:
    index, count = expert or (0, 1)
    nbytes = tensor.nbytes // count
    return Part(role, tensor.name, shard, tensor.start + index * nbytes, nbytes, tensor.dtype, shape)


def _misfit(companion: TensorInfo, shape: tuple[int, ...]) -> Unreadable:
    name = companion.name.rpartition(".")[2]
    return Unreadable(
        "bad_scales",
        f"{name} of {companion.dtype}{list(companion.shape)} for a weight of {' x '.join(map(str, shape))}",
    )
