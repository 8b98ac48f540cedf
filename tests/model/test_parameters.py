"""Names of parameters: every name in the result of a tiny model is a parameter of the model in transformers."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from spectrum_stream import freeze, plan, scan
from spectrum_stream.errors import ResultError, UsageError
from spectrum_stream.model import families
from spectrum_stream.model.config import ModelConfig
from spectrum_stream.model.family_names import _entries
from spectrum_stream.model.names import is_extra_layer
from spectrum_stream.model.no_score import NoScore
from spectrum_stream.model.parameters import Names, read_names
from spectrum_stream.model.transformers_names import InstalledModel
from spectrum_stream.results.record import open_records
from spectrum_stream.results.result import Result
from spectrum_stream.trainers.parameters import parameters_of

from ..support.checkpoints import Save, llama_tensors, reference_score
from ..support.families import BEGIN, END, NOT_BUILT, PUBLISHED, README, TABLE, publish, tiny
from ..support.family_names import PARTS, describe

pytestmark = pytest.mark.usefixtures("working_folder")

# Tensors that transformers saves and loads under different names, so that it does not find them.
NOT_FOUND = {"deepseek_v4": {"model.norm.weight"}}


def saved(folder: Path, family: str) -> Any:
    pytest.importorskip("transformers")
    model = tiny(family)
    model.save_pretrained(folder)
    return model


def check_family(family: str, folder: Path) -> None:
    """Assert that the names of a scan are parameters of the model in transformers, with their scores."""
    saved(folder / "saved", family)
    # A trainer trains the loaded model.
    loaded, report = type(tiny(family)).from_pretrained(folder / "saved", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    check_names(loaded, folder / "saved")


def check_names(loaded: Any, folder: Path) -> None:
    """Assert that the names of a scan are parameters of a model that transformers loaded, with their scores."""
    parameters = dict(loaded.named_parameters())
    result = scan(str(folder), name="x", out=folder / "out", top_percent=50)
    # In a tiny model the bare weights of a projector or a pooling head are a large share.
    assert not result.failed and {s.no_score for s in result.plan.failures} <= {NoScore.BARE_WEIGHT}
    assert not result.plan.warnings
    assert result.plan.names == Names.V5
    assert result.plan.inventory.is_established and result.plan.inventory.model_class == type(loaded).__name__
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
        # transformers fuses two matrices, gate and up. Each has a score.
        parts = [part for e in whole for part in (e.chunk(2) if len(found) == 2 * len(whole) else [e])]
        assert sorted(found) == pytest.approx(sorted(reference_score(part) for part in parts), rel=1e-4), name
    # Every weight of at most two dimensions is scored, including embeddings of positions.
    weights = {name for name, w in parameters.items() if name.endswith(".weight") and w.ndim <= 2}
    assert weights <= scores.keys(), weights - scores.keys()
    assert result.selection is not None and 0 < freeze(loaded, result.selection).trainable_share < 1


@pytest.mark.usefixtures("transformers_here")
@pytest.mark.parametrize("family", PUBLISHED)
def test_result_names_are_parameters_of_a_file_as_published(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    how = PUBLISHED[family]
    publish(family, tmp_path)
    loaded, report = getattr(transformers, how.class_name).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and set(report["unexpected_keys"]) <= how.extra.keys()
    check_names(loaded, tmp_path)
    # A scan does not score the rest, and verify knows it too.
    known = {name for name, _ in loaded.named_parameters()}
    found = parameters_of(str(tmp_path))
    assert found.shapes.keys() - known <= found.tied.keys()
    asked = plan(str(tmp_path), names="transformers").matrices
    assert {w.parameter for w in asked} == {w.parameter for w in plan(str(tmp_path)).matrices}


# Models of all families take a minute. These few show the ways in which families differ.
FEW = ("mixtral", "qwen3_moe", "gpt_oss", "llava", "gemma3", "llama", "gpt2", "t5")


def by_family(families: Iterable[str]) -> Any:
    return [family if family in FEW else pytest.param(family, marks=pytest.mark.slow) for family in families]


@pytest.mark.parametrize("family", by_family(TABLE))
def test_result_names_are_parameters_and_have_their_scores(family: str, tmp_path: Path) -> None:
    check_family(family, tmp_path)


@pytest.mark.usefixtures("transformers_here")
@pytest.mark.parametrize("family", by_family(TABLE))
def test_table_of_families_renames_like_transformers(family: str, tmp_path: Path) -> None:
    saved(tmp_path / "saved", family)
    stored = [w.parameter for w in plan(str(tmp_path / "saved"), names="checkpoint").matrices if w.tied_to is None]
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    with InstalledModel(ModelConfig(config), len(stored)) as model:
        found = model.find(stored)
    asked = {name: parameter for name, (_, parameter) in found.items()}
    rename = families.compile_rules(families.V5[family])
    assert {name: rename(name) for name in stored if name in asked} == asked
    assert {name for name in stored if name not in asked} <= NOT_FOUND.get(family, set())


@pytest.mark.parametrize("family", by_family((*TABLE, *PARTS)))
def test_file_of_names_is_what_transformers_has(family: str) -> None:
    assert _entries()[family] == describe(family), "run: python -m tests.support.families"


def test_readme_lists_every_family() -> None:
    text = README.read_text("utf-8")
    listed = text[text.index(BEGIN) : text.index(END)]
    missing = {family for family in (*families.V5, *TABLE, *NOT_BUILT) if not re.search(rf"\b{family}\b", listed)}
    assert not missing, "run: python -m tests.support.families"


# Scan argv[1] without transformers and its metadata, and print everything that depends on names.
WITHOUT_TRANSFORMERS = """
import importlib.metadata, json, sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def version(name, found=importlib.metadata.version):
    if name == "transformers":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)

sys.meta_path.insert(0, Blocker())
importlib.metadata.version = version
from tests.model.test_parameters import outcome
print(json.dumps(outcome(sys.argv[1])))
"""


def identity_of(record: Path) -> dict[str, Any]:
    with open_records(record, spectra=False) as records:
        return dict(records.identity)


def outcome(folder: str) -> dict[str, Any]:
    """Return the plan, the files and the record of a scan as JSON data."""
    result = scan(folder, name="x", top_percent=50)
    return {
        "plan": result.plan.to_dict(),
        "files": {str(path): path.read_text() for path in result.written},
        "identity": identity_of(result.plan.outputs.record),
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "olmo3"])
def test_result_is_the_same_with_and_without_transformers(tmp_path: Path, family: str) -> None:
    saved(tmp_path / "saved", family)
    # In the same folder, so that paths are the same.
    (tmp_path / "without").mkdir()
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRANSFORMERS, str(tmp_path / "saved")],
        cwd=tmp_path / "without",
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = outcome(str(tmp_path / "saved"))
    assert json.loads(done.stdout) == json.loads(json.dumps(found))
    assert found["identity"]["names"] == ("transformers-v5" if family == "mixtral" else "checkpoint")


def test_scan_with_other_names_than_the_record_fails(tmp_path: Path) -> None:
    saved(tmp_path / "saved", "mixtral")
    folder, path = str(tmp_path / "saved"), Path("model_snr_results/snr_results_x.json")
    first = scan(folder, name="x", names="checkpoint")
    before = path.read_bytes()
    with pytest.raises(ResultError) as error:
        scan(folder, name="x", names="transformers-v5")
    assert error.value.reason == "other_names"
    assert "--names checkpoint" in str(error.value.hint)
    assert path.read_bytes() == before
    assert identity_of(first.plan.outputs.record)["names"] == "checkpoint"


def test_fresh_scan_replaces_the_names_of_the_record(tmp_path: Path) -> None:
    saved(tmp_path / "saved", "mixtral")
    folder, path = str(tmp_path / "saved"), Path("model_snr_results/snr_results_x.json")
    scan(folder, name="x", names="checkpoint")
    second = scan(folder, name="x", names="transformers-v5", fresh=True)
    names = {module.name for module in second.modules}
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert json.loads(path.read_text()).keys() == names
    assert identity_of(second.plan.outputs.record)["names"] == "transformers-v5"
    assert Result.open(path).modules == tuple(second.modules)


def test_record_of_one_list_of_names_rejects_another_list(save: Save) -> None:
    folder = str(save(llama_tensors(1)))
    names = list(llama_tensors(1))
    scan(folder, name="x", names=names)
    scan(folder, name="x", names=names[::-1])
    with pytest.raises(ResultError) as error:
        scan(folder, name="x", names=[f"_orig_mod.{name}" for name in names])
    assert error.value.reason == "other_names"


def test_plan_names_are_those_of_transformers_5_by_default(tmp_path: Path) -> None:
    saved(tmp_path / "saved", "mixtral")
    assert plan(str(tmp_path / "saved")).names == "transformers-v5"
    apart = plan(str(tmp_path / "saved"), names="transformers-v4")
    assert {w.parameter for w in apart.matrices} == {w.tensor for w in apart.matrices}
    (tmp_path / "saved" / "config.json").unlink()
    assert plan(str(tmp_path / "saved")).names == "checkpoint"
    assert any("config.json" in warning for warning in plan(str(tmp_path / "saved")).warnings)


@pytest.mark.parametrize("names", [Names.V4, Names.V5])
def test_plan_of_an_unknown_family_keeps_the_names_of_the_checkpoint_and_warns(save: Save, names: Names) -> None:
    config = {"architectures": ["NoSuchForCausalLM"], "model_type": "nosuch"}
    a_plan = plan(str(save(llama_tensors(1), config=config)), names=names)
    assert a_plan.names == "checkpoint"
    assert {w.parameter for w in a_plan.matrices} == set(llama_tensors(1))
    assert any("nosuch" in warning for warning in a_plan.warnings)


def test_towers_of_older_checkpoints_lose_a_level(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = saved(tmp_path / "saved", "llava")
    path = tmp_path / "saved" / "model.safetensors"
    older = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in load_file(path).items()}
    save_file(older, path, {"format": "pt"})
    names = {w.parameter for w in plan(str(tmp_path / "saved"), names="transformers-v5").matrices}
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
def test_plan_uses_a_list_of_the_names_in_a_trainer(tmp_path: Path, family: str, wrapper: str) -> None:
    model = saved(tmp_path / "saved", family)
    names = [WRAPPED[wrapper](name) for name, _ in model.named_parameters()]
    dumped = tmp_path / "names.txt"
    dumped.write_text("".join(f"{name} torch.Size([1])\n" for name in names))
    assert read_names(dumped) == tuple(names)
    a_plan = plan(str(tmp_path / "saved"), names=names)
    assert a_plan.names == "given" and not a_plan.warnings
    assert {w.parameter for w in a_plan.matrices if w.tied_to is None} <= set(names)


def test_plan_rejects_a_list_without_a_name_of_the_model(tmp_path: Path, save: Save) -> None:
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


def test_towers_and_extra_layers_have_separate_groups(tmp_path: Path, save: Save) -> None:
    saved(tmp_path / "saved", "llava")
    for names in ("checkpoint", "transformers-v5"):
        groups = {w.group: w for w in plan(str(tmp_path / "saved"), names=names).matrices}
        assert "self_attn.q_proj" in groups and "vision.self_attn.q_proj" in groups
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.randn(6, 9),
        "model.layers.1.mlp.up_proj.weight": torch.randn(6, 9),
        "mtp.layers.0.mlp.up_proj.weight": torch.randn(6, 9),
    }
    folder = str(save(tensors, config={"model_type": "deepseek_v3", "num_hidden_layers": 1}))
    found = [w.group for w in plan(folder, names="checkpoint").matrices]
    assert found.count("mlp.up_proj") == 1 and found.count("mtp.mlp.up_proj") == 2
    a_plan = plan(folder, names="transformers-v5")
    assert [w.module for w in a_plan.matrices] == ["model.layers.0.mlp.up_proj"]
    assert [s.no_score for s in a_plan.skipped] == [NoScore.NOT_LOADED] * 2


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "nosuch"},
        {"architectures": ["NoSuchForCausalLM"], "model_type": "nosuch"},
        {"architectures": ["Pipeline"]},
    ],
)
def test_plan_fails_if_the_installed_transformers_has_no_such_model(save: Save, config: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as error:
        plan(str(save(llama_tensors(1), config=config)), names="transformers")
    assert error.value.reason == "unknown_architecture"


def test_plan_fails_for_an_unknown_choice_of_names(save: Save) -> None:
    with pytest.raises(UsageError) as error:
        plan(str(save(llama_tensors(1))), names="trainer")
    assert error.value.reason == "no_such_names"


def test_module_that_the_model_lacks_keeps_its_name_with_a_warning(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(tmp_path / "saved", "olmo3")
    path = tmp_path / "saved" / "model.safetensors"
    save_file(load_file(path) | {"model.extra.0.eh_proj.weight": torch.randn(6, 9)}, path)
    a_plan = plan(str(tmp_path / "saved"), names="transformers")
    assert any("model.extra.0.eh_proj" in warning for warning in a_plan.warnings)
    assert all(w.result_name == w.module for w in a_plan.matrices)


def test_gpt_oss_in_mxfp4_has_the_names_of_its_parameters(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from ..support.checkpoints import mxfp4

    saved(tmp_path / "saved", "gpt_oss")
    path = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
        experts, rows, columns = tensors.pop(name).shape
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4(experts, columns, rows)
    save_file(tensors, path)
    a_plan = plan(str(tmp_path / "saved"), names="transformers-v5")
    assert not a_plan.warnings and "model.layers.0.mlp.experts.gate_up_proj" in {
        w.result_name for w in a_plan.matrices
    }


def test_result_leaves_out_fused_experts_with_an_unreadable_part(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(tmp_path / "saved", "qwen3_moe")
    path = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(path)
    broken = "model.layers.0.mlp.experts.2.up_proj.weight"
    tensors[broken] = tensors[broken].to(torch.uint8)
    save_file(tensors, path)
    result = scan(str(tmp_path / "saved"), name="x", names="transformers-v5")
    names = {module.name for module in result.modules}
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
        {"architectures": ["Olmo3ForCausalLM"] * 1000, "model_type": "olmo3"},
        {"architectures": ["PreTrainedModel", "utils", "pipeline"], "model_type": "olmo3"},
        {"architectures": ["Olmo3ForCausalLM"], "model_type": "../../etc/passwd"},
    ],
)
@pytest.mark.usefixtures("transformers_here")
def test_hostile_config_is_rejected_with_one_sentence(save: Save, config: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as error:
        plan(str(save(llama_tensors(1), config=config)), names="transformers")
    assert error.value.reason == "unknown_architecture" and "\n" not in str(error.value)


def test_list_of_names_never_gives_two_tensors_one_parameter(save: Save) -> None:
    tensors = {"model.layers.0.q.weight": torch.randn(8, 9), "layers.0.q.weight": torch.randn(30, 40)}
    a_plan = plan(str(save(tensors)), names=["model.layers.0.q.weight"])
    assert len({w.parameter for w in a_plan.matrices}) == 2 and a_plan.warnings


def test_config_with_more_layers_than_weights_builds_no_model(save: Save) -> None:
    config = {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "num_hidden_layers": 10**6}
    with pytest.raises(UsageError) as error:
        plan(str(save(llama_tensors(1), config=config)), names="transformers")
    assert error.value.reason == "unknown_architecture"


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
def test_extra_layers_are_known_by_name_and_number(module: str, layers: int | None, is_extra: bool) -> None:
    assert is_extra_layer(module, layers) is is_extra
