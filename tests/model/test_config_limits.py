"""Compare the numbers of layers, experts and labels in configs with checkpoints."""

import json
from typing import Any

import pytest

from spectrum_stream.model.config_limits import MAX_DEPTH, find_excess

MANY = 10**9
COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"),
    *(
        "num_sparse_encoder_layers",
        "num_nextn_predict_layers",
        "t2u_encoder_layers",
        "num_blocks",
        "num_hidden_groups",
    ),
    *(
        "num_experts",
        "n_routed_experts",
        "num_local_experts",
        "moe_num_experts",
        "zero_expert_num",
        "n_shared_experts",
    ),
    *(
        "vocab_size",
        "hidden_size",
        "moe_intermediate_size",
        "num_labels",
        "num_qa_labels",
        "num_classes",
        "num_codebooks",
        "num_stages",
    ),
)


@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("value", [MANY, float(MANY), [1, MANY], 1e400, 10**4000])
def test_excess_of_any_count_is_found_at_any_depth(key: str, value: Any) -> None:
    for config in ({key: value}, {"vision_config": {"a": [{key: value}]}}, {"text_config": {"b": {key: value}}}):
        said = find_excess(config, 14, 128)
        assert said is not None and said.startswith(key) and len(said) < 200


@pytest.mark.parametrize("key", ["layer_types", "layers_block_type", "depths", "attn_layers", "attention_types"])
def test_excess_of_a_list_of_layers_is_found(key: str) -> None:
    assert find_excess({key: ["full_attention"] * 1000}, 999, 0)
    assert find_excess({key: ["full_attention"] * 1000}, 1000, 0) is None


def test_excess_in_nested_lists_is_found() -> None:
    assert find_excess({"attention_types": [[["global", "local"], MANY]]}, 14, 128)


def test_excess_of_depth_is_found() -> None:
    data: Any = 1
    for _ in range(MAX_DEPTH):
        data = {"text_config": data}
    assert find_excess(data, 1, 1) is None
    for deeper in ({"a": data}, {"a": [data]}, {"a": json.loads("[" * 900 + "]" * 900)}):
        assert "deeper" in (find_excess(deeper, 1, 1) or "")


@pytest.mark.parametrize(
    "config",
    [
        {
            "num_hidden_layers": 126,
            "max_position_embeddings": 10_485_760,
            "vocab_size": 290_943,
            "rope_theta": 10**11,
        },
        {"num_labels": 21_843, "id2label": {str(i): "x" for i in range(21_843)}},
        {"max_window_layers": 5000, "hidden_size_per_layer": 4096, "max_depth": 1000, "global_block_size": 1024},
        {"num_hidden_layers": None, "num_experts": "8", "layers": {"a": 1}, "num_labels": -1, "num_layers": True},
        {"num_hidden_layers": float("nan"), "model_max_length": 10**30, "num_experts_per_tok": 5000},
    ],
)
def test_real_config_has_no_excess_in_one_shard_of_many(config: dict[str, Any]) -> None:
    assert find_excess(config, 9, 7168) is None


def test_rows_are_enough_for_experts_and_labels_but_not_for_layers() -> None:
    assert find_excess({"num_experts": 16_384, "num_labels": 670_091}, 20, 670_091) is None
    assert find_excess({"num_hidden_layers": 16_384}, 20, 670_091)
    assert find_excess({"num_hidden_layers": 16_384}, 16_384, 0) is None


@pytest.mark.slow
def test_default_configs_of_transformers_have_no_excess() -> None:
    """Check every family of transformers, with as few tensors as a shard can have."""
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    configs = {}
    for family in auto.CONFIG_MAPPING:
        try:
            configs[family] = auto.CONFIG_MAPPING[family]().to_dict()
        # A few need the config of another model.
        except Exception:
            continue
    assert len(configs) > 500
    # Doge has an expert for each of 16,384 rows.
    assert {f: said for f, config in configs.items() if (said := find_excess(config, 1, 16_384)) is not None} == {}


def test_excess_is_found_in_linear_time() -> None:
    config = {f"part_{i}_layers": {"depths": [1, 2, {"num_labels": 3}]} for i in range(100_000)}
    assert find_excess(config, 1000, 0) is None
