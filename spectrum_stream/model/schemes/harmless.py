"""Tensors, settings and metadata that do not change how a stored weight is read, as data, with their writers.

Everything else about a quantized weight must be in the lists of its format, or the weight is rejected.
"""

import re

from .format import ANY, Values

# A version number of a program.
_VERSION = re.compile(r"v?\d+(\.\w+)*([.+-]\w+)*")

# The endings of tensors beside a weight.
COMPANIONS = (
    *(".bias", "_bias"),  # the bias of the module
    # The scales of activations and of the cache: compressed-tensors, ModelOpt, transformers, vLLM, ComfyUI.
    *(".input_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".prob_scale"),
    *(".input_global_scale", ".input_zero_point", ".output_zero_point", ".activation_scale", ".scale_input"),
    *(".qscale_act", ".activation_scaling_factor"),  # Mistral, TensorRT-LLM
    *("_input_scale", "_activation_scale"),  # those of fused experts, transformers
    *(".k_bias", ".v_bias"),  # the cache, ModelOpt
    ".e_score_correction_bias",  # the router of DeepSeek-V3 and GLM
)

# Tensors at the top of a checkpoint that belong to its model: CLIP, SigLIP and old buffers.
TOP_TENSORS = (
    *("logit_scale", "logit_bias", "position_ids", "token_type_ids", "inv_freq"),
    *("hc_head_base", "hc_head_fn", "hc_head_scale"),  # DeepSeek-V4
)

# Scales of a module that are parameters of the model.
_SCALES = re.compile(
    r"(^|\.)(logit_scale|layer_scale|per_dim_scale|hc_\w+_scale"  # CLIP, ConvNeXt, Gemma, DeepSeek-V4
    r"|router\.(per_expert_)?scale|altup\.correct_output_scale"  # Gemma 4, Gemma 3n
    r"|\w*(norm|ln)\w*\.scale|[kv]_cache_scale)$"
)


def is_scale_of_module(tensor: str) -> bool:
    """Whether a tensor of a module is a parameter of the model, or belongs to its activations."""
    return tensor.endswith(COMPANIONS) or _SCALES.search(tensor) is not None


# The settings of a quantization config.
SETTINGS: dict[str, Values] = {
    "quant_method": ANY,  # `Format.methods` has its values
    # The modules without quantization, by the names of many libraries. Tensors show which weights are quantized.
    "modules_to_not_convert": ANY,
    "modules_to_convert": ANY,
    "ignore": ANY,
    "ignored_layers": ANY,
    "exclude_modules": ANY,
    "llm_int8_skip_modules": ANY,
    "lm_head": (True, False),
    "quant_lm_head": (True, False),
    # Activations and the cache: transformers, compressed-tensors, ModelOpt, auto-round.
    "activation_scheme": ANY,
    "activation_scale_ub": ANY,
    "kv_cache_scheme": ANY,
    "kv_cache_quant_algo": ANY,
    "act_bits": ANY,
    "act_data_type": ANY,
    "act_dynamic": ANY,
    "act_group_size": ANY,
    "act_sym": ANY,
    "static_attention_dtype": ANY,
    "static_attention_granularity": ANY,
    "static_kv_dtype": ANY,
    "static_kv_granularity": ANY,
    # How a program loads or computes: transformers.
    "dequantize": ANY,
    "run_compressed": ANY,
    "use_optimized_inference": ANY,
    # compressed-tensors: the state, a statistic, pruned experts, and steps that must be absent.
    "quantization_status": ("compressed", "frozen", "calibration", "initialized"),
    "global_compression_ratio": ANY,
    "moe_sparsity_config": ANY,
    "sparsity_config.format": ("dense",),
    "sparsity_config.global_sparsity": ANY,
    "sparsity_config.ignore": ANY,
    "sparsity_config.registry_requires_subclass": ANY,
    "sparsity_config.sparsity_structure": ANY,
    "sparsity_config.targets": ANY,
    "transform_config.config_groups": ({},),
    "version": _VERSION,
    # ModelOpt.
    "producer": ANY,
    "has_zero_point": (False,),
    "pre_quant_scale": (False,),
}

# How GPTQ, AWQ and auto-round found the integers, and the kernel that is to use them: AutoGPTQ, GPTQModel, AutoAWQ,
# transformers, auto-round.
SEARCH: dict[str, Values] = dict.fromkeys(
    (
        *(
            "damp_percent",
            "damp_auto_increment",
            "true_sequential",
            "static_groups",
            "act_group_aware",
            "mse",
            "meta",
        ),
        *("model_name_or_path", "model_file_base_name", "tokenizer", "dataset", "model_seqlen", "batch_size"),
        *("block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize"),
        *("pad_token_id", "max_input_length", "cache_block_outputs", "offload_to_disk", "desc_act"),
        *("use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config"),
        *("do_fuse", "fuse_max_seq_len", "modules_to_fuse"),
        *("amp", "autoround_version", "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input"),
        *("gradient_accumulate_steps", "iters", "nsamples", "seqlen", "lr", "minmax_lr", "low_gpu_mem_usage"),
        *("quant_block_list", "to_quant_block_names", "supported_types", "scale_dtype", "enable_alg_ext"),
    ),
    ANY,
)

# The settings that change no weight, so that two configs may differ on them.
MAY_DIFFER = frozenset(
    {"lm_head", "quant_lm_head", *(key for key, values in (SETTINGS | SEARCH).items() if values is ANY)}
    # Column order and method change how a weight is read.
    - {"quant_method", "desc_act", "static_groups"}
)

# The settings of a module or of a pattern of modules: GPTQModel's `dynamic`, auto-round's `extra_config`.
LAYERS: dict[str, Values] = {
    **dict.fromkeys(("dynamic.*.bits", "dynamic.*.group_size", "dynamic.*.sym", "dynamic.*.desc_act"), ANY),
    **dict.fromkeys(("dynamic.*.mse", "dynamic.*.damp_percent", "dynamic.*.static_groups"), ANY),
    **dict.fromkeys(("extra_config.*.bits", "extra_config.*.group_size", "extra_config.*.sym"), ANY),
    "extra_config.*.data_type": ("int", "float"),  # "float" of modules that are not quantized
    **dict.fromkeys(("extra_config.*.act_bits", "extra_config.*.act_data_type", "extra_config.*.act_sym"), ANY),
    **dict.fromkeys(("extra_config.*.act_dynamic", "extra_config.*.act_group_size"), ANY),
}

# The metadata of a shard; a last `*` stands for any text.
METADATA: dict[str, Values] = {
    "format": ("pt", "np", "tf", "flax", "mlx", "jax", "paddle"),  # safetensors, transformers, mlx
    "total_size": ANY,  # transformers' index, copied
    "total_parameters": ANY,
    "modelspec.*": ANY,  # a description of the model
    "ss_*": ANY,  # how kohya's scripts trained it
    "sshs_*": ANY,
    "title": ANY,
    "author": ANY,
    "description": ANY,
    "license": ANY,
    "_export_format": ("safetensors_state_dict",),  # ModelOpt, export/unified_export_hf.py
    "_class_name": ANY,
}
