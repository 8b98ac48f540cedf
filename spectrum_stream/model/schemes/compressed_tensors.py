"""The settings of compressed-tensors, as data (0.20, quantization/quant_config.py, quant_args.py)."""

from .format import ANY, Values

METHOD = "compressed-tensors"

_FORMATS = (
    *("dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "mixed-precision"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
)
_WEIGHTS = "config_groups.*.weights"

# The tensors of a weight show its format. A group can describe other weights, so these are the values of all formats
# that can be read.
SETTINGS: dict[str, Values] = {
    "format": _FORMATS,
    "config_groups.*.format": _FORMATS,
    "config_groups.*.targets": ANY,
    "config_groups.*.input_activations": ANY,
    "config_groups.*.output_activations": ANY,
    f"{_WEIGHTS}.num_bits": ANY,
    f"{_WEIGHTS}.type": ("int", "float"),
    f"{_WEIGHTS}.symmetric": (True, False),
    f"{_WEIGHTS}.group_size": ANY,
    f"{_WEIGHTS}.strategy": ("tensor", "channel", "group", "block", "tensor_group"),
    f"{_WEIGHTS}.block_structure": ANY,
    f"{_WEIGHTS}.dynamic": (False,),
    f"{_WEIGHTS}.actorder": ("weight", "static", "group", "dynamic"),
    f"{_WEIGHTS}.scale_dtype": ANY,
    f"{_WEIGHTS}.zp_dtype": ANY,
    f"{_WEIGHTS}.observer": ANY,
    f"{_WEIGHTS}.observer_kwargs": ANY,
}
