"""The renamings of transformers by family, as data.

transformers 5 fuses the experts of a layer and moves the parts of vision-language models. transformers 4 (from 4.52)
moves these parts too, and keeps experts as separate parameters. A family is the `model_type` of config.json. Each
rule is a regular expression and its replacement, and the rules of a family are applied one after another. A test
compares the table with transformers itself (conversion_mapping.py and core_model_loading.py of 5.24).
"""

import re
from collections.abc import Callable, Mapping
from functools import cache

Rules = tuple[tuple[str, str], ...]

# Both versions rename these for every family. The last two are the norm and the direction of a weight under
# weight_norm. (transformers 5.24, conversion_mapping.py, "legacy"; 4.57, _fix_state_dict_key_on_load)
_OLD_NAMES: Rules = (
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
)
# Few names have these texts. This test is faster than the expressions.
_OLD_ENDINGS = (".gamma", ".beta", ".weight_g", ".weight_v")

# The matrices of an expert become parts of the two parameters of the layer.
_EXPERTS: Rules = (
    (r"\.experts\.\d+\.(gate_proj|up_proj)\.weight$", ".experts.gate_up_proj"),
    (r"\.experts\.\d+\.down_proj\.weight$", ".experts.down_proj"),
)
_LFM2: Rules = (
    (r"\.experts\.\d+\.(w1|w3)\.weight$", ".experts.gate_up_proj"),
    (r"\.experts\.\d+\.w2\.weight$", ".experts.down_proj"),
)
_MIXTRAL: Rules = (*_LFM2, (r"\.block_sparse_moe\.", ".mlp."))
_PHIMOE: Rules = (*_MIXTRAL, (r"\.mlp\.gate\.weight$", ".mlp.router.weight"))
_GRANITE: Rules = (
    (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
    (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
    (r"\.block_sparse_moe\.router\.layer\.", ".block_sparse_moe.router."),
)
_NEMOTRON: Rules = (
    (r"^backbone\.", "model."),
    (r"\.experts\.\d+\.(up_proj|down_proj)\.weight$", r".experts.\1"),
)
# The language model, its head, and the other parts of a multimodal model.
_MULTIMODAL: Rules = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|vision_model|multi_modal_projector|image_newline)\b", r"model.\1"),
)
# The towers of CLIP and SigLIP are one level flatter in transformers 5.
_TOWER: Rules = ((r"vision_tower\.vision_model\.", "vision_tower."),)
_ARIA: Rules = (
    *_MULTIMODAL,
    *_TOWER,
    (r"\.experts\.fc1\.weight$", ".experts.gate_up_proj"),
    (r"\.experts\.fc2\.weight$", ".experts.down_proj"),
)
_QWEN2_VL: Rules = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!visual\.|language_model\.)", "model.language_model."),
)
_VIT: Rules = (
    (r"encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
_DEEPSEEK_V4: Rules = (
    (r"^(embed|norm|layers)\.", r"model.\1."),
    (r"^head\.", "lm_head."),
    (r"^model\.embed\.", "model.embed_tokens."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    *_LFM2,
    (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
    (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
    (r"\.ffn\.", ".mlp."),
    (r"\.attn\.(compressor|indexer\.compressor)\.norm\.", r".attn.\1.kv_norm."),
    (r"\.attn\.norm\.", ".attn.kv_norm."),
    (r"\.attn\.q_norm\.", ".attn.q_a_norm."),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.wo_(a|b)\.", r".o_\1_proj."),
    (r"\.wq_(a|b)\.", r".q_\1_proj."),
    (r"\.attn\.", ".self_attn."),
)

# fmt: off
_SAME_NAMES = (
    "llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "cohere",
    "cohere2", "olmo", "olmo2", "smollm3", "stablelm", "starcoder2", "exaone4", "granite", "gpt2", "gpt_bigcode",
    "gptj", "falcon", "bloom", "mpt", "opt", "persimmon", "jetmoe", "gpt_oss", "qwen3_vl", "qwen3_vl_moe", "qwen3_5",
    "bert", "roberta", "modernbert", "t5", "mamba", "mamba2", "falcon_mamba", "bamba", "falcon_h1",
    "clip", "siglip", "idefics3", "smolvlm", "llama4",
    "xlm-roberta", "distilbert", "electra", "camembert", "mpnet", "albert", "deberta-v2", "bart", "mbart", "mt5",
    "umt5", "gpt_neo", "codegen", "arcee", "apertus", "ernie4_5", "helium", "hunyuan_v1_dense", "lfm2", "nemotron",
    "seed_oss",
)
_SEPARATE_EXPERTS = (
    "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "olmoe", "flex_olmo", "qwen3_next",
    "ernie4_5_moe", "dots1", "hunyuan_v1_moe", "afmoe", "exaone_moe", "jamba", "qwen3_5_moe",
)
_WITH_LANGUAGE_MODEL = (
    "llava", "llava_next", "vipllava", "gemma3", "paligemma", "mistral3", "internvl", "aya_vision", "got_ocr2",
    "mllama",
)
# fmt: on
# The rules of transformers 5 by model_type; none if the names stay as they are.
V5: Mapping[str, Rules] = {
    **dict.fromkeys(_SAME_NAMES, ()),
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
    "phimoe": _PHIMOE,
    **dict.fromkeys(_SEPARATE_EXPERTS, _EXPERTS),
    "lfm2_moe": _LFM2,
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), _GRANITE),
    "nemotron_h": _NEMOTRON,
    **dict.fromkeys(_WITH_LANGUAGE_MODEL, (*_MULTIMODAL, *_TOWER)),
    "aria": _ARIA,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN2_VL),
    "gpt_neox": ((r"^embed_out\.", "lm_head."),),
    "vit": _VIT,
    # The class with a projection keeps the prefix, which `find` adds.
    "clip_text_model": ((r"^text_model\.", ""),),
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), ((r"^vision_model\.", ""),)),
    "deepseek_v4": _DEEPSEEK_V4,
}
# The rules of transformers 4 from 4.52 on, which keeps experts and towers as they are stored.
_NOT_IN_V4 = {
    "deepseek_v4", "qwen3_5", "qwen3_5_moe", "minimax_m2", "afmoe", "exaone_moe", "nemotron_h", "lfm2_moe",
}  # fmt: skip
V4: Mapping[str, Rules] = (
    dict.fromkeys(V5.keys() - _NOT_IN_V4, ())
    | {family: _MULTIMODAL for family, rules in V5.items() if rules[: len(_MULTIMODAL)] == _MULTIMODAL}
    | dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN2_VL)
)


def compile_rules(rules: Rules) -> Callable[[str], str]:
    """Make a function from the stored name of a parameter to its name after loading.

    Without rules, it renames what transformers renames for every family.
    """
    compiled = [(re.compile(pattern), instead) for pattern, instead in rules]
    old = [(re.compile(pattern), instead) for pattern, instead in _OLD_NAMES]

    @cache
    def rename(parameter: str) -> str:
        for pattern, instead in compiled:
            parameter = pattern.sub(instead, parameter)
        if parameter.endswith(_OLD_ENDINGS):
            for pattern, instead in old:
                parameter = pattern.sub(instead, parameter)
        return parameter

    return rename
