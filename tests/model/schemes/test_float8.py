"""Float8 as it is published: scales of other names, MX blocks, no scales at all, and scales that are ambiguous."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ...support.checkpoints import Save
from ...support.quantized import assert_refused, assert_same_from_hub, assert_scores

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
pytestmark = pytest.mark.usefixtures("working_folder")

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def stored(n: int, m: int, dtype: torch.dtype = E4M3, seed: int = 0) -> torch.Tensor:
    return (torch.randn(n, m, generator=torch.Generator().manual_seed(seed)) * 40).to(dtype)


def dequantize(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Dequantize as transformers does."""
    result: torch.Tensor = fp8.Fp8Dequantize._dequantize_one(None, weight, scales, torch.float32)
    return result


def with_config(quantization: dict[str, Any] | None) -> dict[str, Any]:
    return LLAMA | ({} if quantization is None else {"quantization_config": quantization})


SCALES = torch.rand(2, 3, generator=torch.Generator().manual_seed(1)) + 0.1
BLOCKS = {"quant_method": "fp8", "weight_block_size": [32, 32]}


@pytest.mark.parametrize(
    ("ending", "quantization"),
    [
        (".weight_scale_inv", BLOCKS),
        (".weight_scale", BLOCKS),
        (".scale", BLOCKS | {"scale_fmt": "float"}),
        (".qscale_weight", BLOCKS),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_by_any_name_have_the_scores_of_transformers(
    save: Save, ending: str, quantization: dict[str, Any], dtype: torch.dtype
) -> None:
    weight, scales = stored(64, 96), SCALES.to(dtype)
    folder = save({f"{UP}.weight": weight, f"{UP}{ending}": scales}, config=with_config(quantization))
    assert_scores(folder, {UP: dequantize(weight, scales)}, "float8 by block")


@pytest.mark.parametrize(
    ("ending", "others", "quantization"),
    [
        (".weight_scale", {}, {"quant_method": "modelopt", "quant_algo": "FP8"}),
        (".weight_scale", {".input_scale": 0.02}, {"quant_method": "fp8", "activation_scheme": "static"}),
        (".weight_scale", {".k_scale": 0.5, ".output_scale": 2.0}, {"quant_method": "fp8"}),
        (".weight_scale_inv", {".activation_scale": 0.02}, {"quant_method": "fp8", "weight_block_size": None}),
        # ComfyUI before its markers.
        (".scale_weight", {".scale_input": 1.0}, None),
        # The original files of Mistral; their config is params.json.
        (".qscale_weight", {".qscale_act": 0.1}, None),
        # TensorRT-LLM.
        (".weights_scaling_factor", {".activation_scaling_factor": 0.1}, None),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_one_scale_by_any_name_is_a_factor(
    save: Save,
    ending: str,
    others: dict[str, float],
    quantization: dict[str, Any] | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    weight, scale = stored(48, 40, dtype), torch.full(shape, 0.003)
    beside = {f"{UP}{name}": torch.tensor(value) for name, value in others.items()}
    folder = save({f"{UP}.weight": weight, f"{UP}{ending}": scale} | beside, config=with_config(quantization))
    assert_scores(folder, {UP: weight.float() * 0.003}, "float8 by tensor")


def test_marker_of_scaled_float8_is_read(save: Save) -> None:
    weight, scale = stored(48, 40), torch.tensor(0.003)
    tensors = {f"{UP}.weight": weight, f"{UP}.scale_weight": scale, "scaled_fp8": torch.zeros(2).to(E4M3)}
    assert_scores(save(tensors), {UP: weight.float() * 0.003}, "float8 by tensor")


@pytest.mark.parametrize(
    ("ending", "quantization"),
    [
        (".weight_scale", {"quant_method": "modelopt", "quant_algo": "MXFP8"}),
        (".weight_scale", {"quant_method": "mxfp8", "weight_block_size": [1, 32]}),
        (".weight_scale_inv", {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}),
        (".weight_scale_inv", {"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}),
        (".weight_scale", {"quant_method": "compressed-tensors", "format": "mxfp8-quantized", "config_groups": {
            "group_0": {"targets": ["Linear"], "format": "mxfp8-quantized", "weights": {
                "num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
                "scale_dtype": "torch.uint8"}}}}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_mx_blocks_have_the_scores_of_transformers(
    save: Save, ending: str, quantization: dict[str, Any], dtype: torch.dtype
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    weights = {}
    # The scales of the first are as many as blocks of 32 x 32 would have in the second.
    for name, n, m in ((UP, 3, 96), (DOWN, 96, 96)):
        weight = stored(n, m)
        exponents = torch.randint(
            110, 130, (n, m // 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(n)
        )
        weights[name] = dequantize(weight, exponents)
        tensors |= {f"{name}.weight": weight, f"{name}{ending}": exponents.view(dtype)}
    folder = save(tensors, config=with_config(quantization))
    assert_scores(folder, weights, "float8 by group")


def test_mx_blocks_of_compressed_tensors_have_its_scores(save: Save) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)) * 0.02
    how = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    arguments = quantization.QuantizationArgs(**how, scale_dtype=torch.uint8)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = compressors.BaseCompressor.get_value_from_registry("mxfp8-quantized")
    scale = torch.exp2(torch.floor(torch.log2(weight.reshape(40, 3, 32).abs().amax(2))) - 8)
    state = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    theirs = compressor.decompress(dict(state), scheme)["weight"].float()
    groups = {"group_0": {"targets": ["Linear"], "weights": how | {"scale_dtype": "torch.uint8"}}}
    config = {"quant_method": "compressed-tensors", "format": "mxfp8-quantized", "config_groups": groups}
    folder = save({f"{UP}.{name}": part for name, part in state.items()}, config=with_config(config))
    assert_scores(folder, {UP: theirs}, "float8 by group")


def test_fused_experts_in_mx_blocks_have_the_scores_of_transformers(save: Save) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weight = stored(3 * 40, 96).reshape(3, 40, 96)
    exponents = torch.randint(110, 130, (3, 40, 3), dtype=torch.uint8)
    folder = save(
        {name: weight, f"{name}_scale_inv": exponents},
        config=with_config({"quant_method": "mxfp8", "weight_block_size": [1, 32]}),
    )
    assert_scores(folder, {f"{name}.{e}": dequantize(weight[e], exponents[e]) for e in range(3)}, "float8 by group")


def test_fused_experts_of_fbgemm_have_a_scale_for_each_column(save: Save) -> None:
    up, down = "model.layers.0.feed_forward.experts.gate_up_proj", "model.layers.0.feed_forward.experts.down_proj"
    one, two = stored(2 * 24, 40).reshape(2, 24, 40), stored(2 * 24, 24).reshape(2, 24, 24)
    # `FbgemmFp8Llama4TextExperts` of transformers has these shapes. The weights are transposed, so both have one
    # scale for each column.
    one_scale, two_scale = torch.rand(2, 1, 40) + 0.1, torch.rand(2, 24, 1) + 0.1
    tensors = {up: one, f"{up}_scale": one_scale, down: two, f"{down}_scale": two_scale}
    folder = save(tensors, config=with_config({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}))
    weights = {f"{up}.{e}": one[e].float() * one_scale[e] for e in range(2)}
    weights |= {f"{down}.{e}": two[e].float() * two_scale[e].T for e in range(2)}
    assert_scores(folder, weights, "float8 by column")


@pytest.mark.parametrize("config", [None, LLAMA])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_plain_float8_is_read_as_numbers(save: Save, dtype: torch.dtype, config: Any) -> None:
    weight, norm = stored(48, 40, dtype), stored(1, 40, dtype)[0]
    tensors = {f"{UP}.weight": weight, "model.norm.weight": norm, f"{DOWN}.weight": torch.randn(9, 7)}
    tensors |= {f"{UP}.bias": torch.ones(48).to(dtype), "conv.weight": torch.ones(4, 4, 3, 3).to(dtype)}
    weights = {UP: weight.float(), "model.norm": norm.float(), DOWN: tensors[f"{DOWN}.weight"]}
    assert_scores(save(tensors, config=config), weights)


def test_plain_float8_beside_scaled_float8_lacks_its_scales(save: Save) -> None:
    tensors = {
        f"{UP}.weight": stored(48, 40),
        f"{DOWN}.weight": stored(40, 48),
        f"{DOWN}.weight_scale": torch.ones(1),
    }
    assert_refused(save(tensors), {f"{UP}.weight": ("missing_scales", "")})


@pytest.mark.parametrize(
    ("quantization", "code"),
    [
        ({"quant_method": "fp8"}, "missing_scales"),
        ({"quant_method": "new"}, "not_understood"),
        ({"quant_algo": "FP8"}, "not_understood"),
        ({"bits": 8}, "not_understood"),
    ],
)
def test_float8_without_scales_is_refused_if_the_config_says_that_it_is_quantized(
    save: Save, quantization: dict[str, Any], code: str
) -> None:
    tensors = {f"{UP}.weight": stored(48, 40)}
    assert_refused(save(tensors, config=with_config(quantization)), {f"{UP}.weight": (code, "")})


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("scaled_fp8", "missing_scales"),
        (f"{UP}.scale_new", "missing_scales"),
        (f"{UP}.input_scale", "missing_scales"),
        (f"{UP}.zeros", "not_understood"),
        ("new", "not_understood"),
    ],
)
def test_float8_without_scales_is_refused_if_a_tensor_says_that_it_is_quantized(
    save: Save, name: str, code: str
) -> None:
    assert_refused(save({f"{UP}.weight": stored(48, 40), name: torch.ones(2)}), {f"{UP}.weight": (code, "")})


@pytest.mark.parametrize(
    ("scales", "n", "quantization", "code"),
    [
        # It can have one scale for each row or for each column.
        (torch.ones(40), 40, None, "bad_scales"),
        (torch.ones(40), 40, {"quant_method": "fp8"}, "bad_scales"),
        (torch.ones(1, 40), 40, None, "bad_scales"),
        (torch.ones(1, 40), 48, None, "bad_scales"),
        (torch.ones(40), 48, None, "bad_scales"),
        (torch.ones(48, 40), 48, None, "bad_scales"),
        (torch.ones(48, 2), 48, {"quant_method": "fp8"}, "bad_scales"),
        (torch.ones(48, 3, dtype=torch.uint8), 48, {"quant_method": "mxfp8"}, "bad_scales"),
        (torch.ones(48, 1, dtype=torch.int32), 48, None, "bad_scales"),
    ],
)
def test_scales_that_are_ambiguous_or_do_not_fit_are_refused(
    save: Save, scales: torch.Tensor, n: int, quantization: Any, code: str
) -> None:
    tensors = {f"{UP}.weight": stored(n, 40), f"{UP}.weight_scale": scales}
    assert_refused(save(tensors, config=with_config(quantization)), {f"{UP}.weight": (code, "")})


@pytest.mark.parametrize(
    "quantization", [None, {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}]
)
def test_flat_scales_are_those_of_rows_where_nothing_else_fits(save: Save, quantization: Any) -> None:
    # A square weight is not ambiguous if the config has a method with scales by row.
    n = 48 if quantization is None else 40
    weight, scales = stored(n, 40), torch.rand(n) + 0.1
    folder = save({f"{UP}.weight": weight, f"{UP}.weight_scale": scales}, config=with_config(quantization))
    assert_scores(folder, {UP: weight.float() * scales[:, None]}, "float8 by row")


def test_two_kinds_of_scales_are_refused(save: Save) -> None:
    tensors = {f"{UP}.weight": stored(48, 40), f"{UP}.weight_scale": torch.ones(1), f"{UP}.scale": torch.ones(1)}
    assert_refused(save(tensors), {f"{UP}.weight": ("not_understood", ".scale")})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
def test_other_kinds_of_float8_are_refused_by_name(save: Save, dtype: torch.dtype) -> None:
    tensors = {f"{UP}.weight": torch.ones(48, 40).to(dtype), f"{UP}.weight_scale": torch.ones(1)}
    assert_refused(save(tensors), {f"{UP}.weight": ("unsupported_dtype", "FNUZ")})


def test_repo_has_the_scores_of_a_local_scan(save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors = {"norm.weight": stored(1, 9)[0]}
    for i, m in enumerate((32, 96, 40)):
        tensors |= {f"layers.{i}.up.weight": stored(48, m, seed=i)}
    assert_same_from_hub(save(tensors, shards=2), monkeypatch, tmp_path)
    exponents = torch.randint(110, 130, (48, 3), dtype=torch.uint8)
    mx = {f"{UP}.weight": stored(48, 96), "model.norm.weight": torch.ones(3), f"{UP}.weight_scale": exponents}
    assert_same_from_hub(
        save(mx, shards=2, folder="mx", config=with_config({"quant_method": "mxfp8"})), monkeypatch, tmp_path
    )


def test_layers_of_two_algorithms_of_modelopt_have_their_scores(save: Save) -> None:
    eight, codes = stored(48, 64), torch.randint(0, 256, (48, 32), dtype=torch.uint8)
    four_scales = (torch.rand(48, 4) * 400 + 1).to(E4M3)
    tensors = {
        f"{UP}.weight": eight,
        f"{UP}.weight_scale": torch.tensor(0.003),
        f"{UP}.input_scale": torch.tensor(1.0),
    }
    tensors |= {f"{DOWN}.weight": codes, f"{DOWN}.weight_scale": four_scales}
    tensors[f"{DOWN}.weight_scale_2"] = torch.tensor(0.0003)
    unpacked: torch.Tensor = fp8.Fp8Dequantize(None)._unpack_fp4(codes)
    layers = {UP: {"quant_algo": "FP8"}, DOWN: {"quant_algo": "NVFP4", "group_size": 16}}
    quantization = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    weights = {
        UP: eight.float() * 0.003,
        DOWN: unpacked * four_scales.float().repeat_interleave(16, 1) * 0.0003,
    }
    assert_scores(save(tensors, config=with_config(quantization)), weights)
    # An algorithm that is not read may have stored any of them.
    layers = layers | {DOWN: {"quant_algo": "NVFP4_AWQ", "group_size": 16}}
    folder = save(tensors, folder="awq", config=with_config(quantization | {"quantized_layers": layers}))
    reason = ("not_understood", "NVFP4_AWQ")
    assert_refused(folder, {f"{UP}.weight": reason, f"{DOWN}.weight": reason})
