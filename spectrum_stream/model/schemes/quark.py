"""The settings of Quark, as data (amd-quark 0.13, torch/export/config/config.py and torch/quantization/config)."""

from .format import ANY, Values

METHOD = "quark"

_WEIGHT = "global_quant_config.weight"


def settings(dtypes: tuple[str, ...], axis: int) -> dict[str, Values]:
    """Return the settings of weights of these dtypes, with scales along an axis.

    A checkpoint in which layers differ, or in which an algorithm changed the weights, has other values.
    """
    return {
        "export.weight_format": ("real_quantized",),
        "export.pack_method": ("order", "reorder"),  # of integers only
        "export.kv_cache_group": ANY,
        "export.min_kv_scale": ANY,
        "export.weight_merge_groups": ANY,
        "exclude": ANY,
        "quant_mode": ANY,
        "algo_config": ([],),
        "layer_quant_config": ({},),
        "layer_type_quant_config": ({},),
        "kv_cache_quant_config": ANY,
        "kv_cache_post_rope": ANY,
        "softmax_quant_spec": ANY,
        "global_quant_config.input_tensors": ANY,
        "global_quant_config.output_tensors": ANY,
        "global_quant_config.target_device": ANY,
        f"{_WEIGHT}.dtype": dtypes,
        f"{_WEIGHT}.ch_axis": (axis,),
        f"{_WEIGHT}.qscheme": ("per_tensor", "per_channel", "per_group"),
        f"{_WEIGHT}.group_size": (32,),
        f"{_WEIGHT}.symmetric": (True,),
        f"{_WEIGHT}.is_dynamic": (False,),
        f"{_WEIGHT}.is_scale_quant": (False,),
        f"{_WEIGHT}.scale_format": ANY,  # the dtype of the scales shows it
        f"{_WEIGHT}.scale_type": ANY,
        f"{_WEIGHT}.zero_point_type": ANY,
        f"{_WEIGHT}.round_method": ANY,
        f"{_WEIGHT}.observer_cls": ANY,
        f"{_WEIGHT}.scale_calculation_mode": ANY,
    }
