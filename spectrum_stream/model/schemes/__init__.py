"""The formats of quantized weights, told apart by the names, dtypes and shapes of tensors.

    float8       X.weight F8 (n, m)             X.weight_scale_inv or X.weight_scale: one, one a row, one a block
    int8         X.weight I8 (n, m)             X.weight_scale
    mxfp4        X_blocks U8 (e, n, m/32, 16)   X_scales U8 (e, n, m/32); the experts of gpt-oss
                 X.weight_packed U8 (n, m/2)    X.weight_scale U8 (n, m/32); compressed-tensors
    nvfp4        X.weight_packed U8 (n, m/2)    X.weight_scale F8_E4M3 (n, m/16), X.weight_global_scale: divides
                 X.weight U8 (n, m/2)           X.weight_scale F8_E4M3 (n, m/16), X.weight_scale_2; ModelOpt
    int4, int8   X.weight_packed I32 (n, mb/32) X.weight_scale, _zero_point, _g_idx; compressed-tensors
    gptq         X.qweight I32 (mb/32, n)       X.scales (g, n), X.qzeros I32 (g, nb/32), X.g_idx (m,)
    awq          X.qweight I32 (m, n/8)         X.scales (g, n), X.qzeros I32 (g, n/8)

A format is one function in one file. It gets a tensor that may hold a weight, its scales and zero points by name
(`Companions`) and the config, and returns how the weight is stored, why it cannot be read, or None if the tensor is
not in this format. To add a format, write such a function and add it to `SCHEMES`.

The scales of a weight can be in another shard. GPTQ and AWQ store the transpose, and such a matrix has its stored
shape. Every other format is rejected by name, because its stored values are not the weights.
"""

from collections.abc import Callable

from ...checkpoint.header import TensorInfo
from ..config import QuantizationConfig
from ..quantization import Quantization, Unreadable, is_companion
from .awq import awq
from .companions import Companions
from .float8 import float8
from .gptq import gptq
from .int8 import int8
from .mxfp4 import mxfp4
from .nvfp4 import nvfp4
from .packed_integers import packed_integers
from .unknown import unknown

# One `Quantization` for a weight, a list with one for each fused expert, or the reason why it cannot be read.
Found = Quantization | list[Quantization] | Unreadable

# The first answer counts. The order matters in three places. `nvfp4` leaves weights with other scales to `mxfp4`, and
# `gptq` leaves weights with packed columns to `awq`, so that only one of each pair reports an error. `unknown` comes
# last because it rejects all weights that the others did not read.
SCHEMES: tuple[Callable[[TensorInfo, Companions, QuantizationConfig], Found | None], ...] = (
    gptq,
    awq,
    packed_integers,
    nvfp4,
    mxfp4,
    float8,
    int8,
    unknown,
)


def find_quantization(tensor: TensorInfo, companions: Companions, config: QuantizationConfig) -> Found | None:
    """Find how a tensor that may hold a weight is stored.

    Returns:
        one `Quantization` for a weight, or a list with one for each expert of fused experts; `Unreadable` if the
        format is not supported or its scales are missing or wrong; None if the tensor is not quantized.
    """
    if is_companion(tensor.name) or 0 in tensor.shape:
        return None
    for scheme in SCHEMES:
        if (found := scheme(tensor, companions, config)) is not None:
            return found
    return None
