"""Make random checkpoints from names, dtypes, shapes and configs of many formats.

A function chooses the parts, so hypothesis, atheris and a plain random generator can make the same checkpoints. Most
checkpoints are plausible in one part and wrong in another.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spectrum_stream.checkpoint.header import DTYPE_BITS

# A function that returns an index below its argument.
Choose = Callable[[int], int]

_MODULES = (
    "lm_head", "model.embed_tokens", "embed_tokens", "model.norm", "output", "shared", "", ".", "a", "weight", "0",
    "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.q_proj_2",
    "model.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.experts.1.up_proj",
    "model.layers.1.mlp.experts.0.gate_proj", "model.layers.0.mlp.experts.gate_up_proj", "mlp.experts.up_proj",
    "model.layers.0.mlp.experts", "experts.0.w1", "layers.0.ffn.experts.mlp.w1", "moe.gate_proj", "x.input_linear",
    ".q_proj", ".input_layernorm", "..", "model..layers.0.q", "model.layers.99.eh_proj", "mtp.layers.0.q_proj",
    "vision.layers.0.q_proj", "audio_tower.layers.0.q", "module.model.layers.0.mlp.up_proj", "_orig_mod.a",
    "base_model.model.a", "a.base_layer", "a_b", "a_b_c", "a.weight", "transformer.h.0.attn.c_attn", "wte",
    "layers.0.LayerNorm", "conv.experts.w", "lm_head.decoder", "encoder.embed_tokens", "decoder.embed_tokens",
    "\u00b2.q", "\u0663.q", "layers.00.q", "layers.999999999999.q", "a\n", "x" * 300,
)  # fmt: skip
_ENDINGS = (
    ".weight", ".weight", ".weight", "", ".bias", ".qweight", ".weight_packed", "_blocks", ".blocks", ".gamma",
    ".weight_g", ".weight_v", ".W_q", "._data", ":qdata", "_qdata", ".codes", ".lora_A.weight", ".lora_B.weight",
)  # fmt: skip
_BESIDE = (
    ".weight_scale_inv", ".weight_scale", ".scale", "_scale", "_scale_inv", ".scales", ".biases", ".qzeros", ".g_idx",
    ".weight_zero_point", ".weight_shape", ".weight_g_idx", ".weight_global_scale", ".weight_scale_2", ".comfy_quant",
    "_scales", "_bias", "_input_scale", ".input_scale", ".absmax", ".SCB", ".weight.absmax", ".zeros",
    ".smooth_scale",
    ".weight_quantizer._svdquant_lora_a", ".quant_state.bitsandbytes__nf4", ".qscale_weight", "_weight_scale",
    ".act.scales", ".weight_offset", ".unknown", ".rotation", ".svd_up",
)  # fmt: skip
# Weights that some config of `_QUANTIZATIONS` reads: the dtype and the shape of each tensor, by its ending.
_WHOLE: tuple[dict[str, tuple[str, list[int]]], ...] = (
    {".weight": ("BF16", [8, 4])},
    {".weight": ("F8_E4M3", [8, 4]), ".weight_scale_inv": ("F32", [1, 1])},
    {".weight": ("F8_E4M3", [8, 64]), ".scale": ("F8_E8M0", [8, 2]), ".input_scale": ("F32", [])},
    {"": ("F8_E4M3", [2, 8, 4]), "_scale_inv": ("F32", [2, 1, 1])},
    {"": ("BF16", [2, 8, 4])},
    {"_blocks": ("U8", [2, 8, 1, 16]), "_scales": ("U8", [2, 8, 1]), "_bias": ("BF16", [2, 8])},
    {".weight": ("I8", [8, 16]), ".scale": ("F8_E8M0", [8, 1])},
    {".qweight": ("I32", [2, 8]), ".qzeros": ("I32", [4, 1]), ".scales": ("F16", [4, 8]), ".g_idx": ("I32", [16])},
    {".qweight": ("I32", [8, 2]), ".qzeros": ("I32", [2, 2]), ".scales": ("F16", [2, 16])},
    {".weight_packed": ("I32", [8, 8]), ".weight_scale": ("BF16", [8, 2]), ".weight_shape": ("I64", [2])},
    {".weight_packed": ("U8", [8, 8]), ".weight_scale": ("F8_E4M3", [8, 1]), ".weight_global_scale": ("F32", [1])},
    {".weight": ("U32", [8, 8]), ".scales": ("BF16", [8, 1]), ".biases": ("BF16", [8, 1])},
    {".weight": ("U8", [8, 8]), ".weight_scale": ("F8_E4M3", [8, 1]), ".weight_scale_2": ("F32", [])},
    {".weight": ("F8_E4M3", [8, 4]), ".weight_scale": ("F32", []), ".comfy_quant": ("U8", [8])},
)
_TOPS = ("scaled_fp8", "logit_scale", "lora_controlnet", "smooth_scale", "R1", "quant_map", "position_ids")
_SIDES = (0, 1, 1, 2, 4, 4, 8, 16, 32, 64, 128)
_FAMILIES: tuple[tuple[Any, ...], ...] = (
    ("llama", "LlamaForCausalLM"), ("mixtral", "MixtralForCausalLM"), ("deepseek_v3", "DeepseekV3ForCausalLM"),
    ("gpt_oss", "GptOssForCausalLM"), ("bert", "BertForMaskedLM"), ("t5", "T5ForConditionalGeneration"),
    ("gpt2", "GPT2LMHeadModel"), ("qwen3_moe", "Qwen3MoeModel"), ("llava", "LlavaForConditionalGeneration"),
    ("dbrx", "DbrxForCausalLM"), ("x", "X"), (1, 2), (None, None),
)  # fmt: skip
_QUANTIZATIONS: tuple[Any, ...] = (
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "fp8", "expert_dtype": "fp4"},
    {"quant_method": "gptq", "bits": 4, "group_size": 4, "sym": True, "desc_act": True},
    {"quant_method": "gptq", "bits": 4, "dynamic": {"-:^a.*": {}, "+:.*q_proj": {"bits": 8}, "(a+)+": {}}},
    {"quant_method": "awq", "bits": 4, "group_size": 4, "version": "gemm", "zero_point": True},
    {"quant_method": "auto-round", "bits": 4, "group_size": 4, "packing_format": "auto_round:auto_gptq",
     "extra_config": {"a": {"bits": 16}, "model.layers.0.self_attn.q_proj": {"bits": 2, "group_size": 32}}},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {
        "targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32, "symmetric": True, "type": "int"}}}},
    {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float",
        "symmetric": False, "actorder": "group"}}, "h": 1, "i": {"weights": None}}},
    {"quant_method": "modelopt", "quant_algo": "NVFP4"}, {"quant_method": "mxfp4"}, {"quant_method": "quark"},
    {"bits": 4, "group_size": 32}, {"bits": 4, "group_size": 64, "mode": "affine", "a": False},
    {"mode": "mxfp4", "bits": 4, "group_size": 32}, {"quant_method": "fbgemm_fp8"}, {"quant_method": "bitsandbytes"},
    {"quant_method": 1}, {"format": "dense"}, {"config_groups": []}, {"dynamic": {"": 1}}, [], 1, None,
)  # fmt: skip
_METADATA: tuple[dict[str, str] | None, ...] = (
    None, None, {"format": "pt"}, {"format": "x"}, {"_quantization_metadata": "{"}, {"gptq_bits": "4"},
    {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "float8_e4m3fn"}, "a_b": 1}})},
)  # fmt: skip


def make_checkpoint(folder: Path, choose: Choose) -> Path:
    """Write a shard and a config.json with random content."""

    def one(things: Sequence[Any]) -> Any:
        return things[choose(len(things))]

    def shape(dimensions: int) -> list[int]:
        return [one(_SIDES) for _ in range(dimensions)]

    # The others have less than a byte.
    dtypes = [dtype for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0]
    tensors: dict[str, tuple[str, list[int]]] = {}
    for _ in range(1 + choose(6)):
        module = one(_MODULES)
        if choose(3):
            tensors |= {module + ending: tensor for ending, tensor in one(_WHOLE).items()}
            if choose(4) == 0:
                tensors[module + one(_BESIDE)] = (one(dtypes), shape(choose(3)))
            continue
        sides = shape(one((0, 1, 2, 2, 2, 2, 3, 3, 4)))
        tensors[module + one(_ENDINGS)] = (one(("F32", "BF16", "F8_E4M3", "U8", "I8", "I32", "U32", *dtypes)), sides)
        for _ in range(choose(4)):
            # Scales that fit have as many dimensions as the weight, with smaller sides.
            fits = [one((side, 1, -(-side // 32), -(-side // 128), side // 8)) for side in sides]
            beside = one((fits, fits, [], [1], shape(2)))
            tensors[module + one(_BESIDE)] = (one(("F32", "BF16", "F8_E8M0", "F8_E4M3", "U8", "I32", "I64")), beside)
    if choose(4) == 0:
        tensors[one(_TOPS)] = (one(dtypes), shape(choose(2)))
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "model.safetensors", tensors, one(_METADATA))
    family, model_class = one(_FAMILIES)
    quantization = one(_QUANTIZATIONS) if choose(3) else None
    config = {
        "model_type": family, "architectures": [model_class], "num_hidden_layers": one((1, 2, 61, 10**9, -1, "2")),
        "num_experts": one((None, 1, 2, 8, 10**18, True)), "tie_word_embeddings": one((None, True, False, 0, "x")),
        one(("quantization_config", "quantization", "compression_config")): quantization,
        "text_config": one((None, {}, {"num_hidden_layers": 2}, {"quantization_config": {"quant_method": "fp8"}})),
        "auto_map": one((None, {"AutoModelForCausalLM": "m.X"}, [])),
    }  # fmt: skip
    if choose(8):
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    else:
        (folder / "config.json").unlink(missing_ok=True)
    return folder


def write_shard(path: Path, tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None) -> None:
    """Write a shard with bytes that repeat."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    # Bytes other than zero, so that scores are not all degenerate.
    body = bytes(i * 37 % 251 % 120 for i in range(min(end, 4096)))
    data = (body * (end // 4096 + 1))[:end]
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
