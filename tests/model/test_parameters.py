"""Names in memory: for tiny models that transformers makes and saves, every name of a result is a parameter's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spectrum_stream import freeze, plan, scan
from spectrum_stream.errors import UsageError
from spectrum_stream.model import families
from spectrum_stream.model.matrix import NoScore
from spectrum_stream.model.names import is_extra_layer
from spectrum_stream.model.parameters import read_names
from spectrum_stream.model.transformers_names import parameter_names
from spectrum_stream.pipeline import MatrixScored
from spectrum_stream.results.result import Result

from ..conftest import Save, llama_tensors, reference_score
from ..support.families import BEGIN, END, TABLE, table, tiny

pytestmark = pytest.mark.usefixtures("working_folder")

# What transformers saves under one name and asks for under another, so that asking it finds nothing.
NOT_FOUND = {"deepseek_v4": {"model.norm.weight"}}
README = Path(__file__).parents[2] / "README.md"


def saved(folder: Path, family: str) -> Any:
    pytest.importorskip("transformers")
    model = tiny(family)
    model.save_pretrained(folder)
    return model


def check_family(family: str, folder: Path) -> None:
    """Every name of a scan is a parameter's of the model that transformers loads, and every score its own."""
    saved(folder / "saved", family)
    # As it is after loading, which is what a trainer trains.
    loaded, report = type(tiny(family)).from_pretrained(folder / "saved", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    parameters = dict(loaded.named_parameters())
    result = scan(str(folder / "saved"), name="x", out=folder, top_percent=50, target="transformers-v5")
    assert result.complete and not result.plan.failures
    assert result.plan.target == "transformers-v5"
    scores: dict[str, list[float]] = {}
    for record in result.records:
        if record.parameter not in parameters and record.module == "lm_head":
            continue  # tied: the model lists the embedding alone
        assert record.score is not None
        scores.setdefault(record.parameter, []).append(record.score.snr)
    assert scores.keys() <= parameters.keys(), scores.keys() - parameters.keys()
    for name, found in scores.items():
        w = parameters[name].detach()
        whole = [w] if w.ndim <= 2 else list(w)
        # What transformers put together of two, gate and up, is scored as the two.
        parts = [part for e in whole for part in (e.chunk(2) if len(found) == 2 * len(whole) else [e])]
        assert sorted(found) == pytest.approx(sorted(reference_score(part) for part in parts), rel=1e-4), name
    # Whatever has two dimensions, and nothing else, is scored; embeddings of positions and the like among it.
    weights = {name for name, w in parameters.items() if name.endswith(".weight") and w.ndim <= 2}
    assert weights <= scores.keys(), weights - scores.keys()
    assert result.selection is not None and 0 < freeze(loaded, result.selection).trainable_share < 1


@pytest.mark.parametrize("family", TABLE)
def test_every_name_is_a_parameter_and_has_its_score(family: str, tmp_path: Path) -> None:
    check_family(family, tmp_path)


@pytest.mark.parametrize("family", [f for f in TABLE if f in families.V5])
def test_the_table_is_what_transformers_does(family: str, tmp_path: Path) -> None:
    saved(tmp_path / "saved", family)
    stored = [w.parameter for w in plan(str(tmp_path / "saved"), target="checkpoint").matrices if w.tied_to is None]
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    asked = parameter_names(config, stored)
    rename = families.rename(families.V5[family])
    assert {name: rename(name) for name in stored if name in asked} == asked
    assert {name for name in stored if name not in asked} <= NOT_FOUND.get(family, set())


def test_the_readme_has_the_table_of_families() -> None:
    assert f"{BEGIN}\n{table()}\n{END}" in README.read_text()


def test_names_change_and_no_score_is_computed_again(tmp_path: Path) -> None:
    saved(tmp_path / "saved", "mixtral")
    path = Path("model_snr_results/snr_results_x.json")
    first = scan(str(tmp_path / "saved"), name="x", target="checkpoint")
    events: list[object] = []
    second = scan(str(tmp_path / "saved"), name="x", target="transformers-v5", on_event=events.append)
    assert not [e for e in events if isinstance(e, MatrixScored)]
    names = {line.name for line in second.modules}
    assert "model.layers.0.mlp.experts.gate_up_proj" in names and len(names) < len(first.modules)
    assert json.loads(path.read_text()).keys() == names
    assert Result.open(path).modules == tuple(second.modules) and not Result.open(path).notes
    back = scan(str(tmp_path / "saved"), name="x", target="checkpoint")
    assert back.modules == first.modules
    assert Result.open(path).modules == tuple(first.modules)
    assert json.loads(path.read_text()).keys() == {s.name for s in first.modules}


def test_the_names_are_those_of_the_transformers_that_is_installed(tmp_path: Path) -> None:
    saved(tmp_path / "saved", "mixtral")
    assert plan(str(tmp_path / "saved")).target == "transformers-v5"
    apart = plan(str(tmp_path / "saved"), target="transformers-v4")
    assert {w.parameter for w in apart.matrices} == {w.tensor for w in apart.matrices}
    (tmp_path / "saved" / "config.json").unlink()
    assert plan(str(tmp_path / "saved")).target == "checkpoint"


def test_a_family_that_nobody_knows_keeps_its_names_with_a_warning(save: Save) -> None:
    config = {"architectures": ["NoSuchForCausalLM"], "model_type": "nosuch"}
    a_plan = plan(str(save(llama_tensors(1), config=config)))
    assert a_plan.target == "checkpoint" and any("nosuch" in warning for warning in a_plan.warnings)
    with pytest.raises(UsageError) as error:
        plan(str(save(llama_tensors(1), config=config)), target="transformers-v4")
    assert error.value.reason == "unknown_architecture"


def test_the_towers_of_older_checkpoints_are_a_level_deeper(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = saved(tmp_path / "saved", "llava")
    path = tmp_path / "saved" / "model.safetensors"
    older = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in load_file(path).items()}
    save_file(older, path, {"format": "pt"})
    names = {w.parameter for w in plan(str(tmp_path / "saved"), target="transformers-v5").matrices}
    assert names <= set(dict(model.named_parameters()))


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "distributed": lambda name: f"module.{name}",
    "sharded": lambda name: name.replace("layers.", "layers._fsdp_wrapped_module."),
    "adapted": lambda name: "base_model.model." + name.replace("_proj.weight", "_proj.base_layer.weight"),
    "plain": lambda name: name,
    "prefixed": lambda name: f"model.{name}",
}


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3"])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_names_of_a_trainer_are_taken_from_a_list(tmp_path: Path, family: str, wrapper: str) -> None:
    model = saved(tmp_path / "saved", family)
    names = [WRAPPED[wrapper](name) for name, _ in model.named_parameters()]
    dumped = tmp_path / "names.txt"
    dumped.write_text("".join(f"{name} torch.Size([1])\n" for name in names))
    assert read_names(dumped) == tuple(names)
    a_plan = plan(str(tmp_path / "saved"), names=names)
    assert a_plan.target == "given" and not a_plan.warnings
    assert {w.parameter for w in a_plan.matrices if w.tied_to is None} <= set(names)


def test_names_that_are_none_of_the_model_are_refused(tmp_path: Path, save: Save) -> None:
    with pytest.raises(UsageError) as error:
        plan(str(save(llama_tensors(1))), names=["a.weight"])
    assert error.value.reason == "no_such_name"
    for text, reason in (("", "no_names"), ('{"a": 1}', "no_names"), (None, "no_such_file")):
        path = tmp_path / "names"
        if text is None:
            path.unlink()
        else:
            path.write_text(text)
        with pytest.raises(UsageError) as error:
            read_names(path)
        assert error.value.reason == reason, text
    path.write_text('["a.weight", "b"]')
    assert read_names(path) == ("a.weight", "b")


def test_towers_and_further_layers_are_ranked_apart(tmp_path: Path, save: Save) -> None:
    saved(tmp_path / "saved", "llava")
    for target in ("checkpoint", "transformers-v5"):
        groups = {w.group: w for w in plan(str(tmp_path / "saved"), target=target).matrices}
        assert "self_attn.q_proj" in groups and "vision.self_attn.q_proj" in groups
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.randn(6, 9),
        "model.layers.1.mlp.up_proj.weight": torch.randn(6, 9),
        "mtp.layers.0.mlp.up_proj.weight": torch.randn(6, 9),
    }
    folder = str(save(tensors, config={"model_type": "deepseek_v3", "num_hidden_layers": 1}))
    found = [w.group for w in plan(folder, target="checkpoint").matrices]
    assert found.count("mlp.up_proj") == 1 and found.count("mtp.mlp.up_proj") == 2
    a_plan = plan(folder, target="transformers-v5")
    assert [w.module for w in a_plan.matrices] == ["model.layers.0.mlp.up_proj"]
    assert [s.why for s in a_plan.skipped] == [NoScore.NOT_LOADED] * 2


def test_what_transformers_does_not_know_is_refused_or_named(save: Save) -> None:
    for config in (
        {"model_type": "nosuch"},
        {"architectures": ["NoSuchForCausalLM"], "model_type": "nosuch"},
        {"architectures": ["Pipeline"]},
    ):
        with pytest.raises(UsageError) as error:
            plan(str(save(llama_tensors(1), config=config)), target="transformers-v5")
        assert error.value.reason == "unknown_architecture"
    with pytest.raises(UsageError) as error:
        plan(str(save(llama_tensors(1))), target="trainer")
    assert error.value.reason == "no_such_target"


def test_a_module_that_the_model_lacks_keeps_its_name_and_is_pointed_at(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(tmp_path / "saved", "olmo3")
    path = tmp_path / "saved" / "model.safetensors"
    save_file(load_file(path) | {"model.extra.0.eh_proj.weight": torch.randn(6, 9)}, path)
    a_plan = plan(str(tmp_path / "saved"), target="transformers-v5")
    assert any("model.extra.0.eh_proj" in warning for warning in a_plan.warnings)
    assert all(w.result_name == w.module for w in a_plan.matrices)


def test_gpt_oss_as_it_is_published_has_the_names_of_its_parameters(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from .test_quantization import mxfp4

    saved(tmp_path / "saved", "gpt_oss")
    path = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
        experts, rows, columns = tensors.pop(name).shape
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4(experts, columns, rows)
    save_file(tensors, path)
    a_plan = plan(str(tmp_path / "saved"), target="transformers-v5")
    assert not a_plan.warnings and "model.layers.0.mlp.experts.gate_up_proj" in {
        w.result_name for w in a_plan.matrices
    }


def test_a_bank_of_which_a_part_cannot_be_read_is_not_published_as_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(tmp_path / "saved", "qwen3_moe")
    path = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(path)
    broken = "model.layers.0.mlp.experts.2.up_proj.weight"
    tensors[broken] = tensors[broken].to(torch.float8_e4m3fn)
    save_file(tensors, path)
    result = scan(str(tmp_path / "saved"), name="x", target="transformers-v5")
    names = {line.name for line in result.modules}
    assert not result.complete and [s.tensor for s in result.plan.failures] == [broken]
    assert "model.layers.0.mlp.experts.gate_up_proj" not in names
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    assert any("gate_proj" in warning for warning in result.plan.warnings)


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["AutoModel"], "model_type": "olmo3"},
        {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "hidden_size": "many"},
        {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "num_attention_heads": 0},
        {"architectures": [None, 5, {}], "model_type": "olmo3"},
        {"architectures": "Olmo3ForCausalLM", "model_type": ["olmo3"]},
    ],
)
def test_a_hostile_config_is_one_sentence(save: Save, config: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as error:
        plan(str(save(llama_tensors(1), config=config)), target="transformers-v5")
    assert error.value.reason == "unknown_architecture" and "\n" not in str(error.value)


def test_two_tensors_do_not_become_one_parameter_of_a_list(save: Save) -> None:
    tensors = {"model.layers.0.q.weight": torch.randn(8, 9), "layers.0.q.weight": torch.randn(30, 40)}
    a_plan = plan(str(save(tensors)), names=["model.layers.0.q.weight"])
    assert len({w.parameter for w in a_plan.matrices}) == 2 and a_plan.warnings


def test_a_config_of_more_layers_than_weights_builds_no_model(save: Save) -> None:
    config = {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "num_hidden_layers": 10**6}
    a_plan = plan(str(save(llama_tensors(1), config=config)))
    assert a_plan.target == "checkpoint" and a_plan.warnings


@pytest.mark.parametrize(
    ("module", "layers", "is_extra"),
    [
        ("model.layers.61.eh_proj", 61, True),
        ("model.layers.60.mlp.up_proj", 61, False),
        ("model.language_model.layers.46.mlp.up_proj", 46, True),
        ("language_model.model.layers.3.mlp.up_proj", 4, False),
        ("model.mtp_block.0.self_attn.q_proj", None, True),
        ("model.mtp_layers.0.self_attn.q_proj", None, True),
        ("mtp.layers.0.mlp.up_proj", None, True),
        ("model.layers.0.mtp.fc", 4, False),
        ("vision_tower.layers.30.mlp.fc1", 12, False),
    ],
)
def test_layers_behind_the_models_own_are_told_by_name_and_number(
    module: str, layers: int | None, is_extra: bool
) -> None:
    assert is_extra_layer(module, layers) is is_extra
