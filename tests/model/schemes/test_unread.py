"""Anything about a quantized weight that its format does not understand is rejected by name, for every format."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import spectrum_stream
from spectrum_stream import Plan, plan, scan
from spectrum_stream.errors import SpectrumStreamError
from spectrum_stream.model.no_score import NoScore
from spectrum_stream.model.schemes import SCHEMES, harmless, is_companion, unknown

from ...support.checkpoints import reference_score
from ...support.formats import EXAMPLES, Example

BUILDERS = [(name, build) for name, builders in EXAMPLES.items() for build in builders]
every_format = pytest.mark.parametrize(("name", "build"), BUILDERS, ids=[build.__name__ for _, build in BUILDERS])

# A plain weight beside the quantized one, so that a plan is never empty.
OTHER = {"model.layers.0.mlp.plain.weight": torch.ones(4, 6)}


def write(folder: Path, example: Example) -> str:
    folder.mkdir(exist_ok=True)
    save_file(dict(example.tensors) | OTHER, folder / "model.safetensors", metadata=dict(example.metadata))
    (folder / "config.json").write_text(json.dumps({"quantization_config": example.quantization}))
    return str(folder)


def owner_of(example: Example) -> str:
    """Return the module or the bare parameter of an example, with the separator of the tensors beside it."""
    (parameter,) = {w.parameter for w in example_plan(example).matrices if w.quantization is not None}
    return parameter.removesuffix("weight") if parameter.endswith(".weight") else f"{parameter}_"


def example_plan(example: Example, folder: Path = Path("example")) -> Plan:
    return plan(write(folder, example), names="checkpoint")


def merge(settings: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Add settings to nested settings."""
    nested = {k: merge(settings[k], v) for k, v in extra.items() if isinstance(settings.get(k), Mapping)}
    return {**settings, **extra, **nested}


def rejected(example: Example) -> str:
    """Check that the quantized weight, and only that, is rejected as not understood; return the detail."""
    a_plan = example_plan(example)
    (failure,) = a_plan.failures
    assert failure.no_score is NoScore.NOT_UNDERSTOOD
    assert all(w.quantization is None for w in a_plan.matrices)
    return failure.detail


def test_every_format_has_an_example() -> None:
    assert set(EXAMPLES) == {scheme.name for scheme in SCHEMES}
    assert len({scheme.name for scheme in SCHEMES}) == len(SCHEMES)


def test_table_of_the_readme_has_every_format_and_its_test() -> None:
    readme = Path(spectrum_stream.__file__).parent / "model/README.md"
    table = readme.read_text().split("<!-- formats -->")[1].split("<!-- /formats -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert {row[0] for row in rows if row[2] == "read"} == {scheme.name for scheme in SCHEMES}
    rejected = ", ".join(row[0] for row in rows if row[2] == "rejected")
    assert all(name in rejected for name in (*unknown.LIBRARIES.values(), "bitsandbytes"))
    for row in rows:
        assert all((Path(__file__).parent / name.strip("`")).is_file() for name in row[4].split(", "))


@pytest.mark.usefixtures("working_folder")
@every_format
def test_example_has_the_scores_of_its_weights(name: str, build: Callable[[], Example]) -> None:
    example = build()
    result = scan(write(Path("example"), example), name="x", names="checkpoint")
    scores = {r.module: r.score.snr for r in result.records if r.quantized is not None and r.score is not None}
    assert result.complete and scores == {
        module: pytest.approx(reference_score(weight), rel=1e-5) for module, weight in example.weights.items()
    }


@pytest.mark.usefixtures("working_folder")
@every_format
def test_parts_are_listed_as_companions_of_the_format(name: str, build: Callable[[], Example]) -> None:
    example = build()
    (scheme,) = [scheme for scheme in SCHEMES if scheme.name == name]
    owner = owner_of(example)[:-1]
    for w in example_plan(example).matrices:
        for part in w.quantization.parts if w.quantization else ():
            assert part.tensor.removeprefix(owner) in scheme.companions and is_companion(part.tensor)


@pytest.mark.usefixtures("working_folder")
@every_format
@pytest.mark.parametrize("shape", [(), (3,), (64, 96)])
def test_unknown_tensor_beside_a_weight_is_rejected(
    name: str, build: Callable[[], Example], shape: tuple[int, ...]
) -> None:
    example = build()
    extra = {f"{owner_of(example)}mystery": torch.ones(shape)}
    assert "mystery" in rejected(replace(example, tensors={**example.tensors, **extra}))


@pytest.mark.usefixtures("working_folder")
@every_format
@pytest.mark.parametrize(
    "ending",
    [
        *("weight_quantizer._svdquant_lora_a", "weight_quantizer._svdquant_lora_b", "lora_down.weight", "lora_A"),
        *("lora_B.weight", "lora_A.default.weight", "lora_linear_layer.up.weight", "lora_magnitude_vector"),
    ],
)
def test_part_of_an_adapter_beside_a_weight_is_rejected(name: str, build: Callable[[], Example], ending: str) -> None:
    example = build()
    extra = {f"{owner_of(example)}{ending}": torch.ones(4, 96)}
    assert ending[-20:] in rejected(replace(example, tensors={**example.tensors, **extra}))


@pytest.mark.usefixtures("working_folder")
@every_format
@pytest.mark.parametrize(
    "extra",
    [
        *("{owner}_smooth_scale", "{parent}.smooth_scale", "{parent}.pre_quant_scale", "{parent}.hadamard"),
        *("{parent}.rotation", "{parent}.R1.weight", "{parent}.act.scales", "{parent}.channel_scale", "hadK"),
        *("{above}.rotation", "{top}.R1.weight"),
    ],
)
def test_tensor_of_a_module_above_a_weight_is_rejected(name: str, build: Callable[[], Example], extra: str) -> None:
    example = build()
    owner = owner_of(example)[:-1]
    parent = owner.rpartition(".")[0]
    above, top = parent.rpartition(".")[0], owner.partition(".")[0]
    tensor = extra.format(owner=owner, parent=parent, above=above, top=top)
    detail = rejected(replace(example, tensors={**example.tensors, tensor: torch.ones(96)}))
    assert tensor.removeprefix(owner)[-20:] in detail


@pytest.mark.usefixtures("working_folder")
@every_format
def test_parameter_of_a_module_above_a_weight_is_accepted(name: str, build: Callable[[], Example]) -> None:
    example = build()
    owner = owner_of(example)[:-1]
    parent = owner.rpartition(".")[0]
    tensors = {
        f"{parent}.up_norm.weight": torch.ones(9),
        "model.layers.0.norm.scale": torch.ones(9),
        **{f"{parent}.{last}": torch.ones(9) for last in ("logit_scale", "q_norm.scale", "k_cache_scale", "A_log")},
        **{f"{parent}.{last}": torch.tensor(1.0) for last in ("k_scale", "layer_scalar", "mystery_scale")},
        "model.layers.1.mlp.smooth_scale": torch.ones(9),
        "model.layers.0.self_attn.scale": torch.ones(9),
    }
    assert not example_plan(replace(example, tensors={**example.tensors, **tensors})).failures


@pytest.mark.usefixtures("working_folder")
def test_part_of_an_adapter_is_left_out_only_beside_a_plain_weight() -> None:
    example = EXAMPLES["gptq"][0]()
    (module,) = example.weights

    def add(name: str) -> Example:
        return replace(example, tensors={**example.tensors, name: torch.ones(4, 4)})

    beside_plain = example_plan(add("model.layers.0.mlp.plain.lora_A.weight"))
    assert not beside_plain.failures and any("adapter" in w for w in beside_plain.warnings)
    # Its weight is not found, so it may be the quantized one.
    assert "lora_unet" in rejected(add("lora_unet_up_proj.lora_down.weight"))
    assert "up_proj_lora" in rejected(add(f"{module}_lora.down.weight"))
    wrapped = {name.replace(module, f"{module}.base_layer"): t for name, t in example.tensors.items()}
    assert "lora_A" in rejected(replace(example, tensors={**wrapped, f"{module}.lora_A.x.weight": torch.ones(4, 4)}))


@pytest.mark.usefixtures("working_folder")
@every_format
@pytest.mark.parametrize(
    "extra",
    [
        {"mystery": True},
        {"mystery": {"a": 1}},
        {"quant_method": "mystery"},
        {"quant_method": 1},
        {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {"config_groups": {"group_0": {"mystery": 1}}},
        {"config_groups": {"group_0": {"weights": {"mystery": 1}}}},
        {"config_groups": {"group_0": {"weights": {"type": "mystery"}}}},
        {"config_groups": {"group_0": {"format": "mystery"}}},
        {"fmt": "mystery"},
        {"rotation_config": {"type": "hadamard"}},
        {"is_marlin_format": True},
        {"version": "mystery"},
        {"checkpoint_format": "marlin"},
        {"quant_algo": "mystery"},
        {"dynamic": {"+:mystery": {"bits": 2}}} | {"extra_config": {"mystery": {"data_type": "mx_fp"}}},
    ],
    ids=str,
)
def test_unknown_setting_is_rejected(name: str, build: Callable[[], Example], extra: dict[str, Any]) -> None:
    example = build()
    detail = rejected(replace(example, quantization=merge(example.quantization, extra)))
    assert next(iter(extra)) in detail or "mystery" in detail


@pytest.mark.usefixtures("working_folder")
@every_format
def test_unknown_metadata_is_rejected(name: str, build: Callable[[], Example]) -> None:
    example = build()
    for extra in ({"mystery": "1"}, {"format": "mystery"}, {"_quantization_metadata": "mystery"}):
        assert "mystery" in rejected(replace(example, metadata={**example.metadata, **extra}))


@pytest.mark.usefixtures("working_folder")
@every_format
@pytest.mark.parametrize("marker", ["mystery", "model.mystery_fp8", "scaled_mystery"])
def test_unknown_marker_is_rejected(name: str, build: Callable[[], Example], marker: str) -> None:
    example = build()
    for value in (torch.tensor(1.0), torch.empty(2, dtype=torch.float8_e4m3fn), torch.empty(0)):
        assert "mystery" in rejected(replace(example, tensors={**example.tensors, marker: value}))


@pytest.mark.usefixtures("working_folder")
@every_format
def test_harmless_tensors_settings_and_metadata_are_accepted(name: str, build: Callable[[], Example]) -> None:
    example = build()
    owner = owner_of(example)
    # Scales of activations show that a weight without scales lacks them.
    beside = (".bias",) if name == "plain float8" else harmless.COMPANIONS
    tensors = {f"{owner[:-1]}{ending}": torch.ones(2) for ending in beside if ending[0] == owner[-1]}
    metadata = {"format": "pt", "total_size": "12", "modelspec.title": "x", "ss_epoch": "3"}
    added = {
        "modules_to_not_convert": ["x"],
        "ignore": ["lm_head"],
        "kv_cache_scheme": {"num_bits": 8},
        "x": None,
    }
    changed = replace(
        example,
        tensors={**tensors, **{name: torch.tensor(2.0) for name in harmless.TOP_TENSORS}, **example.tensors},
        metadata={**metadata, **example.metadata},
        quantization={**added, **example.quantization},
    )
    assert not example_plan(changed).failures


@pytest.mark.usefixtures("working_folder")
def test_config_of_modelopt_in_its_own_file_is_understood() -> None:
    inner = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]}
    said = {"producer": {"name": "modelopt"}, "quantization": inner}
    (build, *_) = EXAMPLES["nvfp4"]
    assert not example_plan(replace(build(), quantization=said)).failures
    assert "mystery" in rejected(replace(build(), quantization=said | {"quantization": inner | {"mystery": 1}}))
    assert "NVFP4_SVD" in rejected(replace(build(), quantization={"quantization": {"quant_algo": "NVFP4_SVD"}}))


NVFP4, GPTQ, AWQ = (EXAMPLES[name][0] for name in ("nvfp4", "gptq", "awq"))
MODELOPT = {
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}
    },
    "ignore": ["lm_head"],
    "quant_algo": "NVFP4",
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quant_method": "modelopt",
}
MODELOPT_FILE = {
    "quant_algo": "NVFP4",
    "kv_cache_quant_algo": "FP8",
    "group_size": 16,
    "exclude_modules": ["lm_head"],
}
GPTQ_V1 = dict(GPTQ().quantization)
AWQ_FILE = {"zero_point": True, "w_bit": 4, "q_group_size": 32, "version": "GEMM"}
MYSTERY = {"quant_method": "mystery"}


def write_two(
    build: Callable[[], Example], own: dict[str, Any], config: dict[str, Any], files: dict[str, Any]
) -> str:
    """Write an example with its quantization config and another, in config.json or in files beside it."""
    folder = write(Path("example"), build())
    for name, content in ({"config.json": {"quantization_config": own, **config}} | files).items():
        (Path(folder) / name).write_text(json.dumps(content))
    return folder


@pytest.mark.usefixtures("working_folder")
@pytest.mark.parametrize(
    ("build", "own", "config", "files"),
    [
        (NVFP4, MODELOPT, {}, {"hf_quant_config.json": {"producer": {}, "quantization": MODELOPT_FILE}}),
        (GPTQ, GPTQ_V1 | {"checkpoint_format": "gptq", "damp_percent": 0.1}, {},
         {"quantize_config.json": GPTQ_V1 | {"model_name_or_path": "x", "damp_percent": 0.01}}),
        (GPTQ, GPTQ_V1, {"quantization": GPTQ_V1, "text_config": {"quantization_config": GPTQ_V1}}, {}),
        (AWQ, AWQ().quantization, {}, {"quant_config.json": AWQ_FILE}),
    ],
    ids=["modelopt", "gptq", "parts", "awq"],
)  # fmt: skip
def test_two_configs_that_agree_are_understood(
    build: Callable[[], Example], own: dict[str, Any], config: dict[str, Any], files: dict[str, Any]
) -> None:
    assert not plan(write_two(build, own, config, files), names="checkpoint").failures


@pytest.mark.usefixtures("working_folder")
@pytest.mark.parametrize(
    ("build", "own", "config", "files", "word"),
    [
        (NVFP4, MODELOPT, {}, {"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4_SVD"}}}, "hf_quant"),
        (NVFP4, MODELOPT, {}, {"hf_quant_config.json": {"quantization": MODELOPT_FILE | {"mystery": 1}}}, "mystery"),
        (NVFP4, MODELOPT, {}, {"hf_quant_config.json": {"quantization": MODELOPT_FILE | {"group_size": 32}}}, "hf_q"),
        (GPTQ, GPTQ_V1, {}, {"quantize_config.json": GPTQ_V1 | {"checkpoint_format": "gptq_v2"}}, "quantize_config"),
        (GPTQ, GPTQ_V1, {}, {"quantize_config.json": GPTQ_V1 | {"format": "gptq_v2"}}, "quantize_config"),
        (GPTQ, GPTQ_V1, {}, {"quantize_config.json": GPTQ_V1 | {"sym": True}}, "quantize_config"),
        (GPTQ, GPTQ_V1, {}, {"quant_config.json": {"mystery": 1}}, "mystery"),
        (GPTQ, GPTQ_V1, {"compression_config": {"mystery": 1}}, {}, "mystery"),
        (GPTQ, GPTQ_V1, {"quantization": {"mystery": 2}}, {}, "mystery"),
        (GPTQ, GPTQ_V1, {"text_config": {"quantization_config": MYSTERY}}, {}, "text_config"),
        (GPTQ, GPTQ_V1, {"llm_config": {"quantization_config": MYSTERY}}, {}, "llm_config"),
    ],
)  # fmt: skip
def test_second_config_that_differs_is_rejected(
    build: Callable[[], Example], own: dict[str, Any], config: dict[str, Any], files: dict[str, Any], word: str
) -> None:
    (failure,) = plan(write_two(build, own, config, files), names="checkpoint").failures
    assert failure.no_score is NoScore.NOT_UNDERSTOOD and word in failure.detail


KNOWN = {key for scheme in SCHEMES for key in scheme.settings} | set(harmless.SETTINGS)
NAMES = st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="_"), min_size=1, max_size=20)
VALUES = st.one_of(st.booleans(), st.integers(), st.text(max_size=5), st.lists(st.integers(), max_size=2))


@pytest.mark.usefixtures("working_folder")
@settings(max_examples=50)
@given(st.sampled_from(BUILDERS), NAMES, VALUES)
def test_setting_of_any_other_name_is_rejected(
    format: tuple[str, Callable[[], Example]], key: str, value: Any
) -> None:
    assume(not any(known.split(".")[0] == key for known in KNOWN))
    example = format[1]()
    assert key in rejected(replace(example, quantization={**example.quantization, key: value}))


@pytest.mark.usefixtures("working_folder")
@settings(max_examples=50)
@given(st.sampled_from(BUILDERS), NAMES)
def test_tensor_of_any_other_name_is_rejected(format: tuple[str, Callable[[], Example]], ending: str) -> None:
    example = format[1]()
    owner = owner_of(example)
    name = f"{owner}{ending}"
    known = {*harmless.COMPANIONS, *(e for scheme in SCHEMES for e in (*scheme.companions, *scheme.values))}
    assume(name not in example.tensors and name[len(owner) - 1 :] not in known and ending != "weight")
    assert ending in rejected(replace(example, tensors={**example.tensors, name: torch.ones(2)}))


@pytest.mark.usefixtures("working_folder")
@pytest.mark.parametrize("ending", sorted({e for scheme in SCHEMES for e in scheme.companions if e.startswith(".")}))
def test_plain_weight_with_scales_beside_it_is_rejected(ending: str) -> None:
    name = "model.layers.0.mlp.up_proj"
    tensors = {f"{name}.weight": torch.ones(4, 6), f"{name}{ending}": torch.ones(4, 1)}
    assert ending in rejected(Example(tensors=tensors, quantization={}, weights={}))
    assert not example_plan(Example(tensors=tensors, quantization={"format": "dense"}, weights={})).failures


# The formats of compressed-tensors, and whether their example has zero points and a column order.
GROUPED = [(build, e) for _, build in BUILDERS if "config_groups" in (e := build()).quantization]
ZEROS, ORDER = ({"symmetric": False}, "zero points"), ({"actorder": "group"}, "column order")
PROMISED = [
    pytest.param(build, *promise, id=f"{build.__name__}, {promise[1]}")
    for build, e in GROUPED
    for promise, ending in ((ZEROS, "zero_point"), (ORDER, "g_idx"))
    if not any(tensor.endswith(ending) for tensor in e.tensors)
]


@pytest.mark.usefixtures("working_folder")
@pytest.mark.parametrize(("build", "weights", "word"), PROMISED)
def test_part_that_the_config_promises_must_be_there(
    build: Callable[[], Example], weights: dict[str, Any], word: str
) -> None:
    example = build()
    changed = merge(example.quantization, {"config_groups": {"group_0": {"weights": weights}}})
    (failure,) = example_plan(replace(example, quantization=changed)).failures
    assert failure.no_score is NoScore.MISSING_SCALES and word in failure.detail


@pytest.mark.usefixtures("working_folder")
@pytest.mark.parametrize("build", [build for build, _ in GROUPED])
@pytest.mark.parametrize("numbers", [("int", 3), ("int", 8), ("float", 8), ("int", 4), ("float", 4)], ids=str)
def test_numbers_that_contradict_the_config_are_rejected(
    build: Callable[[], Example], numbers: tuple[str, int]
) -> None:
    example = build()
    weights = example.quantization["config_groups"]["group_0"]["weights"]
    own = weights.get("type"), weights.get("num_bits")
    said = {"weights": {"type": numbers[0], "num_bits": numbers[1]}}
    changed = replace(example, quantization=merge(example.quantization, {"config_groups": {"group_0": said}}))
    assert len(example_plan(changed).failures) == (numbers != own)
    # Groups of layers can differ.
    two = merge(example.quantization, {"config_groups": {"group_1": said}})
    if "packed" not in build.__name__:
        assert not example_plan(replace(example, quantization=two)).failures


@pytest.mark.usefixtures("working_folder")
def test_zero_points_of_a_symmetric_weight_are_rejected() -> None:
    (build,) = EXAMPLES["packed integers"]
    said = {"config_groups": {"group_0": {"weights": {"symmetric": True}}}}
    example = build()
    assert "symmetric" in rejected(replace(example, quantization=merge(example.quantization, said)))


@pytest.mark.usefixtures("working_folder")
def test_plan_without_any_readable_weight_is_an_error(tmp_path: Path) -> None:
    example = EXAMPLES["float8"][0]()
    save_file({**example.tensors, "mystery": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(SpectrumStreamError):
        plan(str(tmp_path))
