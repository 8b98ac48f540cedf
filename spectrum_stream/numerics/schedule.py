"""Which matrices are computed together, where, and by which precision.

Three decisions, each made here and nowhere else:

    precision   fp32 first; fp64 and then svd for the matrices whose score would be wrong by more than TOLERANCE
    where    the device, halving a batch that does not fit, and the CPU for what does not fit at all
    when     on a CPU, a small matrix is one core's work and as many run at once as there are cores, since
             the many short steps of an eigenvalue routine lose more to waiting for each other than two cores
             gain; a large one takes all cores. On a GPU, small matrices of one shape are one batch.
"""

import bisect
import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Self

import torch

from ..errors import CheckpointError
from ..model.matrix import Matrix
from ..model.no_score import NoScore
from . import costs
from .costs import cores, gram_nbytes
from .dequantize import Packed, Quantized, Weights
from .device import CPU, Device
from .precision import Precision
from .snr import TOLERANCE, Score, score
from .spectra import Spectrum, count_not_finite, exact_products, singular_values

# Small matrices wait until there are this many for each core, or no more at hand: the longest is then the first.
_WAITING_PER_WORKER = 16

Item = tuple[Matrix, Weights | Packed]
Compute = Callable[[Sequence[Weights], Precision, torch.device, bool], list[Spectrum | NoScore]]


@dataclass(frozen=True, slots=True)
class Computed:
    """What came of one matrix.

    Attributes:
        spectrum: or why there is none, by the last precision that was tried.
        score: None where there is no spectrum.
        device: where it was computed.
        not_finite: how many NaN and infinite weights it has, if that is why there is no spectrum.
        compute_s: seconds, a batch's shared equally.
        detail: what is wrong with how it is stored, if that is why there is no spectrum.
    """

    spectrum: Spectrum | NoScore
    score: Score | None
    device: str
    not_finite: int = 0
    compute_s: float = 0.0
    detail: str = ""


def compute_batch(
    ws: Sequence[Weights],
    *,
    precision: Precision = Precision.AUTO,
    device: Device = CPU,
    limit_nbytes: int | None = None,
    compute: Compute = singular_values,
) -> list[Computed]:
    """Singular values and scores of a batch of matrices of one shape and dtype.

    Args:
        ws: (n, m) matrices on the CPU, in their stored dtype.
        precision: the one to use; AUTO for the first that is exact enough for each matrix.
        device: where.
        limit_nbytes: skip methods that would take more memory, but for the first.
        compute: what computes a batch; tests put faults in its place.
    """
    started = time.perf_counter()
    steps = precision.steps
    if limit_nbytes is not None:
        steps = tuple(step for step in steps if step is steps[0] or _nbytes(ws[0], step) <= limit_nbytes)
    results: list[Computed | None] = [None] * len(ws)
    for step in steps:
        todo = [i for i, result in enumerate(results) if result is None or not _is_exact_enough(result)]
        for i, found in zip(todo, _fitting([ws[i] for i in todo], step, device, compute), strict=True):
            earlier = results[i]
            # An inexact score is better than none.
            if earlier is None or earlier.score is None or found.score is not None:
                results[i] = found
    seconds = (time.perf_counter() - started) / len(ws)
    return [
        replace(
            result,
            not_finite=count_not_finite(w) if result.spectrum is NoScore.OUT_OF_RANGE else 0,
            compute_s=seconds,
        )
        for w, result in zip(ws, results, strict=True)
        if result is not None
    ]


def _is_exact_enough(result: Computed) -> bool:
    return result.score is not None and result.score.error <= TOLERANCE


def _nbytes(w: Weights, precision: Precision) -> int:
    n, m = w.shape
    return costs.compute_nbytes(n, m, precision, w.scales if isinstance(w, Quantized) else None)


def _fitting(ws: Sequence[Weights], precision: Precision, device: Device, compute: Compute) -> list[Computed]:
    """Compute a batch, in halves where the whole does not fit on the device, and on the CPU where one does not."""
    if not ws:
        return []
    where = device.torch_device
    # Metal has no float64, and the last precision has no use for a device.
    if precision is Precision.SVD or (where.type == "mps" and precision is Precision.FP64):
        where = torch.device("cpu")
    try:
        spectra = compute(ws, precision, where, device.looped)
    except torch.OutOfMemoryError:
        if where.type == "cuda":
            torch.cuda.empty_cache()
        if len(ws) > 1:
            half = len(ws) // 2
            return _fitting(ws[:half], precision, device, compute) + _fitting(ws[half:], precision, device, compute)
        where = torch.device("cpu")
        spectra = compute(ws, precision, where, False)
    return [
        Computed(
            spectrum,
            None
            if isinstance(spectrum, NoScore)
            else score(spectrum.values, *w.shape, errors=spectrum.errors, drift=spectrum.drift),
            str(where),
        )
        for w, spectrum in zip(ws, spectra, strict=True)
    ]


def compute_all(
    items: Iterable[Item | None],
    *,
    precision: Precision = Precision.AUTO,
    device: Device = CPU,
    workers: int | None = None,
    limit_nbytes: int | None = None,
    compute: Compute = singular_values,
) -> Iterator[tuple[Matrix, Computed]]:
    """Measure a stream of matrices; yields each as it is done, in an order that suits the machine.

    Args:
        items: matrices with their tensors; taken from only as fast as they are computed. None says that the next
            one is not at hand yet, and may wait for those before to be computed: nothing is held back then. When
            a matrix is yielded, nothing here holds its tensor any more.
        workers: how many small matrices run at once on a CPU; None for one a core.
        precision, device, limit_nbytes, compute: as for `compute_batch`.
    """
    # A host program that has taken cores from torch has a use for them.
    workers = min(workers or cores(), torch.get_num_threads())

    def run(batch: Sequence[Item], at_once: int = 1) -> list[tuple[Matrix, Computed]]:
        readable: list[tuple[Matrix, Weights]] = []
        results: list[tuple[Matrix, Computed]] = []
        for matrix, w in batch:
            try:
                readable.append((matrix, w.opened() if isinstance(w, Packed) else w))
            except CheckpointError as error:
                results.append((matrix, Computed(NoScore.BAD_SCALES, None, "cpu", detail=str(error))))
        if readable:
            limit = None if limit_nbytes is None else limit_nbytes // at_once
            ws = [w for _, w in readable]
            measured = compute_batch(ws, precision=precision, device=device, limit_nbytes=limit, compute=compute)
            results += [(matrix, result) for (matrix, _), result in zip(readable, measured, strict=True)]
        return results

    # On a CPU the small ones wait for a core; on a device for others of one shape and dtype.
    pool = _Pool(lambda item: run([item], workers), workers)
    waiting: dict[tuple[int, int, str], list[Item]] = {}
    with exact_products(), pool:
        for item in items:
            if item is None:
                while waiting:
                    yield from _emptied(waiting.popitem()[1], run)
                yield from pool.finished(wait=False)
                continue
            matrix = item[0]
            if not costs.is_small(matrix.n, matrix.m):
                # It takes all cores, and leaves those that wait for one where they are.
                yield from pool.drained()
                measured = run([item])
                del item
                yield from measured
            elif device.batch_nbytes:
                batch = waiting.setdefault((matrix.n, matrix.m, matrix.dtype), [])
                batch.append(item)
                del item
                if (len(batch) + 1) * gram_nbytes(matrix.n, matrix.m, 4) > device.batch_nbytes:
                    del waiting[matrix.n, matrix.m, matrix.dtype]
                    yield from _emptied(batch, run)
            else:
                pool.add(item)
                del item
                while pool.is_full:
                    yield from pool.finished(wait=True)
        while waiting:
            yield from _emptied(waiting.popitem()[1], run)
        while pool.is_busy:
            yield from pool.finished(wait=True)


def _emptied(
    batch: list[Item], run: Callable[[Sequence[Item]], list[tuple[Matrix, Computed]]]
) -> list[tuple[Matrix, Computed]]:
    measured = run(batch)
    batch.clear()
    return measured


class _Pool:
    """Small matrices, each on one core, as many at once as there are cores; of those that wait the longest is first,
    or a long one at the end would leave the other cores idle."""

    def __init__(self, run: Callable[[Item], list[tuple[Matrix, Computed]]], workers: int) -> None:
        self._run = run
        self._workers = workers
        self._waiting: list[Item] = []
        self._running: set[Future[list[tuple[Matrix, Computed]]]] = set()
        self._open = contextlib.ExitStack()
        self._executor: ThreadPoolExecutor | None = None

    @property
    def is_full(self) -> bool:
        return len(self._waiting) + len(self._running) >= self._workers * _WAITING_PER_WORKER

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, item: Item) -> None:
        bisect.insort(self._waiting, item, key=lambda item: costs.work(item[0].n, item[0].m))

    def finished(self, *, wait: bool) -> Iterator[tuple[Matrix, Computed]]:
        """What is done by now, or with `wait` at least one; whoever is idle starts with the next."""
        # One more than run at once, so that who is done need not wait for this thread, which has others to attend to.
        while self._waiting and len(self._running) <= self._workers:
            if self._executor is None:
                self._open.enter_context(one_thread_each())
                # Its threads take over the setting when they start.
                self._executor = self._open.enter_context(ThreadPoolExecutor(self._workers))
            # Nobody here holds the tensor any longer than the one who computes.
            self._running.add(self._executor.submit(self._run, self._waiting.pop()))
        yield from self._collected(wait)

    def drained(self) -> Iterator[tuple[Matrix, Computed]]:
        """What is running, until all cores are free."""
        while self._running:
            yield from self._collected(wait=True)
        self._close()

    def _collected(self, wait: bool) -> Iterator[tuple[Matrix, Computed]]:
        done, self._running = concurrent.futures.wait(
            self._running, None if wait else 0, concurrent.futures.FIRST_COMPLETED
        )
        for future in done:
            yield from future.result()

    def _close(self) -> None:
        self._open.close()
        self._executor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._waiting.clear()
        for future in self._running:
            future.cancel()
        self._close()


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """LAPACK on one thread: beside a busy program, threads that share a matrix can be a hundred times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
