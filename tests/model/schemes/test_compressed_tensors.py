"""Models of compressed-tensors with layers of several kinds have the scores of the weights that it decompresses."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ...support.checkpoints import Save
from ...support.quantized import assert_refused, assert_same_from_hub, assert_scores

quantization = pytest.importorskip("compressed_tensors.quantization")
compressors = pytest.importorskip("compressed_tensors.compressors")
pytestmark = pytest.mark.usefixtures("working_folder")

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
UP, Q, DOWN = (f"model.layers.0.{name}" for name in ("mlp.up_proj", "self_attn.q_proj", "mlp.down_proj"))


def integers(bits: int, size: int | None, **more: Any) -> dict[str, Any]:
    """Make the settings of integers with this group size; None for whole rows."""
    strategy = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
    return {"num_bits": bits, "type": "int", "symmetric": True, **strategy, **more}


MXFP8 = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
BLOCK = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32], "symmetric": True}


def compress(
    name: str, shape: tuple[int, int], settings: dict[str, Any], kind: str
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Compress a random weight; return its tensors, and the weight that compressed-tensors decompresses."""
    n, m = shape
    weight = torch.randn(n, m, generator=torch.Generator().manual_seed(n + m))
    height, width = settings.get("block_structure", (1, settings.get("group_size", m)))
    largest = weight.reshape(n // height, height, m // width, width).abs().amax((1, 3))
    if kind.startswith("mx"):
        scale = torch.exp2(torch.floor(torch.log2(largest)) - (8 if settings["num_bits"] == 8 else 2))
    else:
        scale = largest / (448 if settings["type"] == "float" else 2 ** (settings["num_bits"] - 1) - 0.5)
    more = {"scale_dtype": torch.uint8} if kind.startswith("mx") else {}
    arguments = quantization.QuantizationArgs(**settings, **more)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = compressors.BaseCompressor.get_value_from_registry(kind)
    state = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    theirs = compressor.decompress(dict(state), scheme)["weight"].float()
    return {f"{name}.{part}": tensor.contiguous() for part, tensor in state.items()}, theirs


def mixed(*groups: tuple[dict[str, Any], str]) -> dict[str, Any]:
    config_groups = {
        f"group_{i}": {"targets": ["Linear"], "weights": settings, "format": kind}
        for i, (settings, kind) in enumerate(groups)
    }
    config = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": config_groups}
    return LLAMA | {"quantization_config": config | {"quantization_status": "compressed", "ignore": ["lm_head"]}}


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ((integers(4, 32), "pack-quantized"), (integers(8, 32), "pack-quantized")),
        ((integers(4, 32), "pack-quantized"), (integers(8, None), "pack-quantized")),
        ((integers(4, 64), "pack-quantized"), (integers(3, 32), "pack-quantized")),
        ((integers(4, 32), "pack-quantized"), (BLOCK, "float-quantized")),
        ((integers(4, 32), "pack-quantized"), (INT8, "int-quantized")),
        ((integers(4, 32), "pack-quantized"), (MXFP8, "mxfp8-quantized")),
        ((MXFP4, "mxfp4-pack-quantized"), (MXFP8, "mxfp8-quantized")),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_layers_of_two_kinds_have_the_scores_of_compressed_tensors(
    save: Save, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one: Any, two: Any, turned: bool
) -> None:
    if turned:
        one, two = two, one
    up, up_weight = compress(UP, (48, 64), *one)
    q, q_weight = compress(Q, (32, 128), *two)
    folder = save(up | q, config=mixed(one, two))
    assert_scores(folder, {UP: up_weight, Q: q_weight})
    assert_same_from_hub(folder, monkeypatch, tmp_path)


def test_zero_points_and_a_column_order_of_one_kind_have_the_scores_of_compressed_tensors(save: Save) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-8, 8, (48, 64), dtype=torch.int8, generator=generator)
    zeros = torch.randint(-8, 8, (48, 2), dtype=torch.int8, generator=generator)
    scales, order = torch.rand(48, 2, generator=generator) + 0.1, torch.randperm(64, generator=generator) // 32
    tensors = {
        f"{UP}.weight_packed": helpers.pack_to_int32(numbers, 4),
        f"{UP}.weight_zero_point": helpers.pack_to_int32(zeros, 4, packed_dim=0),
        f"{UP}.weight_scale": scales,
        f"{UP}.weight_shape": torch.tensor([48, 64]),
        f"{UP}.weight_g_idx": order.int(),
    }
    eight, eight_weight = compress(DOWN, (64, 32), integers(8, 32), "pack-quantized")
    asymmetric = integers(4, 32, symmetric=False, actorder="group")
    config = mixed((asymmetric, "pack-quantized"), (integers(8, 32), "pack-quantized"))
    weight = (numbers.float() - zeros.float()[:, order]) * scales[:, order]
    assert_scores(save(tensors | eight, config=config), {UP: weight, DOWN: eight_weight})


def test_width_of_a_weight_tells_kinds_apart_that_its_words_do_not(save: Save) -> None:
    groups = ((integers(4, None), "pack-quantized"), (integers(8, None), "pack-quantized"))
    four, four_weight = compress(UP, (48, 64), *groups[0])
    eight, eight_weight = compress(Q, (48, 32), *groups[1])
    assert four[f"{UP}.weight_packed"].shape == eight[f"{Q}.weight_packed"].shape
    assert_scores(save(four | eight, config=mixed(*groups)), {UP: four_weight, Q: eight_weight})
    del four[f"{UP}.weight_shape"]
    assert_refused(
        save(four, folder="without", config=mixed(*groups)),
        {f"{UP}.weight_packed": ("not_understood", "2 groups of layers")},
    )


def test_weight_that_fits_no_group_of_layers_is_refused(save: Save) -> None:
    up, _ = compress(UP, (48, 64), integers(4, 32), "pack-quantized")
    config = mixed((integers(3, 32), "pack-quantized"), (integers(8, 16), "pack-quantized"))
    assert_refused(save(up, config=config), {f"{UP}.weight_packed": ("bad_scales", "")})


def test_six_bits_of_floats_are_refused_by_name(save: Save) -> None:
    tensors = {
        f"{UP}.weight_packed": torch.zeros(48, 48, dtype=torch.uint8),
        f"{UP}.weight_scale": torch.ones(48, 3).byte(),
    }
    config = mixed(({**MXFP4, "num_bits": 6}, "mxfp6-pack-quantized"))
    assert_refused(save(tensors, config=config), {f"{UP}.weight_packed": ("not_understood", "mxfp6-pack-quantized")})
