"""Small checkpoints of every format that can be read, with the weights that they store."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

MODULE = "model.layers.0.mlp.up_proj"
EXPERTS = "model.layers.0.mlp.experts.up_proj"

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass(frozen=True, kw_only=True)
class Example:
    """A checkpoint with one quantized weight, or with fused experts.

    Attributes:
        tensors: as stored, by name.
        quantization: the quantization config in config.json.
        weights: the weight that each module stores.
        metadata: that of the shard.
    """

    tensors: Mapping[str, torch.Tensor]
    quantization: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


def pack(numbers: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Pack integers along a dimension into words of 32 bits, bit after bit, the first in the lowest bits."""
    numbers = numbers.movedim(dim, -1).to(torch.int64)
    *lines, length = numbers.shape
    stream = (numbers[..., None] >> torch.arange(bits)) & 1
    stream = stream.reshape(*lines, length * bits)
    stream = torch.nn.functional.pad(stream, (0, -length * bits % 32)).reshape(*lines, -1, 32)
    words = (stream << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).movedim(-1, dim).contiguous()


def _random(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape, generator=generator) * (high - low) + low


def _integers(*shape: int, low: int = 0, high: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def compressed_tensors(format: str, **weights: Any) -> dict[str, Any]:
    """Make the quantization config of compressed-tensors with one group of weights."""
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def gptq(*, bits: int = 4, n: int = 64, m: int = 96, size: int = 32, less_one: int = 1) -> Example:
    """Make a weight of GPTQ with zero points that differ and a column order.

    Args:
        less_one: the number that is subtracted from the zero points that are stored.
    """
    codes = _integers(m, n, high=1 << bits)
    zeros = _integers(m // size, n, low=1, high=1 << bits)
    scales = _random(m // size, n, low=0.001, high=0.01).half()
    order = torch.randperm(m, generator=torch.Generator().manual_seed(0)) // size
    return Example(
        tensors={
            f"{MODULE}.qweight": pack(codes, bits, 0),
            f"{MODULE}.qzeros": pack(zeros - less_one, bits, 1),
            f"{MODULE}.scales": scales,
            f"{MODULE}.g_idx": order.to(torch.int32),
        },
        quantization={"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": True, "sym": False},
        weights={MODULE: (codes - zeros[order]) * scales.float()[order]},
    )


def awq() -> Example:
    """Make a weight of AWQ: eight values a word in the order of its kernel."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(numbers: torch.Tensor) -> torch.Tensor:
        return pack(numbers.reshape(len(numbers), -1, 8)[:, :, order].reshape(len(numbers), -1), 4, 1)

    codes, zeros = _integers(96, 64, high=16), _integers(3, 64, high=16)
    scales = _random(3, 64, low=0.001, high=0.01).half()
    groups = torch.arange(96) // 32
    return Example(
        tensors={f"{MODULE}.qweight": words(codes), f"{MODULE}.qzeros": words(zeros), f"{MODULE}.scales": scales},
        quantization={"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
        weights={MODULE: (codes - zeros[groups]) * scales.float()[groups]},
    )


def packed_integers() -> Example:
    """Make a weight of compressed-tensors in words of 32 bits, with zero points."""
    codes, zeros = _integers(64, 96, high=16), _integers(64, 3, high=16)
    scales = _random(64, 3, low=0.001, high=0.01)
    groups = torch.arange(96) // 32
    return Example(
        tensors={
            f"{MODULE}.weight_packed": pack(codes, 4, 1),
            f"{MODULE}.weight_scale": scales,
            f"{MODULE}.weight_zero_point": pack(zeros, 4, 0),
            f"{MODULE}.weight_shape": torch.tensor([64, 96]),
        },
        quantization=compressed_tensors(
            "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False
        ),
        weights={MODULE: (codes - zeros[:, groups]) * scales[:, groups]},
    )


def _fp4(n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make bytes with two numbers of four bits each, and the numbers."""
    codes = _integers(n, m, high=16)
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8), _E2M1[codes]


def nvfp4() -> Example:
    """Make a weight of NVFP4 as ModelOpt stores it."""
    stored, numbers = _fp4(64, 96)
    scales = _random(64, 6, low=1, high=400).to(torch.float8_e4m3fn)
    return Example(
        tensors={
            f"{MODULE}.weight": stored,
            f"{MODULE}.weight_scale": scales,
            f"{MODULE}.weight_scale_2": torch.tensor(0.0003),
            f"{MODULE}.input_scale": torch.tensor(0.1),
        },
        quantization={"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt"}},
        weights={MODULE: numbers * scales.float().repeat_interleave(16, 1) * 0.0003},
    )


def nvfp4_of_compressed_tensors() -> Example:
    """Make a weight of NVFP4 as compressed-tensors stores it."""
    stored, numbers = _fp4(64, 96)
    scales = _random(64, 6, low=1, high=400).to(torch.float8_e4m3fn)
    return Example(
        tensors={
            f"{MODULE}.weight_packed": stored,
            f"{MODULE}.weight_scale": scales,
            f"{MODULE}.weight_global_scale": torch.tensor([4000.0]),
        },
        quantization=compressed_tensors(
            "nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True
        ),
        weights={MODULE: numbers * scales.float().repeat_interleave(16, 1) / 4000},
    )


def mxfp4() -> Example:
    """Make fused experts in MXFP4, as in gpt-oss."""
    stored, numbers = _fp4(3 * 64, 96)
    exponents = _integers(3, 64, 3, low=118, high=126).to(torch.uint8)
    scales = torch.exp2(exponents.float() - 127).repeat_interleave(32, 2)
    weights = numbers.reshape(3, 64, 96) * scales
    return Example(
        tensors={
            f"{EXPERTS}_blocks": stored.reshape(3, 64, 3, 16),
            f"{EXPERTS}_scales": exponents,
            f"{EXPERTS}_bias": torch.zeros(3, 64),
        },
        quantization={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        weights={f"{EXPERTS}.{e}": weights[e] for e in range(3)},
    )


def mxfp4_of_compressed_tensors() -> Example:
    """Make a weight of MXFP4 as compressed-tensors stores it."""
    stored, numbers = _fp4(64, 96)
    exponents = _integers(64, 3, low=118, high=126).to(torch.uint8)
    return Example(
        tensors={f"{MODULE}.weight_packed": stored, f"{MODULE}.weight_scale": exponents},
        quantization=compressed_tensors(
            "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32, symmetric=True
        ),
        weights={MODULE: numbers * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)},
    )


def float8() -> Example:
    """Make a weight in float8 with scales for blocks, as DeepSeek-V3 stores it."""
    stored = ((_random(64, 96) - 0.5) * 400).to(torch.float8_e4m3fn)
    scales = _random(2, 6, low=0.001, high=0.01)
    grid = scales.repeat_interleave(32, 0).repeat_interleave(16, 1)
    return Example(
        tensors={f"{MODULE}.weight": stored, f"{MODULE}.weight_scale_inv": scales},
        quantization={
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [32, 16],
        },
        weights={MODULE: stored.float() * grid},
    )


def int8() -> Example:
    """Make a weight in int8 with a scale for each row, as compressed-tensors stores it."""
    stored, scales = _integers(64, 96, low=-128, high=128).to(torch.int8), _random(64, 1, low=0.001, high=0.01)
    return Example(
        tensors={f"{MODULE}.weight": stored, f"{MODULE}.weight_scale": scales},
        quantization=compressed_tensors("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
        weights={MODULE: stored.float() * scales},
    )


def plain_float8() -> Example:
    """Make a weight in float8 that has no scales."""
    stored = ((_random(64, 96) - 0.5) * 40).to(torch.float8_e4m3fn)
    return Example(tensors={f"{MODULE}.weight": stored}, quantization={}, weights={MODULE: stored.float()})


def mxfp8() -> Example:
    """Make a weight in float8 with a power of two for 32 columns, as ModelOpt stores it."""
    stored = ((_random(64, 96) - 0.5) * 400).to(torch.float8_e4m3fn)
    exponents = _integers(64, 3, low=110, high=126).to(torch.uint8)
    return Example(
        tensors={f"{MODULE}.weight": stored, f"{MODULE}.weight_scale": exponents},
        quantization={"quant_method": "modelopt", "quant_algo": "MXFP8"},
        weights={MODULE: stored.float() * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)},
    )


def fp4_of_deepseek() -> Example:
    """Make a weight of MXFP4 as DeepSeek-V4 stores it: bytes of the dtype int8."""
    stored, numbers = _fp4(64, 96)
    exponents = _integers(64, 3, low=118, high=126).to(torch.uint8)
    return Example(
        tensors={
            f"{MODULE}.weight": stored.view(torch.int8),
            f"{MODULE}.scale": exponents.view(torch.float8_e8m0fnu),
        },
        quantization={"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
        weights={MODULE: numbers * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)},
    )


def mxfp4_of_gpt_oss_original() -> Example:
    """Make fused experts in MXFP4, as in the original files of gpt-oss."""
    example, owner = mxfp4(), "block.0.mlp.mlp1_weight"
    names = {f"{EXPERTS}_blocks": f"{owner}.blocks", f"{EXPERTS}_scales": f"{owner}.scales"}
    return Example(
        tensors={new: example.tensors[old] for old, new in names.items()},
        quantization={},
        weights={name.replace(EXPERTS, owner): weight for name, weight in example.weights.items()},
    )


def mlx() -> Example:
    """Make a weight of MLX: integers of three bits with scales and offsets."""
    codes = _integers(64, 192, high=8)
    scales, offsets = _random(64, 3, low=0.001, high=0.01), _random(64, 3, low=-0.1, high=0)
    groups = torch.arange(192) // 64
    words = pack(codes, 3, 1).view(torch.uint32)
    return Example(
        tensors={f"{MODULE}.weight": words, f"{MODULE}.scales": scales, f"{MODULE}.biases": offsets},
        quantization={"bits": 3, "group_size": 64},
        weights={MODULE: codes * scales[:, groups] + offsets[:, groups]},
        metadata={"format": "mlx"},
    )


def mlx_of_a_mode() -> Example:
    """Make a weight of MLX in MXFP4, with settings of its own."""
    stored, numbers = _fp4(64, 96)
    exponents = _integers(64, 3, low=118, high=126).to(torch.uint8)
    return Example(
        tensors={f"{MODULE}.weight": stored.view(torch.uint32), f"{MODULE}.scales": exponents},
        quantization={"bits": 8, "group_size": 32, MODULE: {"mode": "mxfp4", "bits": 4, "group_size": 32}},
        weights={MODULE: numbers * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)},
    )


def comfyui() -> Example:
    """Make a weight of NVFP4 as ComfyUI stores it: the high bits first, and scales in tiles of 128 x 4."""
    stored, numbers = _fp4(160, 96)
    scales = _random(160, 6, low=1, high=400).to(torch.float8_e4m3fn)
    tiles = torch.zeros(256 * 8, dtype=torch.uint8)
    for row in range(160):
        for column in range(6):
            tile = row // 128 * 2 + column // 4
            place = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
            tiles[place] = scales.view(torch.uint8)[row, column]
    return Example(
        tensors={
            f"{MODULE}.weight": stored << 4 | stored >> 4,
            f"{MODULE}.weight_scale": tiles.reshape(256, 8).view(torch.float8_e4m3fn),
            f"{MODULE}.weight_scale_2": torch.tensor(0.0003),
            f"{MODULE}.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8),
        },
        quantization={},
        weights={MODULE: numbers * scales.float().repeat_interleave(16, 1) * 0.0003},
    )


def comfyui_with_metadata() -> Example:
    """Make a weight of NVFP4 with its marker in the header."""
    example = comfyui()
    layers = {MODULE: {"format": "nvfp4", "orig_shape": [160, 96]}}
    return Example(
        tensors={name: tensor for name, tensor in example.tensors.items() if not name.endswith("comfy_quant")},
        quantization={},
        weights=example.weights,
        metadata={"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})},
    )


# By the names of the rows of `SCHEMES`.
EXAMPLES: dict[str, tuple[Callable[[], Example], ...]] = {
    "gptq": (gptq,),
    "awq": (awq,),
    "packed integers": (packed_integers,),
    "nvfp4": (nvfp4, nvfp4_of_compressed_tensors),
    "mxfp4": (mxfp4, mxfp4_of_compressed_tensors, mxfp4_of_gpt_oss_original),
    "fp4 of deepseek": (fp4_of_deepseek,),
    "float8": (float8, mxfp8),
    "plain float8": (plain_float8,),
    "mlx": (mlx, mlx_of_a_mode),
    "comfyui": (comfyui, comfyui_with_metadata),
    "int8": (int8,),
}
