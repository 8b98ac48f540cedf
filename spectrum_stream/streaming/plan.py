"""The plan: what a scan would read, score and skip, what it costs, and where it writes.

A plan is data. It is made from headers alone, in well under a second for a thousand tensors on this machine,
so it can be looked at before any weight is read; the scan then does what the plan says and nothing else.
"""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint import Source, open_source
from ..checkpoint.tensors import read_checkpoint
from ..errors import CheckpointError, UsageError
from ..model import parameters as runtime
from ..model.config import ModelConfig
from ..model.inventory import classify, pooled
from ..model.matrix import Experts, Matrix, NoScore, Skipped
from ..model.names import MAX_SLUG_LENGTH, group_order, pick_groups, slug
from ..model.parameters import Names, parse_names
from ..numerics import costs
from ..numerics.precision import Precision
from . import fetch as fetching
from .fetch import Extent, Fetch, Transfer

RESULTS_FOLDER = "model_snr_results"


@dataclass(frozen=True, slots=True)
class Group:
    name: str
    count: int
    shapes: tuple[tuple[int, int], ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a scan writes: Spectrum's names, in Spectrum's places."""

    folder: Path
    stem: str

    @property
    def results(self) -> Path:
        return self.folder / f"{self.stem}.json"

    @property
    def record(self) -> Path:
        return self.folder / f"{self.stem}.sqlite"

    @property
    def sorted(self) -> Path:
        return Path(f"{self.stem}_sorted.json")

    @property
    def shards(self) -> Path:
        """Where shards are while they are scanned that are downloaded for it."""
        return self.folder / f".{self.stem}.shards"

    def unfrozen(self, top_percent: float) -> Path:
        return Path(f"{self.stem}_unfrozenparameters_{top_percent:g}percent.yaml")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a scan of `source` will do.

    Attributes:
        matrices: what is scored, in the order in which it is read: by shard, then by offset.
        members: all modules of every group of the checkpoint, asked for or not.
        parameters: what each of them is a trainer's parameter by, or a part of one.
        names: the names that were really established: one of `Names`, or "given".
        names_sha256: a hash of a given list, or of the answer of the installed transformers; None for the others.
        weights: how many the matrices of the checkpoint have, asked for or not; what two share counts once.
        skipped: every other tensor, with the reason.
        fetch: how a repo's shards are to be read, as asked for.
        fetches: how each shard is read, by name; shards with nothing to score are left out.
        top_percent: the selection to write, None for none.
        precision: of the singular values.
        workers: how many small matrices are computed at once on a CPU.
        max_nbytes: the process's memory may not exceed this; None for no limit.
        max_disk_nbytes: shards that are downloaded to be deleted may not take more; None for no limit.
        warnings: what is odd about the checkpoint, a sentence each.
    """

    source: Source
    outputs: Outputs
    matrices: tuple[Matrix, ...]
    members: Mapping[str, frozenset[str]]
    parameters: Mapping[str, str]
    names: str
    names_sha256: str | None
    weights: int
    skipped: tuple[Skipped, ...]
    fetch: Fetch
    fetches: Mapping[str, Fetch | None]
    top_percent: float | None
    precision: Precision
    workers: int
    max_nbytes: int | None
    max_disk_nbytes: int | None
    warnings: tuple[str, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups in the order of Spectrum's files."""
        members: dict[str, list[Matrix]] = {}
        for matrix in self.matrices:
            members.setdefault(matrix.group, []).append(matrix)
        return tuple(
            Group(
                name,
                len(group := members[name]),
                tuple(sorted({(w.n, w.m) for w in group})),
                sum(w.nbytes for w in group if w.tied_to is None),
            )
            for name in sorted(members, key=group_order)
        )

    @property
    def failures(self) -> tuple[Skipped, ...]:
        """Tensors that hold weights and cannot be scored."""
        return tuple(s for s in self.skipped if s.why.is_failure)

    @property
    def read_nbytes(self) -> int:
        """Bytes to read; a tensor that two modules share counts once."""
        return sum({(w.shard, w.start): w.nbytes for w in self.matrices}.values())

    @property
    def flops(self) -> float:
        return sum({(w.shard, w.start): costs.flops(w.n, w.m) for w in self.matrices}.values())

    @property
    def peak_nbytes(self) -> int:
        """Expected limit of private memory, at the first step of the precision; mapped files do not count."""
        return _peak_nbytes(self.matrices, self.workers, self.precision, self.buffers_nbytes)

    @property
    def buffers_nbytes(self) -> int:
        """The part of the peak that is read or fetched ahead: matrices by range, and scales."""
        return _buffers_nbytes(self.matrices, self.fetches)

    @property
    def room_nbytes(self) -> int:
        """What shards that are downloaded to be deleted may take of the disk: what is free, or the limit."""
        free = _free_nbytes(self.outputs.folder)
        return free if self.max_disk_nbytes is None else min(free, self.max_disk_nbytes)

    def fetches_for(self, todo: Sequence[Matrix]) -> Mapping[str, Fetch | None]:
        """How each shard is read when only some of the matrices are left to be scored.

        Raises:
            UsageError: too_little_disk.
        """
        # Under a limit of memory the plan has promised what its fetches take.
        if self.max_nbytes is not None:
            return self.fetches
        free = _free_nbytes(self.outputs.folder)
        return fetching.choose_fetches(self.source.shards, _extents(todo), self.fetch, free, self.max_disk_nbytes)

    def fetched_nbytes(self, todo: Sequence[Matrix]) -> int:
        """What comes over the network for some of the matrices, headers left out."""
        return fetching.fetched_nbytes(self.source.shards, _extents(todo), self.fetches_for(todo))

    @property
    def transfers(self) -> Mapping[Fetch, Transfer]:
        """What each way would take to fetch what is not on this machine; empty where everything is."""
        return fetching.transfers(self.source.shards, _extents(self.matrices), self.max_disk_nbytes)

    @property
    def worst_nbytes(self) -> int:
        """The bound should the largest matrices need the most exact precision, which few ever do; under a limit
        they then keep a less exact score, and the record says so."""
        worst = (
            costs.runtime_nbytes(self.workers)
            + self.buffers_nbytes
            + max(
                costs.compute_nbytes(w.n, w.m, self.precision.steps[-1], w.scales)
                * (self.workers if costs.is_small(w.n, w.m) else 1)
                for w in self.matrices
            )
        )
        return worst if self.max_nbytes is None else min(worst, self.max_nbytes)

    @property
    def limit_nbytes(self) -> int | None:
        """What all the matrices that are computed at once may take together, under the limit."""
        if self.max_nbytes is None:
            return None
        return self.max_nbytes - costs.runtime_nbytes(self.workers) - self.buffers_nbytes

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data."""
        return {
            "schema_version": 1,
            "model": self.source.model,
            "path": self.source.where,
            "commit": self.source.commit,
            "names": self.names,
            "shards": len(self.source.shards),
            "fetches": {way: list(self.fetches.values()).count(way) for way in Fetch if way in self.fetches.values()},
            "fetch_nbytes": self.fetched_nbytes(self.matrices),
            "transfers": {way: asdict(transfer) for way, transfer in self.transfers.items()},
            "matrices": len(self.matrices),
            "groups": [
                {"name": g.name, "count": g.count, "shapes": [list(s) for s in g.shapes], "nbytes": g.nbytes}
                for g in self.groups
            ],
            "tied": {w.module: w.tied_to for w in self.matrices if w.tied_to},
            "skipped": [
                {
                    "tensor": s.tensor,
                    "dtype": s.dtype,
                    "shape": list(s.shape),
                    "reason": str(s.why),
                    "detail": s.detail,
                }
                for s in self.skipped
            ],
            "read_nbytes": self.read_nbytes,
            "flops": self.flops,
            "peak_nbytes": self.peak_nbytes,
            "worst_nbytes": self.worst_nbytes,
            "precision": str(self.precision),
            "workers": self.workers,
            "outputs": {
                "results": str(self.outputs.results),
                "record": str(self.outputs.record),
                "sorted": str(self.outputs.sorted),
                "unfrozen": str(self.outputs.unfrozen(self.top_percent)) if self.top_percent else None,
            },
            "warnings": list(self.warnings),
        }


def plan(
    model: str,
    *,
    top_percent: float | None = None,
    groups: Sequence[str] | None = None,
    name: str | None = None,
    out: str | Path = RESULTS_FOLDER,
    max_nbytes: int | None = None,
    precision: Precision | str = Precision.AUTO,
    fetch: Fetch | str = Fetch.AUTO,
    max_disk_nbytes: int | None = None,
    names: Names | str | Sequence[str] = Names.V5,
    experts: Experts | str = Experts.SEPARATE,
) -> Plan:
    """Plan the scan of MODEL from its headers.

    Args:
        model: a folder of safetensors shards, one safetensors file, or a repo of the Hugging Face Hub: `org/name`,
            with `@revision` or without, `hf://…`, or the address of its page. A path that exists wins.
        top_percent: the share of each group to select, in (0, 100].
        groups: to score, by exact name or glob (`mlp.*`); None for all.
        name: what to call the model in file names instead of `model` as typed.
        out: the results folder.
        max_nbytes: a limit on the process's own memory on a CPU, mapped files not counted; fewer matrices are
            computed at once to keep it.
        precision: "fp32", "fp64" or "svd" for every matrix; "auto" for the first that is exact enough for each.
        fetch: how a repo's shards are read: "range", "download", "cache", or "auto" for what suits each.
        max_disk_nbytes: a limit on what shards that are downloaded to be deleted may take at once.
        names: the names that results use: "transformers-v5", "transformers-v4" or "checkpoint"; "transformers" to
            ask the installed one; or the names of all parameters in the trainer.
        experts: "separate" to rank an expert among those of its number, "pooled" to rank those of a layer as one.

    Raises:
        UsageError: bad_percent, no_such_group, bad_name, bad_address, no_such_fetch, no_such_names; missing_extra,
            unknown_architecture, no_such_name, no_such_experts; too_little_memory, too_little_disk.
        SourceError, CheckpointError: MODEL cannot be read; nothing_to_score.
    """
    if top_percent is not None:
        check_percent(top_percent)
    if fetch not in list(Fetch):
        raise UsageError(f"there is no way to fetch called {fetch!r}", reason="no_such_fetch")
    names = parse_names(names)
    if experts not in list(Experts):
        raise UsageError(f"experts cannot be {experts!r}", reason="no_such_experts")
    if precision not in list(Precision):
        raise UsageError(f"unknown precision {precision!r}", reason="no_such_precision")
    precision = Precision(precision)
    if name is not None:
        _checked_slug(name)
    source = open_source(model)
    outputs = Outputs(Path(out), f"snr_results_{_checked_slug(name or source.name)}")
    checkpoint, config = read_checkpoint(source), ModelConfig(source.config)
    matrices, skipped = classify(checkpoint, config)
    warnings = list(checkpoint.warnings)
    named = runtime.named(matrices, skipped, config, names)
    matrices = list(named.matrices)
    skipped += [Skipped(w.key, w.dtype, (w.n, w.m), NoScore.NOT_LOADED) for w in named.not_loaded]
    warnings += named.warnings
    if experts == Experts.POOLED:
        matrices = pooled(matrices, skipped)
    parameters = {w.module: w.parameter for w in matrices}
    weights = sum({w.key: w.n * w.m for w in matrices}.values())
    members: dict[str, set[str]] = {}
    for matrix in matrices:
        members.setdefault(matrix.group, set()).add(matrix.module)
    if groups is not None:
        chosen = pick_groups((w.group for w in matrices), groups)
        skipped += [
            Skipped(w.key, w.dtype, (w.n, w.m), NoScore.NOT_CHOSEN)
            for w in matrices
            if w.group not in chosen and w.tied_to is None
        ]
        matrices = [w for w in matrices if w.group in chosen]
        skipped = [
            replace(s, why=NoScore.NOT_CHOSEN)
            # One that nobody knows the name of may have been asked for.
            if s.why.is_failure and (name := named.name_of(s)) and not s.is_among(chosen, groups, name)
            else s
            for s in skipped
        ]
    if not matrices:
        counts = Counter(s.why for s in skipped)
        raise CheckpointError(
            f"{model} has nothing to score: "
            + (", ".join(f"{n} tensors {why}" for why, n in counts.items()) or "it holds no tensors"),
            reason="nothing_to_score",
        )
    fetches = fetching.choose_fetches(
        checkpoint.source.shards, _extents(matrices), Fetch(fetch), _free_nbytes(outputs.folder), max_disk_nbytes
    )
    if fetch == Fetch.RANGE and Fetch.DOWNLOAD in fetches.values():
        warnings.append("the server sends whole files only, so shards are downloaded one after another")
    return Plan(
        checkpoint.source,
        outputs,
        tuple(matrices),
        {group: frozenset(modules) for group, modules in members.items()},
        parameters,
        named.names,
        named.names_sha256,
        weights,
        tuple(skipped),
        Fetch(fetch),
        fetches,
        top_percent,
        precision,
        _workers(matrices, max_nbytes, precision, _buffers_nbytes(matrices, fetches)),
        max_nbytes,
        max_disk_nbytes,
        tuple(warnings),
    )


def _extents(matrices: Sequence[Matrix]) -> Mapping[str, list[Extent]]:
    extents: dict[str, list[Extent]] = {}
    for w in matrices:
        # Two modules that share a tensor give the same extent twice, which counts once wherever extents are counted.
        extents.setdefault(w.shard, []).append((w.start, w.start + w.nbytes))
    return extents


def _buffers_nbytes(matrices: Sequence[Matrix], fetches: Mapping[str, Fetch | None]) -> int:
    parts = costs.PARTS_AHEAD_NBYTES if any(w.quantization for w in matrices) else 0
    return parts + fetching.ahead_nbytes(
        [e for shard, extents in _extents(matrices).items() if fetches[shard] is Fetch.RANGE for e in extents]
    )


def _free_nbytes(folder: Path) -> int:
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _peak_nbytes(matrices: Sequence[Matrix], workers: int, precision: Precision, buffers_nbytes: int) -> int:
    def one(w: Matrix) -> int:
        return costs.compute_nbytes(w.n, w.m, precision, w.scales)

    return (
        costs.runtime_nbytes(workers)
        + buffers_nbytes
        + max(one(w) * (workers if costs.is_small(w.n, w.m) else 1) for w in matrices)
    )


def _workers(matrices: Sequence[Matrix], max_nbytes: int | None, precision: Precision, buffers_nbytes: int) -> int:
    """As many as there are cores, or as fit into the limit."""
    for workers in range(costs.count_cores(), 0, -1):
        if max_nbytes is None or _peak_nbytes(matrices, workers, precision, buffers_nbytes) <= max_nbytes:
            return workers
    enough = _peak_nbytes(matrices, 1, precision, buffers_nbytes)
    raise UsageError(
        f"the scan does not fit into {max_nbytes} bytes; {enough} would do",
        reason="too_little_memory",
        hint=f"--max-memory {-(-enough // 1_000_000)}MB" + (", or --fetch download" if buffers_nbytes else ""),
    )


def check_percent(top_percent: float) -> None:
    """Raises UsageError(bad_percent) unless 0 < top_percent <= 100."""
    if not 0 < top_percent <= 100:
        raise UsageError(f"the percentage {top_percent:g} is not above 0 and at most 100", reason="bad_percent")


def _checked_slug(name: str) -> str:
    result = slug(name)
    if not name.strip() or len(result) > MAX_SLUG_LENGTH:
        raise UsageError(
            f"a name of {len(result)} characters cannot be made into a file name",
            reason="bad_name",
            hint="give a short one with --name",
        )
    return result
