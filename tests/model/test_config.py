"""config.json is untrusted: any JSON gives values of the stated types, and a wrong type counts as absent."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum_stream.model.config import ModelConfig, QuantizationConfig

from ..support.untrusted import check_config

KEYS = (
    *("model_type", "architectures", "text_config", "ffn_config", "vision_config", "num_hidden_layers"),
    *("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "tie_word_embeddings"),
    *("quantization_config", "compression_config", "quant_method", "bits", "group_size", "weight_block_size"),
    *("version", "checkpoint_format", "config_groups", "weights", "num_bits", "block_structure"),
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["llama", "LlamaForCausalLM", "XForConditionalGeneration", "GEMM", ""])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=8),
    max_leaves=30,
)


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(KEYS), JSON))
def test_config_of_any_json_has_values_of_the_stated_types(data: dict[str, Any]) -> None:
    check_config(json.dumps(data).encode())


@given(st.binary() | st.text().map(str.encode))
def test_config_of_any_bytes_has_values_of_the_stated_types(data: bytes) -> None:
    check_config(data)


@pytest.mark.parametrize("value", [None, True, -1, 0, 2.0, "2", [2], {"a": 2}])
def test_config_counts_are_positive_integers(value: Any) -> None:
    assert ModelConfig({"num_hidden_layers": value}).layer_count is None
    assert ModelConfig({"num_experts": value}).expert_count is None
    assert QuantizationConfig({"bits": value}).bits is None
    assert QuantizationConfig({"group_size": value}).group_size is None


def test_config_of_the_language_model_comes_first() -> None:
    config = ModelConfig({"num_hidden_layers": 3, "text_config": {"num_hidden_layers": 5, "num_experts": 8}})
    assert config.layer_count == 5
    assert config.expert_count == 8
    assert ModelConfig({"num_hidden_layers": 3, "text_config": {"num_hidden_layers": "5"}}).layer_count == 3


def test_config_finds_quantization_at_the_top_or_in_the_language_model() -> None:
    assert ModelConfig({"text_config": {"quantization_config": {"bits": 4}}}).quantization.bits == 4
    assert ModelConfig({"compression_config": {"bits": 3}}).quantization.bits == 3
    # InternVL and Qwen-Omni: https://github.com/vllm-project/vllm/pull/10120
    four, three = {"quantization_config": {"bits": 4}}, {"quantization_config": {"bits": 3}}
    assert ModelConfig({"llm_config": four}).quantization.bits == 4
    assert ModelConfig({"thinker_config": {"text_config": four, "audio_config": four}}).quantization.bits == 4
    assert ModelConfig({"text_config": four} | three).quantization.bits == 3
    assert "differ" in (ModelConfig({"text_config": four, "vision_config": three}).quantization.quant_method or "")
    assert ModelConfig({"quantization_config": "fp8"}).quantization.data == {}


def test_config_of_modelopt_in_its_own_file_is_read() -> None:
    inner = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]}
    said = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": inner}
    config = ModelConfig({"quantization_config": said}).quantization
    assert config.quant_method == "modelopt" and config.group_size == 16
    assert config.data == {"quant_method": "modelopt", "producer": said["producer"], **inner}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [((), None), ((None,), None), (("yes",), None), ((True,), True), ((False,), False), ((False, True), True)],
)
def test_config_ties_embeddings_if_any_part_does(flags: tuple[Any, ...], expected: bool | None) -> None:
    parts = [{"tie_word_embeddings": flag} for flag in flags] + [{}, {}]
    assert ModelConfig({**parts[0], "text_config": parts[1]}).ties_embeddings is expected


def test_quantization_config_has_the_bits_of_each_group_of_layers() -> None:
    def groups(*bits: int) -> QuantizationConfig:
        weights = [{"num_bits": b, "group_size": 32} for b in bits]
        return QuantizationConfig({"config_groups": {str(i): {"weights": w} for i, w in enumerate(weights)}})

    assert groups(4, 4).packed_integers == ((4, 32),)
    assert groups(4, 8).packed_integers == ((4, 32), (8, 32))
    assert groups(4, 16).packed_integers == ((4, 32),)
    assert groups(4, 8).bits is None
    assert QuantizationConfig({"bits": 3, "group_size": -1}).packed_integers == ((3, None),)
