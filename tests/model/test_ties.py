"""Tied weights that are stored twice: one weight in counts, budgets and names, as transformers loads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spectrum_stream import plan, scan, select
from spectrum_stream.model.family_names import DATA
from spectrum_stream.model.ties import _TIED_BY_DEFAULT
from spectrum_stream.selection.budget import needs
from spectrum_stream.trainers.parameters import parameters_of
from spectrum_stream.trainers.verify import verify

from ..support.checkpoints import TIED, Save, llama_tensors, write_checkpoint
from ..support.hub_server import REPO, HubServer, use

pytestmark = pytest.mark.usefixtures("working_folder")

SIZE = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
TEXT = {**SIZE, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 96, "tie_word_embeddings": True}


def stored_twice(same: bool = True) -> dict[str, torch.Tensor]:
    tensors = llama_tensors(2)
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()} if same else tensors


def build(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
    bart = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 96}
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "Qwen3ForCausalLM": ("Qwen3Config", TEXT),
        "Gemma2ForCausalLM": ("Gemma2Config", {k: v for k, v in TEXT.items() if k != "tie_word_embeddings"}),
        "T5ForConditionalGeneration": ("T5Config", t5),
        "BartForConditionalGeneration": ("BartConfig", bart | heads),
        "BertForMaskedLM": ("BertConfig", {**SIZE, "vocab_size": 96}),
    }
    config_name, settings = made[kind]
    config = getattr(transformers, config_name)(**settings)
    config.architectures = [kind]
    return getattr(transformers, kind)(config)


def save_all(model: Any, folder: Path) -> None:
    """Save every name of the state, with a copy for each tied one."""
    state = {name: w.detach().clone().contiguous() for name, w in model.state_dict().items()}
    write_checkpoint(folder, state)
    model.config.save_pretrained(folder)


@pytest.mark.parametrize(
    "kind",
    [
        "Qwen3ForCausalLM",
        "Gemma2ForCausalLM",
        "T5ForConditionalGeneration",
        "BartForConditionalGeneration",
        "BertForMaskedLM",
    ],
)
def test_stored_copies_count_as_in_transformers(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    save_all(model, tmp_path / "m")
    # A parameter of a tied model appears once, under its first name.
    matrices = {name: w.numel() for name, w in model.named_parameters() if name.endswith(".weight")}
    a_plan = plan(str(tmp_path / "m"))
    assert a_plan.inventory.weights_numel == sum(matrices.values())
    result = scan(str(tmp_path / "m"), name="x", top_percent=100)
    assert {name for name in result.result.parameters if name.endswith(".weight")} == matrices.keys()
    need = needs(select(result.result, 100))
    assert need is not None and need.total == need.trainable == sum(matrices.values())
    parameters = parameters_of(str(tmp_path / "m"))
    own = parameters.shapes.keys() - parameters.tied.keys()
    assert {name for name in own if name.endswith(".weight")} == matrices.keys()


def test_stored_head_has_the_score_of_its_embedding(save: Save) -> None:
    twice = scan(str(save(stored_twice(), config=TIED)), name="x")
    scores = {module.name: module.value for module in twice.modules}
    assert scores["lm_head"] == scores["model.embed_tokens"]
    assert twice.plan.to_dict()["tied"] == {"lm_head": "model.embed_tokens"}
    assert twice.complete and not twice.plan.skipped


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_stored_head_of_a_wrapped_model_keeps_its_entry(save: Save, prefix: str) -> None:
    config = {**TIED, "model_type": "llama", "num_hidden_layers": 2}
    tensors = {prefix + name: w for name, w in stored_twice().items()}
    heads = [w for w in plan(str(save(tensors, config=config))).matrices if w.tied_to is not None]
    assert [(w.result_name, w.group) for w in heads] == [("lm_head", "lm_head")]


def test_stored_head_is_read_once(save: Save) -> None:
    folder = str(save(stored_twice(), config=TIED))
    embedding = stored_twice()["model.embed_tokens.weight"]
    total = sum(w.numel() * w.element_size() for w in stored_twice().values())
    assert plan(folder).read_nbytes == total - embedding.numel() * embedding.element_size()


def test_head_with_other_values_is_a_separate_weight_with_a_warning(save: Save) -> None:
    a_plan = plan(str(save(stored_twice(same=False), config=TIED)))
    assert a_plan.to_dict()["tied"] == {}
    assert any("lm_head.weight" in warning and "differ" in warning for warning in a_plan.warnings)


def test_head_with_other_values_is_kept_by_transformers(tmp_path: Path) -> None:
    model = build("Qwen3ForCausalLM")
    state = {name: w.detach().clone() for name, w in model.state_dict().items()}
    state["lm_head.weight"][-1, -1] += 1
    write_checkpoint(tmp_path / "m", state)
    model.config.save_pretrained(tmp_path / "m")
    loaded = type(model).from_pretrained(tmp_path / "m")
    assert "lm_head.weight" in dict(loaded.named_parameters())
    assert plan(str(tmp_path / "m")).to_dict()["tied"] == {}


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {},
    ],
)
def test_head_of_an_untied_model_is_a_separate_weight(save: Save, config: dict[str, Any]) -> None:
    assert plan(str(save(stored_twice(), config=config))).to_dict()["tied"] == {}


def test_stored_head_of_a_repo_is_compared_in_part_with_a_warning(
    save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for same in (True, False):
        folder = save(stored_twice(same), config=TIED)
        with HubServer({REPO: folder}) as server:
            use(server.url, monkeypatch, tmp_path / str(same))
            a_plan = plan(REPO, fetch="range")
        assert bool(a_plan.to_dict()["tied"]) == same
        assert any(("parts of" if same else "differ") in warning for warning in a_plan.warnings)


def test_families_tied_by_default_are_not_in_the_table_of_families_too() -> None:
    assert not _TIED_BY_DEFAULT & json.loads(DATA.read_text("utf-8")).keys()


def test_families_that_are_tied_by_default_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    assert {family for family in _TIED_BY_DEFAULT if not mapping[family]().tie_word_embeddings} == set()


def test_verify_counts_a_stored_head_once(save: Save, tmp_path: Path) -> None:
    folder = save(stored_twice(), config=TIED | {"model_type": "llama"})
    path = tmp_path / "a.yaml"
    path.write_text("unfrozen_parameters:\n- ^lm_head.weight$\n- ^model.embed_tokens.weight$\n")
    verdict = verify(path, parameters_of(str(folder)))
    assert verdict.is_good and verdict.trained == ("model.embed_tokens.weight",)
    assert verdict.parameters == len(stored_twice()) - 1
