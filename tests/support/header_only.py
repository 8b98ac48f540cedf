"""Checkpoints with the shapes of published models and without weights: sparse files of full size."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


def write(folder: Path, tensors: Shapes, shards: int, config: Mapping[str, Any]) -> Path:
    """Write shards with the same number of tensors each, in order, their index and config.json."""
    folder.mkdir(parents=True)
    names = list(tensors)
    each = math.ceil(len(names) / shards)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        header: dict[str, Any] = {}
        end = 0
        for name in names[i * each : (i + 1) * each]:
            dtype, shape = tensors[name]
            nbytes = math.prod(shape) * BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
            end += nbytes
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        weight_map |= dict.fromkeys(header, file)
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as shard:
            shard.write(len(text).to_bytes(8, "little") + text)
            shard.truncate(8 + len(text) + end)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def deepseek_v3() -> tuple[Shapes, dict[str, Any]]:
    """Return the published shapes: float8 with a scale for each block, 58 layers of 256 experts, 3 dense, 1 extra."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}

    def float8(module: str, n: int, m: int) -> None:
        tensors[f"{module}.weight"] = ("F8_E4M3", (n, m))
        tensors[f"{module}.weight_scale_inv"] = ("F32", (math.ceil(n / 128), math.ceil(m / 128)))

    tensors["model.embed_tokens.weight"] = ("BF16", (129280, 7168))
    for i in range(62):
        layer = f"model.layers.{i}"
        for name, n, m in (
            ("q_a_proj", 1536, 7168), ("q_b_proj", 24576, 1536), ("kv_a_proj_with_mqa", 576, 7168),
            ("kv_b_proj", 32768, 512), ("o_proj", 7168, 16384),
        ):  # fmt: skip
            float8(f"{layer}.self_attn.{name}", n, m)
        for norm, size in (("self_attn.q_a_layernorm", 1536), ("self_attn.kv_a_layernorm", 512),
                           ("input_layernorm", 7168), ("post_attention_layernorm", 7168)):  # fmt: skip
            tensors[f"{layer}.{norm}.weight"] = ("BF16", (size,))
        if i >= 3:
            tensors[f"{layer}.mlp.gate.weight"] = ("BF16", (256, 7168))
            tensors[f"{layer}.mlp.gate.e_score_correction_bias"] = ("F32", (256,))
        for part in [f"experts.{e}." for e in range(256)] + ["shared_experts."] if i >= 3 else [""]:
            width = 2048 if i >= 3 else 18432
            float8(f"{layer}.mlp.{part}gate_proj", width, 7168)
            float8(f"{layer}.mlp.{part}up_proj", width, 7168)
            float8(f"{layer}.mlp.{part}down_proj", 7168, width)
    tensors["model.layers.61.eh_proj.weight"] = ("BF16", (7168, 14336))
    tensors["model.layers.61.embed_tokens.weight"] = ("BF16", (129280, 7168))
    tensors["model.layers.61.shared_head.head.weight"] = ("BF16", (129280, 7168))
    tensors["model.norm.weight"] = ("BF16", (7168,))
    tensors["lm_head.weight"] = ("BF16", (129280, 7168))
    config = {
        "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 61,
        "n_routed_experts": 256, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }  # fmt: skip
    return tensors, config


def gpt_oss_120b() -> tuple[Shapes, dict[str, Any]]:
    """Return the published shapes: 36 layers of 128 experts in MXFP4, and all else in bfloat16."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": ("BF16", (201088, 2880))}
    for i in range(36):
        layer = f"model.layers.{i}"
        for name, n, m in (
            ("q_proj", 4096, 2880),
            ("k_proj", 512, 2880),
            ("v_proj", 512, 2880),
            ("o_proj", 2880, 4096),
        ):
            tensors[f"{layer}.self_attn.{name}.weight"] = ("BF16", (n, m))
            tensors[f"{layer}.self_attn.{name}.bias"] = ("BF16", (n,))
        tensors[f"{layer}.self_attn.sinks"] = ("BF16", (64,))
        tensors[f"{layer}.mlp.router.weight"] = ("BF16", (128, 2880))
        tensors[f"{layer}.mlp.router.bias"] = ("BF16", (128,))
        for name, n in (("gate_up_proj", 5760), ("down_proj", 2880)):
            tensors[f"{layer}.mlp.experts.{name}_blocks"] = ("U8", (128, n, 90, 16))
            tensors[f"{layer}.mlp.experts.{name}_scales"] = ("U8", (128, n, 90))
            tensors[f"{layer}.mlp.experts.{name}_bias"] = ("BF16", (128, n))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{norm}.weight"] = ("BF16", (2880,))
    tensors["model.norm.weight"] = ("BF16", (2880,))
    tensors["lm_head.weight"] = ("BF16", (201088, 2880))
    config = {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_hidden_layers": 36,
        "num_local_experts": 128, "tie_word_embeddings": False, "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    return tensors, config
