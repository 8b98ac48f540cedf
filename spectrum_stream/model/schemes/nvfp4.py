"""NVFP4, as compressed-tensors and ModelOpt store it: 4-bit floats, a scale for 16 columns and one for the whole."""

from math import prod

from ...checkpoint.header import TensorInfo
from ..config import QuantizationConfig
from ..matrix import FLOAT_DTYPES
from ..names import WEIGHT_SUFFIX
from ..no_score import NoScore
from ..quantization import Packing, Quantization, Unreadable
from . import compressed_tensors, modelopt
from .companions import MISSING_SCALES, Companions
from .format import Format

_COLUMNS = 16


def is_packed_fp4(weight: TensorInfo, companions: Companions) -> bool:
    """Whether a tensor packs two 4-bit floats a byte.

    A plain `.weight` of bytes does if it has a global scale.
    """
    if weight.dtype != "U8":
        return False
    is_modelopt = weight.name.endswith(WEIGHT_SUFFIX) and companions.get(f"{weight.name}_scale_2") is not None
    return is_modelopt or weight.name.endswith(".weight_packed")


def _read(weight: TensorInfo, companions: Companions, config: QuantizationConfig) -> Quantization | Unreadable | None:
    """Read a weight of (n, m / 2) bytes with scales (n, m / 16) and a global scale."""
    if not is_packed_fp4(weight, companions):
        return None
    name = companions.parameter_of(weight.name)
    scales = companions.get(f"{name}_scale")
    if scales is None:
        return MISSING_SCALES
    if len(weight.shape) != 2 or scales.info.dtype != "F8_E4M3":
        return None
    n, m = weight.shape[0], 2 * weight.shape[1]
    if scales.info.shape != (n, -(-m // _COLUMNS)):
        return scales.misfit((n, m))
    # compressed-tensors stores the reciprocal of ModelOpt's factor.
    divisor, factor = companions.get(f"{name}_global_scale"), companions.get(f"{name}_scale_2")
    whole = divisor or factor
    if whole is None:
        return Unreadable(NoScore.MISSING_SCALES, "no global scale")
    if whole.info.dtype not in FLOAT_DTYPES or prod(whole.info.shape) != 1:
        return whole.misfit((n, m))
    return Quantization(
        scheme="nvfp4",
        packing=Packing.FP4,
        stored_shape=(n, m // 2),
        shape=(n, m),
        block=(1, _COLUMNS),
        parts=(scales.part("scales"), whole.part("divisor" if divisor else "factor", (1,))),
    )


NVFP4 = Format(
    name="nvfp4",
    read=_read,
    companions=(".weight_scale", ".weight_global_scale", ".weight_scale_2"),
    values={".weight_packed": WEIGHT_SUFFIX},
    dtypes=("U8",),
    endings=(WEIGHT_SUFFIX, ".weight_packed"),
    methods=(None, compressed_tensors.METHOD, modelopt.METHOD),
    settings={**compressed_tensors.SETTINGS, **modelopt.settings("NVFP4", "W4A16_NVFP4")},
)
