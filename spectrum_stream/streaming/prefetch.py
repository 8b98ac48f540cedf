"""A thread that reads the next matrices while earlier ones are computed.

The readers are generators, one for each way to fetch a shard: `mapped`, `ranged`, `downloaded`. The thread runs them
in the order of the shards and puts their matrices into a queue. Budgets limit how far it may be ahead.

The computation may hold matrices back, to compute several at once. If it did so while the reader waits for a budget,
both would wait forever. So the prefetcher yields None when the queue is empty, and the computation then computes the
matrices that it holds.
"""

import logging
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Self

from ..checkpoint import LocalShard, Shard
from ..errors import SourceError, is_out_of_memory
from ..model.matrix import Matrix
from ..numerics.schedule import Item
from ..text import si_bytes
from .bounded import Budgets, Closed, Traffic
from .decode import Read, Release
from .downloaded import read_cached, read_downloaded, remove_folder
from .fetch import Fetch
from .mapped import read_mapped
from .parts import PartReader
from .ranged import read_ranged

_log = logging.getLogger("spectrum_stream")

# The wait for the next matrix, before None is yielded again.
_ASK_AGAIN_S = 0.02
# A download cannot be interrupted before its next chunk. The process may end without this thread.
_JOIN_S = 1.0


class Prefetcher:
    """Matrices with their tensors, in the order given.

    It is a context manager. Iterate over it once.

    Yields None repeatedly while no matrix is read, and NO_MEMORY in place of a tensor that does not fit into memory.
    Call `release` for every matrix that was computed, after its tensor is freed.

    Args:
        shards: the shards by name.
        matrices: in the order of the shards and of the bytes in them, no tensor twice.
        fetches: the way to read each shard, by name.
        folder: the folder for temporary shard downloads. It is made when it is needed and removed at the end.
        traffic: counted up during the scan.
        budgets: the limits of the thread's lead.

    Raises, from the iteration:
        CheckpointError: unreadable, changed. SourceError: from the network or the disk. MemoryError: memory is short
        for more than a matrix.
    """

    def __init__(
        self,
        shards: Mapping[str, Shard],
        matrices: Sequence[Matrix],
        fetches: Mapping[str, Fetch | None],
        folder: Path,
        traffic: Traffic,
        budgets: Budgets,
    ) -> None:
        self._shards = shards
        self._matrices = matrices
        self._fetches = fetches
        self._folder = folder
        self._traffic = traffic
        self._budgets = budgets
        # An exception belongs to the thread that waits for the matrices; None is the end.
        self._ready: queue.SimpleQueue[Item | BaseException | None] = queue.SimpleQueue()
        self._releases: dict[str, Release] = {}
        self._halt = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)

    def __enter__(self) -> Self:
        # A killed process may have left shards there. Only one scan at a time writes to one result.
        remove_folder(self._folder)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._halt.set()
        self._budgets.close()
        self._thread.join(_JOIN_S)
        self._releases.clear()
        remove_folder(self._folder)

    def __iter__(self) -> Iterator[Item | None]:
        while True:
            started = time.monotonic()
            try:
                item = self._ready.get_nowait()
            except queue.Empty:
                yield None
                started = time.monotonic()
                try:
                    item = self._ready.get(timeout=_ASK_AGAIN_S)
                except queue.Empty:
                    self._traffic.starved_s += time.monotonic() - started
                    # If memory is short, the thread can end before it reports the reason.
                    if not self._thread.is_alive() and self._ready.empty():
                        raise MemoryError("the reader ended") from None
                    continue
            self._traffic.starved_s += time.monotonic() - started
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            if self._fetches[item[0].shard] is None:
                self._budgets.mapped.give(item[0].nbytes)
            yield item
            # This name would keep the tensor alive during the wait for the next one.
            del item

    def release(self, matrix: Matrix) -> None:
        """Give back the budget of a matrix that is computed, when its tensor is gone."""
        if (release := self._releases.pop(matrix.key, None)) is not None:
            release()

    def _run(self) -> None:
        try:
            for name, group in groupby(self._matrices, key=lambda w: w.shard):
                for matrix, stored, release in self._read(self._shards[name], list(group)):
                    if self._halt.is_set():
                        return
                    self._releases[matrix.key] = release
                    self._ready.put((matrix, stored))
                    # This name would keep the tensor alive while the reader waits for room.
                    del stored
            self._ready.put(None)
        except Closed:
            return
        except BaseException as error:
            if is_out_of_memory(error):
                # The functions of the traceback keep tensors alive.
                error = error.with_traceback(None)
            elif isinstance(error, OSError):
                error = SourceError(f"a shard cannot be read: {error.strerror}", reason="unreadable")
            self._ready.put(error)

    def _read(self, shard: Shard, matrices: Sequence[Matrix]) -> Iterator[Read]:
        """Read the matrices of one shard, as `fetches` says."""
        budgets, fetch = self._budgets, self._fetches[shard.name]
        parts = PartReader(self._shards, matrices, budgets.parts, self._count)
        if isinstance(shard, LocalShard):
            yield from read_mapped(shard, matrices, parts, ahead=budgets.mapped)
            return
        if fetch is Fetch.CACHE:
            yield from read_cached(shard, matrices, parts, on_bytes=self._count)
            return
        if fetch is Fetch.RANGE:
            left = yield from read_ranged(
                shard, matrices, parts, ahead=budgets.ranged, on_bytes=self._count, halt=self._halt
            )
            if not left:
                return
            if budgets.disk.is_over(shard.nbytes):
                raise SourceError(
                    f"{shard.where}: the server no longer sends byte ranges, and the {si_bytes(shard.nbytes)} of the "
                    "whole shard do not fit on the disk",
                    reason="too_little_disk",
                )
            _log.warning("%s: the server no longer sends byte ranges, so the shard is downloaded", shard.where)
            matrices, parts = left, PartReader(self._shards, left, budgets.parts, self._count)
        yield from read_downloaded(shard, matrices, parts, folder=self._folder, budgets=budgets, on_bytes=self._count)

    def _count(self, nbytes: int) -> None:
        """Count bytes from the network.

        Raise `Closed` after the end, since a download cannot be interrupted.
        """
        if self._halt.is_set():
            raise Closed
        with self._lock:
            self._traffic.fetched_nbytes += nbytes
