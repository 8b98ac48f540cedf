"""The layouts of ComfyUI: float8, int8, MXFP8 and NVFP4, each told by a marker.

A marker is a JSON object with the format of a layer. It is in the bytes of the tensor `X.comfy_quant`, or in the
entry `_quantization_metadata` of the header. Names and shapes are often those of ModelOpt, but the scales of blocks
lie in the tiles of cuBLAS, and FP4 has the even column in the high bits. (ComfyUI at commit 0271a46, comfy/ops.py,
_load_quantized_module; comfy-kitchen 0.2.40, tensor/)
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from ...checkpoint.header import TensorInfo
from ...files import parse_json
from ..config import QuantizationConfig
from ..matrix import FLOAT_DTYPES
from ..names import WEIGHT_SUFFIX, module_of
from ..no_score import NoScore
from ..quantization import Packing, Part, Quantization, Unreadable
from .companions import EXPONENT_DTYPES, MISSING_SCALES, Companion, Companions
from .format import Format
from .grid import quantize_by_grid

_METADATA = "_quantization_metadata"
_METADATA_KEYS = {"format_version", "layers"}
_MARKER = ".comfy_quant"
# A marker has less than 200 bytes. A larger tensor is something else.
_LARGEST_MARKER_NBYTES = 10_000
# The sides of tiles of scales.
_TILE = (128, 4)


class _Layout(NamedTuple):
    """A format: the dtype of its values, and the columns that share a scale in a tile; None without tiles."""

    dtype: str
    columns: int | None
    packing: Packing = Packing.NONE


_LAYOUTS = {
    "float8_e4m3fn": _Layout("F8_E4M3", None),
    "float8_e5m2": _Layout("F8_E5M2", None),
    "int8_tensorwise": _Layout("I8", None),
    "mxfp8": _Layout("F8_E4M3", 32),
    "nvfp4": _Layout("U8", 16, Packing.FP4_HIGH_FIRST),
}


class Marker(NamedTuple):
    """What a marker says about a layer.

    Attributes:
        shape: the shape of the weight without padding; None if the marker does not have it.
        rotation: the columns that are rotated together; None without rotation.
        unknown: the first thing in it that is not understood; "" if there is none.
    """

    format: str
    shape: tuple[int, int] | None
    rotation: int | None
    unknown: str


def parse_marker(body: Any) -> Marker:
    """Parse a marker: the bytes of a tensor, or an entry of the metadata."""
    try:
        data = parse_json(body) if isinstance(body, bytes) else body
    except ValueError:
        data = None
    if not isinstance(data, Mapping) or not isinstance(data.get("format"), str):
        return Marker("", None, None, "no format")
    # Some writers put the parameters into an object of their own.
    parameters = data.get("params", {})
    data = {**(parameters if isinstance(parameters, Mapping) else {}), **data}
    name, layout = data["format"], _LAYOUTS.get(data["format"])
    if layout is None:
        return Marker(name, None, None, f"format {name}")
    shape, rotation = _parse_shape(data.get("orig_shape")), data.get("convrot_groupsize", 256)
    known = {
        "format": True,
        "params": isinstance(parameters, Mapping),
        "full_precision_matrix_mult": True,  # how the layer computes
        "orig_dtype": True,
        "orig_shape": shape is not None,
        "group_size": data.get("group_size") == layout.columns,
        "convrot": name == "int8_tensorwise" and type(data.get("convrot")) is bool,
        # A rotation is by a Hadamard matrix, and its size is a power of 4.
        "convrot_groupsize": name == "int8_tensorwise" and rotation in (4**k for k in range(1, 9)),
    }
    unknown = next((f"{key} = {value}" for key, value in data.items() if not known.get(key, False)), "")
    return Marker(name, shape, rotation if data.get("convrot") is True else None, unknown)


def _parse_shape(value: Any) -> tuple[int, int] | None:
    match value:
        case [int(n), int(m)] if type(n) is int and type(m) is int and n > 0 and m > 0:
            return n, m
    return None


def _read(weight: TensorInfo, companions: Companions, config: QuantizationConfig) -> Quantization | Unreadable | None:
    """Read a weight with a marker.

    The rows of a rotated weight are multiplied by an orthogonal matrix, which does not change the singular values, so
    it is not rotated back.
    """
    if not weight.name.endswith(WEIGHT_SUFFIX) or weight.dtype in FLOAT_DTYPES:
        return None
    if not companions.metadata and _MARKER.removeprefix(".") not in companions.components:
        return None
    tensor = companions.get(f"{module_of(weight.name)}{_MARKER}")
    markers = [parse_marker(entry) for entry in _find_entries(companions, module_of(weight.name))]
    if tensor is not None:
        if tensor.info.dtype != "U8" or tensor.info.nbytes > _LARGEST_MARKER_NBYTES:
            return tensor.misfit(weight.shape)
        body = companions.local_bytes(tensor)
        # From a remote shard this would take a request for each matrix. There the format follows from the tensors,
        # and is checked when the matrix is read.
        markers.append(_assume_marker(weight, companions) if body is None else parse_marker(body))
    other = next((text for key, text in companions.metadata if key == _METADATA and not _parse_layers(text)), None)
    if other is not None:
        return Unreadable(NoScore.NOT_UNDERSTOOD, f"comfyui with unknown metadata, {_METADATA} = {other}"[:100])
    if not markers:
        return None
    marker = markers[0]
    layout = _LAYOUTS.get(marker.format)
    unknown = next((m.unknown for m in markers if m.unknown), "")
    if unknown or layout is None or any(m.format != marker.format for m in markers):
        return Unreadable(NoScore.NOT_UNDERSTOOD, f"comfyui with {unknown or 'two formats'}"[:100])
    shape = next((m.shape for m in markers if m.shape is not None), None)
    if len(weight.shape) != 2 or weight.dtype != layout.dtype:
        return Unreadable(NoScore.BAD_SCALES, f"the marker is {marker.format}, but the weight is {weight.dtype}")
    scales = companions.get(f"{weight.name}_scale")
    if scales is None:
        return MISSING_SCALES
    rotation = next((m.rotation for m in markers if m.rotation is not None), None)
    if rotation is not None and weight.shape[1] % rotation:
        return Unreadable(NoScore.BAD_SCALES, f"{weight.shape[1]} columns are not rotated by {rotation}")
    if layout.columns is not None:
        return _read_tiles(weight, companions, scales, marker.format, shape, tensor)
    return _read_rows(weight, scales, marker.format, shape, tensor)


def check_marker(body: bytes, how: Quantization) -> str | None:
    """Return the difference between a marker and the storage that was assumed; None if they agree."""
    marker = parse_marker(body)
    if marker.unknown or marker.format != how.marker:
        return f"the marker has {marker.unknown or f'format {marker.format}'}, not format {how.marker}"
    if marker.shape not in (None, how.shape):
        return f"the marker has the shape {list(marker.shape)}, not {list(how.shape)}"
    if marker.rotation is not None and how.stored_shape[1] % marker.rotation:
        return f"{how.stored_shape[1]} columns are not rotated by {marker.rotation}"
    return None


def _find_entries(companions: Companions, module: str) -> list[Any]:
    """Find the entries of a layer in the metadata of the shards."""
    layers = [_parse_layers(value) for key, value in companions.metadata if key == _METADATA]
    return [found[module] for found in layers if module in found]


@lru_cache(maxsize=8)
def _parse_layers(text: str) -> Mapping[str, Any]:
    """Parse the metadata: the entries by the names of layers; empty if it is something else."""
    try:
        data = parse_json(text)
    except ValueError:
        return {}
    layers = data.get("layers") if isinstance(data, Mapping) and data.keys() <= _METADATA_KEYS else None
    return layers if isinstance(layers, Mapping) else {}


def _assume_marker(weight: TensorInfo, companions: Companions) -> Marker:
    """Return the marker that fits the dtypes of a weight and its scales."""
    scales = companions.get(f"{weight.name}_scale")
    has_powers = scales is not None and scales.info.dtype in EXPONENT_DTYPES
    fitting = [name for name, layout in _LAYOUTS.items() if layout.dtype == weight.dtype]
    # Float8 can also be in blocks with powers of two.
    name = "mxfp8" if has_powers and "mxfp8" in fitting else next(iter(fitting), "")
    return Marker(name, None, None, "" if name else f"dtype {weight.dtype}")


def _read_rows(
    weight: TensorInfo, scales: Companion, name: str, shape: tuple[int, int] | None, marker: Companion | None
) -> Quantization | Unreadable:
    """Read float8 or int8 with one scale for the whole, or one a row."""
    n, m = weight.shape
    # torch would broadcast scales (n,) along the rows, so they would not be those of the rows.
    if shape not in (None, (n, m)) or scales.info.shape not in ((), (1,), (1, 1), (n, 1)):
        return scales.misfit(shape or (n, m))
    found = quantize_by_grid("int8" if weight.dtype == "I8" else "float8", scales, (n, m), [])
    return found if isinstance(found, Unreadable) else _with_marker(found, name, marker)


def _read_tiles(
    weight: TensorInfo,
    companions: Companions,
    scales: Companion,
    name: str,
    shape: tuple[int, int] | None,
    marker: Companion | None,
) -> Quantization | Unreadable:
    """Read NVFP4 or MXFP8. Both are padded to the next multiple of 16 or 32 on each side."""
    layout = _LAYOUTS[name]
    columns = layout.columns or 1
    rows, stored = weight.shape
    width = stored if layout.packing is Packing.NONE else 2 * stored
    n, m = shape or (rows, width)
    padded = (-(-rows // _TILE[0]) * _TILE[0], -(-(width // columns) // _TILE[1]) * _TILE[1])
    if (rows, width) not in ((n, m), (-(-n // columns) * columns, -(-m // columns) * columns)) or width % columns:
        return Unreadable(NoScore.BAD_SCALES, f"a weight of {rows} x {width}, but the marker has {n} x {m}")
    dtypes = EXPONENT_DTYPES if layout.packing is Packing.NONE else ("F8_E4M3", "U8")
    if scales.info.dtype not in dtypes or prod(scales.info.shape) != prod(padded):
        return scales.misfit((rows, width))
    parts: list[Part] = [
        scales.part("scales", padded, dtype="F8_E8M0" if layout.packing is Packing.NONE else "F8_E4M3")
    ]
    if layout.packing is not Packing.NONE:
        whole = companions.get(f"{weight.name}_scale_2")
        if whole is None:
            return Unreadable(NoScore.MISSING_SCALES, "no global scale")
        if whole.info.dtype not in FLOAT_DTYPES or prod(whole.info.shape) != 1:
            return whole.misfit((n, m))
        parts.append(whole.part("factor", (1,)))
    found = Quantization(
        scheme=f"{name}, comfyui",
        packing=layout.packing,
        stored_shape=(rows, stored),
        shape=(n, m),
        block=(1, columns),
        parts=tuple(parts),
        tiled=True,
    )
    return _with_marker(found, name, marker)


def _with_marker(found: Quantization, name: str, marker: Companion | None) -> Quantization:
    """Add the marker to the parts, so that it is checked when the matrix is read."""
    parts = found.parts if marker is None else (*found.parts, marker.part("marker"))
    return replace(found, parts=parts, marker=name)


COMFYUI = Format(
    name="comfyui",
    read=_read,
    companions=(".weight_scale", ".weight_scale_2", _MARKER),
    endings=(WEIGHT_SUFFIX,),
    methods=(None,),
    metadata=(_METADATA,),
)
