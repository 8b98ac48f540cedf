"""MXFP4: 4-bit floats with one exponent for 32 columns, as gpt-oss and compressed-tensors store it."""

from ...checkpoint.header import TensorInfo
from ..config import QuantizationConfig
from ..names import WEIGHT_SUFFIX
from ..quantization import Packing, Quantization, Unreadable
from . import compressed_tensors
from .companions import EXPONENT_DTYPES, MISSING_SCALES, Companions
from .format import Format
from .nvfp4 import is_packed_fp4

_COLUMNS = 32


def _read(
    weight: TensorInfo, companions: Companions, config: QuantizationConfig
) -> Quantization | list[Quantization] | Unreadable | None:
    """Read fused experts (experts, n, m / 32, 16), or a weight of (n, m / 2) bytes.

    The scales are (experts, n, m / 32), or (n, m / 32).
    """
    if weight.name.endswith("_blocks") and weight.dtype == "U8" and len(weight.shape) == 4:
        return _fused_experts(weight, companions)
    if not is_packed_fp4(weight, companions):
        return None
    scales = companions.get(f"{companions.parameter_of(weight.name)}_scale")
    if scales is None or len(weight.shape) != 2:
        return None
    n, m = weight.shape[0], 2 * weight.shape[1]
    if scales.info.dtype not in EXPONENT_DTYPES or scales.info.shape != (n, -(-m // _COLUMNS)):
        return scales.misfit((n, m))
    return Quantization(
        scheme="mxfp4",
        packing=Packing.FP4,
        stored_shape=(n, m // 2),
        shape=(n, m),
        block=(1, _COLUMNS),
        parts=(scales.part("scales"),),
    )


def _fused_experts(blocks: TensorInfo, companions: Companions) -> list[Quantization] | Unreadable | None:
    experts, n, groups, width = blocks.shape
    if width != _COLUMNS // 2:
        return None
    scales = companions.get(blocks.name.removesuffix("_blocks") + "_scales")
    if scales is None:
        return MISSING_SCALES
    if scales.info.dtype not in EXPONENT_DTYPES or scales.info.shape != (experts, n, groups):
        return scales.misfit(blocks.shape)
    return [
        Quantization(
            scheme="mxfp4",
            packing=Packing.FP4,
            stored_shape=(n, groups * width),
            shape=(n, groups * _COLUMNS),
            block=(1, _COLUMNS),
            parts=(scales.part("scales", (n, groups), (e, experts)),),
        )
        for e in range(experts)
    ]


MXFP4 = Format(
    name="mxfp4",
    read=_read,
    companions=("_scales", ".weight_scale"),
    values={"_blocks": "", ".weight_packed": WEIGHT_SUFFIX},
    methods=(None, "mxfp4", compressed_tensors.METHOD),
    settings=compressed_tensors.SETTINGS,
)
