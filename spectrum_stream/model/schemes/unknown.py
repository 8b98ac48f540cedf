"""Unsupported formats: a tensor that looks quantized is rejected by name, and its stored values are not scored."""

from collections.abc import Mapping

from ...checkpoint.header import TensorInfo
from ..config import QuantizationConfig
from ..matrix import FLOAT_DTYPES
from ..names import WEIGHT_SUFFIX, is_fused_experts
from ..no_score import NoScore
from ..quantization import Unreadable
from . import harmless
from .companions import Companions

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
    ".res_centroids.weight": "vptq",
    ".outlier_centroids.weight": "vptq",
    ".encoded_exponent": "dfloat11",
    ".sign_mantissa": "dfloat11",
    ".luts": "dfloat11",
    ".dense_weights": "spqr",
    ".compressed": "compressed-tensors, sparse",
}
_LIBRARY_ENDINGS = tuple(LIBRARIES)
# Pairs of the endings of a weight and of a tensor beside it that only one format has, and its name.
_BESIDE = {
    (".weight", ".weight.absmax"): "bitsandbytes",
    (".weight", ".SCB"): "bitsandbytes",
    (".weight", ".svd_up"): "sdnq",
    (".weight", ".weight_offset"): "msmodelslim",
    (".weight_packed", ".scale_packed"): "compressed-tensors, marlin-24",
    (".qweight", ".wscales"): "nunchaku, svdquant",
    (".qweight", ".zeros"): "gptq of GPTQ-for-LLaMa, with zero points that are not packed",
}
_COMPONENTS_BESIDE = frozenset(beside.rpartition(".")[2] for _, beside in _BESIDE)
# The settings that name the format of a method, in the order of their weight.
_FORMATS = ("quant_algo", "format", "checkpoint_format", "packing_format")
_PACKED_SUFFIXES = (WEIGHT_SUFFIX, ".qweight", ".weight_packed")


def owner_of(tensor: str) -> str:
    """Return the name that the tensors of such a weight share: `X` for `X.q_weight`. Other names stay as they are."""
    if not tensor.endswith(_LIBRARY_ENDINGS):
        return tensor
    return next(tensor.removesuffix(ending) for ending in LIBRARIES if tensor.endswith(ending))


def reject_unknown(weight: TensorInfo, companions: Companions, config: QuantizationConfig) -> Unreadable | None:
    """Reject a tensor that holds weights in an unknown format."""
    if len(weight.shape) >= 1 and weight.name.endswith(_LIBRARY_ENDINGS):
        library = next(name for ending, name in LIBRARIES.items() if weight.name.endswith(ending))
        return Unreadable(NoScore.UNSUPPORTED_DTYPE, describe(config) or library)
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
    """Report an unsupported format by the tensors beside a weight, by the config, or by its dtype."""
    name = find_format_beside(weight, companions) or describe(config)
    if not name:
        endings = (ending for _, ending in companions.beside(weight.name) if ending not in harmless.COMPANIONS)
        beside = next(endings, None)
        name = f"{weight.dtype} with {beside}" if beside is not None else weight.dtype
    return Unreadable(NoScore.UNSUPPORTED_DTYPE, name[:100])


def find_format_beside(weight: TensorInfo, companions: Companions) -> str | None:
    """Return the name of the only format that has the tensors beside a weight; None if there is no such format."""
    # Most checkpoints have none of them. The last components of all names are enough to find that.
    if companions.components.isdisjoint(_COMPONENTS_BESIDE):
        return None
    for (ending, beside), name in _BESIDE.items():
        if weight.name.endswith(ending) and companions.get(weight.name.removesuffix(ending) + beside):
            return name
    return None


def describe(config: QuantizationConfig) -> str:
    """Name the method of a config and its format; "" without a method."""
    sparsity = config.data.get("sparsity_config")
    said = [sparsity.get("format") if isinstance(sparsity, Mapping) else None, *map(config.data.get, _FORMATS)]
    format = next((text for text in said if isinstance(text, str) and text != "dense"), None)
    names = (config.quant_method, format if format != config.quant_method else None)
    return ", ".join(name for name in names if name)[:100] if config.quant_method else ""
