"""GPTQ: the transpose, with integers packed down a column into words of 32 bits.

(AutoGPTQ 0.7.1, nn_modules/qlinear/qlinear_cuda_old.py, `QuantLinear.forward`; GPTQModel 7.7.0,
nn_modules/qlinear/__init__.py, `dequantize_weight`; auto-round 0.16.1, auto_round_extension/torch/qlinear_torch.py)
"""

import re
from collections.abc import Mapping

from ...checkpoint.header import TensorInfo
from ..config import QuantizationConfig
from ..matrix import FLOAT_DTYPES
from ..names import WEIGHT_SUFFIX
from ..no_score import NoScore
from ..quantization import Packing, Quantization, Unreadable
from .companions import INDEX_DTYPES, MISSING_SCALES, WORD_BITS, Companions
from .format import ANY, Format
from .harmless import LAYERS, SEARCH
from .unknown import reject

# The number to add to stored zero points, by setting. The first format of GPTQ stores them less one.
# (GPTQModel 7.7.0, utils/model.py, `convert_gptq_v1_to_v2_format`; auto-round 0.16.1, inference/backend.py,
# GPTQ_FORMAT, GPTQ_FORMAT_NO_ZP, and inference/convert_model.py for `auto_round:gptq`)
_ZEROS_OFFSETS = {
    "checkpoint_format": {"gptq": 1, "gptq_v2": 0},
    "format": {"gptq": 1, "gptq_v2": 0},
    "packing_format": {"auto_round": 0, "auto_round:gptqmodel": 0, "auto_round:auto_gptq": 1, "auto_round:gptq": 1},
}
# The metadata that AutoGPTQ writes, with the settings that it repeats. (AutoGPTQ 0.7.1, modeling/_base.py,
# `save_quantized`)
_METADATA = {"gptq_bits": "bits", "gptq_group_size": "group_size", "gptq_desc_act": "desc_act"}
_AUTO_ROUND = ("auto-round", "intel/auto-round")


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
    # GPTQModel packs 5 to 7 bits in another way than auto-round.
    if bits not in (2, 3, 4, 8):
        return Unreadable(NoScore.UNSUPPORTED_DTYPE, f"gptq of {bits} bits")
    if rows * WORD_BITS % bits:
        return Unreadable(NoScore.BAD_SCALES, f"{rows} words per column are not a multiple of {bits} bits")
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
    elif config.data.get("desc_act") is True and config.data.get("static_groups") is not True and groups > 1:
        return Unreadable(NoScore.MISSING_SCALES, "no g_idx, but desc_act")
    offset = _find_zeros_offset(config)
    if isinstance(offset, str):
        return Unreadable(NoScore.NOT_UNDERSTOOD, f"gptq with {offset}")
    if (key := _find_contradiction(companions.metadata_of(weight.name), config)) is not None:
        return Unreadable(NoScore.NOT_UNDERSTOOD, f"gptq with metadata that contradicts the config, {key}")
    return Quantization(
        scheme=f"gptq, {bits} bits",
        packing=Packing.COLUMNS,
        stored_shape=(rows, columns),
        shape=(m, n),
        block=(size, 1),
        parts=tuple(parts),
        bits=bits,
        zeros_offset=offset,
        symmetric=config.symmetric,
    )


def _find_zeros_offset(config: QuantizationConfig) -> int | str:
    """Find the number to add to stored zero points, or say what is wrong with the settings about it."""
    said: dict[str, int] = {}
    for key, offsets in _ZEROS_OFFSETS.items():
        value = config.data.get(key)
        if value is None:
            continue
        if not isinstance(value, str) or value not in offsets:
            return f"an unknown setting, {key} = {value!r:.60}"
        said[key] = offsets[value]
    if len(set(said.values())) > 1:
        return f"settings that disagree about zero points, {', '.join(said)}"
    if not said and config.quant_method in _AUTO_ROUND:
        return "no packing_format, which says how zero points are stored"
    if said.get("packing_format") == 0 and (doubt := _find_doubt(config)) is not None:
        return doubt
    # AutoGPTQ, which wrote the first format, names no format.
    return next(iter(said.values()), 1)


def _find_doubt(config: QuantizationConfig) -> str | None:
    """Find a setting under which some versions of auto-round store zero points less one, and others do not.

    (auto-round 0.5.1 and 0.8.0, export/export_to_autoround/export.py, `dynamic_import_quant_linear_for_packing`)
    """
    act_bits, version = config.data.get("act_bits"), config.data.get("autoround_version")
    if type(act_bits) is int and act_bits <= 8:
        return f"act_bits = {act_bits}, for which zero points are stored either less one or unchanged"
    is_old = isinstance(version, str) and re.match(r"0\.[0-5](\.|$)", version) is not None
    if is_old and config.data["packing_format"] == "auto_round:gptqmodel":
        return f"autoround_version = {version:.20}, for which zero points are stored less one"
    return None


def _find_contradiction(metadata: Mapping[str, str], config: QuantizationConfig) -> str | None:
    """Return the key of AutoGPTQ's metadata that contradicts the config, if any."""
    if metadata.get("gptq_is_marlin_format", "False") not in ("False", "None"):
        return "gptq_is_marlin_format"
    said = ((key, config.data.get(setting)) for key, setting in _METADATA.items() if key in metadata)
    return next((key for key, value in said if value is not None and metadata[key] != str(value)), None)


GPTQ = Format(
    name="gptq",
    read=_read,
    companions=(".scales", ".qzeros", ".g_idx"),
    values={".qweight": WEIGHT_SUFFIX},
    endings=(".qweight",),
    methods=(None, "gptq", *_AUTO_ROUND),
    settings={
        **SEARCH,
        **LAYERS,
        **{key: tuple(offsets) for key, offsets in _ZEROS_OFFSETS.items()},
        "bits": ANY,
        "group_size": ANY,
        "sym": (True, False),
        "method": ("gptq",),
        "data_type": ("int",),
        "provider": ("auto-round",),
        "is_marlin_format": (False,),
        "pack_dtype": ("int32",),
        "backend": ANY,
    },
    metadata=(*_METADATA, "gptq_damp_percent", "gptq_is_marlin_format", "auto_gptq_version"),
)
