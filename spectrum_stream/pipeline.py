"""The scan: a plan in, events out.

`run` is the whole pipeline as a generator of events. It opens the record, prefetches, scores and records each matrix,
and writes Spectrum's files at the end. `scan` runs it to its end. This module prints nothing.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from .checkpoint import LocalShard, Source
from .checkpoint.local import read_again
from .errors import (
    CheckpointError,
    ComputeError,
    ResultError,
    SpectrumStreamError,
    UsageError,
    memory_reported,
)
from .model import schemes
from .model.matrix import Matrix
from .model.no_score import NoScore
from .model.parameters import Names
from .numerics import costs
from .numerics.device import CPU, Device, open_device
from .numerics.precision import Precision
from .numerics.schedule import Computed, compute_all
from .results.atomic import write_atomically
from .results.journal import Journal
from .results.output import check_output
from .results.record import Record
from .results.result import Module, Result, sort_records, write_results
from .selection.select import Selection, check_percent, select
from .streaming.bounded import Budget, Budgets, Traffic
from .streaming.plan import Plan, PlanOptions, plan
from .streaming.prefetch import Prefetcher
from .trainers import DEFAULT, spectrum

# A part of a record's identity. Raise it with any change that can change a number.
_ERROR_MODEL = 5
_FLOAT32_MAX = np.finfo(np.float32).max
_NO_VALUES = np.empty(0, dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanStarted:
    """The record is open, and reading begins.

    Attributes:
        done: the number of matrices that the record holds already.
        dropped: the number of rows that belonged to an earlier state of the checkpoint.
        foreign: a result of another program that is used as it is; None in most cases.
        fetch_nbytes: bytes that will come over the network, without headers; 0 for a local checkpoint.
        traffic: bytes that came so far; it is counted up while the scan runs.
    """

    plan: Plan
    done: int
    dropped: int
    foreign: Path | None
    fetch_nbytes: int
    traffic: Traffic


@dataclass(frozen=True, slots=True)
class MatrixScored:
    """One more matrix is in the record.

    Attributes:
        done, total: matrices, with those of earlier runs.
        work_done, work_total: in units of `costs.work`, of this run only.
    """

    record: Record
    done: int
    total: int
    work_done: float
    work_total: float


@dataclass(frozen=True, slots=True)
class ScanFinished:
    """The files are written. This is the last event."""

    result: "ScanResult"


Event = ScanStarted | MatrixScored | ScanFinished


@dataclass(frozen=True, slots=True)
class ScanResult:
    """The outcome of a scan.

    Attributes:
        plan: the plan that was carried out.
        records: one for each matrix of the plan, in the order of the result file; empty for a foreign result.
        result: the modules of the plan that have a score, with their diagnostics, and the names of all parameters.
        selection: None without a percentage.
        written: the files that were written or kept, the result file first.
    """

    plan: Plan
    records: tuple[Record, ...]
    result: Result
    selection: Selection | None
    written: tuple[Path, ...]

    @property
    def modules(self) -> tuple[Module, ...]:
        """The modules of the plan that have a score, in the order of the result file."""
        return self.result.modules

    @property
    def failed(self) -> tuple[Record, ...]:
        """Records without a score."""
        return tuple(r for r in self.records if r.no_score is not None)

    @property
    def inexact(self) -> tuple[Record, ...]:
        """Records with an estimated score error above the tolerance."""
        return tuple(r for r in self.records if r.score is not None and not r.score.is_exact)

    @property
    def complete(self) -> bool:
        """Whether every weight of the plan has a score."""
        return not self.failed and not self.plan.failures


def scan(
    model_or_plan: str | Plan,
    *,
    top_percent: float | None = None,
    fresh: bool = False,
    device: str = "auto",
    on_event: Callable[[Event], None] | None = None,
    **options: Unpack[PlanOptions],
) -> ScanResult:
    """Score the weight matrices of a model and write Spectrum's files.

    Args:
        model_or_plan: MODEL as for `plan`, or a plan.
        top_percent: the share of each group to select, in (0, 100]; None for no selection.
        fresh: compute all matrices again, even if they are recorded.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        on_event: called with each `Event` as it happens.
        options: see `PlanOptions`; none with a plan, which has its own.

    Raises:
        UsageError: conflicting_options, a plan and options; bad_percent; no_such_device.
        ResultError: the record or a file cannot be written; locked, another scan holds the record.
        ComputeError: all_failed.
        SpectrumStreamError: no_memory, for more than single matrices; finished scores are recorded.
        As `plan`.
    """
    if top_percent is not None:
        check_percent(top_percent)
    if isinstance(model_or_plan, Plan) and options:
        raise UsageError(
            f"a plan already has its options, so {', '.join(options)} cannot be given with it",
            reason="conflicting_options",
            hint="give the options to plan()",
        )
    with memory_reported():
        made = model_or_plan if isinstance(model_or_plan, Plan) else plan(model_or_plan, **options)
        with contextlib.closing(
            run(made, top_percent=top_percent, fresh=fresh, device=open_device(device))
        ) as events:
            for event in events:
                if on_event is not None:
                    on_event(event)
                if isinstance(event, ScanFinished):
                    return event.result
    raise AssertionError("a scan ends with ScanFinished")


def run(
    plan: Plan, *, top_percent: float | None = None, fresh: bool = False, device: Device = CPU
) -> Generator[Event]:
    """Carry out a plan, and yield events; the last one is `ScanFinished`.

    Closing the generator early leaves a valid record, which the next scan of the plan resumes.

    Args:
        top_percent, fresh: as for `scan`.
        device: where to compute.

    Raises:
        UsageError: bad_percent, too_little_disk. ResultError, CheckpointError, SourceError, ComputeError: as `scan`.
        MemoryError, or an error of a library, if it is short for more than single matrices.
    """
    if top_percent is not None:
        check_percent(top_percent)
    names, identity, is_stale = _find_parameters(plan), _identity(plan), _stale_rows(plan)
    foreign = None if fresh or plan.precision is not Precision.AUTO else _read_foreign_result(plan)
    if foreign is not None:
        yield ScanStarted(
            plan=plan,
            done=len(plan.matrices),
            dropped=0,
            foreign=plan.outputs.results,
            fetch_nbytes=0,
            traffic=Traffic(),
        )
        yield ScanFinished(_write_selection(plan, (), Result(tuple(foreign), parameters=names), top_percent))
        return
    with Journal(
        plan.outputs.record,
        identity,
        names=names,
        weights=plan.inventory.weights_numel,
        fresh=fresh,
        others={w.module for w in plan.inventory.matrices} - {w.module for w in plan.matrices},
    ) as journal:
        recorded = journal.reuse(plan.inventory.members, plan.inventory.parameters, is_stale)
        todo = [w for w in plan.matrices if w.module not in recorded]
        rest, traffic = plan.fetch_rest(todo), Traffic()
        done, total = len(plan.matrices) - len(todo), len(plan.matrices)
        yield ScanStarted(
            plan=plan,
            done=done,
            dropped=journal.dropped,
            foreign=None,
            fetch_nbytes=rest.nbytes,
            traffic=traffic,
        )
        sharing = _group_by_tensor(todo)
        copied = _copy_records(sharing, recorded.values())
        prefetcher = Prefetcher(
            {shard.name: shard for shard in plan.source.shards},
            [matrices[0] for tensor, matrices in sharing.items() if tensor not in copied],
            rest.fetches,
            plan.outputs.shards,
            traffic,
            Budgets(disk=Budget(plan.room_nbytes)),
        )
        work_done, work_total = 0.0, sum(costs.work(matrices[0].n, matrices[0].m) for matrices in sharing.values())
        with prefetcher:
            computed = _compute_records(plan, sharing, prefetcher, device)
            for record, work in chain(chain.from_iterable(copied.values()), computed):
                journal.add(record)
                recorded[record.module] = record
                done, work_done = done + 1, work_done + work
                yield MatrixScored(record, done, total, work_done, work_total)
        _check_unchanged(plan)
        yield ScanFinished(_publish(plan, recorded, names, top_percent))


def _find_parameters(plan: Plan) -> tuple[str, ...]:
    """Find the names of all parameters of the checkpoint, planned or not, sorted.

    A tied head is not a separate parameter.
    """
    tied = {w.parameter for w in plan.inventory.matrices if w.tied_to}
    # A tensor without a parameter is a buffer, or not in the model.
    skipped = {
        s.parameter: s.no_score
        for s in plan.skipped
        if s.parameter is not None and not schemes.is_companion(s.tensor)
    }
    absent = (NoScore.NOT_CHOSEN, NoScore.NOT_LOADED, NoScore.MISSING_EXPERTS)
    found = {
        *plan.inventory.parameters.values(),
        *(name for name, why in skipped.items() if why not in absent),
    }
    return tuple(sorted(found - tied))


def _read_foreign_result(plan: Plan) -> list[Module] | None:
    """Read a result without a record, such as one of Spectrum.

    Return None if there is none.

    Raises:
        ResultError: other_result, it lacks modules of the plan.
    """
    if os.path.lexists(plan.outputs.record) or not plan.outputs.results.exists():
        return None
    wanted = {(w.result_name, w.group) for w in plan.matrices}
    modules = [m for m in Result.open(plan.outputs.results).modules if (m.name, m.group) in wanted]
    if len(modules) < len(wanted):
        # Spectrum's own results have the names of the checkpoint.
        is_renamed = plan.names != Names.CHECKPOINT
        use_names = f"use its names with --names {Names.CHECKPOINT}, " if is_renamed else ""
        raise ResultError(
            f"{plan.outputs.results} lacks {len(wanted) - len(modules)} modules and was not written by this program",
            reason="other_result",
            hint=f"{use_names}give the scan a name with --name, or replace the file with --fresh",
        )
    return modules


def _identity(plan: Plan) -> dict[str, Any]:
    """Collect the properties of a scan that its rows depend on."""
    source, inventory = plan.source, plan.inventory
    return {
        "path": source.where,
        "commit": source.commit,
        "shards": {s.name: s.nbytes for s in source.shards},
        # Only shards on this machine have a version. The commit stands for the content of the others.
        "versions": {s.name: [s.mtime_ns, s.inode] for s in source.shards if isinstance(s, LocalShard)},
        "files": _digest(source),
        "engine": _ERROR_MODEL,
        "names": inventory.names,
        "names_sha256": inventory.names_sha256,
    }


def _digest(source: Source) -> str:
    """Return a digest of the index and the configs, which decide numbers and names.

    The order of entries and white space do not count.
    """
    content = (source.config, source.quantization_files, source.weight_map, source.adapter_config)
    text = json.dumps([part if part is None else dict(part) for part in content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _stale_rows(plan: Plan) -> Callable[[Record], bool]:
    """Return a test whether a recorded matrix must be computed again."""
    asked = {w.module for w in plan.matrices}
    stored = {w.module: _storage_of(w) for w in plan.inventory.matrices}

    def is_stale(record: Record) -> bool:
        # A record can be untrusted, and a scan copies rows between modules that share a tensor.
        facts = (record.tensor, record.n, record.m, record.dtype, record.quantized)
        if stored.get(record.module) != facts:
            return True
        if record.module not in asked:
            return False
        if plan.precision is not Precision.AUTO and record.precision is not plan.precision:
            return True
        # Nothing in the row proves that there is no score, and another precision or version of LAPACK may succeed.
        if record.no_score is not None:
            return True
        # A limit of memory kept the score inexact, and this plan has no limit.
        inexact = record.score is not None and not record.score.is_exact and record.precision is not Precision.SVD
        return inexact and plan.precision is Precision.AUTO and plan.max_nbytes is None

    return is_stale


def _storage_of(matrix: Matrix) -> tuple[str, int, int, str, str | None]:
    quantized = matrix.quantization.scheme if matrix.quantization else None
    return matrix.key, matrix.n, matrix.m, matrix.dtype, quantized


def _group_by_tensor(matrices: Sequence[Matrix]) -> dict[str, list[Matrix]]:
    """Group matrices by their stored tensor, so that a shared tensor is computed once."""
    sharing: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        sharing.setdefault(matrix.key, []).append(matrix)
    return sharing


def _copy_records(
    sharing: Mapping[str, Sequence[Matrix]], records: Iterable[Record]
) -> dict[str, list[tuple[Record, float]]]:
    """Copy the records of tensors that were already scored for another module, by tensor, each with its work."""
    recorded = {record.tensor: record for record in records if record.tensor in sharing}
    return {
        tensor: [
            (
                replace(record, module=matrix.module, parameter=matrix.parameter, group=matrix.group),
                costs.work(matrix.n, matrix.m) if matrix is sharing[tensor][0] else 0.0,
            )
            for matrix in sharing[tensor]
        ]
        for tensor, record in recorded.items()
    }


def _compute_records(
    plan: Plan, sharing: Mapping[str, Sequence[Matrix]], prefetcher: Prefetcher, device: Device
) -> Iterator[tuple[Record, float]]:
    """Compute the matrices of the prefetcher.

    Yield the record of each module that shares one, with its work.
    """
    for first, computed in compute_all(
        prefetcher,
        precision=plan.precision,
        device=device,
        workers=plan.workers,
        limit_nbytes=plan.limit_nbytes,
        together_nbytes=plan.together_nbytes,
        count=len(plan.inventory.matrices),
    ):
        prefetcher.release(first)
        for matrix in sharing[first.key]:
            yield _make_record(matrix, computed), costs.work(first.n, first.m) if matrix is first else 0.0


def _make_record(matrix: Matrix, computed: Computed) -> Record:
    spectrum, detail = computed.spectrum, computed.detail
    no_score = spectrum if isinstance(spectrum, NoScore) else None
    if no_score is NoScore.OUT_OF_RANGE and computed.not_finite:
        no_score = NoScore.NOT_FINITE
        detail = f"{computed.not_finite} of {matrix.n * matrix.m} weights are NaN or infinite"
    elif no_score is not None and not detail:
        detail = no_score.sentence
    return Record(
        module=matrix.module,
        group=matrix.group,
        tensor=matrix.key,
        parameter=matrix.parameter,
        quantized=matrix.quantization.scheme if matrix.quantization else None,
        n=matrix.n,
        m=matrix.m,
        dtype=matrix.dtype,
        no_score=no_score,
        detail=detail,
        precision=None if isinstance(spectrum, NoScore) else spectrum.precision,
        refined=0 if isinstance(spectrum, NoScore) else spectrum.refined,
        device=computed.device,
        score=computed.score,
        singular_values=_NO_VALUES
        if isinstance(spectrum, NoScore)
        else np.minimum(spectrum.values, _FLOAT32_MAX).astype(np.float32),
        compute_s=computed.compute_s,
    )


def _check_unchanged(plan: Plan) -> None:
    # The record of the old state may hold scores of the changed file. The next scan drops them when it opens it.
    for shard in plan.source.shards:
        if isinstance(shard, LocalShard) and not shard.is_unchanged():
            raise CheckpointError(
                f"{shard.where} was changed while it was scanned",
                reason="changed",
                hint="run the same command again when the file is complete; earlier results are intact",
            )
    # A commit fixes the content of all files.
    if plan.source.commit is not None:
        return
    try:
        is_same = _digest(read_again(plan.source)) == _digest(plan.source)
    except (SpectrumStreamError, OSError):
        is_same = False
    if not is_same:
        raise CheckpointError(
            f"the config or the index of {plan.source.where} was changed while it was scanned",
            reason="changed",
            hint="run the same command again when the files are complete; earlier results are intact",
        )


def _publish(
    plan: Plan, recorded: Mapping[str, Record], names: tuple[str, ...], top_percent: float | None
) -> ScanResult:
    """Write the result file, and the files that follow from it."""
    asked = {w.module for w in plan.matrices}
    records = sort_records(r for r in recorded.values() if r.module in asked)
    result = replace(Result.from_records(records), parameters=names)
    if not result.modules:
        raise ComputeError(
            f"none of the {len(records)} matrices could be scored: {records[0].module}: {records[0].detail}",
            reason="all_failed",
        )
    # A group that is recorded only in part would be ranked like a whole group.
    members = plan.inventory.members
    whole = {group for group, inside in members.items() if inside <= recorded.keys() or asked & inside}
    write_results(
        plan.outputs.results, (r for r in recorded.values() if r.group in whole and r.module in members[r.group])
    )
    return _write_selection(plan, records, result, top_percent)


def _write_selection(plan: Plan, records: Sequence[Record], result: Result, top_percent: float | None) -> ScanResult:
    """Write the sorted scores and, with a percentage, the selection.

    A foreign result gets no file of scores.
    """
    outputs = plan.outputs
    written = [outputs.results]
    if records:
        _write(outputs.sorted, spectrum.render_sorted(select(result.modules, 100)))
        written.append(outputs.sorted)
    selection = None
    if top_percent is not None:
        selection = select(result, top_percent)
        _write(outputs.unfrozen(top_percent), DEFAULT.render(selection))
        written.append(outputs.unfrozen(top_percent))
    return ScanResult(plan, tuple(records), result, selection, tuple(written))


def _write(path: Path, text: str) -> None:
    # With --out ., the sorted scores of model a have the name of the result of a model that is called a_sorted.
    check_output(path)
    write_atomically(path, text)
