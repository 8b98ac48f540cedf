"""Configs of real families, bad values for settings, and all that a plan reads."""

import importlib
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from spectrum_stream.model.config import LARGEST_NUMBER, ModelConfig, QuantizationConfig
from spectrum_stream.model.config_limits import find_excess
from spectrum_stream.model.family_names import can_list_head, find_family, find_tie
from spectrum_stream.model.ties import can_be_tied
from spectrum_stream.model.transformers_names import _plain

FAMILIES = (
    *(
        "llama",
        "mixtral",
        "qwen3_moe",
        "gpt_oss",
        "gemma3",
        "llava",
        "qwen2_5_vl",
        "deepseek_v3",
        "t5",
        "bart",
        "gpt2",
    ),
    *(
        "gpt_neo",
        "bert",
        "vit",
        "clip",
        "albert",
        "mamba",
        "whisper",
        "switch_transformers",
        "swin",
        "blip-2",
        "jamba",
    ),
)
# Settings of quantized weights, as libraries write them.
QUANTIZATIONS: tuple[dict[str, Any], ...] = (
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "dynamic": {"-:.*a": {}}},
    {"quant_method": "awq", "bits": 4, "w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "gemm"},
    {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 128, "actorder": "group"},
            }
        },
        "ignore": ["lm_head"],
        "sparsity_config": {"format": "dense"},
    },
    {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}},
)
HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 300, 10**5, 10**9, 10**9 + 1, 10**18, 10**400, -(10**30), 0.5, 1e300, float("inf")),
    *(float("nan"), "", "128", "x" * 10_000, "\ud800\x1b[31m", "gptq", "llama", "LlamaForCausalLM"),
    *([], {}, [None], [10**12], ["a"] * 5000, [[1, 2], [3]], {"a": {"b": 1}}, {"__float__": "NaN"}, {"weights": [1]}),
    *({"model_type": "llama"}, {"quantization_config": {"bits": 4}}, json.loads("[" * 90 + "]" * 90)),
)


@cache
def _texts() -> tuple[str, ...]:
    mapping = importlib.import_module("transformers").CONFIG_MAPPING
    configs = [json.loads(mapping[family]().to_json_string(use_diff=False)) for family in FAMILIES]
    for i, config in enumerate(configs):
        name = "LlamaForCausalLM" if config["model_type"] == "llama" else "XForConditionalGeneration"
        config |= {"architectures": [name], "quantization_config": QUANTIZATIONS[i % len(QUANTIZATIONS)]}
    return tuple(map(json.dumps, configs))


def real_config(i: int) -> Any:
    """Return a new copy of the i-th config."""
    return json.loads(_texts()[i % len(FAMILIES)])


def find_places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container of JSON with each of its keys or positions."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from find_places(inner)


def read_all(data: Any, tensors: int = 14, rows: int = 128) -> None:
    """Read everything that a plan and a build use, and check types and limits."""
    config = ModelConfig(data, {"quantize_config.json": data})
    assert config.model_type is None or len(config.model_type) <= 200
    assert len(config.architectures) <= 100 and all(len(name) <= 200 for name in config.architectures)
    for count in (config.layer_count, config.expert_count, *config.other_counts):
        assert count is None or (type(count) is int and 0 < count <= LARGEST_NUMBER)
    assert {type(config.is_causal), type(config.is_multimodal), type(config.has_code)} == {bool}
    assert config.ties_embeddings in (None, True, False) and isinstance(config.text, dict)
    family = find_family(config)
    if family is not None:
        family.find_class(config)
    assert type(can_list_head(config)) is bool and type(can_be_tied(config)) is bool
    assert find_tie(config) in (None, True, False)
    for quantization in (config.quantization, ModelConfig(data).quantization, QuantizationConfig(data)):
        _read_quantization(quantization)
    if find_excess(data, tensors, rows) is None:
        sent = json.dumps(_plain(data))
        assert not any(key in sent for key in ('"auto_map":', '"quantization_config":', 'implementation":'))
        for container, key in find_places(data):
            value = container[key]
            if key in ("num_hidden_layers", "n_layer", "encoder_layers", "decoder_layers") and type(value) is int:
                assert value <= 256


def _read_quantization(config: QuantizationConfig) -> None:
    assert config.quant_method is None or isinstance(config.quant_method, str)
    for number in (config.bits, config.group_size, *(n for pair in config.block_sizes for n in pair)):
        assert number is None or (type(number) is int and 0 < number <= LARGEST_NUMBER)
    for bits, size in config.packed_integers:
        assert 1 <= bits <= 8 and (size is None or 0 < size <= LARGEST_NUMBER)
    assert config.symmetric in (None, True, False)
    flags = (config.has_zeros, config.has_no_zeros, config.has_order, config.is_dense)
    assert {type(flag) for flag in flags} == {bool}
    assert config.numbers is None or config.numbers[0] in ("int", "float")
