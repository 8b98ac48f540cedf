"""MXFP4 as DeepSeek-V4, gpt-oss' original files, Quark and ModelOpt store it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from spectrum_stream import scan

from ...support.checkpoints import Save, mxfp4, reference_score
from ...support.quantized import assert_refused, assert_same_from_hub, assert_scores

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
theirs = pytest.importorskip("transformers.integrations.mxfp4")
pytestmark = pytest.mark.usefixtures("working_folder")

EXPERT = "layers.0.ffn.experts.0.w1"
DEEPSEEK_V4 = {
    "model_type": "deepseek_v4",
    "architectures": ["DeepseekV4ForCausalLM"],
    "num_hidden_layers": 2,
    "n_routed_experts": 2,
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}


def packed(n: int, m: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a weight of two values a byte, and its exponents."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (n, m // 2), dtype=torch.int8, generator=generator)
    return weight, torch.randint(118, 126, (n, m // 32), dtype=torch.uint8, generator=generator)


def dequantize(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Dequantize as transformers does, both float8 and FP4."""
    result: torch.Tensor = fp8.Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32)
    return result


def deepseek_v4() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Make a checkpoint as published, and its weights."""
    generator = torch.Generator().manual_seed(0)
    tensors, weights = {}, {}
    for i in range(2):
        for name, n, m in (("attn.wq_a", 128, 256), ("attn.wkv", 64, 256), ("ffn.shared_experts.w1", 200, 96)):
            module = f"layers.{i}.{name}"
            tensors[f"{module}.weight"] = (torch.randn(n, m, generator=generator) * 40).to(torch.float8_e4m3fn)
            rows, columns = -(-n // 128), -(-m // 128)
            exponents = torch.randint(118, 121, (rows, columns), dtype=torch.uint8, generator=generator)
            tensors[f"{module}.scale"] = exponents.view(torch.float8_e8m0fnu)
            grid = torch.exp2(exponents.float() - 127).repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :m]
            weights[module] = tensors[f"{module}.weight"].float() * grid
        for e in range(2):
            for k, name in enumerate(("w1", "w3")):
                module = f"layers.{i}.ffn.experts.{e}.{name}"
                weight, scales = packed(64, 256, seed=4 * i + 2 * e + k)
                weights[module] = dequantize(weight, scales)
                tensors |= {f"{module}.weight": weight, f"{module}.scale": scales.view(torch.float8_e8m0fnu)}
        weights[f"layers.{i}.attn_norm"] = torch.ones(256)
        tensors[f"layers.{i}.attn_norm.weight"] = torch.ones(256).bfloat16()
    return tensors, weights


def test_deepseek_v4_has_the_scores_of_transformers(
    save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensors, weights = deepseek_v4()
    folder = save(tensors, shards=2, config=DEEPSEEK_V4)
    result = scan(str(folder), name="x", names="checkpoint")
    assert result.complete and {record.module for record in result.records} == set(weights)
    for record in result.records:
        expected = reference_score(weights[record.module])
        assert record.score is not None and record.score.snr == pytest.approx(expected, rel=1e-5), record.module
    schemes = {record.quantized for record in result.records}
    assert schemes == {None, "float8 by block", "mxfp4"}
    assert_same_from_hub(folder, monkeypatch, tmp_path)


def test_fused_experts_in_fp4_have_the_scores_of_transformers(save: Save) -> None:
    # transformers saves DeepSeek-V4 so.
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weight, scales = packed(3 * 40, 64)
    weight, scales = weight.reshape(3, 40, 32), scales.reshape(3, 40, 2)
    folder = save({name: weight, f"{name}_scale_inv": scales}, config={**DEEPSEEK_V4, "model_type": "llama"})
    assert_scores(folder, {f"{name}.{e}": dequantize(weight[e], scales[e]) for e in range(3)}, "mxfp4")


@pytest.mark.parametrize(
    ("change", "quantization", "code"),
    [
        # Integers of eight bits with groups of 32 columns.
        ({f"{EXPERT}.scale": torch.ones(64, 4, dtype=torch.uint8)}, {}, "bad_scales"),
        ({f"{EXPERT}.scale": torch.ones(64, 8)}, {}, "unsupported_dtype"),
        ({f"{EXPERT}.weight_zero_point": torch.ones(64, 8)}, {}, "not_understood"),
        ({}, {"quant_method": "new"}, "not_understood"),
        ({}, {"new": 1}, "not_understood"),
    ],
)
def test_fp4_that_does_not_fit_is_refused(save: Save, change: Any, quantization: Any, code: str) -> None:
    weight, scales = packed(64, 256)
    tensors = {f"{EXPERT}.weight": weight, f"{EXPERT}.scale": scales} | change
    config = {"quantization_config": DEEPSEEK_V4["quantization_config"] | quantization}
    assert_refused(save(tensors, config=config), {f"{EXPERT}.weight": (code, "")})


def test_gpt_oss_original_has_the_scores_of_transformers(
    save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensors: dict[str, torch.Tensor] = {"norm.scale": torch.ones(64).bfloat16()}
    weights: dict[str, torch.Tensor] = {}
    for i in range(2):
        for name, n, m in (("mlp1", 48, 64), ("mlp2", 64, 32)):
            module = f"block.{i}.mlp.{name}_weight"
            blocks, scales = mxfp4(3, n, m)
            tensors |= {f"{module}.blocks": blocks, f"{module}.scales": scales}
            tensors[f"block.{i}.mlp.{name}_bias"] = torch.zeros(3, n).bfloat16()
            whole = theirs.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            weights |= {f"{module}.{e}": whole[e] for e in range(3)}
        tensors[f"block.{i}.mlp.norm.scale"] = torch.ones(64).bfloat16()
        tensors[f"block.{i}.mlp.gate.weight"] = torch.randn(3, 64).bfloat16()
        weights[f"block.{i}.mlp.gate"] = tensors[f"block.{i}.mlp.gate.weight"].float()
    folder = save(tensors, config={"num_hidden_layers": 2, "num_experts": 3, "experts_per_token": 4})
    assert_scores(folder, weights)
    assert_same_from_hub(folder, monkeypatch, tmp_path)


# The config that amd-quark 0.13 writes, `QConfig.to_dict`, with its `export`.
QUARK = {
    "quant_method": "quark",
    "quant_mode": "eager_mode",
    "algo_config": None,
    "exclude": ["lm_head"],
    "export": {
        "kv_cache_group": [],
        "min_kv_scale": 0.0,
        "pack_method": "reorder",
        "weight_format": "real_quantized",
    },
    "global_quant_config": {
        "input_tensors": {
            "dtype": "fp4",
            "is_dynamic": True,
            "qscheme": "per_group",
            "ch_axis": -1,
            "group_size": 32,
        },
        "output_tensors": None,
        "bias": None,
        "target_device": None,
        "weight": {
            "dtype": "fp4",
            "is_dynamic": False,
            "qscheme": "per_group",
            "ch_axis": -1,
            "group_size": 32,
            "block_size": None,
            "symmetric": None,
            "round_method": "half_even",
            "scale_type": "float",
            "scale_format": "e8m0",
            "scale_calculation_mode": "even",
            "mx_element_dtype": None,
            "observer_cls": "PerBlockMXObserver",
            "is_scale_quant": False,
        },
    },
    "layer_quant_config": {},
    "layer_type_quant_config": {},
    "kv_cache_quant_config": {},
    "kv_cache_post_rope": False,
    "softmax_quant_spec": None,
    "version": "0.13",
}


@pytest.mark.parametrize("quantization", [QUARK, {"quant_method": "modelopt", "quant_algo": "MXFP4"}])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_bytes_of_quark_and_modelopt_have_the_scores_of_transformers(
    save: Save, quantization: dict[str, Any], dtype: torch.dtype
) -> None:
    weight, scales = packed(64, 256)
    name = "model.layers.0.mlp.up_proj"
    tensors = {f"{name}.weight": weight.view(torch.uint8), f"{name}.weight_scale": scales.view(dtype)}
    folder = save(tensors, config={"model_type": "llama", "quantization_config": quantization})
    assert_scores(folder, {name: dequantize(weight, scales)}, "mxfp4")


def test_other_settings_of_quark_are_refused(save: Save) -> None:
    weight, scales = packed(64, 256)
    name = "model.layers.0.mlp.up_proj"
    tensors = {f"{name}.weight": weight.view(torch.uint8), f"{name}.weight_scale": scales}
    for key, value in (("algo_config", [{"name": "rotation"}]), ("layer_quant_config", {"*.q_proj": {}})):
        config = {"model_type": "llama", "quantization_config": QUARK | {key: value}}
        folder = save(tensors, folder=key, config=config)
        assert_refused(folder, {f"{name}.weight": ("not_understood", key)})
