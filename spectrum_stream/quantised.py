"""How quantised weights are stored, found by name: the numbers, their scales, and what they belong to.

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
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Any

from .checkpoint import Checkpoint
from .header import TensorInfo
from .naming import WEIGHT_SUFFIX, is_expert_bank, module_path

FLOAT8_DTYPES = ("F8_E4M3", "F8_E5M2")
_FLOAT_DTYPES = ("F32", "BF16", "F16", "F64")
# A power of two, as its exponent plus 127.
_EXPONENT_DTYPES = ("U8", "F8_E8M0")
_COMPANION_SUFFIXES = (
    *("_scale_inv", "_scale", "_scales", "_global_scale", "_scale_2", "_zero_point", "_g_idx", "_shape"),
    *(".qzeros", ".scales", ".g_idx", ".SCB", ".absmax", ".quant_state.bitsandbytes__nf4"),
    ".quant_state.bitsandbytes__fp4",
)
# Names of the stored numbers, where they are no `.weight`.
_PACKED = {".qweight": WEIGHT_SUFFIX, ".weight_packed": WEIGHT_SUFFIX, "_blocks": ""}
_DEFAULT_BLOCK = (128, 128)
_MX_COLUMNS, _NV_COLUMNS = 32, 16
_WORD_BITS = 32


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
class Quantisation:
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


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A quantised weight that cannot be read.

    Attributes:
        why: `missing_scales`, `bad_scales` or `unsupported_dtype`.
        detail: a few words about it.
    """

    why: str
    detail: str = ""


# One for a weight, one for each expert of a bank; None for what is not quantised.
Found = Quantisation | list[Quantisation] | Unreadable | None


def parameter_of(tensor: str) -> str:
    """The weight that a stored tensor holds the numbers of: `X.weight` for `X.qweight`."""
    for suffix, instead in _PACKED.items():
        if tensor.endswith(suffix):
            return tensor.removesuffix(suffix) + instead
    return tensor


def is_companion(tensor: str) -> bool:
    """Whether a tensor belongs to a quantised weight, by its name."""
    return tensor.endswith(_COMPANION_SUFFIXES)


class QuantisationIndex:
    """The quantised weights of a checkpoint, whatever shards their parts are in."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors: Mapping[str, tuple[str, TensorInfo]] = {
            tensor.name: (shard.name, tensor) for shard, tensor in checkpoint.tensors if is_companion(tensor.name)
        }
        config = checkpoint.source.config.get("quantization_config")
        self._config: Mapping[str, Any] = config if isinstance(config, dict) else {}
        self._block = block_size(checkpoint.source.config)

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
        return (
            len(tensor.shape) == 3
            and tensor.dtype in FLOAT8_DTYPES
            and is_expert_bank(module_path(tensor.name) or tensor.name)
        )

    def _unknown(self, tensor: TensorInfo) -> Found:
        if tensor.dtype in _FLOAT_DTYPES:
            return None
        packed = tensor.name.endswith((WEIGHT_SUFFIX, *_PACKED))
        # A bare parameter of integers beside experts is a bank of them; elsewhere it is a buffer.
        bank = len(tensor.shape) >= 3 and "experts" in tensor.name.split(".")[:-1]
        if not packed and not bank:
            return None
        return self._refused(tensor)

    def _refused(self, tensor: TensorInfo) -> Unreadable:
        name = tensor.name.removesuffix(WEIGHT_SUFFIX)
        method = self._config.get("quant_method")
        if any(f"{name}{suffix}" in self._tensors for suffix in (".weight.absmax", ".SCB")):
            method = "bitsandbytes"
        return Unreadable("unsupported_dtype", method[:100] if isinstance(method, str) else "")

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
                quantisations = [grid for grid in grids if isinstance(grid, Quantisation)]
                return quantisations if len(quantisations) == experts else grids[0]
        return Unreadable("missing_scales")

    def _with_grid(
        self,
        shard: str,
        scale: TensorInfo,
        shape: tuple[int, int],
        what: str,
        scale_shape: tuple[int, ...],
        expert: tuple[int, int] | None,
    ) -> Quantisation | Unreadable:
        if scale.dtype not in (*_FLOAT_DTYPES, *_EXPONENT_DTYPES):
            return Unreadable("bad_scales", f"scales of dtype {scale.dtype}")
        n, m = shape
        grids: dict[str, tuple[tuple[int, int], set[tuple[int, ...]]]] = {
            "tensor": ((n, m), {(), (1,), (1, 1)}),
            "row": ((1, m), {(n,), (n, 1)}),
            "block": (self._block, {(-(-n // self._block[0]), -(-m // self._block[1]))}),
        }
        for by, (block, shapes) in grids.items():
            if scale_shape in shapes:
                grid = (-(-n // block[0]), -(-m // block[1]))
                part = _part("scales", shard, scale, grid, expert)
                return Quantisation(f"{what} by {by}", Packing.NONE, shape, shape, block, (part,))
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
            Quantisation(
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
        return Quantisation(scheme, Packing.FP4, (n, m // 2), (n, m), (1, columns), tuple(parts))

    def _packed_integers(self, weight: TensorInfo) -> Found:
        name, bits = parameter_of(weight.name), self._bits()
        if (found := self._tensors.get(f"{name}_scale")) is None:
            return Unreadable("missing_scales")
        if len(weight.shape) != 2 or bits is None:
            return Unreadable("unsupported_dtype", "no number of bits in config.json" if bits is None else "")
        shard, scale = found
        n, words = weight.shape
        # Its true width is in a tensor of its own, which is compared when that is read.
        m = words * _WORD_BITS // bits
        groups = scale.shape[1] if len(scale.shape) == 2 else 1
        size = self._group_size()
        if groups > 1 and size is None:
            return Unreadable("unsupported_dtype", "no group_size in config.json")
        width = m if size is None or groups == 1 else size
        if -(-(groups * width * bits) // _WORD_BITS) == words:
            m = groups * width
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
        return Quantisation(f"int{bits}", Packing.ROWS, (n, words), (n, m), (rows, width), tuple(parts), bits)

    def _by_words(self, weight: TensorInfo) -> Found:
        """GPTQ and AWQ: both store the transpose, in words of 32 bits."""
        module = weight.name.removesuffix(".qweight")
        scale, zeros, order = (self._tensors.get(f"{module}.{name}") for name in ("scales", "qzeros", "g_idx"))
        if scale is None or zeros is None:
            return Unreadable("missing_scales")
        bits = self._bits()
        if weight.dtype != "I32" or len(weight.shape) != 2 or len(scale[1].shape) != 2 or bits is None:
            return self._refused(weight)
        rows, columns = weight.shape
        groups, out = scale[1].shape
        awq = columns != out
        if awq and (bits != 4 or columns * 8 != out or self._config.get("version", "gemm") != "gemm"):
            return Unreadable("unsupported_dtype", "awq, but not of the version gemm with 4 bits")
        if not awq and bits not in (2, 4, 8):
            return Unreadable("unsupported_dtype", f"gptq of {bits} bits")
        inner = rows if awq else rows * _WORD_BITS // bits
        size = self._group_size() or inner
        if scale[1].dtype not in _FLOAT_DTYPES or groups != -(-inner // size):
            return _misfit(scale[1], (out, inner))
        if zeros[1].dtype != "I32" or zeros[1].shape != (groups, -(-out * bits // _WORD_BITS)):
            return _misfit(zeros[1], (out, inner))
        parts = [_part("scales", *scale, (groups, out)), _part("zeros", *zeros, zeros[1].shape)]
        if order is not None and not awq:
            if order[1].dtype not in ("I32", "I64") or order[1].shape != (inner,):
                return _misfit(order[1], (out, inner))
            parts.append(_part("groups", *order, (inner,)))
        first_format = not awq and self._config.get("checkpoint_format") != "gptq_v2"
        return Quantisation(
            "awq" if awq else f"gptq, {bits} bits",
            Packing.AWQ if awq else Packing.COLUMNS,
            (rows, columns),
            (inner, out),
            (size, 1),
            tuple(parts),
            bits,
            int(first_format),
        )

    def _weights_config(self) -> Mapping[str, Any]:
        """Of compressed-tensors, whose groups of layers can differ; one that differs in what matters is not read."""
        groups = self._config.get("config_groups")
        found = [
            {key: weights.get(key) for key in ("num_bits", "group_size")}
            for group in (groups.values() if isinstance(groups, dict) else ())
            if isinstance(group, dict) and isinstance(weights := group.get("weights"), dict)
        ]
        return found[0] if found and all(one == found[0] for one in found) else {}

    def _bits(self) -> int | None:
        bits = self._config.get("bits", self._weights_config().get("num_bits"))
        return bits if type(bits) is int and 1 <= bits <= 8 else None

    def _group_size(self) -> int | None:
        size = self._config.get("group_size", self._weights_config().get("group_size"))
        return size if type(size) is int and size > 0 else None


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says that changes what stored numbers mean."""
    quantisation = config.get("quantization_config")
    names = ("weight_block_size", "bits", "group_size", "checkpoint_format", "version", "config_groups")
    return (
        {name: quantisation[name] for name in names if name in quantisation} if isinstance(quantisation, dict) else {}
    )


def block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, columns) of a float8 weight that share a scale, where they do so by blocks."""
    quantisation = config.get("quantization_config")
    block = quantisation.get("weight_block_size") if isinstance(quantisation, dict) else None
    if isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block):
        return block[0], block[1]
    return _DEFAULT_BLOCK


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
