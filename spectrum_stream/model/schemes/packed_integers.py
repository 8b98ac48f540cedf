"""Integers of 1 to 8 bits packed along a row into words of 32 bits, as compressed-tensors stores them."""

from math import prod

from ...checkpoint.header import TensorInfo
from ..config import QuantizationConfig
from ..matrix import FLOAT_DTYPES
from ..names import WEIGHT_SUFFIX
from ..no_score import NoScore
from ..quantization import Packing, Quantization, Unreadable
from . import compressed_tensors
from .companions import INDEX_DTYPES, MISSING_SCALES, WORD_BITS, Companion, Companions
from .format import ANY, Format


def _read(weight: TensorInfo, companions: Companions, config: QuantizationConfig) -> Quantization | Unreadable | None:
    """Read a weight (n, words) with scales (n, groups).

    It may have zero points, the group of each column, and its true shape.
    """
    if not weight.name.endswith(".weight_packed") or weight.dtype != "I32":
        return None
    name = companions.parameter_of(weight.name)
    scales = companions.get(f"{name}_scale")
    if scales is None:
        return MISSING_SCALES
    if not config.packed_integers:
        return Unreadable(NoScore.UNSUPPORTED_DTYPE, "config.json has no number of bits")
    if len(weight.shape) != 2:
        return Unreadable(NoScore.UNSUPPORTED_DTYPE)
    n, words = weight.shape
    groups = scales.info.shape[1] if len(scales.info.shape) == 2 else 1
    rows = 1 if scales.info.shape[:1] == (n,) else n
    scales_count = groups * (n if rows == 1 else 1)
    if scales.info.dtype not in FLOAT_DTYPES or prod(scales.info.shape) != scales_count:
        return scales.misfit((n, words))
    true_shape = companions.get(f"{name}_shape")
    true_width = _true_width(true_shape, companions)
    # The groups of layers in the config can differ. The words, the scales and the width show which one it is.
    layouts = {
        (bits, width, width if groups == 1 else min(size or width, width))
        for bits, size in config.packed_integers
        for width in (true_width or words * WORD_BITS // bits,)
        if -(-width * bits // WORD_BITS) == words and groups == -(-width // min(size or width, width))
    }
    if len(layouts) > 1:
        return Unreadable(NoScore.NOT_UNDERSTOOD, f"{len(layouts)} groups of layers in config.json fit it")
    if not layouts:
        return scales.misfit((n, words))
    ((bits, m, columns),) = layouts
    parts = [scales.part("scales", (-(-n // rows), groups))]
    zeros, order = companions.get(f"{name}_zero_point"), companions.get(f"{name}_g_idx")
    if zeros is not None:
        packed_rows = -(-n * bits // WORD_BITS)
        if zeros.info.dtype != "I32" or zeros.info.shape != (packed_rows, groups) or rows != 1:
            return zeros.misfit((n, m))
        parts.append(zeros.part("zeros"))
    if order is not None:
        if order.info.dtype not in INDEX_DTYPES or order.info.shape != (m,):
            return order.misfit((n, m))
        parts.append(order.part("groups"))
    if true_shape is not None:
        if true_shape.info.dtype not in INDEX_DTYPES or true_shape.info.shape != (2,):
            return true_shape.misfit((n, m))
        parts.append(true_shape.part("shape"))
    return Quantization(
        scheme=f"int{bits}",
        packing=Packing.ROWS,
        stored_shape=(n, words),
        shape=(n, m),
        block=(rows, columns),
        parts=tuple(parts),
        bits=bits,
    )


def _true_width(true_shape: Companion | None, companions: Companions) -> int | None:
    """Return the number of integers in a row; None if it is not known.

    The width is in a separate tensor. From a remote shard this would take a request for each matrix, so there the
    width that fills the words is assumed, and checked when the matrix is read.
    """
    if true_shape is None or true_shape.info.shape != (2,):
        return None
    body = companions.local_bytes(true_shape)
    return int.from_bytes(body[len(body) // 2 :], "little") or None if body is not None else None


PACKED_INTEGERS = Format(
    name="packed integers",
    read=_read,
    companions=(".weight_scale", ".weight_zero_point", ".weight_g_idx", ".weight_shape"),
    values={".weight_packed": WEIGHT_SUFFIX},
    dtypes=("I32",),
    endings=(".weight_packed",),
    methods=(None, compressed_tensors.METHOD),
    settings={**compressed_tensors.SETTINGS, "bits": ANY, "group_size": ANY},
)
