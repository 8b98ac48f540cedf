"""Copy weights from the memory of the host to a device, block by block.

A copy overlaps the products of the block before it only if it comes from pinned memory. Pinning memory takes longer
than filling it, so each thread pins two buffers once and uses them in turn:

    the thread      fills host buffer 0 | fills host buffer 1 | fills host buffer 0 | ...
    copy stream                         | copies 0            | copies 1            | ...
    stream                                                    | products of 0       | products of 1

Events keep the order: a host buffer is filled again after its copy has ended, and a device buffer after the products
of its block have ended. Blocks keep the layout of the weights, because transposing them on the host would take longer
than copying them.
"""

from collections.abc import Iterator, Sequence

import torch

from ..errors import is_out_of_memory
from .costs import BLOCK_COLUMNS, STAGING_BUFFERS, STAGING_NBYTES
from .dequantize import Weights


def direct_blocks(
    ws: Sequence[Weights], dtype: torch.dtype | None, device: torch.device
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield blocks as `Staging.blocks` does, without buffers, each of all matrices."""
    for c in range(0, ws[0].shape[1], BLOCK_COLUMNS):
        span = slice(c, c + BLOCK_COLUMNS)
        block = ws[0][:, span][None] if len(ws) == 1 else torch.stack([w[:, span] for w in ws])
        yield slice(0, len(ws)), block.to(device, dtype or block.dtype)


class Staging:
    """The buffers of one thread for one device. On the CPU they are plain memory.

    Make and use it in a thread, within its stream.

    Raises:
        torch.OutOfMemoryError, RuntimeError: the buffers do not fit into the memory of the host or the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # On the CPU, copies and products are done when their calls return.
        self._is_cuda = device.type == "cuda"
        self._buffers = [_Buffer(device) for _ in range(STAGING_BUFFERS)]
        self._next = 0
        if self._is_cuda:
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # The memory of the buffers may be recycled, and kernels of this stream may still use it.
            self._copies.wait_stream(torch.cuda.current_stream(device))
            for buffer in self._buffers:
                buffer.on_device.record_stream(self._copies)

    def blocks(self, ws: Sequence[Weights], dtype: torch.dtype | None) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (part, block): W[:, columns] of each W of ws[part], on the device.

        A block is valid until the next one is taken.

        Args:
            ws: (n, m) matrices of one shape and dtype, on the CPU.
            dtype: the dtype of the blocks; None for that of the weights.

        Yields:
            Blocks (batch, n, columns). The blocks of a part follow one another, from the first to the last column.
        """
        n, m = ws[0].shape
        row_nbytes = n * ws[0].dtype.itemsize
        columns = max(1, min(m, BLOCK_COLUMNS, STAGING_NBYTES // row_nbytes))
        count = max(1, STAGING_NBYTES // (columns * row_nbytes))
        for first in range(0, len(ws), count):
            part = slice(first, min(first + count, len(ws)))
            for c in range(0, m, columns):
                buffer = self._buffers[self._next]
                self._next = (self._next + 1) % len(self._buffers)
                block = self._copy(ws[part], slice(c, min(c + columns, m)), buffer)
                try:
                    yield part, block if dtype is None else block.to(dtype)
                finally:
                    if self._is_cuda:
                        buffer.is_used.record(torch.cuda.current_stream(self._device))

    def _copy(self, ws: Sequence[Weights], span: slice, buffer: "_Buffer") -> torch.Tensor:
        """Copy the columns of each matrix into a buffer, and from there to the device."""
        if self._is_cuda:
            buffer.is_copied.synchronize()
        first = ws[0][:, span]
        # A tall matrix arrives as a view of its transpose. Its columns are contiguous, so whole columns are copied.
        is_transposed = first.stride(0) < first.stride(1)
        shape = (len(ws), *(first.T if is_transposed else first).shape)
        nbytes = first.nbytes * len(ws)
        host, on_device = (x[:nbytes].view(first.dtype).view(shape) for x in (buffer.on_host, buffer.on_device))
        for i, w in enumerate(ws):
            piece = w[:, span] if i else first
            host[i].copy_(piece.T if is_transposed else piece)
        if self._is_cuda:
            self._copies.wait_event(buffer.is_used)
            with torch.cuda.stream(self._copies):
                on_device.copy_(host, non_blocking=True)
                buffer.is_copied.record(self._copies)
            torch.cuda.current_stream(self._device).wait_event(buffer.is_copied)
        else:
            on_device.copy_(host)
        return on_device.mT if is_transposed else on_device


class _Buffer:
    """Memory for one block on the host and on the device.

    The events show when each is free again.
    """

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.on_host = _pin_memory() if is_cuda else _take_memory()
        self.on_device = torch.empty(STAGING_NBYTES, dtype=torch.uint8, device=device)
        if is_cuda:
            # An event that was never recorded counts as ended.
            self.is_copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.is_used = torch.cuda.Event()  # type: ignore[no-untyped-call]


def _pin_memory() -> torch.Tensor:
    try:
        return torch.empty(STAGING_NBYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # The system pins no more memory, or none at all. Copies from plain memory overlap less, but are correct.
    return _take_memory()


def _take_memory() -> torch.Tensor:
    return torch.empty(STAGING_NBYTES, dtype=torch.uint8, device="cpu")
