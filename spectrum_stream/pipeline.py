"""The scan: a plan in, events out. Reads ahead, scores, and records each matrix as it is done.

Nothing is printed. `run` is the pipeline as a generator of events; `scan` runs it to its end.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import LocalShard
from .errors import CheckpointError, ComputeError, ResultError
from .model.config import ModelConfig
from .model.matrix import Experts, Matrix, NoScore
from .model.names import is_head, module_of
from .model.parameters import Names
from .model.quantization import is_companion
from .model.quantization import parameter_of as stored_parameter
from .numerics import costs
from .numerics.device import CPU, Device, open_device
from .numerics.precision import Precision
from .numerics.schedule import Computed, compute_all
from .results.atomic import write_atomically
from .results.journal import Journal
from .results.record import Record
from .results.result import Module, Result, modules_of, sort_records, write_results
from .selection.select import Selection, select
from .streaming import plan as planning
from .streaming.bounded import Budget, Budgets, Traffic
from .streaming.fetch import Fetch
from .streaming.plan import RESULTS_FOLDER, Plan
from .streaming.prefetch import Prefetcher
from .trainers import DEFAULT, spectrum

# Part of a record's identity: raise it with any change that can change a number.
_ENGINE = 3
_FLOAT32_MAX = np.finfo(np.float32).max
_NO_VALUES = np.empty(0, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class ScanStarted:
    """The plan is made and the record is open.

    Attributes:
        done: matrices that the record holds already.
        dropped: rows of the record that were of an earlier state of the checkpoint.
        foreign: a result that another program left, and that is taken as it is.
        fetch_nbytes: what will come over the network, headers left out; 0 for a local checkpoint.
        traffic: what has come so far, counted up while the scan runs.
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
        done, total: matrices, those of earlier runs included.
        work_done, work_total: in units of `costs.work`, those of this run only.
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
        modules: those of the result file for the groups that were asked for.
        selection: None without a percentage.
        written: the files written or kept, the result file first.
    """

    plan: Plan
    records: tuple[Record, ...]
    modules: tuple[Module, ...]
    selection: Selection | None
    written: tuple[Path, ...]

    @property
    def failed(self) -> tuple[Record, ...]:
        """Records without a score."""
        return tuple(r for r in self.records if r.no_score is not None)

    @property
    def inexact(self) -> tuple[Record, ...]:
        """Records whose score may be wrong by more than the tolerance."""
        return tuple(r for r in self.records if r.score is not None and not r.score.is_exact)

    @property
    def result(self) -> Result:
        """The modules with their diagnostics, as `diagnose` takes them."""
        return Result.from_records(self.records) if self.records else Result(self.modules)

    @property
    def complete(self) -> bool:
        """Whether everything that holds weights has a score."""
        return not self.failed and not self.plan.failures


def scan(
    model: str,
    *,
    top_percent: float | None = None,
    groups: Sequence[str] | None = None,
    name: str | None = None,
    out: str | Path = RESULTS_FOLDER,
    fresh: bool = False,
    precision: Precision | str = Precision.AUTO,
    device: str = "auto",
    wait: bool = False,
    max_nbytes: int | None = None,
    fetch: Fetch | str = Fetch.AUTO,
    max_disk_nbytes: int | None = None,
    names: Names | str | Sequence[str] = Names.V5,
    experts: Experts | str = Experts.SEPARATE,
    on_event: Callable[[Event], None] | None = None,
) -> ScanResult:
    """Score the weight matrices of MODEL and write Spectrum's files.

    Args:
        model, top_percent, groups, name, out, max_nbytes, fetch, max_disk_nbytes, names, experts, precision: as for
            `plan`.
        fresh: compute everything again, whatever is recorded.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        wait: for another scan that holds the record, instead of raising.
        on_event: called with each `Event` as it happens.

    Raises:
        what `plan` raises; UsageError: no_such_device; ResultError: the record or a file cannot be written;
        ComputeError: all_failed.
    """
    plan = planning.plan(
        model,
        top_percent=top_percent,
        groups=groups,
        name=name,
        out=out,
        max_nbytes=max_nbytes,
        precision=precision,
        fetch=fetch,
        max_disk_nbytes=max_disk_nbytes,
        names=names,
        experts=experts,
    )
    for event in run(plan, fresh=fresh, device=open_device(device), wait=wait):
        if on_event is not None:
            on_event(event)
        if isinstance(event, ScanFinished):
            return event.result
    raise AssertionError("a scan ends with ScanFinished")


def run(plan: Plan, *, fresh: bool = False, device: Device = CPU, wait: bool = False) -> Iterator[Event]:
    """Carry out a plan. The last event is `ScanFinished`; dropping the generator leaves a valid record.

    With `wait`, another scan that holds the record is waited for.
    """
    foreign = None if fresh or plan.precision is not Precision.AUTO else _foreign_result(plan)
    if foreign is not None:
        yield ScanStarted(plan, len(plan.matrices), 0, plan.outputs.results, 0, Traffic())
        yield ScanFinished(_finish(plan, (), foreign))
        return
    with Journal(
        plan.outputs.record, _identity(plan), names=_all_names(plan), weights=plan.weights, fresh=fresh, wait=wait
    ) as store:
        # With the groups of this plan: how experts are grouped changes no number.
        groups = {name: group for group, names in plan.members.items() for name in names}
        stored = store.records()
        known = {
            module: replace(
                record,
                group=groups.get(module, record.group),
                parameter=plan.parameters.get(module, record.parameter),
            )
            for module, record in stored.items()
        }
        # Read with its result, it has to have the names that the result has.
        if moved := [r for r in known.values() if _called(r) != _called(stored[r.module])]:
            store.rename(moved)
        again = [w.module for w in plan.matrices if w.module in known and _is_stale(known[w.module], plan, fresh)]
        store.drop(again)
        known = {module: record for module, record in known.items() if module not in again}
        todo = [w for w in plan.matrices if w.module not in known]
        traffic = Traffic()
        fetches = plan.fetches_for(todo)
        yield ScanStarted(
            plan, len(plan.matrices) - len(todo), store.dropped, None, plan.fetched_nbytes(todo), traffic
        )
        done, work_done, work_total = len(plan.matrices) - len(todo), 0.0, _work(todo)
        for record, work in _records(plan, fetches, todo, list(known.values()), device, traffic):
            store.add(record)
            known[record.module] = record
            done, work_done = done + 1, work_done + work
            yield MatrixScored(record, done, len(plan.matrices), work_done, work_total)
        _check_unchanged(plan)
        asked = {w.module for w in plan.matrices}
        records = sort_records(r for r in known.values() if r.module in asked)
        if not modules_of(records):
            raise ComputeError(
                f"none of the {len(records)} matrices could be scored: {records[0].module}: {records[0].detail}",
                reason="all_failed",
            )
        # Part of a group would be ranked as if it were the whole.
        whole = {g for g, names in plan.members.items() if names <= known.keys() or asked & names}
        published = (r for r in known.values() if r.group in whole and r.module in plan.members[r.group])
        write_results(plan.outputs.results, published)
        yield ScanFinished(_finish(plan, records, modules_of(records)))


def _all_names(plan: Plan) -> list[str]:
    """The parameters that the headers tell, asked for or not; a tied head is its embedding's, and no other."""
    tied = {w.parameter for w in plan.matrices if w.tied_to}
    skipped = {stored_parameter(s.tensor): s.why for s in plan.skipped if not is_companion(s.tensor)}
    asked = {w.module for w in plan.matrices}
    if not any(is_head(module_of(name)) for name in skipped):
        # A head that is stored and was not asked for is among what is skipped.
        tied |= {name for module, name in plan.parameters.items() if is_head(module) and module not in asked}
    absent = (NoScore.NOT_CHOSEN, NoScore.NOT_LOADED, NoScore.MISSING_EXPERTS)
    found = {*plan.parameters.values(), *(name for name, why in skipped.items() if why not in absent)}
    return sorted(found - tied)


def _called(record: Record) -> tuple[str, str]:
    """What a plan decides of a record, and no number depends on."""
    return record.group, record.parameter


def _check_unchanged(plan: Plan) -> None:
    # What was scored after a change is in the record of the state before; it is dropped when that is opened next.
    for shard in plan.source.shards:
        if isinstance(shard, LocalShard) and not shard.is_unchanged():
            raise CheckpointError(
                f"{shard.where} was changed while it was scanned",
                reason="changed",
                hint="the same command starts over when the file is complete; earlier results are as they were",
            )


def _records(
    plan: Plan,
    fetches: Mapping[str, Fetch | None],
    todo: Sequence[Matrix],
    known: Sequence[Record],
    device: Device,
    traffic: Traffic,
) -> Iterator[tuple[Record, float]]:
    """A record for every matrix of `todo`, with the work that it took; two that share a tensor take it once."""
    sharing: dict[str, list[Matrix]] = {}
    for matrix in todo:
        sharing.setdefault(matrix.key, []).append(matrix)
    recorded = {record.tensor: record for record in known if record.tensor in sharing}
    feed = Prefetcher(
        {shard.name: shard for shard in plan.source.shards},
        [group[0] for tensor, group in sharing.items() if tensor not in recorded],
        fetches,
        plan.outputs.shards,
        traffic,
        Budgets(disk=Budget(plan.room_nbytes)),
    )
    for tensor, record in recorded.items():
        for matrix in sharing[tensor]:
            yield (
                replace(record, module=matrix.module, parameter=matrix.parameter, group=matrix.group),
                costs.work(matrix.n, matrix.m),
            )
    with feed:
        for first, measured in compute_all(
            feed, precision=plan.precision, device=device, workers=plan.workers, limit_nbytes=plan.limit_nbytes
        ):
            feed.release(first)
            for matrix in sharing[first.key]:
                yield _record(matrix, measured), costs.work(first.n, first.m) if matrix is first else 0.0


def _record(matrix: Matrix, measured: Computed) -> Record:
    spectrum = measured.spectrum
    no_score = spectrum if isinstance(spectrum, NoScore) else None
    detail = measured.detail
    if no_score is NoScore.OUT_OF_RANGE and measured.not_finite:
        no_score = NoScore.NOT_FINITE
        detail = f"{measured.not_finite} of {matrix.n * matrix.m} weights are NaN or infinite"
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
        device=measured.device,
        score=measured.score,
        singular_values=_NO_VALUES
        if isinstance(spectrum, NoScore)
        else np.minimum(spectrum.values, _FLOAT32_MAX).astype(np.float32),
        compute_s=measured.compute_s,
    )


def _is_stale(record: Record, plan: Plan, fresh: bool) -> bool:
    """Whether a recorded matrix is to be computed again, for this plan and these options."""
    if fresh or (plan.precision is not Precision.AUTO and record.precision is not plan.precision):
        return True
    # Another precision, or another version of LAPACK, may have an answer.
    if record.no_score in (NoScore.OUT_OF_RANGE, NoScore.NOT_CONVERGED):
        return True
    # Kept inexact under a memory limit that is gone.
    inexact = record.score is not None and not record.score.is_exact and record.precision != Precision.SVD
    return inexact and plan.precision is Precision.AUTO and plan.max_nbytes is None


def _identity(plan: Plan) -> dict[str, Any]:
    source = plan.source
    return {
        "path": source.where,
        "commit": source.commit,
        "shards": {s.name: s.nbytes for s in source.shards},
        # Of those that are on this machine; one that is not yet has no version, but that of its commit.
        "versions": {s.name: [s.mtime_ns, s.inode] for s in source.shards if isinstance(s, LocalShard)},
        "quantization": ModelConfig(source.config).quantization.settings,
        "engine": _ENGINE,
        "names": plan.names,
        "names_sha256": plan.names_sha256,
    }


def _foreign_result(plan: Plan) -> list[Module] | None:
    """A result with no record beside it, as Spectrum leaves one, if it holds all that the plan would score."""
    if plan.outputs.record.exists() or not plan.outputs.results.exists():
        return None
    wanted = {(w.result_name, w.group) for w in plan.matrices}
    lines = [line for line in Result.open(plan.outputs.results).modules if (line.name, line.group) in wanted]
    if len(lines) < len(wanted):
        raise ResultError(
            f"{plan.outputs.results} lacks {len(wanted) - len(lines)} modules and is not this program's own",
            reason="other_result",
            hint="give the scan a name with --name, or replace the file with --fresh",
        )
    return lines


def _work(matrices: Sequence[Matrix]) -> float:
    return sum({w.key: costs.work(w.n, w.m) for w in matrices}.values())


def _finish(plan: Plan, records: Sequence[Record], scored: Sequence[Module]) -> ScanResult:
    outputs = plan.outputs
    written = [outputs.results]
    if records:
        write_atomically(outputs.sorted, spectrum.render_sorted(select(scored, 100)))
        written.append(outputs.sorted)
    selection = None
    if plan.top_percent is not None:
        selection = select(Result(tuple(scored), parameters=tuple(_all_names(plan))), plan.top_percent)
        write_atomically(outputs.unfrozen(plan.top_percent), DEFAULT.render(selection))
        written.append(outputs.unfrozen(plan.top_percent))
    return ScanResult(plan, tuple(records), tuple(scored), selection, tuple(written))
