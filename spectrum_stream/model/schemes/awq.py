"""AWQ: the transpose, with eight 4-bit integers of a row in a word, in the order of AWQ's GEMM kernel."""

import re

from ...checkpoint.header import TensorInfo
from ..config import QuantizationConfig
from ..matrix import FLOAT_DTYPES
from ..names import WEIGHT_SUFFIX
from ..no_score import NoScore
from ..quantization import Packing, Quantization, Unreadable
from .companions import WORD_BITS, Companions
from .format import ANY, Format
from .harmless import LAYERS, SEARCH

_BITS = 4


def _read(weight: TensorInfo, companions: Companions, config: QuantizationConfig) -> Quantization | Unreadable | None:
    """Read a weight (m, n / 8) with scales (groups, n) and packed zero points, if any."""
    module = weight.name.removesuffix(".qweight")
    scales = companions.get(f"{module}.scales")
    if not weight.name.endswith(".qweight") or len(weight.shape) != 2:
        return None
    if scales is None or len(scales.info.shape) != 2:
        return None
    m, columns = weight.shape
    groups, n = scales.info.shape
    if config.bits != _BITS or columns * WORD_BITS // _BITS != n:
        return Unreadable(NoScore.UNSUPPORTED_DTYPE, "awq, but not of 4 bits in the layout of its gemm kernel")
    size = min(config.group_size or m, m)
    if scales.info.dtype not in FLOAT_DTYPES or groups != -(-m // size):
        return scales.misfit((n, m))
    parts = [scales.part("scales")]
    zeros = companions.get(f"{module}.qzeros")
    if zeros is not None:
        if zeros.info.dtype != "I32" or zeros.info.shape != (groups, -(-n * _BITS // WORD_BITS)):
            return zeros.misfit((n, m))
        parts.append(zeros.part("zeros"))
    elif config.data.get("zero_point") is True:
        return Unreadable(NoScore.MISSING_SCALES, "no zero points")
    return Quantization(
        scheme="awq",
        packing=Packing.AWQ,
        stored_shape=(m, columns),
        shape=(m, n),
        block=(size, 1),
        parts=tuple(parts),
        bits=_BITS,
        symmetric=config.symmetric,
    )


AWQ = Format(
    name="awq",
    read=_read,
    companions=(".scales", ".qzeros"),
    values={".qweight": WEIGHT_SUFFIX},
    endings=(".qweight",),
    methods=(None, "awq", "auto-round", "intel/auto-round"),
    settings={
        **SEARCH,
        **LAYERS,
        **dict.fromkeys(("bits", "w_bit", "group_size", "q_group_size"), ANY),
        "zero_point": (True, False),
        "version": re.compile("gemm", re.IGNORECASE),
        "sym": (True, False),
        "method": ("awq",),
        "format": ("gemm",),
        "checkpoint_format": ("gemm",),
        "packing_format": ("auto_round:auto_awq", "auto_round:awq"),
        "data_type": ("int",),
        "provider": ("auto-round",),
        "pack_dtype": ("int32",),
        "backend": ("autoawq", "auto"),
    },
)
