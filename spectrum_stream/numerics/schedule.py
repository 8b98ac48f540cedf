"""Batches, device placement and escalation of precision.

This module makes these decisions (on a GPU, `batches` forms the batches):

    precision   fp32 first. If a matrix has no score, or a score with an estimated error above TOLERANCE, then fp64,
                and then svd. On a CUDA device with slow float64 products, mixed comes before fp64
    placement   the device. A batch is halved if it does not fit, or if the eigenvalue routine rejects it. A matrix
                goes to the CPU if it does not fit, or if its eigenvalues fail the check. If it does not fit there, it
                is computed alone. If it still does not fit, it has no score
    batches     on a CPU, each core computes its own matrix, because the short steps of an eigenvalue routine lose
                more to synchronization than a second core gains. A few threads share a matrix if memory is too short
                for more matrices, or if the checkpoint has fewer matrices than cores. On a GPU, matrices of one shape
                and dtype are one batch

Memory: before a matrix is yielded, this module drops all references to its tensor. This is why items are deleted by
name, and lists of them cleared, before each `yield`. A traceback holds the locals of all its functions, so nothing is
tried again in an `except` clause: the memory of the first try would still be taken.
"""

import bisect
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch

from ..errors import CheckpointError, is_out_of_memory
from ..model.matrix import Matrix
from ..model.no_score import NoScore
from . import costs
from .batches import Batches
from .costs import count_cores
from .dequantize import Packed, QuantizedMatrix, Weights
from .device import CPU, Device, one_thread_each
from .eigenvalues import measure_routine
from .precision import Precision
from .snr import Score, score
from .spectra import Spectrum, count_not_finite, exact_products, singular_values

# Matrices wait until there are this many for each core, or until no more are read. The one with the most work starts
# first.
_WAITING_PER_WORKER = 16

# The threads of a device use the CPU one after another, because each takes all cores, and a plan counts the memory of
# one.
_ON_CPU = threading.Lock()

# If a matrix could not be read, the reason replaces its weights.
Item = tuple[Matrix, Weights | Packed | NoScore]


class Compute(Protocol):
    """The signature of `singular_values`."""

    def __call__(self, ws: Sequence[Weights], precision: Precision, device: Device) -> list[Spectrum | NoScore]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """The outcome for one matrix.

    Attributes:
        spectrum: the spectrum, or the reason for its absence at the last precision that was tried.
        score: None without a spectrum.
        device: where it was computed.
        not_finite: the number of NaN and infinite weights, if they are the reason for a missing spectrum.
        compute_s: seconds; those of a batch are shared equally.
        detail: the problem of the scales, if it is the reason; or the reasons why the matrix was computed again.
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
    """Compute the scores of a batch of matrices of one shape and dtype.

    Args:
        ws: (n, m) matrices on the CPU, in their stored dtype.
        precision: AUTO takes, for each matrix, the first precision that is exact enough.
        device: where to compute.
        limit_nbytes: skip precisions that need more memory, except the first.
        compute: computes the spectra of a batch. Tests replace it by functions that fail.
    """
    started = time.perf_counter()
    steps = precision.steps
    if precision is Precision.AUTO and device.torch_device.type == "cuda" and not device.has_fast_float64:
        steps = (steps[0], Precision.MIXED, *steps[1:])
    if limit_nbytes is not None:
        steps = tuple(step for step in steps if step is steps[0] or _nbytes(ws[0], step) <= limit_nbytes)
    results: list[Computed | None] = [None] * len(ws)
    for step in steps:
        todo = [i for i, result in enumerate(results) if result is None or not _is_final(result)]
        for i, found in zip(todo, _compute_step([ws[i] for i in todo], step, device, compute), strict=True):
            earlier = results[i]
            details = (earlier.detail if earlier is not None else "", found.detail)
            # An inexact score is better than none.
            kept = found if earlier is None or earlier.score is None or found.score is not None else earlier
            results[i] = replace(kept, detail="; ".join(filter(None, details)))
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


def _is_final(result: Computed) -> bool:
    """Whether no other precision is tried.

    The score is exact enough, or there is no memory for another precision.
    """
    if result.score is None:
        return result.spectrum is NoScore.NO_MEMORY
    return result.score.is_exact


def _nbytes(w: Weights, precision: Precision) -> int:
    n, m = w.shape
    return costs.compute_nbytes(n, m, precision, w.scales if isinstance(w, QuantizedMatrix) else None)


def _compute_step(ws: Sequence[Weights], precision: Precision, device: Device, compute: Compute) -> list[Computed]:
    """Compute matrices of one shape at one precision, within the limit of a batch."""
    if not ws:
        return []
    # Metal has no float64, and the SVD always runs on the CPU.
    is_impossible = precision is Precision.SVD or (device.torch_device.type == "mps" and precision is Precision.FP64)
    if is_impossible and not device.is_cpu:
        with _turn_on_cpu(device):
            return _compute_in_memory(ws, precision, CPU, compute)
    at_once = len(ws)
    if device.batch_nbytes:
        n, m = ws[0].shape
        at_once = device.limit(n, m, costs.itemsize_of(precision))
    parts = [ws[i : i + at_once] for i in range(0, len(ws), at_once)]
    found = [computed for part in parts for computed in _compute_in_memory(part, precision, device, compute)]
    if not device.is_cpu:
        # The device or its driver is at fault, and not the precision.
        for i, w in enumerate(ws):
            if found[i].spectrum is NoScore.FAILED_CHECK:
                with _turn_on_cpu(device):
                    (again,) = _compute_in_memory([w], precision, CPU, compute)
                found[i] = replace(again, detail="; ".join(filter(None, (found[i].detail, again.detail))))
    return found


def _turn_on_cpu(device: Device) -> contextlib.AbstractContextManager[object]:
    # On a device without batches, each core computes its own matrix.
    return _ON_CPU if device.batch_nbytes else contextlib.nullcontext()


def _compute_in_memory(
    ws: Sequence[Weights], precision: Precision, device: Device, compute: Compute
) -> list[Computed]:
    """Compute a batch, or halve it if it does not fit into memory.

    A single matrix that does not fit on the device goes to the CPU.
    """
    found = _try_in_memory(ws, precision, device, compute)
    if found is None:
        device.free_unused()
    if found is None and len(ws) > 1:
        half = len(ws) // 2
        return [
            *_compute_in_memory(ws[:half], precision, device, compute),
            *_compute_in_memory(ws[half:], precision, device, compute),
        ]
    if found is None and not device.is_cpu:
        with _turn_on_cpu(device):
            return _compute_in_memory(ws, precision, CPU, compute)
    return found if found is not None else [_no_memory(device)]


def _try_in_memory(
    ws: Sequence[Weights], precision: Precision, where: Device, compute: Compute
) -> list[Computed] | None:
    """Compute a batch; return None if it does not fit into memory."""
    try:
        return [
            Computed(
                spectrum=spectrum,
                score=None
                if isinstance(spectrum, NoScore)
                else score(spectrum.values, *w.shape, errors=spectrum.errors, drift=spectrum.drift),
                device=str(where),
                detail=f"{precision} on {where} failed the check" if spectrum is NoScore.FAILED_CHECK else "",
            )
            for w, spectrum in zip(ws, compute(ws, precision, where), strict=True)
        ]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None


def _no_memory(where: Device = CPU) -> Computed:
    return Computed(spectrum=NoScore.NO_MEMORY, score=None, device=str(where))


def compute_all(
    items: Iterable[Item | None],
    *,
    precision: Precision = Precision.AUTO,
    device: Device = CPU,
    workers: int | None = None,
    limit_nbytes: int | None = None,
    together_nbytes: int | None = None,
    count: int | None = None,
    compute: Compute = singular_values,
) -> Iterator[tuple[Matrix, Computed]]:
    """Compute a stream of matrices.

    Yield each when it is done, in an order that suits the machine.

    Args:
        items: matrices with their tensors. They are taken only as fast as they are computed. None means that the next
            matrix is not read yet, and perhaps cannot be read before others are computed. The matrices that wait for
            a batch do not wait for the next one: they are computed as soon as a thread of the device is free.
        workers: the number of cores of a CPU to use; None for all.
        together_nbytes: the memory of all matrices that are computed at once on a CPU, at the first step of the
            precision; None for the usable memory of this machine.
        count: the number of matrices in the checkpoint, including those that are not in `items` because they were
            computed earlier. If there are fewer matrices than cores, several threads share a matrix. None: threads
            share a matrix only if memory is short.
        precision, device, limit_nbytes, compute: as for `compute_batch`.
    """
    # If a program limits the threads of torch, it needs the other cores itself.
    workers = min(workers or count_cores(), torch.get_num_threads())

    def prepare(item: Item) -> tuple[Weights | None, Computed | None]:
        _, w = item
        if isinstance(w, NoScore):
            return None, Computed(spectrum=w, score=None, device="cpu")
        try:
            return w.dequantize() if isinstance(w, Packed) else w, None
        except CheckpointError as error:
            return None, Computed(spectrum=NoScore.BAD_SCALES, score=None, device="cpu", detail=str(error))

    def run_or_raise(batch: Sequence[Item], at_once: int) -> list[tuple[Matrix, Computed]]:
        prepared = [(item[0], *prepare(item)) for item in batch]
        results = [(matrix, failed) for matrix, _, failed in prepared if failed is not None]
        readable = [(matrix, w) for matrix, w, _ in prepared if w is not None]
        if readable:
            limit = None if limit_nbytes is None else limit_nbytes // at_once
            ws = [w for _, w in readable]
            computed = compute_batch(ws, precision=precision, device=device, limit_nbytes=limit, compute=compute)
            results += [(matrix, result) for (matrix, _), result in zip(readable, computed, strict=True)]
        return results

    def run(batch: Sequence[Item], at_once: int = 1) -> list[tuple[Matrix, Computed]]:
        try:
            return run_or_raise(batch, at_once)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # The scales of the batch, or its results, do not fit into memory.
        half = len(batch) // 2
        return [*run(batch[:half]), *run(batch[half:])] if half else [(batch[0][0], _no_memory())]

    # On a CPU matrices wait for a core, and on a device for others of their shape and dtype.
    room = costs.usable_nbytes() if together_nbytes is None else together_nbytes

    def plan_task(item: Item) -> _Task:
        matrix = item[0]
        nbytes = costs.compute_nbytes(matrix.n, matrix.m, precision.steps[0], matrix.scales)
        at_once = costs.count_together(nbytes, workers, room)
        # The last digits of a result depend on the number of threads. So this number must not depend on how many
        # matrices are left: a resumed scan must write the same bytes as an uninterrupted one.
        threads = min(costs.MAX_THREADS, workers // min(at_once, count or at_once))
        return _Task(item, costs.work(matrix.n, matrix.m), nbytes, at_once, threads)

    pool = _Pool(lambda item, at_once: run([item], at_once), workers, room)
    batches = Batches(run, device)
    with exact_products(), pool, batches:
        for item in items:
            if item is None:
                yield from batches.collect(wait=False)
                yield from pool.collect(wait=False)
                continue
            if device.batch_nbytes:
                batches.add(item)
                del item
                yield from batches.collect(wait=batches.is_full)
            else:
                pool.add(plan_task(item))
                del item
                while pool.is_full:
                    yield from pool.collect(wait=True)
        while batches.is_busy:
            yield from batches.collect(wait=True)
        while pool.is_busy:
            yield from pool.collect(wait=True)


@dataclass(slots=True, eq=False)
class _Task:
    """A matrix that waits for a core.

    Attributes:
        item: None from the start of its computation, so that the memory of the tensor is freed.
        work: its time, as `costs.work`.
        nbytes: its memory.
        at_once: the number of such matrices that the memory and the cores allow at once.
        threads: the number of threads that compute it.
    """

    item: Item | None
    work: float
    nbytes: int
    at_once: int
    threads: int


class _Pool:
    """Computes matrices, as many at once as there are cores and memory for them.

    The matrix with the most work starts first. If it started last, the other cores would be idle. A matrix that does
    not fit into memory together with the others is computed again when they are done.

    Args:
        run: computes a matrix. The second argument is the number of such matrices that are computed at once.
        workers: the number of cores.
        limit_nbytes: the memory of all matrices that are computed at once.
    """

    def __init__(
        self, run: Callable[[Item, int], list[tuple[Matrix, Computed]]], workers: int, limit_nbytes: int
    ) -> None:
        self._run = run
        self._workers = workers
        self._limit_nbytes = limit_nbytes
        self._waiting: list[_Task] = []
        self._running: list[_Task] = []
        # The task that was started before there was a core for it, so that a free core does not have to wait for the
        # thread that starts tasks.
        self._next: _Task | None = None
        # The task and its results, or the matrix itself if it did not fit into memory.
        self._done: queue.SimpleQueue[tuple[_Task, list[tuple[Matrix, Computed]] | Item | BaseException]] = (
            queue.SimpleQueue()
        )
        self._open = contextlib.ExitStack()
        self._executor: ThreadPoolExecutor | None = None

    @property
    def is_full(self) -> bool:
        return len(self._waiting) + len(self._running) >= self._workers * _WAITING_PER_WORKER

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, task: _Task) -> None:
        bisect.insort(self._waiting, task, key=lambda task: task.work)

    def collect(self, *, wait: bool) -> Iterator[tuple[Matrix, Computed]]:
        """Start tasks within the cores and memory, and yield the matrices that are done.

        With `wait`, wait for at least one.
        """
        self._start_all()
        yield from self._take_done(wait)

    def _start_all(self) -> None:
        while self._waiting:
            task = self._waiting[-1]
            # The number of threads of BLAS is process-wide, so all running tasks have the same.
            if any(task.threads != other.threads for other in self._running):
                return
            nbytes = sum(other.nbytes for other in self._running)
            threads = sum(other.threads for other in self._running)
            is_room = nbytes + task.nbytes <= self._limit_nbytes and threads + task.threads <= self._workers
            if self._running and not is_room:
                # One task is queued ahead, for the first core that becomes free.
                is_no_larger = all(task.nbytes <= other.nbytes for other in self._running)
                # A thread of the executor that is idle would not wait for this.
                has_to_wait = len(self._running) >= self._workers
                if self._next is not None or not is_no_larger or not has_to_wait:
                    return
                self._next = task
            self._start(self._waiting.pop())

    def _start(self, task: _Task) -> None:
        is_first = self._executor is None
        if self._executor is None:
            # The first measurement changes the number of threads, so it must be done before any task runs.
            measure_routine(CPU)
            self._open.enter_context(one_thread_each())
            self._executor = self._open.enter_context(ThreadPoolExecutor(self._workers))
        self._running.append(task)
        try:
            self._executor.submit(self._work, task)
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # The system allows no more threads. The item is queued nevertheless, for the existing threads.
        if is_first:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._work(task)
            self._close()

    def _work(self, task: _Task) -> None:
        # The worker owns the tensor, so its memory is freed as soon as it is computed.
        item, task.item = task.item, None
        assert item is not None
        try:
            torch.set_num_threads(task.threads)
            results = self._run(item, task.at_once)
            is_alone = self._workers == 1
            is_done = is_alone or results[0][1].spectrum is not NoScore.NO_MEMORY
            self._done.put((task, results if is_done else item))
        except BaseException as error:
            self._done.put((task, error))

    def _take_done(self, wait: bool) -> Iterator[tuple[Matrix, Computed]]:
        again: list[tuple[Item, int]] = []
        while self._running and (wait or again or not self._done.empty()):
            task, found = self._done.get()
            self._running.remove(task)
            # The task that was queued ahead runs on the free core now.
            self._next = None
            wait = False
            if isinstance(found, BaseException):
                raise found
            if isinstance(found, list):
                yield from found
            else:
                again.append((found, task.threads))
        while again:
            item, threads = again.pop()
            torch.set_num_threads(threads)
            results = self._run(item, 1)
            del item
            yield from results

    def _close(self) -> None:
        self._open.close()
        self._executor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._waiting.clear()
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
        self._close()
