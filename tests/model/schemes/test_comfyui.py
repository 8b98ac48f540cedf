"""Checkpoints of ComfyUI have the scores of the weights that comfy-kitchen dequantizes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spectrum_stream import scan

from ...support.formats import nvfp4
from ...support.hub_server import REPO, HubServer, use
from ...support.quantized import assert_refused, assert_same_from_hub, assert_scores

kitchen = pytest.importorskip("comfy_kitchen")
layouts = pytest.importorskip("comfy_kitchen.tensor")
pytestmark = pytest.mark.usefixtures("working_folder")

UP = "transformer_blocks.0.ff.up"
LAYOUTS = {
    "float8_e4m3fn": layouts.TensorCoreFP8Layout,
    "int8_tensorwise": layouts.TensorWiseINT8Layout,
    "mxfp8": layouts.TensorCoreMXFP8Layout,
    "nvfp4": layouts.TensorCoreNVFP4Layout,
}


def quantize(
    kind: str, n: int, m: int, name: str = UP, seed: int = 0, **how: Any
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Quantize a random weight with comfy-kitchen; return its tensors, and the weight that it dequantizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, m, generator=generator) * torch.randn(n, 1, generator=generator).exp()
    layout = LAYOUTS[kind]
    stored, parameters = layout.quantize(weight, **how)
    tensors = {f"{name}.weight{k}": v for k, v in layout.state_dict_tensors(stored, parameters).items()}
    return tensors, layout.dequantize(stored, parameters).float()[:n, :m]


def marker(entry: Any, name: str = UP) -> dict[str, torch.Tensor]:
    return {f"{name}.comfy_quant": torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)}


def write(path: Path, tensors: dict[str, torch.Tensor], layers: Mapping[str, Any] | None = None) -> Path:
    """Write one file as ComfyUI does, with the markers of these layers in its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=entry if layers is not None else {})
    return path


@pytest.mark.parametrize("place", ["tensor", "header", "both"])
@pytest.mark.parametrize("shape", [(128, 256), (48, 80), (160, 32), (16, 16)])
@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
def test_tiles_have_the_scores_of_comfy_kitchen(
    tmp_path: Path, kind: str, shape: tuple[int, int], place: str
) -> None:
    n, m = (2 * side for side in shape)
    tensors, weight = quantize(kind, n, m)
    if place != "header":
        tensors |= marker({"format": kind, "full_precision_matrix_mult": True})
    path = write(tmp_path / "x.safetensors", tensors, None if place == "tensor" else {UP: {"format": kind}})
    assert_scores(path, {UP: weight}, f"{kind}, comfyui")


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
def test_padded_weight_is_read_without_its_padding_or_refused(tmp_path: Path, kind: str) -> None:
    tensors, weight = quantize(kind, 150, 70)
    assert tensors[f"{UP}.weight"].shape[0] == 160
    entry = {"format": kind, "group_size": 16 if kind == "nvfp4" else 32, "orig_shape": [150, 70]}
    path = write(tmp_path / "a.safetensors", tensors, {UP: entry | {"orig_dtype": "torch.bfloat16"}})
    assert_scores(path, {UP: weight}, f"{kind}, comfyui")
    # Without its shape, only the zeros at its end show the padding.
    path = write(tmp_path / "b.safetensors", tensors | {"a.weight": torch.randn(4, 5)}, {UP: {"format": kind}})
    assert_unread(path, "padding")
    path = write(tmp_path / "c.safetensors", tensors, {UP: entry | {"orig_shape": [100, 70]}})
    assert_refused(path, {f"{UP}.weight": ("bad_scales", "100 x 70")})


def assert_unread(path: Path, text: str) -> None:
    """Check that the scan finds out that the weight cannot be read."""
    (record,) = scan(str(path), name=path.stem).failed
    assert record.no_score == "bad_scales" and text in (record.detail or "")


@pytest.mark.parametrize(
    ("kind", "how", "entry"),
    [
        ("float8_e4m3fn", {}, {}),
        ("int8_tensorwise", {}, {}),
        ("int8_tensorwise", {"per_channel": True}, {}),
        ("int8_tensorwise", {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
         {"convrot": True, "convrot_groupsize": 64}),
        ("int8_tensorwise", {"per_channel": True, "convrot": True}, {"params": {"convrot": True}}),
    ],
)  # fmt: skip
def test_rows_have_the_scores_of_comfy_kitchen(tmp_path: Path, kind: str, how: Any, entry: Any) -> None:
    tensors, weight = quantize(kind, 40, 256, **how)
    path = write(tmp_path / "x.safetensors", tensors | marker({"format": kind} | entry))
    assert_scores(path, {UP: weight})


def test_layers_of_several_formats_and_plain_ones_have_their_scores(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    weights, layers = {}, {}
    for i, kind in enumerate(LAYOUTS):
        name = f"transformer_blocks.{i}.ff.up"
        stored, weights[name] = quantize(kind, 64, 96, name, seed=i)
        tensors |= stored | {f"{name}.input_scale": torch.tensor(0.5), f"{name}.bias": torch.ones(64)}
        layers[name] = {"format": kind}
    tensors["final.weight"] = weights["final"] = torch.randn(7, 9)
    assert_scores(write(tmp_path / "x.safetensors", tensors, layers), weights)


def test_repo_has_the_scores_of_a_local_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for i, kind in enumerate(LAYOUTS):
        name = f"transformer_blocks.{i}.ff.up"
        stored, _ = quantize(kind, 64, 96, name, seed=i)
        tensors |= stored | marker({"format": kind}, name)
    write(tmp_path / "model" / "model.safetensors", tensors)
    assert_same_from_hub(tmp_path / "model", monkeypatch, tmp_path)


def test_marker_of_a_repo_is_checked_when_the_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"a.weight": torch.randn(4, 5)}
    entries = ({"format": "new"}, {"format": "nvfp4", "new": 1}, {"format": "nvfp4", "orig_shape": [150, 96]})
    for i, entry in enumerate(entries):
        name = f"transformer_blocks.{i}.ff.up"
        tensors |= quantize("nvfp4", 160, 96, name)[0] | marker(entry, name)
    write(tmp_path / "model" / "model.safetensors", tensors)
    with HubServer({REPO: tmp_path / "model"}) as server:
        use(server.url, monkeypatch, tmp_path)
        result = scan(REPO, fetch="range")
    assert {record.module: record.no_score for record in result.failed} == dict.fromkeys(
        (f"transformer_blocks.{i}.ff.up" for i in range(3)), "bad_scales"
    )


@pytest.mark.parametrize(
    "entry",
    [
        {"format": "convrot_w4a4"},
        {"format": "hybrid_mxfp8"},
        {"format": "mxfp8"},
        {"format": 4},
        {},
        [],
        {"format": "nvfp4", "group_size": 32},
        {"format": "nvfp4", "convrot": True},
        {"format": "nvfp4", "orig_shape": [64]},
        {"format": "nvfp4", "rotation": "new"},
        {"format": "nvfp4", "params": {"rotation": "new"}},
    ],
)
def test_marker_that_is_not_understood_is_refused(tmp_path: Path, entry: Any) -> None:
    tensors, _ = quantize("nvfp4", 64, 96)
    code = "bad_scales" if entry == {"format": "mxfp8"} else "not_understood"
    path = write(tmp_path / "a.safetensors", tensors | marker(entry))
    assert_refused(path, {f"{UP}.weight": (code, "")})
    path = write(tmp_path / "b.safetensors", tensors, {UP: entry})
    assert_refused(path, {f"{UP}.weight": (code, "")})


def test_metadata_without_this_layer_is_refused(tmp_path: Path) -> None:
    tensors, _ = quantize("nvfp4", 128, 64)
    path = write(tmp_path / "a.safetensors", tensors, {"another": {"format": "nvfp4"}})
    assert_refused(path, {f"{UP}.weight": ("not_understood", "_quantization_metadata")})


def test_tensors_that_do_not_fit_the_marker_are_refused(tmp_path: Path) -> None:
    tensors, _ = quantize("nvfp4", 64, 96)
    tensors |= marker({"format": "nvfp4"})
    weight = f"{UP}.weight"
    smooth = tensors | {f"{UP}.pre_quant_scale": torch.ones(96)}
    assert_refused(write(tmp_path / "a.safetensors", smooth), {weight: ("not_understood", ".pre_quant_scale")})
    small = tensors | {f"{UP}.weight_scale": tensors[f"{UP}.weight_scale"][:64]}
    assert_refused(write(tmp_path / "b.safetensors", small), {weight: ("bad_scales", "weight_scale")})
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith("_2")}
    assert_refused(write(tmp_path / "c.safetensors", without), {weight: ("missing_scales", "global")})
    integers, _ = quantize("int8_tensorwise", 40, 96, per_channel=True)
    rotated = integers | marker({"format": "int8_tensorwise", "convrot": True})
    assert_refused(write(tmp_path / "d.safetensors", rotated), {weight: ("bad_scales", "rotated by 256")})
    # torch would broadcast them along the rows.
    flat = integers | marker({"format": "int8_tensorwise"}) | {f"{UP}.weight_scale": torch.ones(40)}
    assert_refused(write(tmp_path / "e.safetensors", flat), {weight: ("bad_scales", "weight_scale")})


def test_same_names_without_a_marker_are_those_of_modelopt(tmp_path: Path) -> None:
    example = nvfp4()
    path = write(tmp_path / "x.safetensors", dict(example.tensors))
    assert_scores(path, example.weights, "nvfp4")
