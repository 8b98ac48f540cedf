"""Files whose names differ from those of the model that a trainer loads: base models, heads, old names, wrappers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spectrum_stream import plan, scan
from spectrum_stream.model.config import ModelConfig
from spectrum_stream.model.family_names import find_family, shape_of
from spectrum_stream.model.no_score import NoScore
from spectrum_stream.model.parameters import Names
from spectrum_stream.streaming.plan import Plan
from spectrum_stream.trainers.parameters import parameters_of

from ..support.checkpoints import Save, llama_tensors, reference_score
from ..support.cli import Cli
from ..support.families import tiny

pytestmark = pytest.mark.usefixtures("working_folder", "transformers_here")

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def save_as(
    folder: Path,
    model: Any,
    rename: Callable[[str], str | None] = str,
    config: dict[str, Any] | None = None,
    more: dict[str, torch.Tensor] | None = None,
) -> str:
    """Save a model under other names; a name of None leaves a tensor out."""
    from safetensors.torch import save_file

    state = {there: w.clone() for name, w in model.state_dict().items() if (there := rename(name)) is not None}
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    save_file(state | (more or {}), folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    data = json.loads(path.read_text()) | (config or {})
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    return str(folder)


def names_of(a_plan: Plan) -> set[str]:
    return {w.parameter for w in a_plan.matrices if w.tied_to is None}


def weights_of(model: Any) -> set[str]:
    return {name for name, w in model.named_parameters() if name.endswith(".weight") and w.ndim <= 2}


# The class in config.json, and the class of the file.
CLASSES = [
    ("GPT2LMHeadModel", "GPT2Model", "gpt2"),
    ("GPT2Model", "GPT2LMHeadModel", "gpt2"),
    ("GPT2ForSequenceClassification", "GPT2Model", "gpt2"),
    ("BloomForCausalLM", "BloomModel", "bloom"),
    ("FalconForCausalLM", "FalconModel", "falcon"),
    ("MixtralForCausalLM", "MixtralModel", "mixtral"),
    ("MixtralModel", "MixtralForCausalLM", "mixtral"),
    ("BertModel", "BertForMaskedLM", "bert"),
    ("BertForSequenceClassification", "BertForMaskedLM", "bert"),
    ("BertForTokenClassification", "BertModel", "bert"),
    ("XLMRobertaForMaskedLM", "XLMRobertaModel", "xlm-roberta"),
    ("XLMRobertaModel", "XLMRobertaForSequenceClassification", "xlm-roberta"),
    ("T5EncoderModel", "T5ForConditionalGeneration", "t5"),
    ("T5ForConditionalGeneration", "T5Model", "t5"),
    ("ViTForImageClassification", "ViTModel", "vit"),
    ("ViTModel", "ViTForImageClassification", "vit"),
    ("LlavaForConditionalGeneration", "LlavaModel", "llava"),
]


@pytest.mark.parametrize(("loaded", "stored", "family"), CLASSES)
def test_names_are_those_of_the_class_in_the_config(tmp_path: Path, loaded: str, stored: str, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    tiny(family, stored).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": [loaded]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, report = getattr(transformers, loaded).from_pretrained(tmp_path, output_loading_info=True)
    own = {name for name, _ in model.named_parameters()}
    new = {name for name in report["missing_keys"] if name in own}
    a_plan = plan(str(tmp_path))
    assert a_plan.names == Names.V5 and a_plan.inventory.is_established
    assert a_plan.inventory.model_class == loaded
    # Fused experts and bare parameters have no `.weight`.
    assert weights_of(model) - new <= names_of(a_plan) <= own - new
    assert parameters_of(str(tmp_path)).shapes.keys() == own - new
    asked = plan(str(tmp_path), names="transformers")
    assert names_of(asked) == names_of(a_plan) and asked.inventory.model_class == loaded
    left_out = {s.tensor for s in a_plan.skipped if s.no_score is NoScore.NOT_LOADED}
    # The encoder of T5 ignores the decoder.
    assert {name for name in left_out if not name.startswith("decoder.")} <= set(report["unexpected_keys"])


def test_base_model_of_transformers_4_gets_the_same_prefix(tmp_path: Path) -> None:
    tiny("mixtral", "MixtralModel").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["MixtralForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    a_plan = plan(str(tmp_path), names="transformers-v4")
    assert names_of(a_plan) == {f"model.{w.tensor}" for w in a_plan.matrices}
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in names_of(a_plan)


@pytest.mark.parametrize(
    ("family", "stored", "guessed"),
    [
        ("gpt2", "GPT2Model", "GPT2LMHeadModel"),
        ("bert", "BertModel", "BertModel"),
        ("bert", "BertForMaskedLM", "BertForMaskedLM"),
    ],
)
def test_class_without_architectures_is_guessed_with_a_warning(
    tmp_path: Path, family: str, stored: str, guessed: str
) -> None:
    folder = save_as(tmp_path, tiny(family, stored), config={"architectures": None})
    a_plan = plan(folder)
    assert a_plan.inventory.model_class == guessed
    assert any("architectures" in warning for warning in a_plan.warnings)


def test_names_of_a_class_in_the_repo_itself_are_unchecked(tmp_path: Path) -> None:
    # jina-embeddings-v2: https://github.com/elixir-nx/bumblebee/pull/407
    code = {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"}
    config = {"architectures": ["JinaBertForMaskedLM"], "auto_map": code}
    a_plan = plan(save_as(tmp_path, tiny("bert", "BertModel"), config=config))
    assert a_plan.names == "checkpoint" and not a_plan.inventory.is_established
    assert any("JinaBertForMaskedLM" in warning for warning in a_plan.warnings)


def test_config_of_a_base_model_warns_of_the_causal_one(tmp_path: Path, cli: Cli) -> None:
    transformers = pytest.importorskip("transformers")
    tiny("qwen3", "Qwen3Model").save_pretrained(tmp_path / "m")
    folder, yaml = str(tmp_path / "m"), "snr_results_x_unfrozenparameters_50percent.yaml"
    done = cli("scan", folder, "--name", "x", "--top-percent", "50")
    assert "as in transformers 5 (Qwen3Model)" in done.stdout + done.stderr
    assert "Qwen3ForCausalLM" in done.stderr and "`model.`" in done.stderr
    own = {name for name, _ in transformers.AutoModel.from_pretrained(folder).named_parameters()}
    causal = {name for name, _ in transformers.AutoModelForCausalLM.from_pretrained(folder).named_parameters()}
    assert parameters_of(folder).shapes.keys() == own
    assert parameters_of(folder, loads_causal=True).shapes.keys() == causal - {"lm_head.weight"}
    assert parameters_of(folder, Names.INSTALLED, loads_causal=True).shapes.keys() == causal
    for name in ("axolotl", "lines"):
        verdict = json.loads(cli("verify", yaml, "--model", folder, "--format", name, "--json", code=4).stdout)
        assert {f["reason"] for f in verdict["findings"]} == {"no_match", "base_model"}
    # The names of the causal model are right there.
    (tmp_path / "names.txt").write_text("\n".join(causal))
    cli("scan", folder, "--name", "y", "--top-percent", "50", "--names", tmp_path / "names.txt")
    yaml = yaml.replace("_x_", "_y_")
    verdict = json.loads(cli("verify", yaml, "--model", folder, "--json").stdout)
    assert verdict["good"] and [f["reason"] for f in verdict["findings"]] == ["base_model"]


def test_config_of_an_encoder_does_not_warn_of_a_causal_one(tmp_path: Path) -> None:
    assert not plan(save_as(tmp_path, tiny("bert", "BertModel"))).warnings


WRAPPERS: dict[str, Callable[[str], str]] = {
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module.": lambda name: f"module.{name}",
    "_fsdp_wrapped_module.": lambda name: name.replace("layers.", "layers._fsdp_wrapped_module."),
    "_checkpoint_wrapped_module.": lambda name: name.replace(".mlp", "._checkpoint_wrapped_module.mlp"),
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "base_layer.": lambda name: name.replace("_proj.weight", "_proj.base_layer.weight"),
    "pretrained_model.": lambda name: f"pretrained_model.{name}",
    "net.": lambda name: f"net.{name}",
    "any.thing.": lambda name: f"any.thing.{name}",
    "module._orig_mod.": lambda name: f"module._orig_mod.{name}",
}


@pytest.mark.parametrize("prefix", WRAPPERS)
@pytest.mark.parametrize("family", ["llama", "mixtral", "bert"])
@pytest.mark.parametrize("names", [Names.V5, Names.INSTALLED])
def test_prefix_of_a_wrapper_in_the_file_is_removed_with_a_warning(
    tmp_path: Path, prefix: str, family: str, names: Names
) -> None:
    from safetensors.torch import load_file, save_file

    tiny(family).save_pretrained(tmp_path)
    path, rename = tmp_path / "model.safetensors", WRAPPERS[prefix]
    tensors = load_file(path)
    expected = {name: (w.parameter, w.group) for w in plan(str(tmp_path)).matrices if (name := w.tensor)}
    wrapped = {rename(name): name for name in tensors}
    save_file({there: tensors[name] for there, name in wrapped.items()}, path, {"format": "pt"})
    a_plan = plan(str(tmp_path), names=names)
    assert {wrapped[w.tensor]: (w.parameter, w.group) for w in a_plan.matrices} == expected
    # Some of the wrappers are around parts that not every family has.
    is_wrapped = wrapped.keys() != tensors.keys()
    assert len(a_plan.warnings) == is_wrapped
    assert not is_wrapped or prefix.split(".")[-2] in a_plan.warnings[0]
    assert a_plan.inventory.is_established
    assert parameters_of(str(tmp_path)).shapes.keys() >= names_of(a_plan)
    stored = plan(str(tmp_path), names="checkpoint")
    assert names_of(stored) <= wrapped.keys() and not stored.warnings


def test_prefix_that_transformers_strips_itself_needs_no_warning(tmp_path: Path) -> None:
    # Lightning's `self.model` has the name of the base model's attribute.
    model = tiny("llama")
    a_plan = plan(save_as(tmp_path, model, lambda name: f"model.{name}"))
    assert names_of(a_plan) == weights_of(model) and not a_plan.warnings


def test_unknown_module_in_a_known_family_is_not_established(save: Save, cli: Cli) -> None:
    tensors = llama_tensors(2) | {"model.layers.0.adapter.up_proj.weight": torch.randn(8, 9)}
    folder = save(tensors, config=LLAMA)
    a_plan = plan(str(folder))
    assert a_plan.names == Names.V5 and not a_plan.inventory.is_established
    assert any("model.layers.0.adapter.up_proj" in warning for warning in a_plan.warnings)
    assert "except those in the warning" in cli("plan", folder).stdout
    assert json.loads(cli("plan", folder, "--json").stdout)["names_are_established"] is False
    # transformers does not load it, so an entry for it would train nothing.
    assert "model.layers.0.adapter.up_proj.weight" not in parameters_of(str(folder)).shapes
    assert not parameters_of(str(folder)).is_established


@pytest.mark.parametrize(
    "rename",
    [
        # Llama's own files
        lambda name: name.replace("self_attn.q_proj", "attention.wq").replace("mlp.up_proj", "feed_forward.w3"),
        lambda name: name.replace("model.layers", "transformer.h"),
        lambda name: name.replace("model.", "a.").replace("layers", "blocks"),
    ],
)
def test_file_of_another_library_keeps_its_names_unchecked(
    save: Save, cli: Cli, rename: Callable[[str], str]
) -> None:
    tensors = {rename(name).replace("_proj", "_p"): w for name, w in llama_tensors(3).items()}
    folder = save(tensors, config=LLAMA)
    a_plan = plan(str(folder))
    assert a_plan.names == Names.CHECKPOINT and not a_plan.inventory.is_established
    assert names_of(a_plan) == tensors.keys()
    assert any("LlamaForCausalLM" in warning for warning in a_plan.warnings)
    assert "as in the checkpoint, unchecked" in cli("plan", folder).stdout
    assert "as in the checkpoint, unchecked" in cli("plan", folder, "--names", "checkpoint").stdout


def test_tied_head_is_listed_only_for_a_class_that_has_it(tmp_path: Path) -> None:
    folder = save_as(tmp_path, tiny("bert", "BertLMHeadModel"), lambda name: None if "decoder" in name else name)
    for names in ("transformers-v5", "transformers"):
        assert "lm_head" not in {w.module for w in plan(folder, names=names).matrices}


def test_two_tensors_never_get_one_name_by_a_prefix(save: Save) -> None:
    names = [f"layers.{i}.mlp.up_proj.weight" for i in range(3)]
    tensors = {name: torch.randn(8, 9) for name in (*names, f"model.{names[0]}", "embed_out.weight")}
    a_plan = plan(str(save(tensors, config=LLAMA)))
    assert len({w.parameter for w in a_plan.matrices}) == len(tensors)
    assert {w.tensor for w in a_plan.matrices if w.parameter == w.tensor} == {
        names[0],
        f"model.{names[0]}",
        "embed_out.weight",
    }
    tensors = {name: torch.randn(8, 9) for name in ("embed_out.weight", "lm_head.weight")}
    config = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
    a_plan = plan(str(save(tensors, config=config)))
    assert sorted(w.parameter for w in a_plan.matrices) == sorted(tensors)


@pytest.mark.parametrize("names", ["transformers-v4", "transformers-v5", "transformers"])
def test_old_names_of_norms_are_weights(tmp_path: Path, names: str) -> None:
    model = tiny("bert")
    folder = save_as(
        tmp_path / "m",
        model,
        lambda name: (
            None
            if "decoder" in name
            else name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        ),
    )
    result = scan(folder, name="x", names=names)
    scores = {module.name: module.value for module in result.modules}
    parameters = {name.removesuffix(".weight"): w for name, w in model.named_parameters()}
    assert scores.keys() == {name.removesuffix(".weight") for name in weights_of(model)}
    for name, value in scores.items():
        assert value == pytest.approx(reference_score(parameters[name]), rel=1e-4)
        assert value == 1.0 or "LayerNorm" not in name
    stored = plan(folder, names="checkpoint")
    assert not any("LayerNorm" in w.module for w in stored.matrices)
    assert "bert.embeddings.LayerNorm.gamma" in {s.tensor for s in stored.skipped}
    assert parameters_of(folder).shapes.keys() <= {name for name, _ in model.named_parameters()}


def test_norm_under_its_old_and_new_name_is_stored_twice(save: Save) -> None:
    tensors = {
        "bert.encoder.layer.0.output.dense.weight": torch.randn(8, 8),
        "bert.encoder.layer.0.output.LayerNorm.gamma": torch.ones(8),
        "bert.encoder.layer.0.output.LayerNorm.weight": torch.ones(8),
    }
    a_plan = plan(str(save(tensors, config={"model_type": "bert", "architectures": ["BertModel"]})))
    assert {s.no_score for s in a_plan.skipped} == {NoScore.STORED_TWICE}


@pytest.mark.parametrize(
    "prefix",
    [
        *(
            "0.auto_model.",
            "0.model.",
            "pretrained_model.",
            "net.model.",
            "module.",
            "_fsdp_wrapped_module.",
            "bert.",
        ),
        *("_orig_mod.", "base_model.model.", "model.", "module._orig_mod.", "student.0.auto_model.bert.", "bert."),
    ],
)
@pytest.mark.parametrize("stored", ["", "bert."])
def test_names_in_a_trainer_that_share_any_prefix_are_found(tmp_path: Path, prefix: str, stored: str) -> None:
    model = tiny("bert", "BertModel")
    folder = save_as(tmp_path, model, lambda name: stored + name)
    names = [prefix + name for name, _ in model.named_parameters()]
    a_plan, plain = plan(folder, names=names), plan(folder)
    assert names_of(a_plan) == {prefix + name for name in weights_of(model)} and not a_plan.warnings
    # A prefix does not change the groups of layers.
    groups = [[w.group for w in one.matrices if ".layer." in w.module] for one in (a_plan, plain)]
    assert groups[0] == groups[1]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.12.mlp.up_proj.weight", "model.layers.*.mlp.up_proj."),
        ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.gate_up_proj"),
        ("weight", "weight"),
        ("1.bias", "*."),
        ("", ""),
    ],
)
def test_shape_of_a_name_has_no_numbers(name: str, shape: str) -> None:
    assert shape_of(name) == shape


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llava", "text_config": {"model_type": ["llama"]}},
        {"model_type": "llava", "text_config": "llama", "vision_config": 3},
        {"model_type": "llava", "text_config": {"model_type": "no_such"}},
        {"model_type": "llama", "architectures": [None, 3, "LlamaModel"]},
    ],
)
def test_family_of_a_hostile_config_is_found(config: dict[str, Any]) -> None:
    family = find_family(ModelConfig(config))
    assert family is not None and family.classes


def save_config(folder: str, **settings: Any) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


CODE = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}


def test_names_are_unchecked_if_code_of_the_repo_can_name_parameters_otherwise(tmp_path: Path, cli: Cli) -> None:
    # transformers stores the experts separately, and loads them fused.
    tiny("qwen3_moe").save_pretrained(tmp_path)
    folder = str(tmp_path)
    save_config(folder, auto_map=CODE)
    a_plan = plan(folder)
    assert a_plan.names == Names.CHECKPOINT and not a_plan.inventory.is_established
    assert all(w.parameter == w.tensor for w in a_plan.matrices)
    assert any("auto_map" in warning for warning in a_plan.warnings)
    assert "as in the checkpoint, unchecked" in cli("plan", folder).stdout
    assert not parameters_of(folder).is_established
    # The code that is asked for is that of transformers.
    asked = plan(folder, names="transformers")
    assert "model.layers.0.mlp.experts.gate_up_proj" in names_of(asked) and asked.inventory.is_established
    # A tokenizer's code does not matter.
    save_config(folder, auto_map={"AutoTokenizer": [None, "x.X"]})
    assert plan(folder).inventory.is_established


def test_names_are_established_if_they_are_the_same_with_code_of_the_repo(tmp_path: Path) -> None:
    a_plan = plan(save_as(tmp_path, tiny("llama"), config={"auto_map": CODE}))
    assert a_plan.names == Names.V5 and a_plan.inventory.is_established


@pytest.mark.parametrize("name", ["LlamaForCausalLMEagle3", "LlavaLlamaForCausalLM", "MistralForCausalLM"])
def test_class_that_the_family_lacks_is_named_and_its_names_are_unchecked(tmp_path: Path, name: str) -> None:
    folder = save_as(tmp_path, tiny("llama"), lambda n: n.removeprefix("model."), {"architectures": [name]})
    a_plan = plan(folder)
    assert a_plan.names == Names.CHECKPOINT and not a_plan.inventory.is_established
    assert "layers.0.mlp.up_proj.weight" in names_of(a_plan)
    assert any(name in warning for warning in a_plan.warnings)
    assert not parameters_of(folder).is_established


def test_class_in_other_capital_letters_is_the_same(tmp_path: Path) -> None:
    a_plan = plan(save_as(tmp_path, tiny("llama"), config={"architectures": ["LLaMAForCausalLM"]}))
    assert a_plan.inventory.model_class == "LlamaForCausalLM" and a_plan.inventory.is_established


@pytest.mark.parametrize("names", ["transformers-v5", "transformers"])
def test_class_that_loads_none_of_the_weights_is_named(tmp_path: Path, names: str) -> None:
    folder = save_as(tmp_path, tiny("llama"), config={"architectures": ["LlamaForQuestionAnswering"]})
    a_plan = plan(folder, names=names)
    assert a_plan.names == Names.CHECKPOINT and not a_plan.inventory.is_established and a_plan.matrices
    assert any("LlamaForQuestionAnswering" in warning for warning in a_plan.warnings)


def test_installed_transformers_leaves_out_tensors_that_its_model_lacks(tmp_path: Path) -> None:
    model = tiny("llama")
    folder = save_as(tmp_path, model, more={"v_head.summary.weight": torch.randn(1, 64)})
    asked = plan(folder, names="transformers")
    assert names_of(asked) == weights_of(model) and asked.inventory.is_established
    assert any("v_head.summary" in warning for warning in asked.warnings)
    assert {s.tensor for s in asked.skipped if s.no_score is NoScore.NOT_LOADED} == {"v_head.summary.weight"}
    # The table can lack a parameter of a newer version.
    kept = plan(folder)
    assert not kept.inventory.is_established and any("v_head.summary" in warning for warning in kept.warnings)


@pytest.mark.parametrize("names", ["transformers-v5", "transformers"])
@pytest.mark.parametrize(
    ("family", "kept", "dropped"),
    [
        ("llama", "lm_head.weight", "model.embed_tokens.weight"),
        ("roberta", "lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
        ("bloom", "lm_head.weight", "transformer.word_embeddings.weight"),
    ],
)
def test_head_without_its_embedding_is_the_embedding(
    tmp_path: Path, names: str, family: str, kept: str, dropped: str
) -> None:
    # safetensors.torch.save_model keeps the first of two names.
    model = tiny(family, settings={"tie_word_embeddings": True})
    a_plan = plan(save_as(tmp_path, model, lambda name: None if name == dropped else name), names=names)
    assert names_of(a_plan) == weights_of(model) and a_plan.inventory.is_established
    assert [w.parameter for w in a_plan.matrices if w.tensor == kept and w.tied_to is None] == [dropped]


@pytest.mark.parametrize("names", ["transformers-v5", "transformers"])
def test_tied_head_with_other_values_is_a_parameter_of_its_own(tmp_path: Path, names: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny("llama", settings={"tie_word_embeddings": True})
    folder = save_as(tmp_path, model, more={"lm_head.weight": torch.randn(128, 64)})
    own = {name for name, _ in transformers.AutoModelForCausalLM.from_pretrained(folder).named_parameters()}
    assert "lm_head.weight" in own and names_of(plan(folder, names=names)) == own
    found = parameters_of(folder, Names(names))
    assert not found.tied and found.shapes.keys() == own


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"tie_word_embeddings": None}),
        ("mistral3", {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}),
    ],
)
def test_missing_head_that_is_not_tied_is_not_listed(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    model = tiny(family, settings={"tie_word_embeddings": True})
    text = model.config.to_dict().get("text_config", {})
    parts = {key: text | value for key, value in settings.items() if isinstance(value, dict)}
    folder = save_as(tmp_path, model, lambda name: None if name == "lm_head.weight" else name, settings | parts)
    assert "lm_head" not in {w.module for w in plan(folder).matrices}


@pytest.mark.parametrize(
    ("family", "class_name", "settings"),
    [
        ("qwen3_next", None, {"num_hidden_layers": 5}),
        ("opt", None, {"word_embed_proj_dim": 16}),
        ("roberta", "RobertaForCausalLM", {}),
    ],
)
def test_parameters_that_only_some_models_of_a_family_have_are_known(
    tmp_path: Path, family: str, class_name: str | None, settings: dict[str, Any]
) -> None:
    model = tiny(family, class_name, settings)
    model.save_pretrained(tmp_path)
    a_plan = plan(str(tmp_path))
    own = {name for name, _ in model.named_parameters()}
    assert a_plan.inventory.is_established
    assert weights_of(model) <= names_of(a_plan) <= own


def test_layer_beyond_the_config_is_not_loaded(tmp_path: Path) -> None:
    folder = save_as(
        tmp_path, tiny("gpt2", settings={"n_layer": 3}), config={"n_layer": 2, "num_hidden_layers": None}
    )
    left_out = {s.tensor for s in plan(folder).skipped if s.no_score is NoScore.NOT_LOADED}
    assert "transformer.h.2.mlp.c_fc.weight" in left_out
    assert all(name.startswith("transformer.h.2.") for name in left_out)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "pretrained_model.", "module._orig_mod."])
def test_prefix_of_a_wrapper_is_removed_in_an_unknown_family(save: Save, prefix: str) -> None:
    tensors = llama_tensors(2)
    folder = save({prefix + name: w for name, w in tensors.items()}, config={"model_type": "no_such_family"})
    a_plan = plan(str(folder))
    assert names_of(a_plan) == {name for name in tensors if name.endswith(".weight")}
    assert not a_plan.inventory.is_established
    assert any("prefix" in warning and prefix.split(".")[0] in warning for warning in a_plan.warnings)
    assert names_of(plan(str(folder), names="checkpoint")) == {prefix + name for name in names_of(a_plan)}


def test_gamma_of_a_layer_scale_keeps_its_name(save: Save) -> None:
    folder = save({"blocks.0.ls1.gamma": torch.ones(8), "blocks.0.attn.proj.weight": torch.randn(8, 8)})
    assert {s.tensor for s in plan(str(folder)).skipped} == {"blocks.0.ls1.gamma"}


def test_bias_of_a_tied_decoder_is_not_a_parameter(tmp_path: Path) -> None:
    model = tiny("bert", "BertForMaskedLM")
    folder = save_as(tmp_path, model, lambda name: None if name == "cls.predictions.decoder.weight" else name)
    assert parameters_of(folder).shapes.keys() == {name for name, _ in model.named_parameters()}
