"""Blocks of weights on their way to a device.

On the CPU the buffers are plain memory.
"""

import contextlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectrum_stream.numerics import costs, staging
from spectrum_stream.numerics.dequantize import Scaled, Weights
from spectrum_stream.numerics.staging import Staging, direct_blocks

CPU = torch.device("cpu")


def numbers(n: int, m: int, first: int, dtype: torch.dtype) -> torch.Tensor:
    return ((torch.arange(n * m).reshape(n, m) + first) % 251).to(dtype)


def join(ws: Sequence[Weights], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Put the blocks together again: (batch, n, m)."""
    parts: dict[int, list[torch.Tensor]] = {}
    for part, block in Staging(device).blocks(ws, dtype):
        assert len(block) == part.stop - part.start
        # The block is valid only until the next one.
        parts.setdefault(part.start, []).append(block.to("cpu", copy=True))
    assert list(parts) == sorted(parts)
    return torch.cat([torch.cat(blocks, 2) for blocks in parts.values()])


@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 60),
    st.integers(9, 14),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    st.booleans(),
)
def test_staging_blocks_are_the_matrices(
    count: int, n: int, m: int, size: int, dtype: torch.dtype, is_transposed: bool
) -> None:
    ws = [numbers(n, m, 1000 * i, dtype) for i in range(count)]
    if is_transposed:
        ws = [w.T.contiguous().T for w in ws]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "STAGING_NBYTES", 1 << size)
        torch.testing.assert_close(join(ws, CPU), torch.stack(list(ws)), rtol=0, atol=0)


def test_staging_blocks_are_converted() -> None:
    w = numbers(3, 4, 0, torch.bfloat16)
    torch.testing.assert_close(join([w], CPU, torch.float64), w.to(torch.float64)[None], rtol=0, atol=0)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_staging_blocks_of_quantized_matrices(is_transposed: bool) -> None:
    stored = numbers(6, 10, 0, torch.int8)
    w = Scaled(stored, torch.tensor([[0.5], [2.0]]), (3, 10))
    expected = stored.to(torch.float32) * torch.tensor([0.5, 0.5, 0.5, 2, 2, 2])[:, None]
    found = join([w.T if is_transposed else w] * 2, CPU)
    torch.testing.assert_close(found, torch.stack([expected.T if is_transposed else expected] * 2))


def test_staging_uses_its_buffers_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block stays as it is while the next one is copied."""
    monkeypatch.setattr(staging, "STAGING_NBYTES", 256)
    used = Staging(CPU)
    ws = [numbers(4, 64, 0, torch.float32)]
    addresses = [block.data_ptr() for _ in range(2) for _, block in used.blocks(ws, None)]
    assert len(addresses) == 8
    assert all(one != following for one, following in pairwise(addresses))
    assert len(set(addresses)) == costs.STAGING_BUFFERS


def test_staging_goes_on_after_blocks_that_were_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "STAGING_NBYTES", 256)
    used = Staging(CPU)
    w = numbers(4, 64, 0, torch.float32)
    next(iter(used.blocks([w], None)))
    found = torch.cat([block.clone() for _, block in used.blocks([w], None)], 2)
    torch.testing.assert_close(found, w[None], rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 3])
def test_direct_blocks_are_the_matrices(count: int) -> None:
    ws = [numbers(2, 5000, i, torch.float32) for i in range(count)]
    found = list(direct_blocks(ws, torch.float64, CPU))
    assert all(part == slice(0, count) for part, _ in found)
    joined = torch.cat([block for _, block in found], 2)
    torch.testing.assert_close(joined, torch.stack(ws).to(torch.float64), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("n", "m", "count"), [(1, 9, 3), (300, 700, 40), (2048, 20_000, 2)])
def test_gpu_staging_blocks_are_the_matrices(n: int, m: int, count: int, is_transposed: bool) -> None:
    ws = [numbers(n, m, 1000 * i, torch.bfloat16) for i in range(count)]
    if is_transposed:
        ws = [w.T.contiguous().T for w in ws]
    torch.testing.assert_close(join(ws, torch.device("cuda")), torch.stack(list(ws)), rtol=0, atol=0)


@pytest.mark.gpu
def test_gpu_staging_does_not_overwrite_blocks_in_use() -> None:
    """The products of a block take longer than the copy of the next one."""
    used = Staging(torch.device("cuda"))
    w = numbers(4096, 40_960, 0, torch.bfloat16)
    sums = torch.zeros(4096, device="cuda")
    for _, block in used.blocks([w], torch.float32):
        for _ in range(20):
            torch.mm(block[0], block[0].T)
        sums += block[0].sum(1)
    torch.testing.assert_close(sums.cpu(), w.to(torch.float32).sum(1))


class _Log:
    """Streams and events that replace those of CUDA and log their calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, can_pin: bool) -> None:
        self.lines: list[str] = []
        self._events = 0
        self._stream = self.Stream(self, "main")
        empty = torch.empty

        def empty_on_cpu(*args: int, device: object = None, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            if pin_memory and not can_pin:
                raise RuntimeError("CUDA error: out of memory")
            return empty(*args, **kwargs)

        monkeypatch.setattr(torch, "empty", empty_on_cpu)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.lines.append("keep buffer"))
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: self.Stream(self, "copies"))
        monkeypatch.setattr(torch.cuda, "Event", self._make_event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self._stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())

    def _make_event(self) -> "_Log.Event":
        self._events += 1
        # Each buffer has two events, and makes them in this order.
        return self.Event(self, f"{'used' if self._events % 2 == 0 else 'copied'} {(self._events - 1) // 2}")

    class Stream:
        def __init__(self, log: "_Log", name: str) -> None:
            self.log, self.name = log, name

        def wait_stream(self, other: "_Log.Stream") -> None:
            self.log.lines.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event: "_Log.Event") -> None:
            self.log.lines.append(f"{self.name} waits for {event.name}")

    class Event:
        def __init__(self, log: "_Log", name: str) -> None:
            self.log, self.name = log, name

        def record(self, stream: "_Log.Stream") -> None:
            self.log.lines.append(f"{stream.name} records {self.name}")

        def synchronize(self) -> None:
            self.log.lines.append(f"thread waits for {self.name}")


@pytest.mark.parametrize("can_pin", [True, False])
def test_staging_waits_for_the_copy_and_the_products_of_a_buffer(
    can_pin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "STAGING_NBYTES", 256)
    log = _Log(monkeypatch, can_pin=can_pin)
    w = numbers(4, 48, 0, torch.float32)
    joined = []
    for i, (_, block) in enumerate(Staging(torch.device("cuda")).blocks([w], None)):
        log.lines.append(f"products {i}")
        joined.append(block.clone())
    torch.testing.assert_close(torch.cat(joined, 2), w[None], rtol=0, atol=0)

    def block_of(i: int, buffer: int) -> list[str]:
        return [
            f"thread waits for copied {buffer}",
            f"copies waits for used {buffer}",
            f"copies records copied {buffer}",
            f"main waits for copied {buffer}",
            f"products {i}",
            f"main records used {buffer}",
        ]

    opened = ["copies waits for main", "keep buffer", "keep buffer"]
    assert log.lines == [*opened, *block_of(0, 0), *block_of(1, 1), *block_of(2, 0)]
