"""GPTQ: zero points as the config says, bits that differ by module, and the words of auto-round."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spectrum_stream import plan, scan
from spectrum_stream.model.no_score import NoScore

from ...support.checkpoints import Save, reference_score
from ...support.formats import MODULE, Example, gptq, pack
from ...support.judges import auto_round_linear

pytestmark = pytest.mark.usefixtures("working_folder")

AUTO_ROUND = {"quant_method": "auto-round", "data_type": "int", "desc_act": False}
# Settings, and the number that is subtracted from zero points that are stored.
ZERO_POINTS = [
    ({"quant_method": "gptq"}, 1),
    ({}, 1),
    ({"quant_method": "gptq", "checkpoint_format": "gptq"}, 1),
    ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, 0),
    ({"quant_method": "gptq", "checkpoint_format": "gptq_v2", "format": "gptq_v2", "method": "gptq"}, 0),
    ({"quant_method": "gptq", "format": "gptq_v2"}, 0),
    (AUTO_ROUND | {"packing_format": "auto_round"}, 0),
    (AUTO_ROUND | {"packing_format": "auto_round:gptqmodel"}, 0),
    (AUTO_ROUND | {"packing_format": "auto_round:gptqmodel", "autoround_version": "0.16.1", "act_bits": 16}, 0),
    (AUTO_ROUND | {"packing_format": "auto_round:auto_gptq"}, 1),
    (AUTO_ROUND | {"packing_format": "auto_round:auto_gptq", "autoround_version": "0.5.1", "act_bits": 8}, 1),
    (AUTO_ROUND | {"packing_format": "auto_round:gptq"}, 1),
    ({"quant_method": "intel/auto-round", "packing_format": "auto_round:auto_gptq"}, 1),
]


def quantized(weight: torch.Tensor, bits: int, size: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zero points (n, m / size) for a weight (n, m)."""
    blocks = weight.reshape(weight.shape[0], -1, size)
    if symmetric:
        scales = blocks.abs().amax(2) / ((1 << (bits - 1)) - 0.5)
        return scales.half().float(), torch.full_like(scales, 1 << (bits - 1)).int()
    scales = ((blocks.amax(2) - blocks.amin(2)) / ((1 << bits) - 1)).half().float()
    # auto-round cannot store 0 less one.
    return scales, (-blocks.amin(2) / scales).round().clamp(1, (1 << bits) - 1).int()


def settings(example: Example, config: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in example.quantization.items() if k != "quant_method"}
    return {"quantization_config": kept | config}


def score_of(save: Save, tensors: Any, config: dict[str, Any]) -> float:
    result = scan(str(save(tensors, config=config)), name="x", names="checkpoint")
    (record,) = result.records
    assert result.complete and record.score is not None
    return record.score.snr


def reason(save: Save, tensors: Any, config: dict[str, Any]) -> tuple[NoScore, str]:
    """Return the reason why the quantized weight has no score."""
    other = {"model.layers.0.mlp.plain.weight": torch.ones(2, 3)}
    result = scan(str(save({**tensors, **other}, config=config)), name="x", names="checkpoint")
    assert not result.complete and [module.name for module in result.modules] == ["model.layers.0.mlp.plain"]
    if result.failed:
        (record,) = result.failed
        assert record.no_score is not None
        return record.no_score, record.detail or ""
    (failure,) = result.plan.failures
    return failure.no_score, failure.detail


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("less_one", [True, False])
def test_gptq_agrees_with_auto_round(save: Save, bits: int, symmetric: bool, less_one: bool) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits)) * 0.02
    state, theirs = auto_round_linear(weight, *quantized(weight, bits, 32, symmetric), bits, 32, less_one)
    packing = "auto_round:auto_gptq" if less_one else "auto_round"
    config = AUTO_ROUND | {"bits": bits, "group_size": 32, "sym": symmetric, "packing_format": packing}
    tensors = {f"{MODULE}.{name}": tensor for name, tensor in state.items()}
    found = score_of(save, tensors, {"quantization_config": config})
    assert found == pytest.approx(reference_score(theirs), rel=1e-5)


@pytest.mark.parametrize(("config", "less_one"), ZERO_POINTS)
def test_zero_points_are_read_as_the_config_says(save: Save, config: dict[str, Any], less_one: int) -> None:
    example = gptq(less_one=less_one)
    found = score_of(save, example.tensors, settings(example, config))
    assert found == pytest.approx(reference_score(example.weights[MODULE]), rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        AUTO_ROUND,
        AUTO_ROUND | {"packing_format": "auto_round:exllamav2"},
        AUTO_ROUND | {"packing_format": "auto_round:auto_awq"},
        AUTO_ROUND | {"packing_format": ["auto_round"]},
        {"quant_method": "gptq", "checkpoint_format": "gptq_p"},
        {"quant_method": "gptq", "checkpoint_format": "marlin"},
        {"quant_method": "gptq", "checkpoint_format": "gptq", "format": "gptq_v2"},
        AUTO_ROUND | {"packing_format": "auto_round", "checkpoint_format": "gptq"},
        {"quant_method": "gptqmodel"},
        # Some versions of auto-round stored these less one.
        AUTO_ROUND | {"packing_format": "auto_round", "act_bits": 8},
        AUTO_ROUND | {"packing_format": "auto_round:gptqmodel", "autoround_version": "0.5.1"},
    ],
)
def test_zero_points_of_unknown_or_contradictory_settings_are_rejected(save: Save, config: dict[str, Any]) -> None:
    example = gptq()
    why, detail = reason(save, example.tensors, settings(example, config))
    assert why is NoScore.NOT_UNDERSTOOD
    assert any(word in detail for word in ("_format", "quant_method", "act_bits", "autoround_version"))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("config", "less_one"), ZERO_POINTS)
@pytest.mark.parametrize("sym", [True, False, None])
def test_symmetric_zero_points_that_contradict_the_config_are_reported(
    save: Save, bits: int, config: dict[str, Any], less_one: int, sym: bool | None
) -> None:
    example = gptq(bits=bits)
    half = 1 << (bits - 1)
    # They are stored as in the other format: 8 under "less one", 7 under "as they are".
    wrong = pack(torch.full((3, 64), half - (1 - less_one)), bits, 1)
    tensors = {**example.tensors, f"{MODULE}.qzeros": wrong}
    why, detail = reason(save, tensors, settings(example, config | {"sym": sym}))
    assert why is NoScore.BAD_SCALES and "symmetric" in detail and str(half) in detail
    right = {**example.tensors, f"{MODULE}.qzeros": pack(torch.full((3, 64), half - less_one), bits, 1)}
    assert score_of(save, right, settings(example, config | {"sym": sym})) > 0


def test_zero_points_that_differ_in_a_symmetric_checkpoint_are_reported(save: Save) -> None:
    example = gptq()
    assert reason(save, example.tensors, settings(example, {"sym": True}))[0] is NoScore.BAD_SCALES


@pytest.mark.parametrize("name", ["qzeros", "g_idx"])
def test_gptq_without_zero_points_or_its_column_order_is_rejected(save: Save, name: str) -> None:
    example = gptq()
    tensors = {key: tensor for key, tensor in example.tensors.items() if not key.endswith(name)}
    assert reason(save, tensors, settings(example, {}))[0] is NoScore.MISSING_SCALES


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_gptq_of_bits_that_two_libraries_pack_differently_is_rejected(save: Save, bits: int) -> None:
    example = gptq(bits=bits)
    assert reason(save, example.tensors, settings(example, {}))[0] is NoScore.UNSUPPORTED_DTYPE


def layers(bits: dict[int, int]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Make a module for each layer, with its bits; return the tensors and the weights."""
    tensors: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for i, width in bits.items():
        example = gptq(bits=width)
        name = MODULE.replace(".0.", f".{i}.")
        tensors |= {key.replace(MODULE, name): tensor for key, tensor in example.tensors.items()}
        weights[name] = example.weights[MODULE]
    return tensors, weights


@pytest.mark.parametrize(
    "rules",
    [
        {"dynamic": {r"+:.*\.1\.mlp\..*": {"bits": 8}}},
        {"dynamic": {r".*\.(?:1|7)\.mlp\..*": {"bits": 8, "group_size": 32}}},
        {"dynamic": {r"+:^model\.layers\.1\.mlp\.up_proj$": {"bits": 8}, r"-:.*": {}} | {}},
        {"dynamic": {r"-:.*\.down_proj": {}, r"+:model\.layers\.1": {"bits": 8}, r"+:.*": {"bits": 4}}},
        {"extra_config": {"model.layers.1.mlp.up_proj": {"bits": 8, "act_bits": 16, "rotation_config": None}}},
        {"extra_config": {r".*layers\.1.*": {"bits": 8}, "lm_head": {"bits": 16}}},
        {"extra_config": {r"layers\.[1-3]\.mlp": {"bits": 8}}},
    ],
    ids=str,
)
def test_bits_that_differ_by_module_are_read(save: Save, rules: dict[str, Any]) -> None:
    tensors, weights = layers({0: 4, 1: 8, 2: 4} if "[1-3]" not in str(rules) else {0: 4, 1: 8, 2: 8})
    if "-:.*" in rules.get("dynamic", {}):
        tensors = {key: tensor for key, tensor in tensors.items() if ".1." in key}
        weights = {key: weight for key, weight in weights.items() if ".1." in key}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True} | rules
    result = scan(str(save(tensors, config={"quantization_config": config})), name="x", names="checkpoint")
    assert result.complete
    for record in result.records:
        assert record.score is not None
        assert record.score.snr == pytest.approx(reference_score(weights[record.module]), rel=1e-5)


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        # A repeated group can take exponential time.
        ({"dynamic": {r"+:(.*a)*b": {"bits": 8}}}, NoScore.NOT_UNDERSTOOD),
        ({"dynamic": {r"+:(?=model).*": {"bits": 8}}}, NoScore.NOT_UNDERSTOOD),
        ({"dynamic": {r"+:.{1,9}": {"bits": 8}}}, NoScore.NOT_UNDERSTOOD),
        ({"dynamic": {f"+:.*{i}.*x": {"bits": 8} for i in range(1000)}}, NoScore.NOT_UNDERSTOOD),
        ({"dynamic": {"+:" + "(" * 1000 + ")" * 1000: {"bits": 8}}}, NoScore.NOT_UNDERSTOOD),
        ({"dynamic": {"+:" + ".*" * 1000: {"bits": 8}}}, NoScore.NOT_UNDERSTOOD),
        ({"dynamic": {r"-:.*up_proj": {}}}, NoScore.NOT_UNDERSTOOD),
        ({"dynamic": {r"+:.*": {"bits": 4, "mystery": 1}}}, NoScore.NOT_UNDERSTOOD),
        ({"dynamic": {r"+:.*": {"bits": 4, "format": "gptq_v2"}}}, NoScore.NOT_UNDERSTOOD),
        ({"dynamic": {r"+:.*": {"bits": 8}}}, NoScore.BAD_SCALES),
        ({"dynamic": {r"+:.*": {"bits": "8"}}}, NoScore.UNSUPPORTED_DTYPE),
        ({"dynamic": {r"+:.*": {"group_size": 64}}}, NoScore.BAD_SCALES),
        ({"dynamic": 1}, NoScore.NOT_UNDERSTOOD),
        ({"extra_config": {MODULE: {"bits": 16}}}, NoScore.NOT_UNDERSTOOD),
        ({"extra_config": {MODULE: {"data_type": "mx_fp"}}}, NoScore.NOT_UNDERSTOOD),
        ({"extra_config": {"mlp.up_proj": {"bits": 4}}}, NoScore.NOT_UNDERSTOOD),
        ({"extra_config": {"(a+)+": {"bits": 4}}}, NoScore.NOT_UNDERSTOOD),
    ],
    ids=lambda value: str(value)[:50],
)
def test_rules_that_cannot_be_applied_are_rejected(save: Save, rules: dict[str, Any], why: NoScore) -> None:
    example = gptq()
    assert reason(save, example.tensors, settings(example, {"quant_method": "gptq"} | rules))[0] is why


@pytest.mark.parametrize(
    "config",
    [
        {"bits": 4, "group_size": 32, "desc_act": True, "sym": False},
        {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": True, "static_groups": False, "sym": False,
         "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "gptq_model-4bit-32g",
         "quant_method": "gptq", "checkpoint_format": "gptq", "is_marlin_format": False, "lm_head": False},
        {"bits": 4, "group_size": 32, "desc_act": True, "sym": False, "lm_head": False, "quant_method": "gptq",
         "checkpoint_format": "gptq", "pack_dtype": "int32", "dynamic": None,
         "meta": {"quantizer": ["gptqmodel:2.0.0"], "uri": "https://github.com/modelcloud/gptqmodel", "mse": 0.0}},
        {"batch_size": 1, "bits": 4, "block_name_to_quantize": None, "cache_block_outputs": True, "damp_percent": 0.1,
         "dataset": None, "desc_act": True, "exllama_config": {"version": 1}, "group_size": 32,
         "max_input_length": None, "model_seqlen": None, "module_name_preceding_first_block": None,
         "modules_in_block_to_quantize": None,
         "pad_token_id": None, "quant_method": "gptq", "sym": False, "tokenizer": None, "true_sequential": True,
         "use_cuda_fp16": False, "use_exllama": True},
    ],
)  # fmt: skip
def test_published_config_is_understood(save: Save, config: dict[str, Any]) -> None:
    example = gptq()
    found = score_of(save, example.tensors, {"quantization_config": config})
    assert found == pytest.approx(reference_score(example.weights[MODULE]), rel=1e-5)


def test_published_config_of_auto_round_is_understood(save: Save) -> None:
    config = {
        "amp": True, "autoround_version": "0.5.1", "backend": "auto_round:gptq:exllamav2", "batch_size": 8, "bits": 4,
        "block_name_to_quantize": None, "data_type": "int", "dataset": "NeelNanda/pile-10k",
        "enable_minmax_tuning": True, "enable_norm_bias_tuning": False, "enable_quanted_input": True,
        "gradient_accumulate_steps": 1,
        "group_size": 32, "iters": 1000, "low_gpu_mem_usage": True, "lr": 0.001, "minmax_lr": 0.001, "nsamples": 512,
        "packing_format": "auto_round:auto_gptq", "quant_method": "auto-round", "scale_dtype": "torch.float16",
        "seqlen": 2048, "sym": False, "to_quant_block_names": None, "act_bits": 16, "super_bits": None,
    }  # fmt: skip
    example = gptq()
    found = score_of(save, example.tensors, {"quantization_config": config})
    assert found == pytest.approx(reference_score(example.weights[MODULE]), rel=1e-5)


AUTO_GPTQ = {
    "format": "pt",
    "auto_gptq_version": "0.7.1",
    "gptq_bits": "4",
    "gptq_group_size": "32",
    "gptq_desc_act": "True",
    "gptq_damp_percent": "0.01",
    "gptq_is_marlin_format": "False",
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"gptq_bits": "8"},
        {"gptq_group_size": "64"},
        {"gptq_desc_act": "no"},
        {"gptq_is_marlin_format": "True"},
    ],
)
def test_metadata_of_autogptq_must_agree_with_the_config(save: Save, change: dict[str, str]) -> None:
    example = gptq()
    tensors = {**example.tensors, "model.layers.0.mlp.plain.weight": torch.ones(2, 3)}
    folder = save(tensors, config=settings(example, {"quant_method": "gptq"}))
    save_file(tensors, folder / "model.safetensors", metadata=AUTO_GPTQ | change)
    failures = plan(str(folder), names="checkpoint").failures
    assert [s.no_score for s in failures] == [NoScore.NOT_UNDERSTOOD for _ in change]
    assert all(key in s.detail for s in failures for key in change)


def test_words_that_hold_no_whole_number_of_integers_are_reported(save: Save) -> None:
    example = gptq(bits=3)
    tensors = {**example.tensors, f"{MODULE}.qweight": torch.ones(10, 64, dtype=torch.int32)}
    assert reason(save, tensors, settings(example, {}))[0] is NoScore.BAD_SCALES


def test_example_of_other_shapes_has_a_plan(save: Save) -> None:
    example = replace(gptq(n=32, m=64), metadata={})
    folder = save(example.tensors, config={"quantization_config": example.quantization})
    (matrix,) = plan(str(folder), names="checkpoint").matrices
    assert (matrix.n, matrix.m) == (64, 32)
