"""Measure a workload: time the contenders in alternation, then check our scores."""

import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from spectrum_stream import Plan, plan, select
from spectrum_stream.checkpoint import LocalShard
from spectrum_stream.model.names import group_of
from spectrum_stream.numerics import costs
from spectrum_stream.results.result import Module
from spectrum_stream.text import VERSION

from . import contenders
from .checkpoints import known_scores, make_checkpoint
from .contenders import Parts, Scan, Shape, Task
from .hardware import matrix_units, processor
from .results import Accuracy, Agreement, ShapeResult, Spread, WorkloadResult
from .worker import Watched, Worker
from .workloads import Workload

_PERCENTS = (50, 25)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of a measurement.

    Attributes:
        repetitions: turns of each contender, at least 1.
        with_numpy: whether numpy takes part.
        device: the device that computes, by torch's name; numpy stays on the CPU.
        cold: whether the checkpoint is dropped from the page cache before every turn.
        folder: the folder for checkpoints.
        say: called with a line of progress.
    """

    repetitions: int
    with_numpy: bool
    device: str
    cold: bool
    folder: Path
    say: Callable[[str], None]


def measure_workload(workload: Workload, settings: Settings) -> WorkloadResult:
    """Make a workload's checkpoints and measure it.

    Raises:
        WorkerError: a contender failed.
    """
    settings.say(f"{workload.name}: making {len(workload.weights)} matrices")
    checkpoint = make_checkpoint(workload, workload.timed_dtype, settings.folder)
    numpy_turns = settings.repetitions if workload.numpy_turns is None else workload.numpy_turns
    result = measure_checkpoint(
        str(checkpoint), workload.name, settings, numpy_turns=numpy_turns, only_ours=workload.only_ours
    )
    if workload.only_ours:
        return result
    exact = make_checkpoint(workload, "float32", settings.folder)
    settings.say(f"{workload.name}: ours, against the known spectra")
    with Worker(contenders.warm_up) as worker:
        scan = worker.run(contenders.ours, Task(str(exact), settings.device)).value
    return replace(result, accuracy=_accuracy(scan, known_scores(workload), workload.error_limit))


def measure_checkpoint(
    checkpoint: str, name: str, settings: Settings, *, numpy_turns: int, only_ours: bool = False
) -> WorkloadResult:
    """Measure on an existing checkpoint.

    Its singular values are not known, so `accuracy` is None.

    Raises:
        WorkerError: a contender failed.
        SpectrumStreamError: it cannot be planned.
    """
    todo, task = plan(checkpoint), Task(checkpoint, settings.device)
    functions = {"ours": contenders.ours}
    if not only_ours:
        functions["spectrum"] = contenders.spectrum
        if settings.with_numpy and numpy_turns:
            functions["numpy"] = contenders.numpy
    scans: dict[str, list[Watched[Scan]]] = {contender: [] for contender in functions}
    parts: list[Watched[Parts]] = []
    shapes: dict[Shape, float] = {}
    with ExitStack() as stack:
        names = [*functions] if only_ours else [*functions, "parts"]
        workers = {contender: stack.enter_context(Worker(contenders.warm_up)) for contender in names}
        for worker in workers.values():
            worker.wait_until_ready()
        for turn in range(settings.repetitions):
            if not only_ours:
                # This comes first, because it leaves the page cache warm for all others.
                _before_turn(todo, settings)
                parts.append(workers["parts"].run(contenders.parts, task))
            # The order alternates, so that no contender always follows the same one.
            for contender in list(functions) if turn % 2 == 0 else reversed(functions):
                if contender != "numpy" or turn < numpy_turns:
                    _before_turn(todo, settings)
                    watched = workers[contender].run(functions[contender], task)
                    scans[contender].append(watched)
                    settings.say(
                        f"{name}: {turn + 1}/{settings.repetitions} {contender} {watched.value.seconds:.2f} s"
                    )
        if not only_ours:
            settings.say(f"{name}: each shape by itself")
            shapes = workers["parts"].run(contenders.shapes, task).value
    return _result(name, todo, scans, parts, shapes)


def machine() -> dict[str, str | int]:
    """Describe the machine, and name the versions."""
    return {
        "system": platform.system(),
        "processor": processor(),
        "cpus": len(psutil.Process().cpu_affinity()) if platform.system() == "Linux" else psutil.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "memory_nbytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "matrix_units": matrix_units(Path("/proc/cpuinfo")),
        "numpy": np.__version__,
        "spectrum_stream": VERSION,
    }


def _before_turn(todo: Plan, settings: Settings) -> None:
    if not settings.cold:
        return
    for shard in todo.source.shards:
        assert isinstance(shard, LocalShard)
        handle = os.open(shard.path, os.O_RDONLY)
        try:
            # Pages that are not on the disk yet would stay.
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _result(
    name: str,
    todo: Plan,
    scans: Mapping[str, Sequence[Watched[Scan]]],
    watched_parts: Sequence[Watched[Parts]],
    shapes: Mapping[Shape, float],
) -> WorkloadResult:
    parts = [turn.value for turn in watched_parts]
    turns: list[Watched[Any]] = [*chain.from_iterable(scans.values()), *watched_parts]
    matrices = [w for w in todo.matrices if min(w.n, w.m) > 1]
    times = {contender: [turn.value.seconds for turn in turns] for contender, turns in scans.items()}
    ours = times["ours"]
    # Numpy may have had fewer turns.
    ratios = {
        f"times_{contender}": Spread.of([theirs / mine for theirs, mine in zip(times[contender], ours, strict=False)])
        for contender in times
        if contender != "ours"
    }
    if parts:
        times["reading"] = [turn.reading for turn in parts]
        times["computing"] = [turn.computing for turn in parts]
        slower = [max(pair) for pair in zip(times["reading"], times["computing"], strict=True)]
        floors = [todo.flops / turn.sgemm for turn in parts]
        ratios["scan_over_parts"] = Spread.of([mine / part for mine, part in zip(ours, slower, strict=True)])
        ratios["floor_share"] = Spread.of([floor / mine for mine, floor in zip(ours, floors, strict=True)])
    latest = {contender: turns[-1].value for contender, turns in scans.items()}
    resident = {contender: [t.peak_resident for t in turns if t.peak_resident] for contender, turns in scans.items()}
    seconds = {contender: Spread.of(values) for contender, values in times.items()}
    sgemm = Spread.of([turn.sgemm for turn in parts]) if parts else None
    return WorkloadResult(
        name=name,
        dtype=Counter(w.dtype for w in matrices).most_common(1)[0][0],
        matrices=len(matrices),
        nbytes=todo.read_nbytes,
        flops=todo.flops,
        planned_nbytes=todo.peak_nbytes,
        seconds=seconds,
        sgemm=sgemm,
        ratios=ratios,
        numpy_matrices=latest["numpy"].matrices if "numpy" in latest else 0,
        read_rate=todo.read_nbytes / seconds["ours"].median,
        peak_anonymous={contender: max(t.peak_anonymous for t in turns) for contender, turns in scans.items()},
        peak_resident={contender: max(peaks) for contender, peaks in resident.items() if peaks},
        others_cpu_share=sum(t.others_seconds for t in turns) / sum(t.cpu_seconds for t in turns),
        precisions=latest["ours"].precisions,
        failed=len(todo.matrices) - len(latest["ours"].scores),
        accuracy=None,
        agreement={
            contender: _agreement(latest["ours"].scores, scan.scores, len(todo.matrices))
            for contender, scan in latest.items()
            if contender != "ours"
        },
        shapes=_shapes(todo, shapes, sgemm.median) if sgemm else [],
    )


def _shapes(todo: Plan, seconds: Mapping[Shape, float], sgemm: float) -> list[ShapeResult]:
    results = []
    for n, m in sorted(seconds):
        flops = [costs.flops(w.n, w.m) for w in todo.matrices if (w.n, w.m) == (n, m) and w.tied_to is None]
        results.append(ShapeResult(n, m, len(flops), seconds[n, m], sum(flops) / sgemm / seconds[n, m]))
    return results


def _accuracy(found: Scan, known: Mapping[str, float], limit: float) -> Accuracy:
    errors = {module: _difference(found.scores.get(module, 0.0), exact) for module, exact in known.items()}
    worst = max(errors, key=lambda module: errors[module])
    beyond = [module for module, error in errors.items() if error > limit]
    excused = sum(errors[module] <= found.errors.get(module, 0.0) for module in beyond)
    return Accuracy(
        max_error=errors[worst],
        estimated=found.errors.get(worst, 0.0),
        limit=limit,
        excused=excused,
        unexcused=len(beyond) - excused,
        same_sets=_same_sets(found.scores, known),
        precisions=found.precisions,
    )


def _agreement(ours: Mapping[str, float], theirs: Mapping[str, float], total: int) -> Agreement:
    return Agreement(
        matrices=len(theirs),
        max_difference=max(_difference(ours.get(module, 0.0), snr) for module, snr in theirs.items()),
        same_sets=_same_sets(ours, theirs) if len(theirs) == total else None,
    )


def _difference(a: float, b: float) -> float:
    """Return the relative error; a missing score counts as 0.0, so its error is 1.0."""
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0


def _same_sets(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, bool]:
    def chosen(scores: Mapping[str, float], percent: int) -> dict[str, set[str]]:
        # Both have the same order, because it decides between equal scores.
        lines = [Module(module, group_of(module), scores[module]) for module in theirs if module in scores]
        return {group: set(modules) for group, modules in select(lines, percent).chosen.items()}

    return {f"top_{percent}": chosen(ours, percent) == chosen(theirs, percent) for percent in _PERCENTS}
