"""The formats of quantized weights, told apart by the names, dtypes and shapes of tensors.

    comfyui      X.weight                       X.weight_scale, X.comfy_quant or metadata: the format
    mlx          X.weight U32 (n, mb/32)        X.scales (n, m/g), X.biases
    float8       X.weight F8 (n, m)             X.weight_scale_inv and other names: one, one a row, one a block
    int8         X.weight I8 (n, m)             X.weight_scale
    mxfp4        X_blocks U8 (e, n, m/32, 16)   X_scales U8 (e, n, m/32); the experts of gpt-oss
                 X.weight_packed U8 (n, m/2)    X.weight_scale U8 (n, m/32); compressed-tensors
                 X.weight I8 (n, m/2)           X.scale F8_E8M0 (n, m/32); DeepSeek-V4
    nvfp4        X.weight_packed U8 (n, m/2)    X.weight_scale F8_E4M3 (n, m/16), X.weight_global_scale: divides
                 X.weight U8 (n, m/2)           X.weight_scale F8_E4M3 (n, m/16), X.weight_scale_2; ModelOpt
    int4, int8   X.weight_packed I32 (n, mb/32) X.weight_scale, _zero_point, _g_idx; compressed-tensors
    gptq         X.qweight I32 (mb/32, n)       X.scales (g, n), X.qzeros I32 (g, nb/32), X.g_idx (m,)
    awq          X.qweight I32 (m, n/8)         X.scales (g, n), X.qzeros I32 (g, n/8)

A format is one `Format` in one file. Its reader gets a tensor that may hold a weight, the tensors beside it by name
(`Companions`) and the config, and returns how the weight is stored, why it cannot be read, or None if the tensor is
not in this format. To add a format, write such a file and add its `Format` to `SCHEMES`.

Nothing is scored on a guess. A weight is rejected if a tensor beside it, a setting of the config, an entry of the
metadata or a marker is neither read by its format nor harmless by the lists of `harmless.py`.

The scales of a weight can be in another shard. GPTQ and AWQ store the transpose, and such a matrix has its stored
shape. Every other format is rejected by name, because its stored values are not the weights.
"""

from functools import lru_cache

from ...checkpoint.header import TensorInfo
from ...checkpoint.tensors import Checkpoint
from ..config import QuantizationConfig
from ..matrix import FLOAT_DTYPES
from ..names import WEIGHT_SUFFIX, is_fused_experts, module_of
from ..no_score import NoScore
from ..quantization import Packing, Quantization, Unreadable
from . import companions, harmless
from .awq import AWQ
from .comfyui import COMFYUI
from .companions import Companions
from .float8 import FLOAT8, PLAIN_FLOAT8
from .format import Format, Found
from .gptq import GPTQ
from .int8 import INT8
from .layers import Layers
from .mlx import MLX
from .mxfp4 import DEEPSEEK_FP4, MXFP4
from .nvfp4 import NVFP4
from .packed_integers import PACKED_INTEGERS
from .unknown import COMPANIONS as UNKNOWN_COMPANIONS
from .unknown import describe, find_format_beside, owner_of, reject_unknown
from .unread import find_unread_beside, find_unread_elsewhere

# The first answer counts. The order matters in four places. A marker of `COMFYUI` counts more than names and shapes.
# `FLOAT8` rejects weights that lack their scales, so that `PLAIN_FLOAT8` does not read them. `NVFP4` leaves weights
# with other scales to `MXFP4`, and `GPTQ` leaves weights with packed columns to `AWQ`, so that only one of each pair
# reports an error.
SCHEMES: tuple[Format, ...] = (
    COMFYUI,
    MLX,
    GPTQ,
    AWQ,
    PACKED_INTEGERS,
    NVFP4,
    MXFP4,
    DEEPSEEK_FP4,
    FLOAT8,
    PLAIN_FLOAT8,
    INT8,
)

_VALUES = {ending: instead for scheme in SCHEMES for ending, instead in scheme.values.items()}
# The endings of scales and zero points, as opposed to those of activations.
_SCALES = tuple({ending: None for scheme in SCHEMES for ending in scheme.companions})
_VALUE_ENDINGS = tuple(_VALUES)
_COMPANIONS = (
    *(*_SCALES, *UNKNOWN_COMPANIONS),
    *(marker for scheme in SCHEMES for marker in scheme.markers if marker.startswith(".")),
    *(ending for ending in harmless.COMPANIONS if not ending.endswith("bias")),
)

# The last component of a name is enough to find most of them.
_OF_COMPONENT = tuple(ending for ending in _COMPANIONS if "." not in ending[1:])
_OF_COMPONENTS = tuple(ending for ending in _COMPANIONS if "." in ending[1:])


def parameter_of(tensor: str) -> str:
    """Return the name of the weight that a tensor stores: `X.weight` for `X.qweight`."""
    # Most names have none of the endings. One test finds that.
    return companions.parameter_of(tensor, _VALUES) if tensor.endswith(_VALUE_ENDINGS) else tensor


def owners_of(tensor: str) -> set[str]:
    """Return the names that the tensors beside a quantized weight can begin with: its module, or the parameter."""
    return {module_of(parameter_of(tensor)), owner_of(tensor)}


def is_companion(tensor: str) -> bool:
    """Whether a tensor holds scales, zero points or the like, by its name."""
    return _ends_as_companion(tensor[max(tensor.rfind("."), 0) :]) or tensor.endswith(_OF_COMPONENTS)


@lru_cache(maxsize=1024)
def _ends_as_companion(last: str) -> bool:
    return last.endswith(_OF_COMPONENT)


def _numbers_of(tensor: TensorInfo, found: Quantization) -> tuple[str, int]:
    """Return the type, `int` or `float`, and the bits of the values of a weight."""
    if found.bits:
        return "int", found.bits
    if found.packing in (Packing.FP4, Packing.FP4_HIGH_FIRST):
        return "float", 4
    return "int" if tensor.dtype == "I8" else "float", 8


class Reader:
    """Finds how the weights of a checkpoint are stored."""

    def __init__(self, checkpoint: Checkpoint, config: QuantizationConfig) -> None:
        self._companions = Companions(checkpoint, _VALUES, harmless.TOP_TENSORS, harmless.is_scale_of_module)
        self._config = config
        self._layers = Layers(config)
        self._unread = {scheme.name: find_unread_elsewhere(scheme, self._companions, config) for scheme in SCHEMES}
        self._read_beside = {scheme.name: frozenset((*harmless.COMPANIONS, *scheme.markers)) for scheme in SCHEMES}
        self._schemes: dict[str, tuple[Format, ...]] = {}
        self._has_scales = self._companions.has(_SCALES)

    def find_quantization(self, tensor: TensorInfo) -> Found | None:
        """Find how a tensor that may hold a weight is stored.

        Returns:
            one `Quantization` for a weight, or a list with one for each expert of fused experts; `Unreadable` if the
            format is not supported, its scales are missing or wrong, or something about it is not understood; None if
            the tensor is not quantized.
        """
        if is_companion(tensor.name) or 0 in tensor.shape:
            return None
        if self._companions.twin_of(tensor.name) is not None:
            return Unreadable(NoScore.STORED_TWICE)
        config: QuantizationConfig | Unreadable = self._config
        if self._layers.has_rules:
            config = self._layers.config_of(module_of(parameter_of(tensor.name)))
        settings = self._config if isinstance(config, Unreadable) else config
        for scheme in self._find_schemes(tensor.dtype):
            if not tensor.name.endswith(scheme.endings):
                continue
            found = scheme.read(tensor, self._companions, settings)
            if found is not None:
                return config if isinstance(config, Unreadable) else self._check(scheme, tensor, found)
        return self._check_plain(tensor) or reject_unknown(tensor, self._companions, self._config)

    def _find_schemes(self, dtype: str) -> tuple[Format, ...]:
        """Return the formats that have tensors of a dtype."""
        if dtype not in self._schemes:
            self._schemes[dtype] = tuple(
                scheme for scheme in SCHEMES if scheme.dtypes is None or dtype in scheme.dtypes
            )
        return self._schemes[dtype]

    def _check(self, scheme: Format, tensor: TensorInfo, found: Found) -> Found:
        """Reject a weight if its format does not read everything about it."""
        if (other := find_format_beside(tensor, self._companions)) is not None:
            return Unreadable(NoScore.UNSUPPORTED_DTYPE, other)
        if isinstance(found, Unreadable):
            return self._explain(scheme, found)
        parts = [found] if isinstance(found, Quantization) else found
        unread = self._unread[scheme.name] or find_unread_beside(
            self._read_beside[scheme.name], tensor, parts, self._companions
        )
        if unread is not None:
            return Unreadable(NoScore.NOT_UNDERSTOOD, f"{scheme.name} with {unread}")
        roles = {part.role for one in parts for part in one.parts}
        if self._config.has_zeros and "zeros" not in roles:
            return Unreadable(NoScore.MISSING_SCALES, f"{scheme.name} without its zero points")
        if self._config.has_order and "groups" not in roles:
            return Unreadable(NoScore.MISSING_SCALES, f"{scheme.name} without its column order")
        if self._config.has_no_zeros and "zeros" in roles:
            return Unreadable(NoScore.NOT_UNDERSTOOD, f"{scheme.name} with zero points, but symmetric = true")
        said = self._config.numbers
        if said is not None and (numbers := _numbers_of(tensor, parts[0])) != said:
            stored, stated = ("{}{}".format(*pair) for pair in (numbers, said))
            return Unreadable(NoScore.NOT_UNDERSTOOD, f"{scheme.name} with {stored}, but the config says {stated}")
        return found

    def _explain(self, scheme: Format, found: Unreadable) -> Unreadable:
        """Name the method or the setting that a reader does not know, if it could not read a weight."""
        if found.no_score not in (NoScore.UNSUPPORTED_DTYPE, NoScore.MISSING_SCALES, NoScore.BAD_SCALES):
            return found
        method, unread = self._config.quant_method, self._unread[scheme.name]
        if method is not None and method not in scheme.methods:
            return Unreadable(NoScore.UNSUPPORTED_DTYPE, describe(self._config) or found.detail)
        if found.no_score is NoScore.UNSUPPORTED_DTYPE and (unread is None or method is None):
            return found
        if unread is None:
            name = describe(self._config) or scheme.name
            return Unreadable(found.no_score, f"{name}: {found.detail}" if found.detail else name)
        return Unreadable(NoScore.NOT_UNDERSTOOD, f"{scheme.name} with {unread}")

    def _check_plain(self, tensor: TensorInfo) -> Unreadable | None:
        """Reject a weight of plain numbers with scales beside it, unless the config says that the numbers count."""
        is_matrix = len(tensor.shape) == 2 and tensor.name.endswith(WEIGHT_SUFFIX)
        is_fused = len(tensor.shape) == 3 and is_fused_experts(tensor.name.removesuffix(WEIGHT_SUFFIX))
        if tensor.dtype not in FLOAT_DTYPES or not (is_matrix or is_fused) or self._config.is_dense:
            return None
        owner = tensor.name.removesuffix(WEIGHT_SUFFIX)
        scales = self._companions.find(owner, _SCALES) if self._has_scales else None
        if scales is None:
            return None
        name = scales.info.name.removeprefix(owner)
        return Unreadable(NoScore.NOT_UNDERSTOOD, f"plain {tensor.dtype} with an unused tensor beside it, {name}")
