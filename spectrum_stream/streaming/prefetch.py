"""The reader: a thread that has the next matrices at hand while earlier ones are computed, by whichever way.

What it may be ahead is bounded: in bytes read from a map or fetched by range, and in shards on disk. Room
is made again when a matrix is released, that is, computed. So that nobody waits for each other, the feed says
when it has nothing at hand: whoever holds matrices back to compute them together must then compute them.
"""

import contextlib
import logging
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ..checkpoint import LocalShard, RangesIgnored, RemoteShard, Shard
from ..errors import SourceError
from ..model.matrix import Matrix
from ..numerics import costs
from ..numerics.dequantize import Packed
from .decode import PartReader, ShardReader, empty_matrix
from .fetch import AHEAD_NBYTES, SHARDS_ON_DISK, Fetch, requests

if TYPE_CHECKING:
    import torch

Item = tuple[Matrix, "torch.Tensor | Packed"]

_log = logging.getLogger("spectrum_stream")

# How far a map is read ahead; this is page cache, not memory of the process's own.
_MAPPED_AHEAD_NBYTES = 1_000_000_000
_READ_NBYTES = 4 << 20
_REQUESTS_IN_FLIGHT = 4
# How long a core may be idle, when there is nothing to read, before its next matrix is looked for.
_ASK_AGAIN_S = 0.02
# A download cannot be broken off; the process ends without its thread.
_JOIN_S = 1.0


@dataclass
class Traffic:
    """Counters of a scan that is going on.

    Attributes:
        fetched_nbytes: what came over the network, headers left out.
        starved_s: seconds in which the computation waited for bytes.
    """

    fetched_nbytes: int = 0
    starved_s: float = 0.0


class Feed:
    """Matrices with their tensors, in the order given; iterate over it once, within its context.

    Yields None whenever it has nothing at hand, and again and again while it waits. Call `release` for every matrix
    that was computed.

    Args:
        shards: by name.
        matrices: in the order of shards and of the bytes in them, no tensor twice.
        fetches: how each shard is read, by name.
        folder: for shards that are downloaded and deleted; made when it is needed, removed at the end.
        traffic: counted up as it happens.
        max_disk_nbytes: how much such shards may take.
        mapped_ahead_nbytes, ahead_nbytes: what may be read and not yet taken, fetched and not yet released.

    Raises, from the iteration:
        CheckpointError: unreadable, changed; SourceError: what the network or the disk refuses.
    """

    def __init__(
        self,
        shards: Mapping[str, Shard],
        matrices: Sequence[Matrix],
        fetches: Mapping[str, Fetch | None],
        folder: Path,
        traffic: Traffic,
        *,
        max_disk_nbytes: int | None = None,
        mapped_ahead_nbytes: int = _MAPPED_AHEAD_NBYTES,
        ahead_nbytes: int = AHEAD_NBYTES,
    ) -> None:
        self._shards = shards
        self._matrices = matrices
        self._ways = fetches
        self._folder = folder
        self._ready: queue.SimpleQueue[Item | BaseException | None] = queue.SimpleQueue()
        self._mapped = _Budget(mapped_ahead_nbytes)
        self._fetched = _Budget(ahead_nbytes)
        self._on_disk = _Budget(SHARDS_ON_DISK)
        self._disk = _Budget(max_disk_nbytes)
        self._parts = _Budget(costs.PARTS_AHEAD_NBYTES)
        self._on_release: dict[str, Callable[[], None]] = {}
        self._halt = threading.Event()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._thread = threading.Thread(target=self._read, name="reader", daemon=True)
        self._traffic = traffic

    def __enter__(self) -> Self:
        self._remove_folder()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._halt.set()
        for budget in (self._mapped, self._fetched, self._on_disk, self._disk, self._parts):
            budget.close()
        self._thread.join(_JOIN_S)
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._on_release.clear()
        self._remove_folder()

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
                    continue
            self._traffic.starved_s += time.monotonic() - started
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            if self._ways[item[0].shard] is None:
                self._mapped.give(item[0].nbytes)
            yield item
            # Or it would be kept alive while the next one is awaited.
            del item

    @property
    def held_nbytes(self) -> int:
        """What was fetched by range, or is being fetched, and is not released yet."""
        return self._fetched.taken

    def release(self, matrix: Matrix) -> None:
        """The matrix is computed, and nobody holds its tensor any more."""
        if (act := self._on_release.pop(matrix.key, None)) is not None:
            act()

    def _read(self) -> None:
        try:
            for name, group in groupby(self._matrices, key=lambda w: w.shard):
                shard, way, matrices = self._shards[name], self._ways[name], list(group)
                if isinstance(shard, LocalShard):
                    self._map(shard, matrices)
                    continue
                if way is Fetch.RANGE:
                    matrices = self._fetch(shard, matrices)
                    if matrices and self._disk.is_over(shard.nbytes):
                        raise SourceError(
                            f"{shard.where}: the server sends whole files only now, and there is no room on disk for "
                            f"{shard.nbytes} bytes",
                            reason="too_little_disk",
                        )
                    if matrices:
                        _log.warning("%s: the server sends whole files only now: it is downloaded", shard.where)
                        way = Fetch.DOWNLOAD
                if matrices and way is Fetch.CACHE:
                    self._map(self._download(shard, None), matrices)
                elif matrices:
                    self._pass_through_disk(shard, matrices)
            self._ready.put(None)
        except _Closed:
            return
        except OSError as error:
            self._ready.put(SourceError(f"a shard cannot be read: {error.strerror}", reason="unreadable"))
        except BaseException as error:
            # Whatever it is, it belongs to the thread that waits for the tensors.
            self._ready.put(error)

    def _map(self, shard: LocalShard, matrices: Sequence[Matrix]) -> None:
        scratch = memoryview(bytearray(_READ_NBYTES))
        parts = PartReader(self._shards, shard, matrices, self._count)
        # A tensor keeps the map that it is a view of.
        with ShardReader(shard) as reader:
            for matrix in matrices:
                if self._ways[matrix.shard] is None:
                    self._mapped.take(matrix.nbytes)
                elif self._halt.is_set():
                    raise _Closed
                reader.warm(matrix.start, matrix.nbytes, scratch)
                self._hand_over(matrix, reader.matrix(matrix), parts)

    def _pass_through_disk(self, shard: RemoteShard, matrices: Sequence[Matrix]) -> None:
        self._on_disk.take(1)
        self._disk.take(shard.nbytes)
        local = self._download(shard, self._folder)
        left = len(matrices)

        def release() -> None:
            nonlocal left
            left -= 1
            if not left:
                # Windows keeps a file that is mapped; it goes with its folder, at the end.
                with contextlib.suppress(PermissionError):
                    local.path.unlink(missing_ok=True)
                self._disk.give(shard.nbytes)
                self._on_disk.give(1)

        self._on_release.update((matrix.key, release) for matrix in matrices)
        self._map(local, matrices)

    def _download(self, shard: RemoteShard, folder: Path | None) -> LocalShard:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if free < shard.nbytes:
                raise SourceError(
                    f"{shard.where} takes {shard.nbytes} bytes of disk, and {free} are free",
                    reason="disk_full",
                    hint="--fetch range needs none" if shard.is_ranged else None,
                )
        return shard.download(folder, self._count)

    def _fetch(self, shard: RemoteShard, matrices: Sequence[Matrix]) -> list[Matrix]:
        """Fetch matrices by range; returns those that are left when the server stops to send ranges."""
        parts = PartReader(self._shards, shard, matrices, self._count)
        pending: deque[tuple[Future[None], list[_Buffer]]] = deque()
        undelivered = {w.key: w for w in matrices}
        taken: dict[str, int] = {}

        def deliver() -> None:
            future, finished = pending.popleft()
            future.result()
            for buffer in finished:
                matrix = buffer.matrix
                del undelivered[matrix.key], taken[matrix.key]
                self._on_release[matrix.key] = partial(self._fetched.give, matrix.nbytes)
                self._hand_over(matrix, buffer.tensor, parts)

        waiting = deque(matrices)
        unfinished: list[_Buffer] = []
        try:
            for start, stop in requests([(w.start, w.start + w.nbytes) for w in matrices]):
                starting = []
                while waiting and waiting[0].start < stop:
                    starting.append(waiting.popleft())
                nbytes = sum(w.nbytes for w in starting)
                # Only what is delivered can be released.
                while pending and not self._fetched.has_room(nbytes):
                    deliver()
                # What is fetched in part cannot be released before it is finished, so it is not waited for.
                self._fetched.take(nbytes, beside=sum(b.matrix.nbytes for b in unfinished))
                taken |= {w.key: w.nbytes for w in starting}
                unfinished += [_Buffer(w) for w in starting]
                finished = [b for b in unfinished if b.stop <= stop]
                pending.append((self._request(shard, start, stop, unfinished), finished))
                unfinished = [b for b in unfinished if b.stop > stop]
                del finished
                while len(pending) >= _REQUESTS_IN_FLIGHT:
                    deliver()
            while pending:
                deliver()
        except RangesIgnored:
            self._fetched.give(sum(taken.values()))
        return list(undelivered.values())

    def _hand_over(self, matrix: Matrix, stored: "torch.Tensor", parts: "PartReader") -> None:
        how = matrix.quantization
        if how is None:
            self._ready.put((matrix, stored))
            return
        # Unlike the matrix itself, its scales are in memory of the process's own.
        self._parts.take(how.parts_nbytes)
        before = self._on_release.get(matrix.key)

        def release() -> None:
            self._parts.give(how.parts_nbytes)
            if before is not None:
                before()

        self._on_release[matrix.key] = release
        self._ready.put((matrix, Packed(stored, how, parts.of(matrix))))

    def _request(self, shard: RemoteShard, start: int, stop: int, buffers: Sequence["_Buffer"]) -> Future[None]:
        def write(position: int, chunk: bytes) -> None:
            for buffer in buffers:
                first, last = max(position, buffer.start), min(position + len(chunk), buffer.stop)
                if first < last:
                    buffer.bytes[first - buffer.start : last - buffer.start] = chunk[
                        first - position : last - position
                    ]
            self._count(len(chunk))

        if self._pool is None:
            self._pool = ThreadPoolExecutor(_REQUESTS_IN_FLIGHT, "request")
        return self._pool.submit(shard.stream, start, stop, write, self._halt)

    def _count(self, nbytes: int) -> None:
        # A download can be broken off nowhere else.
        if self._halt.is_set():
            raise _Closed
        with self._lock:
            self._traffic.fetched_nbytes += nbytes

    def _remove_folder(self) -> None:
        # Also what a process left that was killed: only one scan at a time writes to one result.
        shutil.rmtree(self._folder, ignore_errors=True)


class _Buffer:
    """A matrix that is being fetched."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self.start, self.stop = matrix.start, matrix.start + matrix.nbytes
        self.tensor, self.bytes = empty_matrix(matrix)


class _Closed(Exception):
    """Nobody wants more."""


class _Budget:
    """What one thread takes and another gives back."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._taken = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def taken(self) -> int:
        return self._taken

    def has_room(self, amount: int) -> bool:
        return not self._taken or self._limit is None or self._taken + amount <= self._limit

    def is_over(self, amount: int) -> bool:
        """Whether it is more than could be taken ever."""
        return self._limit is not None and amount > self._limit

    def take(self, amount: int, beside: int = 0) -> None:
        """Wait until there is room, or nothing is taken but `beside`. Raises _Closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._taken <= beside or self.has_room(amount))
            if self._closed:
                raise _Closed
            self._taken += amount

    def give(self, amount: int) -> None:
        with self._changed:
            self._taken -= amount
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
