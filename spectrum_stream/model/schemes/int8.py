"""Int8 with its scales, as compressed-tensors stores it."""

from ...checkpoint.header import TensorInfo
from ..config import QuantizationConfig
from ..matrix import FLOAT_DTYPES
from ..names import WEIGHT_SUFFIX
from ..quantization import Quantization, Unreadable
from . import compressed_tensors
from .companions import Companions
from .format import Format
from .grid import quantize_by_grid
from .unknown import reject


def _read(weight: TensorInfo, companions: Companions, config: QuantizationConfig) -> Quantization | Unreadable | None:
    """Read a weight (n, m) of integers with scales for the whole, a row, a group of a row or a block."""
    if weight.dtype != "I8" or len(weight.shape) != 2 or not weight.name.endswith(WEIGHT_SUFFIX):
        return None
    scales = companions.get(f"{weight.name}_scale_inv", f"{weight.name}_scale")
    # Without these scales, or with zero points, the integers belong to another format, such as bitsandbytes.
    if scales is None or companions.get(f"{weight.name}_zero_point"):
        return reject(weight, companions, config)
    if scales.info.dtype not in FLOAT_DTYPES:
        return scales.misfit(weight.shape)
    n, m = weight.shape
    return quantize_by_grid("int8", scales, (n, m), config.block_sizes)


INT8 = Format(
    name="int8",
    read=_read,
    companions=(".weight_scale", ".weight_scale_inv"),
    dtypes=("I8",),
    endings=(WEIGHT_SUFFIX,),
    methods=(None, compressed_tensors.METHOD),
    settings=compressed_tensors.SETTINGS,
)
