"""MXFP4: 4-bit floats, two a byte, with one exponent for 32 columns, by many writers.

X_blocks, X_scales          gpt-oss (transformers 5.24, integrations/mxfp4.py, convert_moe_packed_tensors)
X.blocks, X.scales          gpt-oss' original files
X.weight_packed, _scale     compressed-tensors
X.weight I8, X.scale        DeepSeek-V4 (transformers 5.24, integrations/finegrained_fp8.py, Fp8Dequantize)
X.weight U8, X.weight_scale ModelOpt 0.47 (torch/quantization/qtensor/mxfp4_tensor.py), amd-quark 0.13
                            (torch/utils/pack.py, Pack_fp4)
"""

from ...checkpoint.header import TensorInfo
from ..config import QuantizationConfig
from ..names import WEIGHT_SUFFIX, is_fused_experts, is_weight, module_of
from ..quantization import MAX_EXPERTS, TOO_MANY_EXPERTS, Packing, Quantization, Unreadable
from . import compressed_tensors, modelopt, quark
from .companions import EXPONENT_DTYPES, MISSING_SCALES, Companion, Companions
from .format import ANY, Format
from .nvfp4 import is_packed_fp4

_COLUMNS = 32
# The endings of blocks of fused experts, and those of their scales.
_BLOCKS = {"_blocks": "_scales", ".blocks": ".scales"}
# Methods with bytes in a plain `.weight`.
_OF_BYTES = (modelopt.METHOD, quark.METHOD)


def _read(
    weight: TensorInfo, companions: Companions, config: QuantizationConfig
) -> Quantization | list[Quantization] | Unreadable | None:
    """Read fused experts (experts, n, m / 32, 16), or a weight or fused experts of (n, m / 2) bytes.

    The scales are (experts, n, m / 32), or (n, m / 32).
    """
    ending = next((ending for ending in _BLOCKS if weight.name.endswith(ending)), None)
    if ending is not None and weight.dtype == "U8" and len(weight.shape) == 4:
        return _read_blocks(weight, companions, ending)
    is_of_bytes = weight.dtype == "U8" and is_weight(weight.name) and config.quant_method in _OF_BYTES
    if not is_of_bytes and not is_packed_fp4(weight, companions):
        return None
    scales = companions.get(f"{companions.parameter_of(weight.name)}_scale")
    return None if scales is None or len(weight.shape) != 2 else _read_bytes(weight, scales)


def _read_bytes(
    weight: TensorInfo, scales: Companion, expert: tuple[int, int] | None = None
) -> Quantization | Unreadable:
    *_, n, width = weight.shape
    grid = (n, -(-2 * width // _COLUMNS))
    experts = () if expert is None else (expert[1],)
    if scales.info.dtype not in EXPONENT_DTYPES or scales.info.shape != (*experts, *grid):
        return scales.misfit((n, 2 * width))
    return Quantization(
        scheme="mxfp4",
        packing=Packing.FP4,
        stored_shape=(n, width),
        shape=(n, 2 * width),
        block=(1, _COLUMNS),
        parts=(scales.part("scales", grid, expert or (0, 1)),),
    )


def _read_deepseek(
    weight: TensorInfo, companions: Companions, config: QuantizationConfig
) -> Quantization | list[Quantization] | Unreadable | None:
    """Read bytes that are stored as I8, with scales by the names of those of float8.

    transformers also saves the fused experts of DeepSeek-V4 so.
    """
    owner = module_of(weight.name)
    if is_weight(weight.name):
        scales = companions.get(f"{owner}.scale", f"{owner}.weight_scale_inv")
    else:
        scales = companions.get(f"{owner}_scale_inv")
    if weight.dtype != "I8" or scales is None or scales.info.dtype not in EXPONENT_DTYPES:
        return None
    if len(weight.shape) == 2 and is_weight(weight.name):
        return _read_bytes(weight, scales)
    if len(weight.shape) != 3 or not is_fused_experts(owner):
        return None
    if weight.shape[0] > MAX_EXPERTS:
        return TOO_MANY_EXPERTS
    found: list[Quantization] = []
    for e in range(weight.shape[0]):
        one = _read_bytes(weight, scales, (e, weight.shape[0]))
        if isinstance(one, Unreadable):
            return one
        found.append(one)
    return found


def _read_blocks(blocks: TensorInfo, companions: Companions, ending: str) -> list[Quantization] | Unreadable | None:
    experts, n, groups, width = blocks.shape
    if width != _COLUMNS // 2:
        return None
    scales = companions.get(blocks.name.removesuffix(ending) + _BLOCKS[ending])
    if scales is None:
        return MISSING_SCALES
    if scales.info.dtype not in EXPONENT_DTYPES or scales.info.shape != (experts, n, groups):
        return scales.misfit(blocks.shape)
    if experts > MAX_EXPERTS:
        return TOO_MANY_EXPERTS
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
    companions=("_scales", ".scales", ".weight_scale"),
    values={"_blocks": "", ".blocks": "", ".weight_packed": WEIGHT_SUFFIX},
    dtypes=("U8",),
    methods=(None, "mxfp4", modelopt.METHOD, quark.METHOD, compressed_tensors.METHOD),
    settings={
        **compressed_tensors.SETTINGS,
        **modelopt.settings("MXFP4", "W4A8_MXFP4_FP8"),
        **quark.settings(("fp4",), axis=-1),
    },
)

DEEPSEEK_FP4 = Format(
    name="fp4 of deepseek",
    read=_read_deepseek,
    companions=(".scale", ".weight_scale_inv", "_scale_inv"),
    dtypes=("I8",),
    # Without this method, the bytes may be integers.
    methods=("fp8",),
    settings={
        "weight_block_size": ANY,  # of the float8 weights
        "fmt": ("e4m3",),
        "scale_fmt": ("ue8m0",),
        "expert_dtype": ("fp4",),
    },
)
