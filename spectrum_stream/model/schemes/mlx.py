"""The layouts of MLX: affine integers, MXFP4, MXFP8 and NVFP4 in words of 32 bits (mlx 0.32.4, mlx.core.quantize).

The words have no trace of the mode, and their number fits several pairs of bits and group size. Both are in
config.json, for all layers and again for layers that differ. transformers writes the affine integers with the method
`metal` (5.24, integrations/metal_quantization.py).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ...checkpoint.header import TensorInfo
from ..config import QuantizationConfig
from ..matrix import FLOAT_DTYPES
from ..names import WEIGHT_SUFFIX, module_of
from ..no_score import NoScore
from ..quantization import MAX_EXPERTS, TOO_MANY_EXPERTS, Packing, Part, Quantization, Unreadable
from .companions import WORD_BITS, Companion, Companions
from .format import ANY, Format

_BITS = (1, 2, 3, 4, 5, 6, 8)
_GROUP_SIZES = (32, 64, 128)
_SETTINGS = ("mode", "bits", "group_size")


class _Floats(NamedTuple):
    """A mode of floats with one scale a group and no offsets."""

    packing: Packing
    bits: int
    group_size: int
    scales_dtype: str


_MODES = {
    "mxfp4": _Floats(Packing.FP4, 4, 32, "F8_E8M0"),
    "mxfp8": _Floats(Packing.FLOAT8, 8, 32, "F8_E8M0"),
    "nvfp4": _Floats(Packing.FP4, 4, 16, "F8_E4M3"),
}


class _Settings(NamedTuple):
    mode: str
    bits: int
    group_size: int


def _read(
    weight: TensorInfo, companions: Companions, config: QuantizationConfig
) -> Quantization | list[Quantization] | Unreadable | None:
    """Read a weight (n, words), or fused experts (experts, n, words), with scales and offsets (…, n, groups)."""
    if weight.dtype != "U32" or len(weight.shape) not in (2, 3) or not weight.name.endswith(WEIGHT_SUFFIX):
        return None
    module = module_of(weight.name)
    scales = companions.get(f"{module}.scales")
    if scales is None:
        return None
    settings = _find_settings(config.data, module)
    if settings is None:
        return Unreadable(NoScore.UNSUPPORTED_DTYPE, "mlx, but config.json has no mode, bits and group_size for it")
    offsets = companions.get(f"{module}.biases", f"{module}.qbiases")
    *experts, n, words = weight.shape
    *_, groups = scales.info.shape or (0,)
    m = groups * settings.group_size
    if scales.info.shape != (*experts, n, groups) or m * settings.bits != words * WORD_BITS:
        return scales.misfit((n, words))
    floats = _MODES.get(settings.mode)
    if (offsets is None) != (floats is not None):
        return Unreadable(NoScore.MISSING_SCALES, "no biases") if offsets is None else offsets.misfit((n, m))
    if scales.info.dtype not in (FLOAT_DTYPES if floats is None else ("U8",)):
        return scales.misfit((n, m))
    if offsets is not None and (offsets.info.dtype not in FLOAT_DTYPES or offsets.info.shape != scales.info.shape):
        return offsets.misfit((n, m))
    count = experts[0] if experts else 1
    if count > MAX_EXPERTS:
        return TOO_MANY_EXPERTS

    def describe(e: int) -> Quantization:
        return Quantization(
            scheme=f"mlx, {settings.bits} bits" if floats is None else f"mlx {settings.mode}",
            packing=Packing.ROWS if floats is None else floats.packing,
            stored_shape=(n, words),
            shape=(n, m),
            block=(1, settings.group_size),
            parts=tuple(_describe_parts(scales, offsets, floats, (n, groups), (e, count))),
            bits=settings.bits,
        )

    return [describe(e) for e in range(count)] if experts else describe(0)


def _describe_parts(
    scales: Companion,
    offsets: Companion | None,
    floats: _Floats | None,
    shape: tuple[int, int],
    expert: tuple[int, int],
) -> list[Part]:
    parts = [scales.part("scales", shape, expert, dtype=floats.scales_dtype if floats else None)]
    return parts if offsets is None else [*parts, offsets.part("offsets", shape, expert)]


def _find_settings(config: Mapping[str, Any], module: str) -> _Settings | None:
    """Find the mode, bits and group size of a layer; None if they are missing or not those of MLX.

    Settings of the layer replace those of all layers as a whole, as in mlx_lm 0.31 (utils.py, load_model) and
    mlx.nn.quantize: missing ones have the default of the mode.
    """
    own = config.get(module)
    settings = own if isinstance(own, Mapping) else config
    mode = settings.get("mode", "affine")
    floats = _MODES.get(mode) if isinstance(mode, str) else None
    default_bits, default_size = (floats.bits, floats.group_size) if floats else (4, 64)
    if settings is config:
        # `mlx.nn.quantize` has defaults too, but a config without them is not one of MLX.
        bits, size = config.get("bits"), config.get("group_size")
    else:
        bits, size = settings.get("bits", default_bits), settings.get("group_size", default_size)
    if own is False or type(bits) is not int or type(size) is not int:
        return None
    if floats:
        return _Settings(mode, bits, size) if (bits, size) == (floats.bits, floats.group_size) else None
    return _Settings(mode, bits, size) if mode == "affine" and bits in _BITS and size in _GROUP_SIZES else None


MLX = Format(
    name="mlx",
    read=_read,
    companions=(".scales", ".biases", ".qbiases"),
    dtypes=("U32",),
    endings=(WEIGHT_SUFFIX,),
    methods=(None, "metal"),
    settings={
        **dict.fromkeys(_SETTINGS, ANY),
        # The settings of layers, by their names.
        **{f"*.{name}": ANY for name in _SETTINGS},
        "**": (True, False),
    },
)
