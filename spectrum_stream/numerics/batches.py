"""Batches of matrices of one shape and dtype, two at a time on a device.

Each of two threads computes whole batches on a stream of its own. While one thread waits for the eigenvalues of its
batch, because torch reads the status of the routine, the other copies and multiplies. A free thread takes the waiting
matrices of the shape with the most work. So batches are small while the device is faster than the reader, and large
while it is slower.

Memory: a thread drops the tensors of a batch before it hands over the results.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Self

from ..errors import is_out_of_memory
from . import costs
from .device import Device

if TYPE_CHECKING:
    from ..model.matrix import Matrix
    from .schedule import Computed, Item

# Waiting matrices are memory-mapped, and the system may drop their pages before they are computed. So no more
# matrices are taken while this many bytes wait. The limit is about four times the bytes that the reader prefetches.
_WAITING_NBYTES = 4_000_000_000
# Batches are sized for K in float32, the first precision. Later precisions split them by their own sizes.
_ITEMSIZE = 4


class Batches:
    """Matrices that wait for a device, and the threads that compute them in batches.

    This is a context manager. On exit, it waits for the running batches and drops the waiting matrices.

    Args:
        run: computes a batch; several threads call it.
    """

    def __init__(self, run: "Callable[[list[Item]], list[tuple[Matrix, Computed]]]", device: Device) -> None:
        self._run = run
        self._device = device
        self._waiting: dict[tuple[int, int, str], list[Item]] = {}
        self._waiting_nbytes = 0
        # The number of running batches, and their device memory.
        self._running = 0
        self._running_nbytes = 0
        self._threads: list[threading.Thread] | None = None
        self._todo: queue.SimpleQueue[tuple[list[Item], int] | None] = queue.SimpleQueue()
        self._results: deque[tuple[Matrix, Computed]] = deque()
        # The device memory of each finished batch, and its results or its error.
        self._done: queue.SimpleQueue[tuple[int, list[tuple[Matrix, Computed]] | BaseException]] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *exc: object) -> None:
        self._waiting.clear()
        for _ in self._threads or ():
            self._todo.put(None)
        for thread in self._threads or ():
            thread.join()
        self._threads = None
        # After a device error, this would fail too.
        if error is None:
            self._device.free_unused()

    @property
    def is_full(self) -> bool:
        """Whether no more matrices should be added before some are computed."""
        return self._waiting_nbytes >= _WAITING_NBYTES

    @property
    def is_busy(self) -> bool:
        """Whether matrices wait or are being computed."""
        return bool(self._waiting or self._running)

    def add(self, item: "Item") -> None:
        """Queue a matrix for a batch."""
        matrix = item[0]
        self._waiting.setdefault((matrix.n, matrix.m, matrix.dtype), []).append(item)
        self._waiting_nbytes += matrix.nbytes

    def collect(self, *, wait: bool) -> "Iterator[tuple[Matrix, Computed]]":
        """Start a batch on each free thread, and yield the matrices that are done.

        With `wait`, wait for at least one batch.

        Raises:
            Exception: from `run`.
        """
        self._start()
        if wait and self._running:
            self._receive()
        while True:
            # This runs again after each yield, so a finished thread does not wait until the caller has all results.
            while not self._done.empty():
                self._receive()
            if not self._results:
                return
            yield self._results.popleft()

    def _receive(self) -> None:
        """Wait for a batch to finish, keep its results, and start other batches."""
        nbytes, found = self._done.get()
        self._running -= 1
        self._running_nbytes -= nbytes
        if isinstance(found, BaseException):
            raise found
        self._results.extend(found)
        self._start()

    def _start(self) -> None:
        while self._waiting and self._running < self._count_threads():
            key = max(self._waiting, key=lambda key: len(self._waiting[key]) * costs.work(key[0], key[1]))
            n, m, _ = key
            if not self._device.is_measured(min(n, m)):
                if self._running:
                    return
                self._device.measure(min(n, m))
            count = min(len(self._waiting[key]), self._device.limit(n, m, _ITEMSIZE))
            nbytes = self._device.nbytes(n, m, _ITEMSIZE, count)
            # A matrix that needs more than the share of a thread is computed alone.
            if self._running and self._running_nbytes + nbytes > self._device.batch_nbytes:
                return
            self._start_batch(self._take(key, count), nbytes)

    def _take(self, key: tuple[int, int, str], count: int) -> "list[Item]":
        """Remove and return the first `count` waiting matrices of a shape and dtype."""
        waiting = self._waiting.pop(key)
        if waiting[count:]:
            self._waiting[key] = waiting[count:]
        del waiting[count:]
        self._waiting_nbytes -= sum(item[0].nbytes for item in waiting)
        return waiting

    def _start_batch(self, batch: "list[Item]", nbytes: int) -> None:
        self._running += 1
        self._running_nbytes += nbytes
        if self._threads:
            self._todo.put((batch, nbytes))
        else:
            self._compute(batch, nbytes)

    def _count_threads(self) -> int:
        """Return the number of batches that are computed at once; start the threads."""
        if self._threads is None:
            self._threads = []
            for i in range(costs.DEVICE_THREADS):
                # A daemon thread does not keep the process alive if the caller never closes the scan.
                thread = threading.Thread(
                    target=self._serve, args=(self._device.new_stream(),), name=f"device {i}", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    # The system allows no more threads. If it allows none, the calling thread computes the batches.
                    break
                self._threads.append(thread)
        return max(1, len(self._threads))

    def _serve(self, stream: AbstractContextManager[object]) -> None:
        with stream:
            while (task := self._todo.get()) is not None:
                self._compute(*task)
                # Otherwise this name would keep the batch alive while the thread waits.
                del task

    def _compute(self, batch: "list[Item]", nbytes: int) -> None:
        try:
            found: list[tuple[Matrix, Computed]] | BaseException = self._run(batch)
        except BaseException as error:
            found = error
        batch.clear()
        self._done.put((nbytes, found))
