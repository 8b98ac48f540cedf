"""The settings of ModelOpt, as data (ModelOpt 0.47, torch/export/convert_hf_config.py)."""

from .format import ANY, Values

METHOD = "modelopt"

# What can be read. Other layers of a mixed checkpoint may have any of them.
_READABLE = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8", "MXFP4", "W4A8_MXFP4_FP8", "NVFP4", "W4A16_NVFP4")


def settings(*algorithms: str) -> dict[str, Values]:
    """Return the settings of weights that these algorithms store."""
    return {
        "quant_algo": (*algorithms, "MIXED_PRECISION"),
        "group_size": (16, 32),
        "quantized_layers.*.quant_algo": _READABLE,
        "quantized_layers.*.group_size": ANY,
    }
