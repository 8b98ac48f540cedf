"""Checkpoints of MLX have the scores of the weights that MLX dequantizes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ...support.checkpoints import Save
from ...support.quantized import assert_refused, assert_same_from_hub, assert_scores

mx = pytest.importorskip("mlx.core")
pytestmark = pytest.mark.usefixtures("working_folder")

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
UP, Q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"


def to_torch(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array.astype(mx.float32)))


def quantize(name: str, shape: tuple[int, ...], seed: int = 0, **how: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """Quantize a random weight with MLX; return its tensors, and the weight that MLX dequantizes."""
    mx.random.seed(seed)
    weight = mx.random.normal(shape) * mx.exp(mx.random.normal((*shape[:-1], 1)))
    stored = mx.quantize(weight.astype(mx.bfloat16), **how)
    # In bfloat16 the product would be rounded.
    exact = [stored[0], *(s if s.dtype == mx.uint8 else s.astype(mx.float32) for s in stored[1:])]
    endings = ("weight", "scales", "biases")[: len(stored)]
    tensors = {f"{name}.{ending}": part for ending, part in zip(endings, stored, strict=True)}
    return tensors, to_torch(mx.dequantize(*exact, dtype=mx.float32, **how))


def write(folder: Path, tensors: dict[str, Any], quantization: Any, *, both: bool = True) -> Path:
    """Write a checkpoint as mlx_lm does; older versions have the settings under one name only."""
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    names = ("quantization", "quantization_config") if both else ("quantization",)
    config = LLAMA | ({} if quantization is None else dict.fromkeys(names, quantization))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_affine_has_the_scores_of_mlx(tmp_path: Path, bits: int, size: int) -> None:
    tensors, weight = quantize(UP, (48, 256), bits=bits, group_size=size)
    folder = write(tmp_path / "model", tensors, {"bits": bits, "group_size": size}, both=bits > 2)
    assert_scores(folder, {UP: weight}, f"mlx, {bits} bits")


@pytest.mark.parametrize(("mode", "bits", "size"), [("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)])
def test_floats_have_the_scores_of_mlx(tmp_path: Path, mode: str, bits: int, size: int) -> None:
    tensors, weight = quantize(UP, (48, 96), mode=mode)
    folder = write(tmp_path / "model", tensors, {"bits": bits, "group_size": size, "mode": mode})
    assert_scores(folder, {UP: weight}, f"mlx {mode}")


def test_layers_with_settings_of_their_own_have_the_scores_of_mlx(tmp_path: Path) -> None:
    up, up_weight = quantize(UP, (48, 128), bits=3, group_size=64)
    q, q_weight = quantize(Q, (48, 128), bits=8, group_size=32)
    # What the settings of a layer leave out has the default of its mode, not the value for all layers.
    head, head_weight = quantize("lm_head", (64, 128), bits=6, group_size=64)
    router, router_weight = quantize("model.layers.0.mlp.gate", (16, 128), mode="mxfp8")
    embedding = {"model.embed_tokens.weight": mx.random.normal((64, 128))}
    settings = {
        "bits": 8,
        "group_size": 32,
        UP: {"bits": 3, "group_size": 64},
        Q: True,
        "model.embed_tokens": False,
        "lm_head": {"bits": 6},
        "model.layers.0.mlp.gate": {"mode": "mxfp8"},
    }
    folder = write(tmp_path / "model", up | q | head | router | embedding, settings)
    weights = {UP: up_weight, Q: q_weight, "lm_head": head_weight, "model.layers.0.mlp.gate": router_weight}
    assert_scores(folder, weights | {"model.embed_tokens": to_torch(embedding["model.embed_tokens.weight"])})


def test_experts_in_one_tensor_have_the_scores_of_mlx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    tensors, weights = quantize(name, (3, 40, 96), bits=5, group_size=32)
    folder = write(tmp_path / "model", tensors, {"bits": 5, "group_size": 32})
    assert_scores(folder, {f"{name}.{e}": weights[e] for e in range(3)}, "mlx, 5 bits")
    assert_same_from_hub(folder, monkeypatch, tmp_path)


def test_plain_experts_in_one_tensor_are_scored_one_by_one(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    weights = mx.random.normal((3, 40, 96))
    folder = write(tmp_path / "model", {f"{name}.weight": weights}, None)
    assert_scores(folder, {f"{name}.{e}": to_torch(weights)[e] for e in range(3)})


def test_repo_has_the_scores_of_a_local_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    up, _ = quantize(UP, (40, 192), bits=3, group_size=64)
    q, _ = quantize(Q, (48, 96), mode="mxfp8")
    settings = {"bits": 3, "group_size": 64, Q: {"mode": "mxfp8", "bits": 8, "group_size": 32}}
    folder = write(tmp_path / "model", up | q | {"model.norm.weight": mx.ones((7,))}, settings)
    assert_same_from_hub(folder, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        (None, "unsupported_dtype"),
        ({"bits": 4}, "unsupported_dtype"),
        ({"group_size": 64}, "unsupported_dtype"),
        ({"bits": 4, "group_size": 64, "mode": "new"}, "unsupported_dtype"),
        ({"bits": 7, "group_size": 64}, "unsupported_dtype"),
        ({"bits": 4, "group_size": 48}, "unsupported_dtype"),
        ({"bits": 4, "group_size": 64, UP: False}, "unsupported_dtype"),
        ({"bits": "4", "group_size": 64}, "unsupported_dtype"),
        # The words hold 128 columns of 4 bits.
        ({"bits": 8, "group_size": 64}, "bad_scales"),
        ({"bits": 4, "group_size": 32}, "bad_scales"),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "bad_scales"),
        ({"bits": 4, "group_size": 64, "rotation": "hadamard"}, "not_understood"),
        ({"bits": 4, "group_size": 64, UP: {"bits": 4, "group_size": 64, "rotation": 1}}, "not_understood"),
        ({"bits": 4, "group_size": 64, "quant_method": "another"}, "not_understood"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, settings: Any, code: str) -> None:
    tensors, _ = quantize(UP, (48, 128), bits=4, group_size=64)
    assert_refused(write(tmp_path / "model", tensors, settings), {f"{UP}.weight": (code, "")})


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tensors, _ = quantize(UP, (48, 128), bits=4, group_size=64)
    settings = {"bits": 4, "group_size": 64}
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith("biases")}
    assert_refused(write(tmp_path / "a", without, settings), {f"{UP}.weight": ("missing_scales", "biases")})
    other = tensors | {f"{UP}.biases": mx.zeros((48, 1))}
    assert_refused(write(tmp_path / "b", other, settings), {f"{UP}.weight": ("bad_scales", "biases")})
    whole = tensors | {f"{UP}.global_scale": mx.ones((1,))}
    assert_refused(write(tmp_path / "c", whole, settings), {f"{UP}.weight": ("not_understood", ".global_scale")})


def test_method_metal_has_the_scores_of_transformers(save: Save) -> None:
    metal = pytest.importorskip("transformers.integrations.metal_quantization")
    generator = torch.Generator().manual_seed(0)
    tensors, weights = {}, {}
    for bits in (2, 4, 8):
        name = f"model.layers.{bits}.mlp.up_proj"
        weight = torch.randn(40, 128, generator=generator)
        words, scales, offsets = metal._affine_quantize_tensor(weight, 64, bits)
        weights[name] = metal._affine_dequantize_tensor(words, scales, offsets, 64, bits)
        tensors = {f"{name}.weight": words, f"{name}.scales": scales, f"{name}.qbiases": offsets}
        quantization = {"quant_method": "metal", "bits": bits, "group_size": 64, "modules_to_not_convert": None}
        folder = save(tensors, folder=str(bits), config=LLAMA | {"quantization_config": quantization})
        assert_scores(folder, {name: weights[name]}, f"mlx, {bits} bits")
