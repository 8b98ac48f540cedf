"""A coverage-guided fuzzer of config.json and similar files, to be run by hand.

pip install atheris && python -m tests.checkpoint.fuzz_config -max_total_time=300
"""

import json
from typing import Any

import atheris

from ..support.fuzzing import fuzz

with atheris.instrument_imports(include=["spectrum_stream"]):
    from ..support.untrusted import check_config

_SEEDS: tuple[Any, ...] = (
    {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "n_layer": 3},
    {"text_config": {"num_experts": 8, "tie_word_embeddings": True}, "vision_config": {}, "ffn_config": {}},
    {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}},
    {"compression_config": {"config_groups": {"g": {"weights": {"num_bits": 8, "block_structure": [128, 128]}}}}},
    {"quantization": {"bits": 4, "group_size": 64}, "w_bit": 4, "q_group_size": 128, "zero_point": True},
    [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}],
    {"auto_map": {"AutoModel": "x.y"}, "weight_block_size": [128, 128], "transformers_weights": "x.safetensors"},
)


if __name__ == "__main__":
    fuzz(check_config, (json.dumps(seed).encode() for seed in _SEEDS))
