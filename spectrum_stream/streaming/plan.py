"""The plan of a scan: the tensors to read, score and skip, the cost, and the files to write.

A plan is data. It is made from headers, in well under a second for a thousand tensors on this machine, so you can
look at it before any weight is read. The scan then follows the plan. Everything that depends on the state of the disk
is computed when the plan is made, so a plan does not change.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

from ..checkpoint import Source, open_source
from ..checkpoint.tensors import read_checkpoint
from ..errors import CheckpointError, UsageError
from ..model.config import ModelConfig
from ..model.inventory import Inventory, take_inventory
from ..model.matrix import Experts, GroupIndex, Matrix, Skipped
from ..model.names import MAX_SLUG_LENGTH, group_order, pick_groups, slug
from ..model.no_score import NoScore
from ..model.parameters import Names, parse_names
from ..numerics import costs
from ..numerics.precision import Precision
from ..text import listed, printable, si_bytes
from .fetch import (
    Fetch,
    Transfer,
    choose_fetches,
    count_fetched_nbytes,
    estimate_transfers,
    find_extents,
    limit_ahead_nbytes,
)

RESULTS_FOLDER = "model_snr_results"


class PlanOptions(TypedDict, total=False):
    """The options of `plan` and `scan`.

    Attributes:
        groups: the groups to score, by exact name or glob (`mlp.*`); default: None, all groups.
        name: the name of the model in file names; default: MODEL as typed.
        out: the results folder; default: `model_snr_results`.
        precision: "fp32", "mixed", "fp64" or "svd" for every matrix; default: "auto", for each matrix the fastest
            that is exact enough.
        max_nbytes: the limit of private memory on a CPU, in bytes; mapped files do not count. Fewer matrices are
            computed at once to keep it. Default: no limit.
        fetch: the way to read the shards of a repo: "range", "download" or "cache"; default: "auto", the best for
            each.
        max_disk_nbytes: the limit of disk for temporary shard downloads, in bytes; default: no limit.
        names: the names in results: "transformers-v5" (default), "transformers-v4" or "checkpoint"; "transformers"
            for those of the installed transformers; or the names of all parameters in the trainer.
        experts: "separate" (default) ranks an expert among those with the same number, as Spectrum does; "pooled"
            ranks the experts of a layer as one.
    """

    groups: Sequence[str] | None
    name: str | None
    out: str | Path
    precision: Precision | str
    max_nbytes: int | None
    fetch: Fetch | str
    max_disk_nbytes: int | None
    names: Names | str | Sequence[str]
    experts: Experts | str


@dataclass(frozen=True, slots=True)
class Outputs:
    """The paths that a scan writes, with the names and places that Spectrum uses."""

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
        """The folder for temporary shard downloads."""
        return self.folder / f".{self.stem}.shards"

    def unfrozen(self, top_percent: float) -> Path:
        return Path(f"{self.stem}_unfrozenparameters_{top_percent:g}percent.yaml")


@dataclass(frozen=True, slots=True)
class Group:
    """The matrices of a plan that are ranked together.

    Attributes:
        shapes: the distinct (n, m), ascending.
        nbytes: bytes to read; 0 if the group only shares tensors of others.
    """

    name: str
    count: int
    shapes: tuple[tuple[int, int], ...]
    nbytes: int


class Rest(NamedTuple):
    """The way to fetch each shard with matrices left to score, and the bytes."""

    fetches: Mapping[str, Fetch | None]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plan of a scan of `source`.

    Attributes:
        outputs: the files to write.
        inventory: all matrices of the checkpoint.
        matrices: the matrices to score, in the order of reading: by shard, then by offset.
        skipped: every other tensor, with the reason.
        fetch: the requested way to fetch the shards of a repo.
        fetches: the way to fetch each shard, by name; shards without a matrix to score are left out.
        fetched_nbytes: bytes that come over the network if nothing is scored yet, without headers.
        transfers: the cost of each way to fetch the shards that are not on this machine; {} if all are here.
        free_nbytes: free bytes of the disk of the results folder.
        precision: the precision of the singular values.
        workers: the number of cores that compute matrices.
        together_nbytes: the limit of memory for the matrices that are computed at once on a CPU, at the first step of
            the precision.
        max_nbytes: the limit of private memory; None for no limit.
        max_disk_nbytes: the limit of disk for temporary shard downloads; None for no limit.
        warnings: one sentence for each oddity of the checkpoint.
    """

    source: Source
    outputs: Outputs
    inventory: Inventory
    matrices: tuple[Matrix, ...]
    skipped: tuple[Skipped, ...]
    fetch: Fetch
    fetches: Mapping[str, Fetch | None]
    fetched_nbytes: int
    transfers: Mapping[Fetch, Transfer]
    free_nbytes: int
    precision: Precision
    workers: int
    together_nbytes: int
    max_nbytes: int | None
    max_disk_nbytes: int | None
    warnings: tuple[str, ...]

    @property
    def names(self) -> str:
        """The names that results use: one of `Names`, or "given"."""
        return self.inventory.names

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
        return tuple(s for s in self.skipped if s.no_score.is_failure)

    @property
    def read_nbytes(self) -> int:
        """Bytes to read; a tensor that two modules share counts once."""
        return sum({(w.shard, w.start): w.nbytes for w in self.matrices}.values())

    @property
    def flops(self) -> float:
        """Floating-point operations; a tensor that two modules share counts once."""
        return sum({(w.shard, w.start): costs.flops(w.n, w.m) for w in self.matrices}.values())

    @property
    def peak_nbytes(self) -> int:
        """The limit of private memory at the first step of the precision.

        Mapped files do not count.
        """
        return self._peak_nbytes(self.precision.steps[0])

    @property
    def worst_nbytes(self) -> int:
        """The limit if the largest matrices need the most exact precision, which few do.

        Under `max_nbytes` such a matrix keeps a less exact score instead, and the record marks it.
        """
        worst = self._peak_nbytes(self.precision.steps[-1])
        return worst if self.max_nbytes is None else min(worst, self.max_nbytes)

    def _peak_nbytes(self, precision: Precision) -> int:
        def compute_nbytes(w: Matrix) -> int:
            first = costs.compute_nbytes(w.n, w.m, self.precision.steps[0], w.scales)
            at_once = costs.count_together(first, self.workers, self.together_nbytes)
            return at_once * costs.compute_nbytes(w.n, w.m, precision, w.scales)

        return costs.runtime_nbytes(self.workers) + self.buffers_nbytes + max(map(compute_nbytes, self.matrices))

    @property
    def device_nbytes(self) -> int:
        """The GPU memory for the largest matrix, at the most exact precision of a GPU.

        The workspace of the eigenvalue routine is assumed and not measured, because a plan needs no GPU. CUDA itself
        needs a few hundred megabytes more. With more memory, more matrices are computed at once. 0 if nothing is
        computed on the GPU.
        """
        steps = [step for step in self.precision.steps if step is not Precision.SVD]
        if not steps:
            return 0
        return max(costs.device_nbytes(w.n, w.m, costs.itemsize_of(steps[-1])) for w in self.matrices)

    @property
    def buffers_nbytes(self) -> int:
        """The part of the peak for prefetched bytes: matrices by range, and scales."""
        return _buffers_nbytes(self.matrices, self.fetches)

    @property
    def limit_nbytes(self) -> int | None:
        """The limit of memory for all matrices that are computed at once.

        It is None for no limit.
        """
        if self.max_nbytes is None:
            return None
        return self.max_nbytes - costs.runtime_nbytes(self.workers) - self.buffers_nbytes

    @property
    def room_nbytes(self) -> int:
        """The disk for shard downloads: the smaller of free space and `max_disk_nbytes`."""
        return self.free_nbytes if self.max_disk_nbytes is None else min(self.free_nbytes, self.max_disk_nbytes)

    def only(self, groups: Sequence[str]) -> "Plan":
        """Return the plan for some groups, without reading the checkpoint again.

        Groups are exact names or globs.

        Raises:
            UsageError: no_such_group, too_little_memory, too_little_disk.
        """
        return _make_plan(
            source=self.source,
            outputs=self.outputs,
            inventory=self.inventory,
            groups=groups,
            fetch=self.fetch,
            precision=self.precision,
            max_nbytes=self.max_nbytes,
            max_disk_nbytes=self.max_disk_nbytes,
        )

    def fetch_rest(self, todo: Sequence[Matrix]) -> Rest:
        """Choose the way to fetch each shard for the matrices left to score.

        Raises:
            UsageError: too_little_disk.
        """
        shards, extents, fetches = self.source.shards, find_extents(todo), self.fetches
        # Under a limit of memory, the plan has promised the memory of its own fetches.
        if self.max_nbytes is None:
            fetches = choose_fetches(shards, extents, self.fetch, self.free_nbytes, self.max_disk_nbytes)
        return Rest(fetches, count_fetched_nbytes(shards, extents, fetches))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON data."""
        fetches = list(self.fetches.values())
        return {
            "schema_version": 1,
            "model": self.source.model,
            "path": self.source.where,
            "commit": self.source.commit,
            "names": self.names,
            "names_are_established": self.inventory.is_established,
            "shards": len(self.source.shards),
            "fetches": {fetch: fetches.count(fetch) for fetch in Fetch if fetch in fetches},
            "fetch_nbytes": self.fetched_nbytes,
            "transfers": {fetch: asdict(transfer) for fetch, transfer in self.transfers.items()},
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
                    "nbytes": s.nbytes,
                    "reason": str(s.no_score),
                    "detail": s.detail,
                }
                for s in self.skipped
            ],
            "unscored": self.inventory.unscored.to_dict(),
            "read_nbytes": self.read_nbytes,
            "flops": self.flops,
            "peak_nbytes": self.peak_nbytes,
            "worst_nbytes": self.worst_nbytes,
            "device_nbytes": self.device_nbytes,
            "precision": str(self.precision),
            "workers": self.workers,
            "outputs": {
                "results": str(self.outputs.results),
                "record": str(self.outputs.record),
                "sorted": str(self.outputs.sorted),
            },
            "warnings": list(self.warnings),
        }


def plan(model: str, **options: Unpack[PlanOptions]) -> Plan:
    """Plan the scan of MODEL from its headers.

    Args:
        model: a folder of safetensors shards, a safetensors file or index, or a repo of the Hugging Face Hub:
            `org/name` with or without `@revision`, `hf://…` with or without a folder, or the address of its page. A
            path that exists wins.
        options: see `PlanOptions`.

    Raises:
        TypeError: an option is not in `PlanOptions`.
        UsageError: no_such_group, bad_name, bad_address, no_such_fetch, no_such_names, no_such_experts,
            no_such_precision; missing_extra, unknown_architecture, no_such_name; too_little_memory, too_little_disk.
        SourceError, CheckpointError: MODEL cannot be read; nothing_to_score.
    """
    if unknown := options.keys() - PlanOptions.__annotations__.keys():
        raise TypeError(f"there is no option {sorted(unknown)[0]!r}; PlanOptions has them all")
    fetch = Fetch(_check_choice(options.get("fetch", Fetch.AUTO), Fetch, "fetch"))
    experts = Experts(_check_choice(options.get("experts", Experts.SEPARATE), Experts, "experts"))
    precision = Precision(_check_choice(options.get("precision", Precision.AUTO), Precision, "precision"))
    names = parse_names(options.get("names", Names.V5))
    stem = None if (name := options.get("name")) is None else _make_stem(name)
    source = open_source(model)
    return _make_plan(
        source=source,
        outputs=Outputs(Path(options.get("out", RESULTS_FOLDER)), stem or _make_stem(source.name)),
        inventory=take_inventory(
            read_checkpoint(source), ModelConfig(source.config, source.quantization_files), names, experts
        ),
        groups=options.get("groups"),
        fetch=fetch,
        precision=precision,
        max_nbytes=options.get("max_nbytes"),
        max_disk_nbytes=options.get("max_disk_nbytes"),
    )


def _make_plan(
    *,
    source: Source,
    outputs: Outputs,
    inventory: Inventory,
    groups: Sequence[str] | None,
    fetch: Fetch,
    precision: Precision,
    max_nbytes: int | None,
    max_disk_nbytes: int | None,
) -> Plan:
    matrices, skipped = _choose_groups(inventory, groups)
    if not matrices:
        error = _nothing_to_score(source.model, skipped)
        error.hint = source.other_copy or error.hint
        raise error
    extents, free_nbytes = find_extents(matrices), _free_nbytes(outputs.folder)
    fetches = choose_fetches(source.shards, extents, fetch, free_nbytes, max_disk_nbytes)
    buffers_nbytes = _buffers_nbytes(matrices, fetches)
    workers, together_nbytes = _share_memory(matrices, max_nbytes, precision, buffers_nbytes)
    warnings = list(inventory.warnings)
    if fetch is Fetch.RANGE and Fetch.DOWNLOAD in fetches.values():
        warnings.append("the server does not support byte ranges, so whole shards are downloaded one after another")
    return Plan(
        source=source,
        outputs=outputs,
        inventory=inventory,
        matrices=tuple(matrices),
        skipped=tuple(skipped),
        fetch=fetch,
        fetches=fetches,
        fetched_nbytes=count_fetched_nbytes(source.shards, extents, fetches),
        transfers=estimate_transfers(source.shards, extents, max_disk_nbytes),
        free_nbytes=free_nbytes,
        precision=precision,
        workers=workers,
        together_nbytes=together_nbytes,
        max_nbytes=max_nbytes,
        max_disk_nbytes=max_disk_nbytes,
        warnings=tuple(warnings),
    )


def _check_choice(value: str, choices: type[Fetch] | type[Experts] | type[Precision], option: str) -> str:
    if value not in list(choices):
        raise UsageError(
            f"unknown {option} {value!r}", reason=f"no_such_{option}", hint=f"use one of {', '.join(choices)}"
        )
    return value


def _make_stem(name: str) -> str:
    result = slug(name)
    if not name.strip() or len(result) > MAX_SLUG_LENGTH:
        raise UsageError(
            f"a name of {len(result)} characters cannot be made into a file name",
            reason="bad_name",
            hint="give a shorter one with --name",
        )
    return f"snr_results_{result}"


def _choose_groups(inventory: Inventory, groups: Sequence[str] | None) -> tuple[list[Matrix], list[Skipped]]:
    """Split an inventory into the matrices of some groups, and all other tensors."""
    if groups is None:
        return list(inventory.matrices), list(inventory.skipped)
    chosen = pick_groups((w.group for w in inventory.matrices), groups)
    index = GroupIndex(chosen, groups)

    def is_asked_for(s: Skipped) -> bool:
        # If its name is not known, it may have been asked for.
        return not s.parameter or index.has(s)

    skipped = [
        replace(s, no_score=NoScore.NOT_CHOSEN) if s.no_score.is_failure and not is_asked_for(s) else s
        for s in inventory.skipped
    ]
    skipped += [w.skip(NoScore.NOT_CHOSEN) for w in inventory.matrices if w.group not in chosen and w.tied_to is None]
    return [w for w in inventory.matrices if w.group in chosen], skipped


def _nothing_to_score(model: str, skipped: Sequence[Skipped]) -> CheckpointError:
    tensors: dict[NoScore, list[Skipped]] = {}
    for s in sorted(skipped, key=lambda s: (not s.no_score.is_failure, -s.nbytes)):
        tensors.setdefault(s.no_score, []).append(s)
    found = []
    for why, alike in tensors.items():
        # The details name the format.
        details = list(dict.fromkeys(s.detail for s in alike if s.detail))
        clause = f"{why.sentence} ({listed(details, 2)})" if details else why.sentence
        names = [s.tensor for s in alike]
        found.append(
            f"{len(names)} tensors ({listed(names, 2)}): each {clause}" if names[1:] else f"{names[0]} {clause}"
        )
        if len(skipped) == 1:
            found = [f"its only tensor, {names[0]}, {clause}"]
    found = found or ["it holds no tensors"]
    return CheckpointError(
        f"{model} has nothing to score: {printable('; '.join(found[:3]))}",
        reason="nothing_to_score",
        hint=next((why.hint for why in tensors if why.hint), None),
    )


def _free_nbytes(folder: Path) -> int:
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _buffers_nbytes(matrices: Sequence[Matrix], fetches: Mapping[str, Fetch | None]) -> int:
    parts = costs.PARTS_AHEAD_NBYTES if any(w.quantization for w in matrices) else 0
    extents = find_extents([w for w in matrices if fetches[w.shard] is Fetch.RANGE])
    return parts + limit_ahead_nbytes([extent for shard in extents.values() for extent in shard])


def _share_memory(
    matrices: Sequence[Matrix], max_nbytes: int | None, precision: Precision, buffers_nbytes: int
) -> tuple[int, int]:
    """Return the number of cores, and the memory limit of matrices computed at once.

    Raises:
        UsageError: too_little_memory.
    """
    if max_nbytes is None:
        return costs.count_cores(), costs.usable_nbytes()
    largest = max(costs.compute_nbytes(w.n, w.m, precision.steps[0], w.scales) for w in matrices)
    for workers in range(costs.count_cores(), 0, -1):
        room = max_nbytes - costs.runtime_nbytes(workers) - buffers_nbytes
        if largest <= room:
            return workers, room
    enough = costs.runtime_nbytes(1) + buffers_nbytes + largest
    raise UsageError(
        f"the scan needs at least {si_bytes(enough)} ({enough} bytes), but the limit is {si_bytes(max_nbytes)}",
        reason="too_little_memory",
        hint=f"use --max-memory {-(-enough // 1_000_000)}MB" + (" or --fetch download" if buffers_nbytes else ""),
    )
