"""GPTQ: the transpose, with integers packed down a column into words of 32 bits."""

from ...checkpoint.header import TensorInfo
from ..config import QuantizationConfig
from ..names import WEIGHT_SUFFIX
from ..no_score import NoScore
from ..quantization import Packing, Quantization, Unreadable
from .companions import FLOAT_DTYPES, INDEX_DTYPES, MISSING_SCALES, WORD_BITS, Companions
from .format import ANY, Format
from .harmless import SEARCH
from .unknown import reject


def _read(weight: TensorInfo, companions: Companions, config: QuantizationConfig) -> Quantization | Unreadable | None:
    """Read a weight (words, n) with scales (groups, n) and packed zero points.

    It may have the group of each of its m rows.
    """
    if not weight.name.endswith(".qweight"):
        return None
    module, bits = weight.name.removesuffix(".qweight"), config.bits
    scales = companions.get(f"{module}.scales")
    if scales is None:
        return MISSING_SCALES
    if weight.dtype != "I32" or len(weight.shape) != 2 or len(scales.info.shape) != 2 or bits is None:
        return reject(weight, companions, config)
    rows, columns = weight.shape
    groups, n = scales.info.shape
    if columns != n:
        # The columns are packed, so it is AWQ.
        return None
    if bits not in (2, 4, 8):
        return Unreadable(NoScore.UNSUPPORTED_DTYPE, f"gptq of {bits} bits")
    m = rows * WORD_BITS // bits
    size = min(config.group_size or m, m)
    zeros, order = companions.get(f"{module}.qzeros"), companions.get(f"{module}.g_idx")
    if zeros is None:
        return Unreadable(NoScore.MISSING_SCALES, "no zero points")
    if scales.info.dtype not in FLOAT_DTYPES or groups != -(-m // size):
        return scales.misfit((n, m))
    if zeros.info.dtype != "I32" or zeros.info.shape != (groups, -(-n * bits // WORD_BITS)):
        return zeros.misfit((n, m))
    parts = [scales.part("scales"), zeros.part("zeros")]
    if order is not None:
        if order.info.dtype not in INDEX_DTYPES or order.info.shape != (m,):
            return order.misfit((n, m))
        parts.append(order.part("groups"))
    return Quantization(
        scheme=f"gptq, {bits} bits",
        packing=Packing.COLUMNS,
        stored_shape=(rows, columns),
        shape=(m, n),
        block=(size, 1),
        parts=tuple(parts),
        bits=bits,
        zeros_offset=0 if config.checkpoint_format == "gptq_v2" else 1,
    )


GPTQ = Format(
    name="gptq",
    read=_read,
    companions=(".scales", ".qzeros", ".g_idx"),
    values={".qweight": WEIGHT_SUFFIX},
    methods=(None, "gptq"),
    settings={
        **SEARCH,
        "bits": ANY,
        "group_size": ANY,
        "sym": (True, False),
        "checkpoint_format": ("gptq", "gptq_v2"),
        "is_marlin_format": (False,),
        "pack_dtype": ("int32",),
        "backend": ANY,
    },
)
