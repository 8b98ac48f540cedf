"""Float8 (E4M3, E5M2) with its scales, as DeepSeek, compressed-tensors and transformers store it."""

from ...checkpoint.header import TensorInfo
from ..config import QuantizationConfig
from ..names import WEIGHT_SUFFIX, is_fused_experts, module_of
from ..quantization import Quantization, Unreadable
from . import compressed_tensors
from .companions import MISSING_SCALES, Companions
from .format import ANY, Format
from .grid import find_scales, quantize_by_grid
from .unknown import reject

_DTYPES = ("F8_E4M3", "F8_E5M2")


def _read(
    weight: TensorInfo, companions: Companions, config: QuantizationConfig
) -> Quantization | list[Quantization] | Unreadable | None:
    """Read a weight (n, m), or fused experts (experts, n, m).

    There is one scale for the whole weight, for each row, or for each block.
    """
    is_fused = len(weight.shape) == 3 and is_fused_experts(module_of(weight.name))
    is_weight = len(weight.shape) == 2 and weight.name.endswith(WEIGHT_SUFFIX)
    if weight.dtype not in _DTYPES or not (is_fused or is_weight):
        return None
    if is_weight and companions.get(f"{weight.name}_zero_point"):
        return reject(weight, companions, config)
    scales = find_scales(weight, companions)
    if scales is None:
        return MISSING_SCALES
    n, m = weight.shape[-2:]
    if is_weight:
        return quantize_by_grid("float8", scales, (n, m), config.block_size)
    experts = weight.shape[0]
    if scales.info.shape[:1] != (experts,):
        return scales.misfit(weight.shape)
    found: list[Quantization] = []
    for e in range(experts):
        one = quantize_by_grid("float8", scales, (n, m), config.block_size, (e, experts))
        if isinstance(one, Unreadable):
            return one
        found.append(one)
    return found


FLOAT8 = Format(
    name="float8",
    read=_read,
    companions=(".weight_scale_inv", ".weight_scale", "_scale_inv", "_scale"),
    methods=(None, "fp8", "fbgemm_fp8", "modelopt", compressed_tensors.METHOD),
    settings={
        **compressed_tensors.SETTINGS,
        "weight_block_size": ANY,
        "fmt": ("e4m3", "e5m2"),
        "scale_fmt": ("float", "ue8m0"),
        "quant_algo": ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"),
    },
)
