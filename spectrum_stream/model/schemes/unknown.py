"""Unsupported formats: a tensor that looks quantized is rejected by name, and its stored values are not scored."""

from ...checkpoint.header import TensorInfo
from ..config import QuantizationConfig
from ..names import WEIGHT_SUFFIX, is_fused_experts
from ..no_score import NoScore
from ..quantization import Unreadable
from .companions import FLOAT_DTYPES, Companions

# The endings of tensors beside a weight of bitsandbytes.
COMPANIONS = (".SCB", ".absmax", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
# The endings of tensors with quantized values that no other format has, and the library that writes them.
LIBRARIES = {
    "_qdata": "torchao",  # prototype/safetensors, `0._weight_qdata`
    ":qdata": "torchao",  # transformers' form of the same
    "._data": "optimum-quanto",
    ".W_q": "hqq",
    ".q_weight": "exllamav2",
    ".trellis": "exllamav3",
    ".Qidxs": "quip-sharp",
    ".codes": "aqlm",
    ".centroids.weight": "vptq",
    ".dense_weights": "spqr",
    ".compressed": "compressed-tensors, sparse",
}
_PACKED_SUFFIXES = (WEIGHT_SUFFIX, ".qweight", ".weight_packed")


def reject_unknown(weight: TensorInfo, companions: Companions, config: QuantizationConfig) -> Unreadable | None:
    """Reject a tensor that holds weights in an unknown format."""
    library = next((name for ending, name in LIBRARIES.items() if weight.name.endswith(ending)), None)
    if library is not None and len(weight.shape) >= 1:
        return Unreadable(NoScore.UNSUPPORTED_DTYPE, (config.quant_method or library)[:100])
    if weight.dtype in (*FLOAT_DTYPES, "I64", "BOOL"):
        return None
    is_packed = weight.name.endswith(_PACKED_SUFFIXES)
    # A bare 3-D parameter of integers with the name of experts holds experts. Other bare parameters are buffers,
    # unless the config says that weights are quantized: Marlin calls them `B`.
    is_fused = len(weight.shape) >= 3 and is_fused_experts(companions.parameter_of(weight.name))
    # Older models keep a mask as a `bias` of bytes.
    is_other = len(weight.shape) >= 2 and config.quant_method is not None and not weight.name.endswith("bias")
    return reject(weight, companions, config) if is_packed or is_fused or is_other else None


def reject(weight: TensorInfo, companions: Companions, config: QuantizationConfig) -> Unreadable:
    """Report an unsupported format by the name in the config or in the tensors."""
    module = weight.name.removesuffix(WEIGHT_SUFFIX)
    if companions.get(f"{module}.weight.absmax", f"{module}.SCB"):
        return Unreadable(NoScore.UNSUPPORTED_DTYPE, "bitsandbytes")
    return Unreadable(NoScore.UNSUPPORTED_DTYPE, (config.quant_method or "")[:100])
