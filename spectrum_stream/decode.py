"""Stored bytes to matrices: through safetensors' memory map, read ahead by one thread.

A matrix comes back in its stored dtype and is a view of the map: it takes no memory of its own until a
block of it is upcast. Its pages belong to the file, and the system may drop them at any time.
"""

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError
from .planning import Matrix
from .source import Shard

# How far the reader may be ahead of the computation.
AHEAD_NBYTES = 1_000_000_000
_READ_NBYTES = 4 << 20


class ShardReader:
    """An open shard; use it as a context manager."""

    def __init__(self, shard: Shard) -> None:
        """
        Raises:
            CheckpointError: unreadable, the file is gone or is not what its header said a moment ago.
        """
        try:
            self._file: Any = safe_open(shard.path, framework="pt", device="cpu")
            self._bytes = shard.path.open("rb", buffering=0)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard.path} cannot be opened: {error}", reason="unreadable") from error

    def matrix(self, tensor: str) -> torch.Tensor:
        """The tensor as an (n, m) matrix in its stored dtype, a view of the file; a vector is (1, k)."""
        stored: torch.Tensor = self._file.get_tensor(tensor)
        return stored.unsqueeze(0) if stored.ndim == 1 else stored

    def warm(self, start: int, nbytes: int, scratch: memoryview) -> None:
        """Bring a range of the file into the page cache.

        Sequential reads do this at the speed of the disk; page faults through the map would do it at the
        pace of its latency.
        """
        self._bytes.seek(start)
        while nbytes > 0 and (got := self._bytes.readinto(scratch[:nbytes])):
            nbytes -= got

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.__exit__(*exc)
        self._bytes.close()


def read_ahead(
    shards: Mapping[str, Shard], matrices: Sequence[Matrix], ahead_nbytes: int = AHEAD_NBYTES
) -> Iterator[tuple[Matrix, torch.Tensor]]:
    """Matrices with their tensors, in the order given, read by a thread of their own.

    Args:
        shards: by name.
        matrices: in the order of shards.
        ahead_nbytes: how many bytes may be read and not yet asked for; one tensor may always be.

    Raises:
        CheckpointError: unreadable, a shard cannot be opened or read.
    """
    ready: queue.SimpleQueue[tuple[Matrix, torch.Tensor] | BaseException | None] = queue.SimpleQueue()
    budget = _Budget(ahead_nbytes)

    def read() -> None:
        try:
            scratch = memoryview(bytearray(_READ_NBYTES))
            for name, group in groupby(matrices, key=lambda w: w.shard):
                # A tensor keeps the map that it is a view of.
                with ShardReader(shards[name]) as reader:
                    for matrix in group:
                        if not budget.take(matrix.nbytes):
                            return
                        reader.warm(matrix.start, matrix.nbytes, scratch)
                        ready.put((matrix, reader.matrix(matrix.tensor)))
            ready.put(None)
        except BaseException as error:
            # Whatever it is, it belongs to the thread that waits for the tensors.
            ready.put(error)

    thread = threading.Thread(target=read, name="reader", daemon=True)
    with ExitStack() as stack:
        thread.start()
        stack.callback(thread.join)
        stack.callback(budget.close)
        while (item := ready.get()) is not None:
            if isinstance(item, (OSError, SafetensorError)):
                raise CheckpointError(f"a shard cannot be read: {item}", reason="unreadable") from item
            if isinstance(item, BaseException):
                raise item
            if item[1].shape != (item[0].n, item[0].m):
                raise CheckpointError(f"{item[0].tensor} changed its shape after it was planned", reason="changed")
            budget.give(item[0].nbytes)
            yield item


class _Budget:
    """Bytes that one thread takes and another gives back."""

    def __init__(self, nbytes: int) -> None:
        self._limit = nbytes
        self._taken = 0
        self._closed = False
        self._changed = threading.Condition()

    def take(self, nbytes: int) -> bool:
        """Wait until there is room, or nothing else is taken. False when nobody wants more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._taken or self._taken + nbytes <= self._limit)
            self._taken += nbytes
            return not self._closed

    def give(self, nbytes: int) -> None:
        with self._changed:
            self._taken -= nbytes
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
