"""Float8 (E4M3, E5M2) with its scales by the names of many writers, and without any.

    X.weight_scale_inv        DeepSeek-V3, transformers 5.24 (integrations/finegrained_fp8.py)
    X.weight_scale            compressed-tensors, ModelOpt, fbgemm, Quark
    X.scale, X.qscale_weight  DeepSeek-V4, Mistral (transformers 5.24, quantizers/quantizer_finegrained_fp8.py)
    X.scale_weight            ComfyUI before its markers (comfy/utils.py, convert_old_quants)
    X.weights_scaling_factor  TensorRT-LLM; ModelOpt 0.47 (torch/export/quant_utils.py, from_quantized_weight)
    X_weight_scale            fused experts, ModelOpt (https://github.com/sgl-project/sglang/pull/35032)

All of them are factors, in spite of `_inv`.
"""

from dataclasses import replace

from ...checkpoint.header import TensorInfo
from ..config import QuantizationConfig
from ..names import WEIGHT_SUFFIX, is_fused_experts, is_weight, module_of
from ..no_score import NoScore
from ..quantization import MAX_EXPERTS, TOO_MANY_EXPERTS, Packing, Quantization, Unreadable
from . import compressed_tensors, modelopt, quark
from .companions import MISSING_SCALES, Companion, Companions
from .format import ANY, Format
from .grid import describe_grid, quantize_by_grid
from .unknown import reject

_DTYPES = ("F8_E4M3", "F8_E5M2")
# These have another bias, and another value for NaN.
_OTHER_DTYPES = ("F8_E4M3FNUZ", "F8_E5M2FNUZ")
# The endings of scales, after the name of the module or of the parameter.
_OF_MODULE = (
    *(".weight_scale_inv", ".weight_scale", ".scale"),
    *(".qscale_weight", ".scale_weight", ".weights_scaling_factor"),
)
_OF_PARAMETER = ("_scale_inv", "_scale", "_weight_scale")
# Methods in which scales (n,) are those of the rows.
_FLAT_BY_ROW = (modelopt.METHOD, quark.METHOD)
_FBGEMM = "fbgemm_fp8"
# ComfyUI's sign that weights have scales.
_MARKERS = ("scaled_fp8",)


def _read(
    weight: TensorInfo, companions: Companions, config: QuantizationConfig
) -> Quantization | list[Quantization] | Unreadable | None:
    """Read a weight (n, m), or fused experts (experts, n, m).

    There is one scale for the whole weight, for each row, for each group of a row, or for each block.
    """
    owner, has_module = module_of(weight.name), is_weight(weight.name)
    is_fused = len(weight.shape) == 3 and is_fused_experts(owner)
    if not is_fused and not (has_module and len(weight.shape) in (1, 2)):
        return None
    if weight.dtype in _OTHER_DTYPES:
        return Unreadable(NoScore.UNSUPPORTED_DTYPE, weight.dtype)
    if weight.dtype not in _DTYPES:
        return None
    scales = companions.find(owner, _OF_MODULE if has_module else _OF_PARAMETER)
    if scales is None:
        return MISSING_SCALES if is_fused or _has_scales(companions, config) else None
    if len(weight.shape) == 1 or companions.get(f"{weight.name}_zero_point"):
        return reject(weight, companions, config)
    if is_fused:
        return _read_experts(weight, scales, config)
    n, m = weight.shape
    match scales.info.shape:
        case [rows, 1, columns, 1]:
            # ModelOpt keeps the dimensions of its blocks. (0.47, torch/export/quant_utils.py, FP8_PB_WO)
            scales = scales._replace(info=replace(scales.info, shape=(rows, columns)))
    flat_is_by_row = config.quant_method in _FLAT_BY_ROW
    found = quantize_by_grid("float8", scales, (n, m), config.block_sizes, flat_is_by_row=flat_is_by_row)
    if isinstance(found, Quantization) and _may_have_own_blocks(owner, found):
        return Unreadable(NoScore.NOT_UNDERSTOOD, "float8 in blocks, of which each part of it may have its own")
    return found


def _may_have_own_blocks(module: str, found: Quantization) -> bool:
    """Whether the blocks of a fused weight may begin anew with each part, so that the same scales fit in two ways.

    This is so if a block is partial. (MiMo-V2, https://github.com/vllm-project/vllm/pull/42270)
    """
    name, rows = module.rpartition(".")[2], found.block[0]
    is_fused = "qkv" in name or name == "query_key_value"
    return is_fused and rows > 1 and found.shape[0] % rows > 0 and found.grid_shape[0] >= 3


def _read_experts(
    weight: TensorInfo, scales: Companion, config: QuantizationConfig
) -> list[Quantization] | Unreadable:
    experts, n, m = weight.shape
    if experts > MAX_EXPERTS:
        return TOO_MANY_EXPERTS
    if scales.info.shape[:1] != (experts,):
        return scales.misfit(weight.shape)
    # transformers transposes the experts of Llama-4 before it finds their scales by row.
    is_transposed = config.quant_method == _FBGEMM
    if is_transposed and scales.info.shape[1:] not in ((1, m), (m, 1)):
        return scales.misfit(weight.shape)
    found: list[Quantization] = []
    for e in range(experts):
        expert = (e, experts)
        if is_transposed:
            found.append(describe_grid("float8", "column", scales, (n, m), (n, 1), expert))
            continue
        one = quantize_by_grid("float8", scales, (n, m), config.block_sizes, expert)
        if isinstance(one, Unreadable):
            return one
        found.append(one)
    return found


def _has_scales(companions: Companions, config: QuantizationConfig) -> bool:
    """Whether anything in a checkpoint says that its float8 has scales."""
    is_marked = any(name.rpartition(".")[2] in _MARKERS for name in companions.markers)
    return is_marked or companions.has_scaled_float8 or config.quant_method in FLOAT8.methods[1:]


def _read_plain(
    weight: TensorInfo, companions: Companions, config: QuantizationConfig
) -> Quantization | Unreadable | None:
    """Read a weight without scales as the numbers that it holds.

    Some programs store float8 only to save space, as they would store float16. `FLOAT8` rejects the weights that lack
    their scales.
    """
    if weight.dtype not in _DTYPES or not is_weight(weight.name):
        return None
    if len(weight.shape) not in (1, 2):
        return Unreadable(NoScore.NOT_A_MATRIX)
    n, m = weight.shape if len(weight.shape) == 2 else (1, *weight.shape)
    return Quantization(
        scheme="float8", packing=Packing.NONE, stored_shape=(n, m), shape=(n, m), block=(n, m), parts=()
    )


FLOAT8 = Format(
    name="float8",
    read=_read,
    companions=(*_OF_MODULE, *_OF_PARAMETER),
    dtypes=(*_DTYPES, *_OTHER_DTYPES),
    methods=(None, "fp8", "mxfp8", _FBGEMM, modelopt.METHOD, quark.METHOD, compressed_tensors.METHOD),
    settings={
        **compressed_tensors.SETTINGS,
        **modelopt.settings("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8"),
        **quark.settings(("fp8_e4m3", "fp8_e5m2"), axis=0),
        "weight_block_size": ANY,
        "fmt": ("e4m3", "e5m2"),
        "scale_fmt": ("float", "ue8m0"),
        "expert_dtype": ("fp8", "fp4"),
    },
    markers=_MARKERS,
)

PLAIN_FLOAT8 = Format(
    name="plain float8", read=_read_plain, companions=(), dtypes=_DTYPES, endings=(WEIGHT_SUFFIX,), methods=(None,)
)
