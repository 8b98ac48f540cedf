"""`verify` finds every kind of planted problem, and accepts correct files."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from spectrum_stream import scan, select
from spectrum_stream.errors import SpectrumStreamError
from spectrum_stream.model.config import ModelConfig
from spectrum_stream.model.parameters import Names
from spectrum_stream.trainers import TRAINERS
from spectrum_stream.trainers.parameters import Parameters, parameters_of
from spectrum_stream.trainers.trainer import Reason
from spectrum_stream.trainers.verify import verify

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
PARAMETERS = Parameters(shapes=dict.fromkeys(NAMES, (64, 32)), origin="given")


def write(path: Path, *entries: str, **config: Any) -> Path:
    path.write_text(yaml.safe_dump({"unfrozen_parameters": list(entries)} | config))
    return path


def reasons(path: Path, trainer: str = "axolotl", parameters: Parameters = PARAMETERS) -> list[Reason]:
    return [finding.reason for finding in verify(path, parameters, trainer).findings]


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        (["model.layers.3.mlp.up_proj"], []),
        (["^lm_head.weight$", "^model.embed_tokens.weight$", "model.layers.3.self_attn.q_proj"], []),
        (["model.layers.(?:1|3).mlp.up_proj"], []),
        (["model.layers.[0-9]+.mlp.up_proj"], []),
        (["mlp.up_proj"], [Reason.NO_MATCH]),
        ([r"model\.layers\.3\.mlp\.up_proj"], [Reason.NO_MATCH]),
        (["model.layers.*.mlp.up_proj"], [Reason.NO_MATCH]),
        (["language_model.model.layers.3.mlp.up_proj"], [Reason.NO_MATCH]),
        (["model.layers.1"], [Reason.TOO_MANY]),
        (["model.layers.3.mlp"], []),
        (["model.layers.(?:1|3).mlp.gate"], [Reason.TOO_MANY]),
        (["model.layers.(?:1|3).mlp.gate.weight$"], []),
        (["model.layers.3.mlp.gate"], [Reason.TOO_MANY]),
        (["model.layers.3.mlp.gate.weight$"], []),
        (["model.layers.3.mlp.up_proj["], [Reason.BAD_PATTERN]),
        (["model.+"], []),
    ],
)
def test_verify_finds_wrong_patterns_of_axolotl(tmp_path: Path, entries: list[str], found: list[Reason]) -> None:
    # The last entry is correct, so that something is trained.
    path = write(tmp_path / "a.yaml", *entries, "model.layers.5.mlp.down_proj")
    assert reasons(path) == found


def test_verify_reports_a_pattern_that_overflows(tmp_path: Path) -> None:
    assert reasons(write(tmp_path / "a.yaml", "a{99999999999999999999}")) == [Reason.BAD_PATTERN]


def test_verify_reports_a_bad_pattern_as_written(tmp_path: Path) -> None:
    # Axolotl escapes the dots before it compiles the pattern.
    (finding,) = verify(write(tmp_path / "a.yaml", "model.layers.3.(mlp"), PARAMETERS).findings
    assert finding.entry == "model.layers.3.(mlp"


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        (["layers.1.mlp"], [Reason.NO_MATCH, Reason.ALL_FROZEN]),
        ([".+"], [Reason.NOTHING_FROZEN]),
        # Axolotl ignores an empty list.
        ([], [Reason.NOTHING_FROZEN]),
    ],
)
def test_verify_finds_if_no_or_every_parameter_is_trained(
    tmp_path: Path, entries: list[str], found: list[Reason]
) -> None:
    assert reasons(write(tmp_path / "a.yaml", *entries)) == found


def test_verify_finds_if_a_model_lacks_both_head_and_embedding(tmp_path: Path) -> None:
    other = Parameters(shapes={"a.weight": (3, 4), "b.weight": (3, 4)}, origin="given")
    path = write(tmp_path / "a.yaml", "^lm_head.weight$", "^model.embed_tokens.weight$")
    assert reasons(path, parameters=other) == [Reason.ALL_FROZEN]


@pytest.mark.parametrize(
    ("trainer", "entry", "advice"),
    [
        ("axolotl", r"model\.layers\.3\.mlp\.up_proj", "--format lines"),
        ("axolotl", "model.layers.*.mlp.up_proj", ".+"),
        ("axolotl", "language_model.model.layers.3.mlp.up_proj", "the model has model.layers.3.mlp.up_proj.weight"),
        ("lines", r"language_model\.model\.layers\.3\.mlp\.up_proj", "has model.layers.3.mlp.up_proj.weight"),
    ],
)
def test_verify_explains_an_entry_without_a_match(tmp_path: Path, trainer: str, entry: str, advice: str) -> None:
    path = write(tmp_path / "a.yaml", entry)
    finding = verify(path, PARAMETERS, trainer).findings[0]
    assert finding.reason == Reason.NO_MATCH
    assert advice in finding.detail


def test_verify_notes_a_tied_head_without_a_mismatch(tmp_path: Path) -> None:
    tied = Parameters(shapes=PARAMETERS.shapes, origin="given", tied={"lm_head.weight": "model.embed_tokens.weight"})
    path = write(tmp_path / "a.yaml", "^lm_head.weight$", "^model.embed_tokens.weight$")
    verdict = verify(path, tied)
    assert [finding.reason for finding in verdict.findings] == [Reason.TIED_HEAD]
    assert verdict.is_good
    assert verdict.trained == ("model.embed_tokens.weight",)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"fsdp": ["full_shard"], "fsdp_config": {"fsdp_use_orig_params": False}}, [Reason.FSDP]),
        ({"fsdp": ["full_shard"], "fsdp_config": {"fsdp_use_orig_params": True}}, []),
        ({"fsdp_version": 2, "fsdp_config": {"use_orig_params": False}}, []),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
         [Reason.CHECKPOINTING]),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, []),
        ({"adapter": "lora"}, [Reason.ADAPTER]),
    ],
)  # fmt: skip
def test_verify_finds_settings_that_exclude_frozen_weights(
    tmp_path: Path, config: dict[str, Any], found: list[Reason]
) -> None:
    assert reasons(write(tmp_path / "a.yaml", "model.layers.3.mlp.up_proj", **config)) == found


@pytest.mark.parametrize(
    ("rows", "config", "found"),
    [
        ("[0:32]", {}, []),
        ("[63]", {}, []),
        ("[:65]", {}, [Reason.ROW_RANGE]),
        ("[64]", {}, [Reason.ROW_RANGE]),
        ("[9:3]", {}, [Reason.ROW_RANGE]),
        ("[70:]", {}, [Reason.ROW_RANGE]),
        ("[7:]", {}, []),
        ("[0:32]", {"deepspeed": {"zero_optimization": {"stage": 3}}}, [Reason.ROW_RANGE]),
        ("[0:32]", {"deepspeed": {"zero_optimization": {"stage": 1}}}, []),
        ("[0:32]", {"fsdp_version": 2, "fsdp_config": {"a": 1}}, [Reason.ROW_RANGE]),
        ("[0:32]", {"deepspeed": "configs/zero3_bf16.json"}, [Reason.ROW_RANGE]),
        ("[0:32]", {"deepspeed": "configs/zero1.json"}, []),
    ],
)
def test_verify_finds_rows_that_a_parameter_does_not_have(
    tmp_path: Path, rows: str, config: dict[str, Any], found: list[Reason]
) -> None:
    path = write(tmp_path / "a.yaml", f"model.layers.3.mlp.up_proj.weight${rows}", **config)
    assert reasons(path) == found


def findings_of(path: Path, parameters: Parameters = PARAMETERS) -> list[tuple[Reason, str]]:
    return [(finding.reason, finding.detail) for finding in verify(path, parameters).findings]


KEY = "unfrozen_parameters:\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        # All entries are commented out, and Axolotl then trains everything.
        (KEY + "# - model.layers.1.mlp\n", [Reason.NOTHING_FROZEN]),
        ("unfrozen_parameters: []", [Reason.NOTHING_FROZEN]),
        ("unfrozen_parameters: []\nadapter: lora", [Reason.ADAPTER]),
        (KEY + "- model.layers.3.mlp.up_proj:\n- lm_head\n", [Reason.REJECTED]),
        (KEY + "- - model.layers.3.mlp.up_proj\n- lm_head\n", [Reason.REJECTED]),
        (KEY + "- 1\n-\n- true\n- lm_head\n", [Reason.REJECTED] * 3),
        (KEY + "- lm_head\n" + KEY + "- model.layers.3.mlp.up_proj\n", [Reason.DUPLICATE]),
        (KEY + "- lm_head\nload_in_4bit: true\n", [Reason.REJECTED]),
        (KEY + "- lm_head\nload_in_8bit: true\nadapter: lora\n", [Reason.ADAPTER]),
        (KEY + "- model.layers.[10-11].mlp.up_proj\n", [Reason.DIGIT_RANGE]),
        (KEY + "- model.layers.[0-3].mlp.up_proj\n", []),
        (KEY + "- model.layers.[0-11].mlp.up_proj\n", [Reason.DIGIT_RANGE]),
        (KEY + "- &a model.layers.3.mlp.up_proj\n- *a\n", []),
        ("plugins: [axolotl.integrations.spectrum.SpectrumPlugin]\nspectrum_top_fraction: 50", [Reason.FRACTION]),
        ("plugins: [axolotl.integrations.spectrum.SpectrumPlugin]\nspectrum_top_fraction: 50%", [Reason.FRACTION]),
        ("plugins: [axolotl.integrations.spectrum.SpectrumPlugin]\nspectrum_top_fraction: 0", [Reason.FRACTION]),
        ("plugins: [axolotl.integrations.spectrum.SpectrumPlugin]\n" + KEY + "- lm_head\n", [Reason.PLUGIN]),
    ],
)
def test_verify_finds_lists_that_axolotl_rejects_replaces_or_ignores(
    tmp_path: Path, text: str, found: list[Reason]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    # One kind a file; the fraction of 50 also trains everything.
    assert [r for r in reasons(path) if r is not Reason.NOTHING_FROZEN or r in found] == found


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("^lm_head.weights$", "lm_head.weight"),
        ("model.layer.1.mlp.up_proj", "model.layers.1.mlp.up_proj.weight"),
        ("model.layers.{0..2}.mlp.up_proj", "model.layers.0.mlp.up_proj.weight"),
        ("up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("embed_tokens", "model.embed_tokens.weight"),
        ("base_model.model.model.layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj.weight"),
        ("model.layers.30.mlp.up_proj", "up to model.layers.11.mlp.up_proj.weight"),
        ("model.layers.1.mlp.up_proj,", "write model.layers.1.mlp.up_proj"),
        ('"model.layers.1.mlp.up_proj"', "write model.layers.1.mlp.up_proj"),
        ("transformer.h.0.attn.c_attn", "no similar name"),
        ("lm_head.weight[0:5]$", "write `lm_head.weight$[0:5]`"),
        (r"^model\.layers\..*", "write `^model.layers.`"),
    ],
)
def test_verify_says_what_to_write_for_an_entry_without_a_match(tmp_path: Path, entry: str, words: str) -> None:
    (reason, detail), *_ = findings_of(write(tmp_path / "a.yaml", entry, "lm_head.weight"))
    assert reason is Reason.NO_MATCH and words in detail


def test_verify_takes_a_second_for_many_entries_of_another_model(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", *(f"transformer.h.{i}.x{i}.c_fc" for i in range(5_000)))
    assert len(verify(path, PARAMETERS).findings) == 5_001


def test_verify_says_that_a_loose_head_is_tied(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in PARAMETERS.shapes.items() if name != "lm_head.weight"}
    tied = Parameters(shapes=shapes, origin="given", tied={"lm_head.weight": "model.embed_tokens.weight"})
    for entry in ("lm_head", "lm_head.*"):
        # The embedding is trained by another entry, so both are.
        path = write(tmp_path / "a.yaml", entry, "model.embed_tokens")
        assert verify(path, tied).is_good and reasons(path, parameters=tied) == [Reason.TIED_HEAD]
        (reason, detail), *_ = findings_of(write(tmp_path / "a.yaml", entry, "model.layers.3.mlp.up_proj"), tied)
        assert reason is Reason.NO_MATCH and "tied to model.embed_tokens.weight" in detail


@pytest.mark.parametrize("names", [Names.V5, Names.INSTALLED])
def test_verify_of_a_tied_multimodal_model_is_the_same_with_and_without_transformers(
    tmp_path: Path, names: Names
) -> None:
    tiny("gemma3").save_pretrained(tmp_path / "m")
    parameters = parameters_of(str(tmp_path / "m"), names)
    escaped = write(tmp_path / "a.yaml", r"^model\.language_model\..*", r"^lm_head\..*")
    assert reasons(escaped, parameters=parameters) == [Reason.NO_MATCH, Reason.NO_MATCH, Reason.ALL_FROZEN]
    mended = write(tmp_path / "a.yaml", "model.language_model.*", "lm_head.*")
    verdict = verify(mended, parameters)
    assert verdict.is_good and [f.reason for f in verdict.findings] == [Reason.TIED_HEAD]
    assert all(name.startswith("model.language_model.") for name in verdict.trained) and verdict.trained
    loose = write(tmp_path / "a.yaml", "model.language_model.*", "lm_head", "embed_tokens")
    assert reasons(loose, parameters=parameters) == [Reason.TIED_HEAD, Reason.NO_MATCH]
    assert "model.language_model.embed_tokens.weight" in findings_of(loose, parameters)[1][1]


def test_verify_finds_towers_that_the_config_freezes(tmp_path: Path) -> None:
    names = ("model.vision_tower.layers.0.q.weight", "model.language_model.layers.0.q.weight", "lm_head.weight")
    parameters = Parameters(shapes=dict.fromkeys(names, (4, 4)), origin="given")
    path = write(tmp_path / "a.yaml", "model.vision_tower", "lm_head", freeze_mm_modules=True)
    verdict = verify(path, parameters)
    assert [f.reason for f in verdict.findings] == [Reason.TOWER] and verdict.trained == ("lm_head.weight",)
    path = write(tmp_path / "a.yaml", "model.", freeze_mm_modules=True)
    assert verify(path, parameters).trained == ("model.language_model.layers.0.q.weight",)


def test_verify_translates_old_names_of_a_family(tmp_path: Path) -> None:
    tiny("mixtral").save_pretrained(tmp_path / "m")
    parameters = parameters_of(str(tmp_path / "m"))
    entries = ("model.layers.[0-1]+.block_sparse_moe.gate", "model.layers.0.block_sparse_moe.experts")
    found = findings_of(write(tmp_path / "a.yaml", *entries, "lm_head"), parameters)
    assert [reason for reason, _ in found] == [Reason.NO_MATCH] * 2
    assert "write model.layers.0.mlp.gate.weight" in found[0][1]
    assert "write model.layers.0.mlp.experts.gate_up_proj" in found[1][1]


@pytest.mark.parametrize(
    ("text", "reason", "words"),
    [
        (KEY + "- *.mlp.down_proj\n", "not_a_selection", "line 2"),
        (KEY + "\t- model.layers.1.mlp\n", "not_a_selection", "spaces instead of tabs"),
        ("---\na: 1\n---\n" + KEY + "- lm_head\n", "not_a_selection", "one document"),
        (KEY + "- [a-z]+.mlp\n", "not_a_selection", "quote entries"),
        (KEY + "- 'lm_head\n", "not_a_selection", "close the quotes"),
        ("- lm_head\n", "not_a_selection", "put the line `unfrozen_parameters:` above it"),
        ("unfrozen_parameters: a.b", "not_a_selection", "write a list: `unfrozen_parameters: [a.b]`"),
        ("unfrozen_parameters: a.b, c.d", "not_a_selection", "[a.b, c.d]"),
        ("unfrozen_parameters: |\n  a.b\n  c.d\n", "not_a_selection", "[a.b, c.d]"),
        (KEY + "  a.b:\n  c.d: true\n", "not_a_selection", "[a.b, c.d]"),
        ("unfrozen_parameters: 3", "not_a_selection", "begin each entry with `- `"),
        ("training:\n  unfrozen_parameters: [lm_head]\n", "not_a_selection", "top level"),
        ("base_model: x\nadapter: lora\n", "not_a_selection", "trains all parameters"),
        ("spectrum_top_fraction: 0.5\n", "not_a_selection", "SpectrumPlugin"),
        ("", "not_a_selection", "is empty"),
        ('{"target_modules": ["q_proj"]}', "not_a_selection", "--format peft"),
        ('{"frozen_res": ["^(?!(?:a)$)"]}', "not_a_selection", "--format distillkit"),
        ("plugins: [axolotl.integrations.spectrum.SpectrumPlugin]\nbase_model: a/b_c\n", "chosen_by_plugin",
         "model_snr_results/snr_results_a-b-c.json"),
    ],
)  # fmt: skip
def test_verify_says_how_to_mend_a_file_that_it_cannot_check(
    tmp_path: Path, text: str, reason: str, words: str
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(SpectrumStreamError) as error:
        verify(path, PARAMETERS)
    assert error.value.reason == reason and words in f"{error.value} {error.value.hint}"


BOMB = "a: &a0 [x]\n" + "".join(f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))


@pytest.mark.parametrize(
    "config",
    [
        "unfrozen_parameters: [lm_head, *a29]\n",
        "unfrozen_parameters: *a29\n",
        "unfrozen_parameters: [lm_head]\nadapter: *a29\ndeepspeed: *a29\nfsdp: *a29\nplugins: *a29\n",
        "plugins: [SpectrumPlugin, *a29]\nspectrum_top_fraction: *a29\n",
        "plugins: [SpectrumPlugin]\nbase_model: *a29\n",
        "training: {unfrozen_parameters: [*a29]}\n",
        "trainable_parameters: *a29\nfrozen_res: *a29\n",
    ],
)
@pytest.mark.parametrize("trainer", ["axolotl", "soup", "ms-swift", "distillkit"])
def test_verify_does_not_expand_a_config_that_repeats_its_parts(tmp_path: Path, config: str, trainer: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(BOMB + config)
    try:
        assert not verify(path, PARAMETERS, trainer).is_good
    except SpectrumStreamError as error:
        assert error.reason in ("not_a_selection", "chosen_by_plugin")


PLANT: dict[str, Callable[[str], str]] = {
    "lines": lambda name: f"unfrozen_parameters:\n- {name}\n",
    "soup": lambda name: yaml.safe_dump({"training": {"unfrozen_parameters": [name]}}),
    "ms-swift": lambda name: yaml.safe_dump({"freeze_parameters_ratio": 1, "trainable_parameters": [name]}),
    "peft": lambda name: json.dumps({"target_modules": f"(?:{name})|lm_head", "target_parameters": []}),
    "json": lambda name: json.dumps({"parameters": [f"{name}.weight", "lm_head.weight"]}),
    "python": lambda name: f"TRAINED = ['{name}.weight', 'lm_head.weight']\nTRAINED_IF_THERE = []\n",
    "distillkit": lambda name: yaml.safe_dump(
        {"frozen_res": [rf"^(?!(?:{re.escape(name)}\.weight|lm_head\.weight)$)"]}
    ),
    "axolotl-snr": lambda name: json.dumps({name: {"snr": 1.0, "type": "a"}}),
}


def plant_regex(name: str) -> str:
    """Plant a name in the second key of ms-swift."""
    pattern = f"^(?:{re.escape(name)}|lm_head)"
    return yaml.safe_dump({"freeze_parameters_ratio": 1, "trainable_parameters_regex": pattern})


VARIANTS = [*PLANT.items(), ("ms-swift", plant_regex)]
# The entries of these trainers match from the start of a name.
PREFIXES = [
    (trainer, plant) for trainer, plant in VARIANTS if trainer in ("lines", "soup", "ms-swift", "axolotl-snr")
]


@pytest.mark.parametrize(("trainer", "plant"), VARIANTS)
def test_verify_finds_a_name_of_another_model_in_every_format(
    tmp_path: Path, trainer: str, plant: Callable[[str], str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(plant("transformer.h.3.mlp.c_fc"))
    assert set(reasons(path, trainer)) - {Reason.ALL_FROZEN} == {Reason.NO_MATCH}
    path.write_text(plant("model.layers.3.mlp.up_proj"))
    assert reasons(path, trainer) == []


@pytest.mark.parametrize(("trainer", "plant"), PREFIXES)
def test_verify_finds_a_name_that_is_a_prefix_of_another(
    tmp_path: Path, trainer: str, plant: Callable[[str], str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(plant("model.layers.3.mlp.gate"))
    assert reasons(path, trainer) == [Reason.TOO_MANY]


@pytest.mark.parametrize(
    ("trainer", "config", "found"),
    [
        ("ms-swift", {"trainable_parameters": ["model.layers.1."]}, [Reason.NOTHING_FROZEN]),
        ("ms-swift", {"trainable_parameters": ["model.layers.1."], "freeze_parameters_ratio": 1}, []),
        ("ms-swift", {"trainable_parameters": ["model.layers.1."], "freeze_parameters_ratio": 1,
                      "tuner_type": "lora"}, [Reason.ADAPTER]),
        ("ms-swift", {"trainable_parameters_regex": r"layers\.1\."}, [Reason.NOTHING_FROZEN]),
        ("ms-swift", {"freeze_parameters_ratio": 1}, [Reason.ALL_FROZEN]),
        ("ms-swift", {"freeze_parameters_regex": ".*", "trainable_parameters": ["model.layers.1."]}, []),
        ("ms-swift", {"freeze_parameters": ["model", "lm_head"], "trainable_parameters": ["model.layers.1."]}, []),
        ("llama-factory", {"finetuning_type": "freeze", "freeze_trainable_modules": "mlp, self_attn",
                           "freeze_extra_modules": None}, []),
        ("llama-factory", {"finetuning_type": "freeze", "use_llama_pro": True, "freeze_trainable_layers": 5},
         [Reason.REJECTED]),
        ("ms-swift", {"trainable_parameters": ["lm_head"], "trainable_parameters_regex": r"layers\.x\.",
                      "freeze_parameters_ratio": 1}, [Reason.NO_MATCH]),
        ("llama-factory", {"finetuning_type": "freeze", "freeze_trainable_layers": 2,
                           "freeze_trainable_modules": "mlp"}, []),
        ("llama-factory", {"finetuning_type": "freeze", "freeze_trainable_layers": 2,
                           "freeze_trainable_modules": "mlp,nonsense"}, [Reason.NO_MATCH]),
        ("llama-factory", {"finetuning_type": "lora", "freeze_trainable_layers": 2,
                           "freeze_trainable_modules": "mlp"}, [Reason.ALL_FROZEN, Reason.ADAPTER]),
        ("llama-factory", {"finetuning_type": "freeze", "freeze_trainable_modules": "all"}, []),
        ("llama-factory", {"finetuning_type": "freeze"}, []),
        ("llama-factory", {"finetuning_type": "freeze", "freeze_trainable_modules": ["mlp", "self_attn"]}, []),
        ("llama-factory", {"finetuning_type": "full"}, [Reason.NOTHING_FROZEN]),
        ("peft", {"target_modules": r"model\.layers\.(?:3|7)\.mlp\.down_proj"}, []),
        ("peft", {"target_modules": ["q_proj", "up_proj"]}, []),
        ("peft", {"target_modules": "all-linear"}, []),
        ("peft", {"target_modules": ["q_proj", "nonsense"]}, [Reason.NO_MATCH]),
        ("peft", {"target_modules": ["down_proj"], "exclude_modules": ["down_proj"]}, [Reason.ALL_FROZEN]),
    ],
)  # fmt: skip
def test_verify_reads_the_other_settings_of_a_config(
    tmp_path: Path, trainer: str, config: dict[str, Any], found: list[Reason]
) -> None:
    path = tmp_path / "a.json"
    # YAML includes JSON.
    path.write_text(json.dumps(config))
    assert reasons(path, trainer) == found


@pytest.mark.parametrize("text", ["[" * 1_000, "def f(:", "\0", "{" * 1_000, "a: &a [*a]"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_verify_of_hostile_text_fails_with_a_reason(tmp_path: Path, text: str, trainer: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    try:
        verify(path, PARAMETERS, trainer)
    except SpectrumStreamError as error:
        assert error.reason == "not_a_selection"


@pytest.mark.parametrize("trainer", sorted(set(TRAINERS) - {"llama-factory"}))
def test_verify_passes_the_files_that_formats_write(save: Save, tmp_path: Path, trainer: str) -> None:
    result = scan(str(save(llama_tensors(4), config={"model_type": "llama"})), name="x")
    names = [f"{module.name}.weight" for module in result.modules]
    selection = select([module for module in result.modules if "norm" not in module.name], 50)
    path = tmp_path / f"selection.{TRAINERS[trainer].suffix}"
    path.write_text(TRAINERS[trainer].render(selection, names))
    verdict = verify(path, Parameters(shapes=dict.fromkeys(names), origin="given"), trainer)
    assert verdict.findings == ()
    assert 0 < len(verdict.trained) < len(names)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3", "gpt_oss"])
def test_verify_checks_a_result_against_the_model_of_transformers(tmp_path: Path, family: str) -> None:
    tiny(family).save_pretrained(tmp_path / "m")
    parameters = parameters_of(str(tmp_path / "m"), Names.INSTALLED)
    scan(str(tmp_path / "m"), name="x", top_percent=50)
    for path in ("model_snr_results/snr_results_x.json", "snr_results_x_unfrozenparameters_50percent.yaml"):
        verdict = verify(Path(path), parameters)
        assert verdict.is_good, verdict.findings
    # In two of the families the names of the checkpoint are not those of the model.
    scan(str(tmp_path / "m"), name="x", top_percent=50, names="checkpoint", fresh=True)
    verdict = verify(Path("model_snr_results/snr_results_x.json"), parameters)
    assert verdict.is_good == (family in ("llama", "gpt_oss"))
    assert {f.reason for f in verdict.findings} <= {Reason.NOT_IN_MODEL, Reason.TIED_HEAD}


def test_parameters_of_reads_the_headers_for_names_of_the_checkpoint(save: Save) -> None:
    folder = save(llama_tensors(2), config={"model_type": "llama"})
    for names in (Names.CHECKPOINT, Names.V4, Names.V5):
        assert set(parameters_of(str(folder), names).shapes) == set(llama_tensors(2))


def test_verify_command_exits_with_4_on_a_mismatch(cli: Cli, save: Save, tmp_path: Path) -> None:
    folder = save(llama_tensors(3))
    cli("scan", folder, "--name", "x", "--top-percent", "50")
    path = Path("snr_results_x_unfrozenparameters_50percent.yaml")
    assert ": OK\n" in cli("verify", path, "--model", folder).stdout
    path.write_text(path.read_text().replace("layers.", "blocks."))
    done = cli("verify", path, "--model", folder, "--json", code=4)
    data = json.loads(done.stdout)
    assert data["good"] is False
    assert {f["reason"] for f in data["findings"]} == {"no_match"}


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
def test_verify_fails_for_files_that_are_not_selections(
    tmp_path: Path, text: str | bytes | None, suffix: str, reason: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpectrumStreamError) as error:
        verify(path, PARAMETERS)
    assert error.value.reason == reason


def test_verify_fails_for_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(SpectrumStreamError) as error:
        verify(tmp_path / "a.yaml", PARAMETERS, "nobody")
    assert error.value.reason == "no_such_format"


def test_parameters_of_a_known_family_lack_layers_that_transformers_does_not_load(save: Save) -> None:
    tensors = llama_tensors(4)
    folder = str(save(tensors, config={"model_type": "llama", "num_hidden_layers": 3}))
    extra = {name for name in tensors if ".layers.3." in name}
    assert tensors.keys() - parameters_of(folder, Names.V5).shapes.keys() == extra
    assert parameters_of(folder, Names.CHECKPOINT).shapes.keys() == tensors.keys()


def test_verify_says_when_the_names_of_a_family_are_not_known(cli: Cli, save: Save, tmp_path: Path) -> None:
    folder = save(llama_tensors(2), config={"model_type": "nobody_knows"})
    path = write(tmp_path / "a.yaml", "model.layers.0.mlp.up_proj")
    done = cli("verify", path, "--model", folder, "--json")
    assert not json.loads(done.stdout)["names_are_established"]
    assert "warning: the names of transformers-v5 are not known" in done.stderr
    done = cli("verify", path, "--model", folder, "--names", "checkpoint", "--json")
    assert json.loads(done.stdout)["names_are_established"]


def test_parameters_of_asks_for_a_config_if_there_is_none(save: Save) -> None:
    (warning,) = parameters_of(str(save(llama_tensors(2)))).warnings
    assert "beside the weights" in warning
    assert "--names" not in warning


def test_parameters_of_needs_a_model_or_names() -> None:
    with pytest.raises(SpectrumStreamError) as error:
        parameters_of(None, Names.V5)
    assert error.value.reason == "no_model"


@pytest.mark.parametrize(
    ("trainer", "text"),
    [
        ("axolotl", "unfrozen_parameters: model.layers"),
        ("soup", "training: {unfrozen_parameters: model.layers}"),
        ("ms-swift", "trainable_parameters: model.layers"),
        ("distillkit", "frozen_res: model.layers"),
        ("json", '{"parameters": "model.layers"}'),
    ],
)
def test_verify_fails_for_a_string_instead_of_a_list(tmp_path: Path, trainer: str, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(SpectrumStreamError) as error:
        verify(path, PARAMETERS, trainer)
    assert error.value.reason == "not_a_selection"


def test_verify_finds_a_string_of_targets_for_a_mixture_of_experts(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    mixture = Parameters(
        shapes={"layers.0.q.weight": None, "layers.0.mlp.experts.up_proj": None, "b.weight": None}, origin=""
    )
    path.write_text(json.dumps({"target_modules": r"layers\.0\.q"}))
    assert reasons(path, "peft", mixture) == [Reason.TOO_MANY]
    path.write_text(json.dumps({"target_modules": ["layers.0.q"]}))
    assert reasons(path, "peft", mixture) == []


def test_parameters_of_takes_a_model_or_names_but_not_both() -> None:
    with pytest.raises(SpectrumStreamError) as error:
        parameters_of("model", ["a.weight"])
    assert error.value.reason == "conflicting_options"


def test_verify_searches_all_alternatives_of_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(r"- (?:lm_head\.weight|model\.layers\.0\.mlp\.up_proj\.weight)\Z")
    assert len(verify(path, PARAMETERS, "lines").trained) == 2


TEXT = "model.language_model.layers"
TOWERS = Parameters(
    shapes=dict.fromkeys(
        (*(f"{TEXT}.{i}.mlp.up_proj.weight" for i in range(3)), "model.visual.blocks.2.mlp.weight",
         "model.visual.merger.mlp.0.weight", "lm_head.weight"), (4, 4),
    ),
    origin="given",
    config=ModelConfig({
        "model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "vision_config": {}, "text_config": {"num_hidden_layers": 3},
    }),
)  # fmt: skip
MERGER, LAST = "model.visual.merger.mlp.0.weight", f"{TEXT}.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("trainer", "config", "trained"),
    [
        ("ms-swift", {"freeze_parameters_ratio": 1, "trainable_parameters": [f"{TEXT}.2"]}, {LAST}),
        ("ms-swift", {"freeze_parameters_ratio": 1, "freeze_aligner": False, "trainable_parameters": [f"{TEXT}.2"]},
         {LAST, MERGER}),
        ("ms-swift", {"freeze_llm": True, "freeze_aligner": False, "trainable_parameters": [f"{TEXT}.2"]},
         {LAST, MERGER}),
        ("llama-factory", {"finetuning_type": "freeze", "freeze_trainable_layers": 1}, {LAST}),
        ("llama-factory", {"finetuning_type": "freeze", "freeze_trainable_layers": 1,
                           "freeze_multi_modal_projector": False}, {LAST, MERGER}),
    ],
)  # fmt: skip
def test_verify_knows_which_towers_a_trainer_freezes(
    tmp_path: Path, trainer: str, config: dict[str, Any], trained: set[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(config))
    verdict = verify(path, TOWERS, trainer)
    assert set(verdict.trained) == trained
    assert verdict.is_good


def test_verify_says_if_it_does_not_know_the_towers(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"trainable_parameters": [TEXT]}))
    config = ModelConfig({**TOWERS.config.data, "model_type": "other"}) if TOWERS.config else None
    assert Reason.TOWER in reasons(path, "ms-swift", replace(TOWERS, config=config))


def test_verify_freezes_by_a_ratio_only_if_the_order_is_known(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("freeze_parameters_ratio: 0.5\ntrainable_parameters: [a]\n")
    given = Parameters(shapes=dict.fromkeys(("a", "b", "c", "d"), (2, 2)), origin="given")
    with pytest.raises(SpectrumStreamError) as error:
        verify(path, given, "ms-swift")
    assert error.value.reason == "needs_sizes"
    assert verify(path, replace(given, is_ordered=True), "ms-swift").trained == ("a", "c", "d")


@pytest.mark.parametrize(
    ("trainer", "config"),
    [
        ("axolotl", {"unfrozen_parameters": ["^score.weight$"], "reward_model": True}),
        ("axolotl", {"unfrozen_parameters": ["score"], "model_type": "AutoModelForSequenceClassification"}),
        ("ms-swift", {"trainable_parameters": ["score"], "freeze_parameters_ratio": 1, "num_labels": 2}),
    ],
)
def test_verify_knows_the_head_of_a_classifier(tmp_path: Path, trainer: str, config: dict[str, Any]) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(config))
    causal = replace(PARAMETERS, config=ModelConfig({"architectures": ["LlamaForCausalLM"]}))
    verdict = verify(path, causal, trainer)
    assert verdict.is_good
    assert verdict.trained == ("score.weight",)


def test_verify_says_that_a_script_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "train.sh"
    path.write_text("swift sft \\\n    --model org/name \\\n    --trainable_parameters model.layers.1 \\\n")
    with pytest.raises(SpectrumStreamError) as error:
        verify(path, PARAMETERS, "ms-swift")
    assert error.value.reason == "not_a_selection"
    assert "trainable_parameters: [" in str(error.value.hint)
