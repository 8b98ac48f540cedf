from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum_stream.model.config import ModelConfig
from spectrum_stream.model.names import (
    find_tied_head,
    group_of,
    group_order,
    is_encoder,
    is_weight,
    model_order,
    module_of,
    slug,
)


@pytest.mark.parametrize(
    ("tensor", "module"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj"),
        ("lm_head.weight", "lm_head"),
        ("model.layers.0.mlp.up_proj.bias", None),
        ("model.layers.0.mlp.experts.gate_up_proj", None),
        ("model.layers.0.mlp.up_proj.weight_scale", None),
        (".weight", None),
        ("weight", None),
    ],
)
def test_module_of_removes_the_suffix_of_weights_only(tensor: str, module: str | None) -> None:
    assert is_weight(tensor) == (module is not None)
    assert module_of(tensor) == (module or tensor)


@pytest.mark.parametrize(
    ("module", "group"),
    [
        ("model.layers.31.self_attn.q_proj", "self_attn.q_proj"),
        ("model.layers.0.block_sparse_moe.experts.7.w1", "block_sparse_moe.experts.7.w1"),
        ("lm_head", "lm_head"),
        ("model.embed_tokens", "model.embed_tokens"),
        ("projector.0", ""),
        ("encoder.layer.3.output.dense", "output.dense"),
    ],
)
def test_group_is_the_path_after_the_first_number(module: str, group: str) -> None:
    assert group_of(module) == group


def test_group_order_is_by_first_component_and_then_by_name() -> None:
    # A plain sort puts "mlp-x" before "mlp.up", since "-" is before "."; Spectrum sorts the components.
    groups = ["mlp.up", "mlp-x.a", "lm_head", "mlp.down", "mlp"]
    assert sorted(groups, key=group_order) == ["lm_head", "mlp", "mlp.down", "mlp.up", "mlp-x.a"]


def test_model_order_compares_layers_by_number() -> None:
    names = [f"model.layers.{i}.mlp" for i in (10, 2, 0, 1, 100)]
    assert sorted(names, key=model_order) == [f"model.layers.{i}.mlp" for i in (0, 1, 2, 10, 100)]


def test_model_order_accepts_a_number_of_thousands_of_digits() -> None:
    assert model_order("a." + "9" * 5000) > model_order("a.10")


@given(st.lists(st.text(alphabet="a.0123456789²١_-", max_size=12)))
def test_model_order_and_group_order_accept_any_names(names: list[str]) -> None:
    for key in (model_order, group_order):
        # The keys of any two names must be comparable.
        assert sorted(map(key, names)) == sorted(map(key, reversed(names)))


@given(st.integers(0, 10**30), st.integers(0, 10**30))
def test_model_order_compares_numbers_by_value(a: int, b: int) -> None:
    first, second = (model_order(f"layers.{number}.mlp") for number in (a, b))
    assert (first < second) == (a < b)
    assert (first == second) == (a == b)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("mistralai/Mixtral-8x22B-v0.1", "mistralai-Mixtral-8x22B-v0.1"),
        ("org/some_model", "org-some-model"),
        ("../models/x", "..-models-x"),
        ("C:\\models\\x", "C--models-x"),
        ("a\nb\x1b[31m", "a-b--31m"),
    ],
)
def test_slug_replaces_unsafe_characters_and_those_of_spectrum(model: str, expected: str) -> None:
    assert slug(model) == expected


@given(st.text())
def test_slug_never_leaves_its_folder(model: str) -> None:
    assert not set(slug(model)) & set("/\\\0:\n")


LLAMA = {"architectures": ["LlamaForCausalLM"]}
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("tensors", "config", "expected"),
    [
        ([EMBEDDING], {**LLAMA, "tie_word_embeddings": True}, ("lm_head", EMBEDDING)),
        ([EMBEDDING], {**LLAMA, "text_config": {"tie_word_embeddings": True}}, ("lm_head", EMBEDDING)),
        # GPT-2's config does not have the flag, since tied is the default of its family.
        (
            ["transformer.wte.weight", "transformer.wpe.weight"],
            {"architectures": ["GPT2LMHeadModel"]},
            ("lm_head", "transformer.wte.weight"),
        ),
        ([EMBEDDING, "lm_head.weight"], {**LLAMA, "tie_word_embeddings": True}, None),
        (["gpt_neox.embed_in.weight", "embed_out.weight"], {"architectures": ["GPTNeoXForCausalLM"]}, None),
        ([EMBEDDING], {**LLAMA, "tie_word_embeddings": False}, None),
        (["embeddings.word_embeddings.weight"], {"architectures": ["BertModel"]}, None),
        ([EMBEDDING, "x.embed_tokens.weight"], LLAMA, None),
        (["model.norm.weight"], LLAMA, None),
        ([EMBEDDING], {}, None),
        ([EMBEDDING], {"architectures": "LlamaForCausalLM"}, None),
        ([EMBEDDING], {"architectures": [None, 3]}, None),
    ],
)
def test_tied_head_is_found_only_if_a_causal_model_stores_no_head(
    tensors: list[str], config: dict[str, Any], expected: tuple[str, str] | None
) -> None:
    assert find_tied_head(tensors, ModelConfig(config)) == expected


def test_tied_head_ignores_the_output_of_a_projector() -> None:
    config = {"architectures": ["XForConditionalGeneration"], "text_config": {"tie_word_embeddings": True}}
    names = ["model.embed_tokens.weight", "multi_modal_projector.output.weight"]
    assert find_tied_head(names, ModelConfig(config)) == ("lm_head", "model.embed_tokens.weight")
    assert find_tied_head([*names, "output.weight"], ModelConfig(config)) is None


def test_tied_head_of_a_multimodal_model_is_found_and_of_an_encoder_is_not() -> None:
    flat = {"architectures": ["XForConditionalGeneration"], "vision_config": {}, "tie_word_embeddings": True}
    assert find_tied_head(["model.embed_tokens.weight"], ModelConfig(flat)) == (
        "lm_head",
        "model.embed_tokens.weight",
    )
    names = ["text_decoder.bert.embeddings.word_embeddings.weight", "text_decoder.cls.predictions.decoder.weight"]
    assert find_tied_head(names, ModelConfig(flat)) is None
    assert (
        find_tied_head(["shared.embed_tokens.weight"], ModelConfig({"architectures": ["T5ForConditionalGeneration"]}))
        is None
    )


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["bert.embeddings.word_embeddings", "bert.encoder.layer.0.output.dense"], True),
        (["embeddings.tok_embeddings", "lm_head.dense"], True),
        (["text_model.embeddings.token_embedding", "lm_head"], False),
        (["embed_tokens", "layers.0.mlp.up_proj"], False),
        (["transformer.wte", "transformer.h.0.mlp.c_fc"], False),
        (["backbone.embeddings"], False),
        (["vision_tower.embeddings.position_embedding"], False),
        (["model.layers.7.mlp.up_proj"], False),
        ([], False),
    ],
)
def test_encoder_has_its_embeddings_in_one_module_and_no_head(modules: list[str], expected: bool) -> None:
    assert is_encoder(modules) is expected
