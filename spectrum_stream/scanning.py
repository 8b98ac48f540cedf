"""The scan: a plan in, events out. Reads one matrix at a time, scores it, records it.

Nothing is printed. `run` is the pipeline as a generator of events; `scan` runs it to its end.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import planning
from .decode import ShardReader
from .errors import ComputeError
from .exporters import axolotl, spectrum
from .planning import RESULTS_FOLDER, Matrix, Plan
from .selection import Selection, select
from .snr import Score, score
from .spectra import Method, NotConverged, OutOfRange, Spectrum, count_not_finite, singular_values
from .store import Record, Scored, Status, Store, in_order, read_results, write_atomically, write_results

if TYPE_CHECKING:
    import torch

# A score is computed again, more exactly, while its estimated relative error is above this.
TOLERANCE = 1e-5
# Part of a record's identity: raise it with any change that can change a number.
_ENGINE = 1
_NO_VALUES = np.empty(0, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class ScanStarted:
    """The plan is made and the record is open.

    Attributes:
        done: matrices that the record holds already.
        dropped: rows of the record that were of an earlier state of the checkpoint.
        foreign: a result that another program left, and that is taken as it is.
    """

    plan: Plan
    done: int
    dropped: int
    foreign: Path | None


@dataclass(frozen=True, slots=True)
class MatrixScored:
    """One more matrix is in the record.

    Attributes:
        done, total: matrices, those of earlier runs included.
        work_done, work_total: in units of `Matrix.work`, those of this run only.
    """

    record: Record
    done: int
    total: int
    work_done: float
    work_total: float


@dataclass(frozen=True, slots=True)
class ScanFinished:
    result: "ScanResult"


Event = ScanStarted | MatrixScored | ScanFinished


@dataclass(frozen=True, slots=True)
class ScanResult:
    """What a scan came to.

    Attributes:
        plan: what was to be done.
        records: one a matrix, in the order of the result file; empty where a foreign result was taken.
        scored: the lines of the result file for the groups that were asked for.
        selection: None without a percentage.
        written: the files written or kept, the result file first.
    """

    plan: Plan
    records: tuple[Record, ...]
    scored: tuple[Scored, ...]
    selection: Selection | None
    written: tuple[Path, ...]

    @property
    def failed(self) -> tuple[Record, ...]:
        """Records without a score."""
        return tuple(r for r in self.records if r.status is not Status.OK)

    @property
    def complete(self) -> bool:
        """Whether everything that holds weights has a score."""
        return not self.failed and not self.plan.failures


def scan(
    model: str,
    *,
    top_percent: float | None = None,
    modules: Sequence[str] | None = None,
    name: str | None = None,
    out: str | Path = RESULTS_FOLDER,
    fresh: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> ScanResult:
    """Score the weight matrices of MODEL and write Spectrum's files.

    Args:
        model, top_percent, modules, name, out: as for `plan`.
        fresh: compute everything again, whatever is recorded.
        on_event: called with each `Event` as it happens.

    Raises:
        what `plan` raises; ResultError: the record or a file cannot be written; ComputeError: all_failed.
    """
    plan = planning.plan(model, top_percent=top_percent, modules=modules, name=name, out=out)
    for event in run(plan, fresh=fresh):
        if on_event is not None:
            on_event(event)
        if isinstance(event, ScanFinished):
            return event.result
    raise AssertionError("a scan ends with ScanFinished")


def run(plan: Plan, *, fresh: bool = False) -> Iterator[Event]:
    """Carry out a plan. The last event is `ScanFinished`; a generator that is dropped leaves a valid record."""
    foreign = None if fresh else _foreign_result(plan)
    if foreign is not None:
        yield ScanStarted(plan, len(plan.matrices), 0, plan.outputs.results)
        yield ScanFinished(_finish(plan, (), foreign))
        return
    with Store(plan.outputs.record, _identity(plan), fresh=fresh) as store:
        known = store.records()
        todo = [w for w in plan.matrices if w.module not in known]
        yield ScanStarted(plan, len(plan.matrices) - len(todo), store.dropped, None)
        by_tensor = {record.tensor: record for record in known.values()}
        done, work_done, work_total = len(plan.matrices) - len(todo), 0.0, _work(todo)
        for shard_name, matrices in groupby(todo, key=lambda w: w.shard):
            shard = next(s for s in plan.source.shards if s.name == shard_name)
            with ShardReader(shard) as reader:
                for matrix in matrices:
                    if matrix.tensor in by_tensor:
                        record = replace(by_tensor[matrix.tensor], module=matrix.module, group=matrix.group)
                    else:
                        record = _score_matrix(matrix, reader.matrix(matrix.tensor))
                        by_tensor[matrix.tensor] = record
                        work_done += matrix.work
                    store.add(record)
                    known[record.module] = record
                    done += 1
                    yield MatrixScored(record, done, len(plan.matrices), work_done, work_total)
        asked = {w.module for w in plan.matrices}
        records = in_order(r for r in known.values() if r.module in asked)
        if not _lines(records):
            raise ComputeError(
                f"none of the {len(records)} matrices could be scored: {records[0].module}: {records[0].detail}",
                reason="all_failed",
            )
        write_results(plan.outputs.results, known.values())
        yield ScanFinished(_finish(plan, records, _lines(records)))


def measure(w: "torch.Tensor", method: Method | None = None) -> tuple[Spectrum, Score]:
    """Singular values and score of W (n, m), by one method or by the first that is exact enough.

    Raises:
        OutOfRange, NotConverged: by the last method that was tried.
    """
    methods = list(Method) if method is None else [method]
    for candidate in methods:
        last = candidate is methods[-1]
        try:
            spectrum = singular_values(w, candidate)
        except (OutOfRange, NotConverged):
            # bfloat16 reaches 3e38, whose square only a wider type holds.
            if last:
                raise
            continue
        result = score(spectrum.values, *w.shape, errors=spectrum.errors, drift=spectrum.drift)
        if last or result.error <= TOLERANCE:
            return spectrum, result
    raise AssertionError("the last method returns or raises")


def _score_matrix(matrix: Matrix, w: "torch.Tensor") -> Record:
    started = time.perf_counter()
    status, detail, method, result, values = Status.OK, "", None, None, _NO_VALUES
    try:
        spectrum, result = measure(w)
        method, values = str(spectrum.method), spectrum.values.astype(np.float32)
    except OutOfRange:
        status, detail = (
            Status.NOT_FINITE,
            f"{count_not_finite(w)} of {w.numel()} weights are NaN or infinite",
        )
    except NotConverged:
        status, detail = Status.NO_CONVERGENCE, "the singular values did not converge"
    return Record(
        module=matrix.module,
        group=matrix.group,
        tensor=matrix.tensor,
        n=matrix.n,
        m=matrix.m,
        dtype=matrix.dtype,
        status=status,
        detail=detail,
        method=method,
        score=result,
        singular_values=values,
        compute_s=time.perf_counter() - started,
    )


def _identity(plan: Plan) -> dict[str, Any]:
    return {
        "path": str(plan.source.path),
        "shards": [[s.name, s.nbytes, s.mtime_ns] for s in plan.source.shards],
        "engine": _ENGINE,
    }


def _foreign_result(plan: Plan) -> list[Scored] | None:
    """A result with no record beside it, as Spectrum leaves one, if it holds all that the plan would score."""
    if plan.outputs.record.exists() or not plan.outputs.results.exists():
        return None
    wanted = {(w.module, w.group) for w in plan.matrices}
    lines = [line for line in read_results(plan.outputs.results) if (line.module, line.group) in wanted]
    return lines if len(lines) == len(wanted) else None


def _lines(records: Sequence[Record]) -> list[Scored]:
    return [Scored(r.module, r.group, r.score.snr) for r in records if r.score is not None]


def _work(matrices: Sequence[Matrix]) -> float:
    return sum({w.tensor: w.work for w in matrices}.values())


def _finish(plan: Plan, records: Sequence[Record], scored: Sequence[Scored]) -> ScanResult:
    outputs = plan.outputs
    written = [outputs.results]
    if records:
        write_atomically(outputs.sorted, spectrum.render_sorted(select(scored, 100)))
        written.append(outputs.sorted)
    selection = None
    if plan.top_percent is not None:
        selection = select(scored, plan.top_percent)
        write_atomically(outputs.unfrozen(plan.top_percent), axolotl.render(selection))
        written.append(outputs.unfrozen(plan.top_percent))
    return ScanResult(plan, tuple(records), tuple(scored), selection, tuple(written))
