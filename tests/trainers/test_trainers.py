"""Every format, checked by the code of the trainer itself, on models of transformers."""

import json
from collections.abc import Callable

import pytest
import torch
import yaml

from spectrum_stream.errors import ResultError
from spectrum_stream.selection.select import Rule, choose
from spectrum_stream.trainers import TRAINERS, llama_factory, ms_swift

from ..support.families import tiny
from ..support.trainers import (
    FREEZE_BY,
    freeze_by_llama_factory,
    llama_factory_parts,
    modules_of,
    names_of,
    swift_parts,
    trainable_parameters,
    wanted_parameters,
)

transformers = pytest.importorskip("transformers")

SIZE = {
    "vocab_size": 64,
    "num_hidden_layers": 12,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama() -> torch.nn.Module:
    """Make a model with a tied head."""
    model: torch.nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE, tie_word_embeddings=True))
    return model


def qwen2() -> torch.nn.Module:
    """Make a model with biases."""
    model: torch.nn.Module = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZE, tie_word_embeddings=False)
    )
    return model


def gpt_oss() -> torch.nn.Module:
    """Make a model with fused experts and their biases."""
    config = transformers.GptOssConfig(**SIZE, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
    model: torch.nn.Module = transformers.GptOssForCausalLM(config)
    return model


MODELS = [llama, qwen2, gpt_oss]
Make = Callable[[], torch.nn.Module]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("name", FREEZE_BY)
@pytest.mark.parametrize("percent", [25, 100])
def test_trainer_trains_the_chosen_parameters(name: str, make: Make, percent: float) -> None:
    model = make()
    selection = choose(modules_of(model), Rule(percent))
    names = names_of(model)
    text = TRAINERS[name].render(selection, names)
    FREEZE_BY[name](model, text)
    assert trainable_parameters(model) == TRAINERS[name].matches(text, names)
    wanted = wanted_parameters(selection, names)
    biases = {n.replace(".weight", ".bias") for n in wanted} if "axolotl" in name else set()
    assert wanted <= trainable_parameters(model) <= wanted | biases


@pytest.mark.parametrize(("make", "key"), [(qwen2, "trainable_parameters"), (gpt_oss, "trainable_parameters_regex")])
def test_ms_swift_writes_the_list_where_it_is_exact_else_the_expression(make: Make, key: str) -> None:
    # `experts.down_proj` of gpt-oss is a prefix of `experts.down_proj_bias`.
    model = make()
    text = TRAINERS["ms-swift"].render(choose(modules_of(model), Rule(25)), names_of(model))
    assert set(yaml.safe_load(text)) == {"freeze_parameters_ratio", key}


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_5", "glm4v", "qwen3_vl", "gemma3", "llava", "mllama"])
def test_ms_swift_knows_the_parts_of_a_model_with_towers(model_type: str) -> None:
    assert tuple(map(list, ms_swift.PARTS[model_type])) == swift_parts(model_type)


def test_llama_factory_knows_the_parts_of_models_with_towers() -> None:
    parts = llama_factory_parts()
    assert {name: tuple(map(list, known)) for name, known in llama_factory.PARTS.items()} == {
        name: parts[name] for name in llama_factory.PARTS
    }


def test_llama_factory_trains_whole_first_or_last_layers() -> None:
    for first, layers in ((False, range(9, 12)), (True, range(3))):
        model = llama()
        modules = [
            module._replace(value=float(".mlp." in module.name and int(module.name.split(".")[2]) in layers))
            for module in modules_of(model)
        ]
        selection = choose(modules, Rule(25, groups=("mlp.*",)))
        text = TRAINERS["llama-factory"].render(selection, names_of(model))
        assert (yaml.safe_load(text)["freeze_trainable_layers"] < 0) == first
        freeze_by_llama_factory(model, text)
        assert trainable_parameters(model) == TRAINERS["llama-factory"].matches(text, names_of(model))
        assert trainable_parameters(model) == wanted_parameters(selection, names_of(model))


@pytest.mark.parametrize("make", MODELS)
def test_peft_adapts_the_chosen_modules_with_their_ranks(make: Make) -> None:
    peft = pytest.importorskip("peft")
    model = make()
    rule = Rule(50, norms=False, head=make is not llama)
    # The router of gpt-oss is not a Linear, and PEFT rejects it.
    modules = [module for module in modules_of(model) if not module.name.endswith("router")]
    selection = choose(modules, rule)
    text = TRAINERS["peft"].render(selection, names_of(model))
    chosen = {str(module.parameter) for module in modules if module.name in selection.chosen_names}
    assert chosen == TRAINERS["peft"].matches(text, names_of(model))
    options = json.loads(text)
    peft.inject_adapter_in_model(peft.LoraConfig(**options), model)
    ranks: dict[str, int] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, peft.tuners.lora.LoraLayer):
            continue
        # PEFT wraps fused experts by parameter; the wrappers of two parameters of one module are nested.
        base = name.replace(".base_layer", "")
        parameter = getattr(layer, "parameter_name", None)
        ranks[f"{base}.{parameter or 'weight'}"] = layer.r["default"]
    assert set(ranks) == chosen
    scores = {str(module.parameter): (module.group, module.rank_key) for module in modules}
    for name, rank in ranks.items():
        group = [other for other in chosen if scores[other][0] == scores[name][0]]
        better = sum(scores[other][1] > scores[name][1] for other in group) < len(group) // 2
        assert rank == (32 if better and ".experts." not in name else 16), name


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # PEFT's use of transformers
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_peft_adapts_single_layers_of_a_mixture_of_experts(family: str) -> None:
    """PEFT rewrites the targets of such models, by the last parts of their names."""
    peft = pytest.importorskip("peft")
    model = tiny(family)
    modules = [module for module in modules_of(model) if module.group not in ("mlp.gate", "mlp.router")]
    modules = [m for m in modules if not m.name.endswith(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))]
    modules = [module for module in modules if "shared_experts" not in module.name]
    selection = choose(modules, Rule(50, norms=False, head=False, embeddings=False))
    text = TRAINERS["peft"].render(selection, names_of(model))
    chosen = {str(module.parameter) for module in modules if module.name in selection.chosen_names}
    assert chosen == TRAINERS["peft"].matches(text, names_of(model))
    adapted = peft.get_peft_model(model, peft.LoraConfig(**json.loads(text)))
    found = set()
    for name, layer in adapted.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            parameter = getattr(layer, "parameter_name", None)
            found.add(f"{name.replace('.base_layer', '')}.{parameter or 'weight'}")
    assert found == chosen


def test_peft_export_fails_for_modules_that_peft_treats_as_experts() -> None:
    model = tiny("mixtral")
    selection = choose(modules_of(model), Rule(50, norms=False, head=False, embeddings=False))
    with pytest.raises(ResultError) as error:
        TRAINERS["peft"].render(selection, names_of(model))
    assert error.value.reason == "not_adaptable"
