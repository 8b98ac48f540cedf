"""Any block of a dequantized matrix equals the one from the format's library."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spectrum_stream.model.quantization import Packing
from spectrum_stream.numerics.dequantize import (
    Fp4,
    Integers,
    QuantizedMatrix,
    Scaled,
    ScaleGrid,
    unpack,
    unpack_awq,
    untile,
)

from ..support.checkpoints import mxfp4

mx = pytest.importorskip("mlx.core")
comfy_kitchen = pytest.importorskip("comfy_kitchen")
transformers_mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")


def assert_any_block_is_the_same(w: QuantizedMatrix, whole: torch.Tensor, turned: bool, data: st.DataObject) -> None:
    if turned:
        w, whole = w.T, whole.T
    rows = slice(*sorted(data.draw(st.tuples(*[st.integers(0, w.shape[0])] * 2))))
    columns = slice(*sorted(data.draw(st.tuples(*[st.integers(0, w.shape[1])] * 2))))
    assert w.shape == whole.shape
    assert w.any() == bool(whole.any())
    if rows.start < rows.stop and columns.start < columns.stop:
        assert torch.equal(w[rows, columns], whole[rows, columns])
        assert torch.equal(w[rows], whole[rows])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 45), st.integers(1, 45), st.booleans(), st.data())
def test_scaled_block_is_the_block_of_the_product(
    n: int, m: int, height: int, width: int, turned: bool, data: st.DataObject
) -> None:
    stored = torch.arange(n * m, dtype=torch.float32).reshape(n, m)
    scales = torch.arange(1, 1 + -(-n // height) * -(-m // width), dtype=torch.float32).reshape(-(-n // height), -1)
    whole = stored * scales.repeat_interleave(height, 0)[:n].repeat_interleave(width, 1)[:, :m]
    w: QuantizedMatrix = Scaled(stored, scales, (height, width))
    assert_any_block_is_the_same(w, whole, turned, data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 9), st.integers(1, 4), st.booleans(), st.data())
def test_fp4_block_is_the_block_of_transformers(n: int, groups: int, turned: bool, data: st.DataObject) -> None:
    blocks, scales = mxfp4(1, n, 32 * groups)
    whole = transformers_mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].T
    w: Any = Fp4(blocks[0].flatten(1), scales[0].view(torch.float8_e8m0fnu), 32)
    assert_any_block_is_the_same(w, whole, turned, data)


def from_mlx(array: Any) -> torch.Tensor:
    """Return an array of MLX as safetensors reads it."""
    return torch.from_numpy(np.array(array))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from([32, 64, 128]), st.booleans(), st.data())
def test_integers_with_offsets_block_is_the_block_of_mlx(
    bits: int, n: int, groups: int, size: int, turned: bool, data: st.DataObject
) -> None:
    mx.random.seed(groups)
    stored = mx.quantize(mx.random.normal((n, groups * size)), group_size=size, bits=bits)
    whole = from_mlx(mx.dequantize(*stored, group_size=size, bits=bits))
    words, scales, offsets = map(from_mlx, stored)
    grid = ScaleGrid(scales, None, offsets, torch.arange(n), torch.arange(groups * size) // size)
    w = Integers(words.view(torch.int32), (n, groups * size), Packing.ROWS, bits, grid)
    assert_any_block_is_the_same(w, whole, turned, data)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(st.integers(1, 9), st.integers(1, 4), st.booleans(), st.data())
def test_floats_of_mlx_block_is_the_block_of_mlx(
    mode: str, n: int, groups: int, turned: bool, data: st.DataObject
) -> None:
    mx.random.seed(groups)
    stored = mx.quantize(mx.random.normal((n, 32 * groups)), mode=mode)
    whole = from_mlx(mx.dequantize(*stored, mode=mode, dtype=mx.float32))
    words, scales = map(from_mlx, stored)
    powers = scales.view(torch.float8_e8m0fnu)
    w: QuantizedMatrix
    if mode == "mxfp8":
        w = Scaled(words.view(torch.float8_e4m3fn), powers.float(), (1, 32))
    elif mode == "mxfp4":
        w = Fp4(words.view(torch.uint8), powers, 32)
    else:
        w = Fp4(words.view(torch.uint8), scales.view(torch.float8_e4m3fn), 16)
    assert_any_block_is_the_same(w, whole, turned, data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(st.integers(1, 20), st.integers(1, 9), st.booleans(), st.data())
def test_fp4_high_first_with_tiles_is_the_block_of_comfy_kitchen(
    rows: int, groups: int, turned: bool, data: st.DataObject
) -> None:
    n, m = 16 * rows, 16 * groups
    layout = comfy_kitchen.tensor.TensorCoreNVFP4Layout
    stored, how = layout.quantize(torch.randn(n, m, generator=torch.Generator().manual_seed(groups)))
    whole = comfy_kitchen.dequantize_nvfp4(stored, how.scale, how.block_scale, torch.float32)
    w = Fp4(stored, untile(how.block_scale, n, groups), 16, float(how.scale), high_first=True)
    assert_any_block_is_the_same(w, whole, turned, data)


@given(st.integers(1, 300), st.integers(1, 20))
def test_untile_returns_what_comfy_kitchen_tiled(rows: int, columns: int) -> None:
    scales = (torch.arange(rows * columns) % 251).to(torch.uint8).reshape(rows, columns)
    tiles = comfy_kitchen.float_utils.to_blocked(scales, flatten=False)
    assert torch.equal(untile(tiles, rows, columns), scales)
    powers = untile(tiles.view(torch.float8_e8m0fnu), rows, columns)
    assert powers.dtype is torch.float8_e8m0fnu and torch.equal(powers.view(torch.uint8), scales)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 1), st.data())
def test_unpack_returns_what_compressed_tensors_packed(
    bits: int, lines: int, length: int, dim: int, data: st.DataObject
) -> None:
    shape = (lines, length) if dim == 1 else (length, lines)
    numbers = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(length))
    words = packing.pack_to_int32((numbers - (1 << (bits - 1))).to(torch.int8), bits, packed_dim=dim)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, length)] * 2)))
    assert torch.equal(unpack(words, bits, start, stop, dim).long(), numbers.narrow(dim, start, stop - start))


def test_unpack_awq_returns_what_compressed_tensors_reads() -> None:
    awq = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq").AutoAWQConverter
    words = torch.randint(-(2**31), 2**31 - 1, (6, 4), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    theirs, _ = awq.reverse_awq_order(*awq.unpack_awq(words, None, 4), 4)
    assert torch.equal(unpack_awq(words, 0, 32), (theirs & 15).int())
    assert torch.equal(unpack_awq(words, 3, 13), (theirs & 15).int()[:, 3:13])


def test_fp4_every_exponent_is_a_power_of_two() -> None:
    exponents = torch.arange(256, dtype=torch.uint8).reshape(256, 1)
    w = Fp4(torch.full((256, 16), 0x22, dtype=torch.uint8), exponents.view(torch.float8_e8m0fnu), 32)
    expected = torch.tensor([2.0**e for e in range(-127, 128)])
    assert torch.equal(w[:255][:, 0], expected)
    assert w[255:].isnan().all()
