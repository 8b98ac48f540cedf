"""Matrices of a remote shard, requested by byte range: only the bytes that are needed, and no disk."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from ..checkpoint import RangesIgnored, RemoteShard
from ..model.matrix import Matrix
from ..model.no_score import NoScore
from .bounded import Budget
from .decode import Read, empty_matrix, without_memory
from .fetch import plan_requests
from .parts import PartReader

if TYPE_CHECKING:
    import torch

_REQUESTS_IN_FLIGHT = 4


def read_ranged(
    shard: RemoteShard,
    matrices: Sequence[Matrix],
    parts: PartReader,
    *,
    ahead: Budget,
    on_bytes: Callable[[int], object],
    halt: threading.Event,
) -> Generator[Read, None, list[Matrix]]:
    """Fetch matrices by range, several requests at a time, and yield them in order.

    Args:
        matrices: the matrices of this shard, in the order of their bytes.
        ahead: bytes are taken from it before they are requested, and given back by the `release` of a matrix.
        halt: set it to end requests that are under way.

    Returns:
        The matrices that were not read because the server stopped sending ranges; empty in most cases.

    Raises:
        Closed; Halted; SourceError; CheckpointError: changed.
    """
    run = _RangedRun(shard, matrices, parts, ahead, on_bytes, halt)
    try:
        yield from run.read()
    except RangesIgnored:
        ahead.give(sum(matrix.nbytes for matrix in run.requested.values()))
    finally:
        run.close()
    return list(run.undelivered.values())


class _Buffer:
    """A matrix in transfer: bytes [start, stop) of its shard, and their memory.

    Attributes:
        tensor: None if there is no memory for it or for one of its requests.
    """

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self.start, self.stop = matrix.start, matrix.start + matrix.nbytes
        self.tensor: torch.Tensor | None = None
        self.bytes = memoryview(b"")
        with without_memory():
            self.tensor, self.bytes = empty_matrix(matrix)

    def write(self, position: int, chunk: bytes) -> None:
        """Copy the part of a chunk that belongs to the matrix.

        The chunk begins at `position`.
        """
        first, last = max(position, self.start), min(position + len(chunk), self.stop)
        if first < last and self.bytes:
            self.bytes[first - self.start : last - self.start] = chunk[first - position : last - position]


class _RangedRun:
    """The state of `read_ranged`: requests under way, and the buffers that they fill.

    Attributes:
        undelivered: matrices that were not yielded yet, by key.
        requested: those of them whose bytes were taken from the budget, by key.
    """

    def __init__(
        self,
        shard: RemoteShard,
        matrices: Sequence[Matrix],
        parts: PartReader,
        ahead: Budget,
        on_bytes: Callable[[int], object],
        halt: threading.Event,
    ) -> None:
        self._shard, self._matrices, self._parts, self._ahead = shard, matrices, parts, ahead
        self._on_bytes, self._halt = on_bytes, halt
        self._pool = ThreadPoolExecutor(_REQUESTS_IN_FLIGHT, "request")
        # Each request has the buffers that it fills, and the buffers that are full when it is done.
        self._pending: deque[tuple[Future[None], list[_Buffer], list[_Buffer]]] = deque()
        self.undelivered = {w.key: w for w in matrices}
        self.requested: dict[str, Matrix] = {}

    def read(self) -> Iterator[Read]:
        waiting = deque(self._matrices)
        unfinished: list[_Buffer] = []
        for start, stop in plan_requests([(w.start, w.start + w.nbytes) for w in self._matrices]):
            starting = []
            while waiting and waiting[0].start < stop:
                starting.append(waiting.popleft())
            nbytes = sum(w.nbytes for w in starting)
            # Only a matrix that was delivered can be released.
            while self._pending and not self._ahead.has_room(nbytes):
                yield from self._deliver()
            # A matrix that is only requested in part cannot be released, so waiting for it would not help.
            self._ahead.take(nbytes, beside=sum(b.matrix.nbytes for b in unfinished))
            self.requested |= {w.key: w for w in starting}
            unfinished += [_Buffer(w) for w in starting]
            future = self._request(start, stop, unfinished)
            self._pending.append((future, unfinished, [b for b in unfinished if b.stop <= stop]))
            unfinished = [b for b in unfinished if b.stop > stop]
            while len(self._pending) >= _REQUESTS_IN_FLIGHT:
                yield from self._deliver()
        while self._pending:
            yield from self._deliver()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _deliver(self) -> Iterator[Read]:
        future, buffers, finished = self._pending.popleft()
        is_done = False
        with without_memory():
            future.result()
            is_done = True
        for buffer in () if is_done else buffers:
            buffer.tensor = None
        for buffer in finished:
            matrix = buffer.matrix
            del self.undelivered[matrix.key], self.requested[matrix.key]
            release = partial(self._ahead.give, matrix.nbytes)
            read: Read = matrix, NoScore.NO_MEMORY, release
            if buffer.tensor is not None:
                with without_memory():
                    read = self._parts.attach(matrix, buffer.tensor, release)
            yield read
            # This name would keep the tensor alive.
            del read

    def _request(self, start: int, stop: int, buffers: Sequence[_Buffer]) -> Future[None]:
        def write(position: int, chunk: bytes) -> None:
            for buffer in buffers:
                buffer.write(position, chunk)
            self._on_bytes(len(chunk))

        # `buffers` may not be changed while the request runs: the caller replaces the list instead.
        return self._pool.submit(self._shard.stream, start, stop, write, self._halt)
