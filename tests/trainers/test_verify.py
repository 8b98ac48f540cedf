"""Selections against models: every mistake, planted, is found, and what is right passes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from spectrum_stream import scan, select
from spectrum_stream.errors import SpectrumStreamError
from spectrum_stream.model.parameters import Names
from spectrum_stream.trainers import FORMATS
from spectrum_stream.trainers.verify import Mistake, Parameters, parameters_of, verify

from ..support.checkpoints import Save, llama_tensors
from ..support.cli import Cli
from ..support.families import tiny

pytestmark = pytest.mark.usefixtures("working_folder")

NAMES = (
    "model.embed_tokens.weight",
    *(
        f"model.layers.{i}.mlp.{name}.weight"
        for i in range(12)
        for name in ("gate", "gate_proj", "up_proj", "down_proj")
    ),
    *(f"model.layers.{i}.self_attn.q_proj.{kind}" for i in range(12) for kind in ("weight", "bias")),
    "lm_head.weight",
)
PARAMETERS = Parameters(dict.fromkeys(NAMES, (64, 32)), "given", {})


def written(path: Path, *entries: str, **config: Any) -> Path:
    path.write_text(yaml.safe_dump({"unfrozen_parameters": list(entries)} | config))
    return path


def mistakes(path: Path, trainer: str = "axolotl", parameters: Parameters = PARAMETERS) -> list[Mistake]:
    return [finding.mistake for finding in verify(path, parameters, trainer).findings]


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        (["model.layers.3.mlp.up_proj"], []),
        (["^lm_head.weight$", "^model.embed_tokens.weight$", "model.layers.3.self_attn.q_proj"], []),
        (["model.layers.(?:1|3).mlp.up_proj"], []),
        (["model.layers.[0-9]+.mlp.up_proj"], []),
        (["mlp.up_proj"], [Mistake.NO_MATCH]),
        ([r"model\.layers\.3\.mlp\.up_proj"], [Mistake.NO_MATCH]),
        (["model.layers.*.mlp.up_proj"], [Mistake.NO_MATCH]),
        (["language_model.model.layers.3.mlp.up_proj"], [Mistake.NO_MATCH]),
        (["model.layers.1"], [Mistake.TOO_MANY]),
        (["model.layers.3.mlp"], []),
        (["model.layers.(?:1|3).mlp.gate"], [Mistake.TOO_MANY]),
        (["model.layers.(?:1|3).mlp.gate.weight$"], []),
        (["a{99999999999999999999}"], None),
        (["model.layers.3.mlp.gate"], [Mistake.TOO_MANY]),
        (["model.layers.3.mlp.gate.weight$"], []),
        (["model.layers.3.mlp.up_proj["], [Mistake.BAD_PATTERN]),
        (["model.+"], []),
    ],
)
def test_mistakes_of_axolotls_patterns_are_found(
    tmp_path: Path, entries: list[str], found: list[Mistake] | None
) -> None:
    # One that is right beside it, so that something is trained.
    path = written(tmp_path / "a.yaml", *entries, "model.layers.5.mlp.down_proj")
    if found is None:
        with pytest.raises(SpectrumStreamError) as error:
            verify(path, PARAMETERS)
        assert error.value.reason == "not_a_selection"
    else:
        assert mistakes(path) == found


def test_nothing_trained_and_nothing_frozen_are_found(tmp_path: Path) -> None:
    assert Mistake.ALL_FROZEN in mistakes(written(tmp_path / "a.yaml", "layers.1.mlp"))
    assert mistakes(written(tmp_path / "a.yaml", ".+")) == [Mistake.NOTHING_FROZEN]
    # An empty list is none to Axolotl.
    assert mistakes(written(tmp_path / "a.yaml")) == [Mistake.NOTHING_FROZEN]
    # Spectrum's two patterns alone, in a model that has neither.
    other = Parameters({"a.weight": (3, 4), "b.weight": (3, 4)}, "given", {})
    path = written(tmp_path / "a.yaml", "^lm_head.weight$", "^model.embed_tokens.weight$")
    assert mistakes(path, parameters=other) == [Mistake.ALL_FROZEN]


def test_a_tied_head_is_noted_and_is_no_mismatch(tmp_path: Path) -> None:
    tied = Parameters(PARAMETERS.shapes, "given", {"lm_head.weight": "model.embed_tokens.weight"})
    path = written(tmp_path / "a.yaml", "^lm_head.weight$", "^model.embed_tokens.weight$")
    verdict = verify(path, tied)
    assert [finding.mistake for finding in verdict.findings] == [Mistake.TIED_HEAD] and verdict.is_good
    assert verdict.trained == ("model.embed_tokens.weight",)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"fsdp": ["full_shard"], "fsdp_config": {"fsdp_use_orig_params": False}}, [Mistake.FSDP]),
        ({"fsdp": ["full_shard"], "fsdp_config": {"fsdp_use_orig_params": True}}, []),
        ({"fsdp_version": 2, "fsdp_config": {"use_orig_params": False}}, []),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
         [Mistake.CHECKPOINTING]),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, []),
        ({"adapter": "lora"}, [Mistake.ADAPTER]),
    ],
)  # fmt: skip
def test_a_config_that_does_not_go_with_frozen_weights_is_found(
    tmp_path: Path, config: dict[str, Any], found: list[Mistake]
) -> None:
    assert mistakes(written(tmp_path / "a.yaml", "model.layers.3.mlp.up_proj", **config)) == found


@pytest.mark.parametrize(
    ("rows", "config", "found"),
    [
        ("[0:32]", {}, []),
        ("[63]", {}, []),
        ("[:65]", {}, [Mistake.ROW_RANGE]),
        ("[64]", {}, [Mistake.ROW_RANGE]),
        ("[9:3]", {}, [Mistake.ROW_RANGE]),
        ("[70:]", {}, [Mistake.ROW_RANGE]),
        ("[7:]", {}, []),
        ("[0:32]", {"deepspeed": {"zero_optimization": {"stage": 3}}}, [Mistake.ROW_RANGE]),
        ("[0:32]", {"deepspeed": {"zero_optimization": {"stage": 1}}}, []),
        ("[0:32]", {"fsdp_version": 2, "fsdp_config": {"a": 1}}, [Mistake.ROW_RANGE]),
        ("[0:32]", {"deepspeed": "configs/zero3_bf16.json"}, [Mistake.ROW_RANGE]),
        ("[0:32]", {"deepspeed": "configs/zero1.json"}, []),
    ],
)
def test_rows_that_are_not_there_are_found(
    tmp_path: Path, rows: str, config: dict[str, Any], found: list[Mistake]
) -> None:
    path = written(tmp_path / "a.yaml", f"model.layers.3.mlp.up_proj.weight${rows}", **config)
    assert mistakes(path) == found


PLANT: dict[str, Callable[[str], str]] = {
    "lines": lambda name: f"unfrozen_parameters:\n- {name}\n",
    "soup": lambda name: yaml.safe_dump({"training": {"unfrozen_parameters": [name]}}),
    "ms-swift": lambda name: yaml.safe_dump({"freeze_parameters_ratio": 1, "trainable_parameters": [name]}),
    "ms-swift-regex": lambda name: yaml.safe_dump(
        {"freeze_parameters_ratio": 1, "trainable_parameters_regex": f"^(?:{re.escape(name)}|lm_head)"}
    ),
    "peft": lambda name: json.dumps({"target_modules": f"(?:{name})|lm_head", "target_parameters": []}),
    "json": lambda name: json.dumps({"parameters": [f"{name}.weight", "lm_head.weight"]}),
    "python": lambda name: f"TRAINED = ['{name}.weight', 'lm_head.weight']\nTRAINED_IF_THERE = []\n",
    "distillkit": lambda name: yaml.safe_dump(
        {"frozen_res": [rf"^(?!(?:{re.escape(name)}\.weight|lm_head\.weight)$)"]}
    ),
    "axolotl-snr": lambda name: json.dumps({name: {"snr": 1.0, "type": "a"}}),
}


@pytest.mark.parametrize("trainer", PLANT)
def test_a_name_of_another_model_is_found_in_every_dialect(tmp_path: Path, trainer: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(PLANT[trainer]("transformer.h.3.mlp.c_fc"))
    assert set(mistakes(path, trainer)) - {Mistake.ALL_FROZEN} == {Mistake.NO_MATCH}
    path.write_text(PLANT[trainer]("model.layers.3.mlp.up_proj"))
    assert mistakes(path, trainer) == []


@pytest.mark.parametrize("trainer", ["lines", "soup", "ms-swift", "ms-swift-regex", "axolotl-snr"])
def test_a_name_that_is_the_start_of_another_is_found_in_every_dialect(tmp_path: Path, trainer: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(PLANT[trainer]("model.layers.3.mlp.gate"))
    assert mistakes(path, trainer) == [Mistake.TOO_MANY]


@pytest.mark.parametrize(
    ("trainer", "config", "found"),
    [
        ("ms-swift", {"trainable_parameters": ["model.layers.1."]}, [Mistake.NOTHING_FROZEN]),
        ("ms-swift", {"trainable_parameters": ["model.layers.1."], "freeze_parameters_ratio": 1}, []),
        ("ms-swift", {"trainable_parameters": ["model.layers.1."], "freeze_parameters_ratio": 1,
                      "tuner_type": "lora"}, [Mistake.ADAPTER]),
        ("ms-swift-regex", {"trainable_parameters_regex": r"layers\.1\."}, [Mistake.NOTHING_FROZEN]),
        ("llama-factory", {"finetuning_type": "freeze", "freeze_trainable_layers": 2,
                           "freeze_trainable_modules": "mlp"}, []),
        ("llama-factory", {"finetuning_type": "freeze", "freeze_trainable_layers": 2,
                           "freeze_trainable_modules": "mlp,nonsense"}, [Mistake.NO_MATCH]),
        ("llama-factory", {"finetuning_type": "lora", "freeze_trainable_layers": 2,
                           "freeze_trainable_modules": "mlp"}, [Mistake.ALL_FROZEN, Mistake.ADAPTER]),
        ("peft", {"target_modules": r"model\.layers\.(?:3|7)\.mlp\.down_proj"}, []),
        ("peft", {"target_modules": ["q_proj", "up_proj"]}, []),
        ("peft", {"target_modules": "all-linear"}, []),
        ("peft", {"target_modules": ["q_proj", "nonsense"]}, [Mistake.NO_MATCH]),
        ("peft", {"target_modules": ["down_proj"], "exclude_modules": ["down_proj"]}, [Mistake.ALL_FROZEN]),
    ],
)  # fmt: skip
def test_what_else_a_config_says_counts(
    tmp_path: Path, trainer: str, config: dict[str, Any], found: list[Mistake]
) -> None:
    path = tmp_path / "a.json"
    # JSON is YAML as well.
    path.write_text(json.dumps(config))
    assert mistakes(path, trainer) == found


@pytest.mark.parametrize("text", ["[" * 20_000, "def f(:", "\0", "{" * 5_000, "a: &a [*a]"])
@pytest.mark.parametrize("trainer", FORMATS)
def test_hostile_text_is_one_sentence(tmp_path: Path, text: str, trainer: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    try:
        verify(path, PARAMETERS, trainer)
    except SpectrumStreamError as error:
        assert error.reason == "not_a_selection"


@pytest.mark.parametrize("trainer", sorted(set(FORMATS) - {"llama-factory"}))
def test_what_select_writes_passes_for_its_trainer(save: Save, tmp_path: Path, trainer: str) -> None:
    result = scan(str(save(llama_tensors(4), config={"model_type": "llama"})), name="x")
    names = [f"{line.name}.weight" for line in result.modules]
    selection = select([line for line in result.modules if "norm" not in line.name], 50)
    path = tmp_path / f"selection.{FORMATS[trainer].SUFFIX}"
    path.write_text(FORMATS[trainer].render(selection, names))
    verdict = verify(path, Parameters(dict.fromkeys(names), "given", {}), trainer)
    assert verdict.findings == () and 0 < len(verdict.trained) < len(names)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3", "gpt_oss"])
def test_a_result_is_held_against_the_model_that_transformers_makes(tmp_path: Path, family: str) -> None:
    tiny(family).save_pretrained(tmp_path / "m")
    parameters = parameters_of(str(tmp_path / "m"), Names.INSTALLED)
    scan(str(tmp_path / "m"), name="x", top_percent=50)
    for path in ("model_snr_results/snr_results_x.json", "snr_results_x_unfrozenparameters_50percent.yaml"):
        verdict = verify(Path(path), parameters)
        assert verdict.is_good, verdict.findings
    # By the names of the checkpoint it is another matter, where they are others.
    scan(str(tmp_path / "m"), name="x", top_percent=50, names="checkpoint", fresh=True)
    verdict = verify(Path("model_snr_results/snr_results_x.json"), parameters)
    assert verdict.is_good == (family in ("llama", "gpt_oss"))
    assert {f.mistake for f in verdict.findings} <= {Mistake.NOT_IN_MODEL, Mistake.TIED_HEAD}


def test_without_transformers_the_headers_are_what_is_known(save: Save) -> None:
    folder = save(llama_tensors(2), config={"model_type": "llama"})
    for names in (Names.CHECKPOINT, Names.V4, Names.V5):
        assert set(parameters_of(str(folder), names).shapes) == set(llama_tensors(2))


def test_a_mismatch_is_exit_code_4_and_what_is_right_is_0(cli: Cli, save: Save, tmp_path: Path) -> None:
    folder = save(llama_tensors(3))
    cli("scan", folder, "--name", "x", "--top-percent", "50")
    path = Path("snr_results_x_unfrozenparameters_50percent.yaml")
    assert "as meant" in cli("verify", path, "--model", folder).stdout
    path.write_text(path.read_text().replace("layers.", "blocks."))
    done = cli("verify", path, "--model", folder, "--json", code=4)
    data = json.loads(done.stdout)
    assert data["good"] is False and {f["mistake"] for f in data["findings"]} == {"no_match"}


@pytest.mark.parametrize(
    ("text", "suffix", "reason"),
    [
        ("unfrozen_parameters: [", "yaml", "not_a_selection"),
        ("a: 1", "yaml", "not_a_selection"),
        ("[1, 2]", "json", "not_a_selection"),
        (b"\xff\xfe", "yaml", "not_a_selection"),
        (None, "yaml", "no_such_result"),
    ],
)
def test_a_file_that_is_no_selection_is_one_sentence(
    tmp_path: Path, text: str | bytes | None, suffix: str, reason: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpectrumStreamError) as error:
        verify(path, PARAMETERS)
    assert error.value.reason == reason
    with pytest.raises(SpectrumStreamError) as error:
        verify(path, PARAMETERS, "nobody")
    assert error.value.reason == "no_such_format"


def test_a_model_is_asked_for() -> None:
    with pytest.raises(SpectrumStreamError) as error:
        parameters_of(None, Names.V5)
    assert error.value.reason == "no_model"


def test_a_text_in_the_place_of_a_list_is_no_selection(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("unfrozen_parameters: model.layers")
    with pytest.raises(SpectrumStreamError) as error:
        verify(path, PARAMETERS)
    assert error.value.reason == "not_a_selection"


def test_a_text_for_peft_is_too_much_for_a_mixture_of_experts(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    mixture = Parameters({"layers.0.q.weight": None, "layers.0.mlp.experts.up_proj": None, "b.weight": None}, "", {})
    path.write_text(json.dumps({"target_modules": r"layers\.0\.q"}))
    assert mistakes(path, "peft", mixture) == [Mistake.TOO_MANY]
    path.write_text(json.dumps({"target_modules": ["layers.0.q"]}))
    assert mistakes(path, "peft", mixture) == []


def test_a_model_and_a_list_of_names_exclude_each_other() -> None:
    with pytest.raises(SpectrumStreamError) as error:
        parameters_of("model", ["a.weight"])
    assert error.value.reason == "conflicting_options"


def test_alternatives_with_an_end_of_another_kind_are_both_looked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(r"- (?:lm_head\.weight|model\.layers\.0\.mlp\.up_proj\.weight)\Z")
    assert len(verify(path, PARAMETERS, "lines").trained) == 2
