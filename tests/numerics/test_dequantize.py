"""Any block of a dequantized matrix equals the block of the matrix that the format's library dequantizes."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spectrum_stream.numerics.dequantize import Fp4, QuantizedMatrix, Scaled, unpack, unpack_awq

from ..support.checkpoints import mxfp4

transformers_mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 45), st.integers(1, 45), st.booleans(), st.data())
def test_scaled_block_is_the_block_of_the_product(
    n: int, m: int, height: int, width: int, turned: bool, data: st.DataObject
) -> None:
    stored = torch.arange(n * m, dtype=torch.float32).reshape(n, m)
    scales = torch.arange(1, 1 + -(-n // height) * -(-m // width), dtype=torch.float32).reshape(-(-n // height), -1)
    whole = stored * scales.repeat_interleave(height, 0)[:n].repeat_interleave(width, 1)[:, :m]
    w: QuantizedMatrix = Scaled(stored, scales, (height, width))
    if turned:
        w, whole = w.T, whole.T
    rows = slice(*sorted(data.draw(st.tuples(*[st.integers(0, w.shape[0])] * 2))))
    columns = slice(*sorted(data.draw(st.tuples(*[st.integers(0, w.shape[1])] * 2))))
    if rows.start < rows.stop and columns.start < columns.stop:
        assert torch.equal(w[rows, columns], whole[rows, columns])
        assert torch.equal(w[rows], whole[rows])
    assert w.any() == bool(whole.any())
    assert w.shape == whole.shape


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 9), st.integers(1, 4), st.booleans(), st.data())
def test_fp4_block_is_the_block_of_transformers(n: int, groups: int, turned: bool, data: st.DataObject) -> None:
    blocks, scales = mxfp4(1, n, 32 * groups)
    whole = transformers_mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].T
    w: Any = Fp4(blocks[0].flatten(1), scales[0].view(torch.float8_e8m0fnu), 32)
    if turned:
        w, whole = w.T, whole.T
    rows = slice(*sorted(data.draw(st.tuples(*[st.integers(0, w.shape[0])] * 2))))
    columns = slice(*sorted(data.draw(st.tuples(*[st.integers(0, w.shape[1])] * 2))))
    assert w.shape == whole.shape
    assert w.any() == bool(whole.any())
    if rows.start < rows.stop and columns.start < columns.stop:
        assert torch.equal(w[rows, columns], whole[rows, columns])
        assert torch.equal(w[rows], whole[rows])


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
