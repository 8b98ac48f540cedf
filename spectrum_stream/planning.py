"""The plan: what a scan would read, score and skip, what it costs, and where it writes.

A plan is data. It is made from headers alone, in well under a second for a thousand tensors, so it can be
looked at before any weight is read; the scan then does what the plan says and nothing else.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from . import costs
from .checkpoint import Checkpoint, read_checkpoint
from .errors import CheckpointError, UsageError
from .header import TensorInfo
from .naming import MAX_SLUG_LENGTH, group_of, group_order, model_order, module_path, slug, tied_head
from .source import LocalSource, open_source

RESULTS_FOLDER = "model_snr_results"
# How GPTQ and AWQ, compressed-tensors, and MXFP4 checkpoints call weights that are packed into integers.
_PACKED = (".qweight", ".weight_packed", "_proj_blocks")
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class Skip(StrEnum):
    """Why a tensor is not scored."""

    NOT_A_WEIGHT = "not_a_weight"  # a bias, a buffer, a bare parameter: Spectrum scores `.weight`s
    NOT_A_MATRIX = "not_a_matrix"  # a scalar, a convolution, a bank of experts
    EMPTY = "empty"  # a dimension of 0
    NOT_CHOSEN = "not_chosen"  # its group was not asked for
    UNSUPPORTED_DTYPE = "unsupported_dtype"  # quantised or integer: its numbers are not the weights

    @property
    def is_failure(self) -> bool:
        """Whether the user would expect a score here, so that the scan is not complete without it."""
        return self is Skip.UNSUPPORTED_DTYPE


@dataclass(frozen=True, slots=True)
class Skipped:
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    why: Skip


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight to score, as an n x m matrix; a vector of k numbers is 1 x k.

    Attributes:
        module: the module's name, `model.layers.0.mlp.up_proj`.
        group: the group in which it is ranked, `mlp.up_proj`.
        tensor, shard, start: the stored tensor, its shard, and where in it the bytes begin.
        dtype, nbytes: as stored.
        tied_to: the module that stores the tensor, where this one only shares it.
    """

    module: str
    group: str
    tensor: str
    shard: str
    start: int
    dtype: str
    n: int
    m: int
    nbytes: int
    tied_to: str | None = None

    @property
    def flops(self) -> float:
        return costs.flops(self.n, self.m)

    @property
    def work(self) -> float:
        return costs.work(self.n, self.m)

    @property
    def is_small(self) -> bool:
        """Whether one core computes it as fast as several would, shared out over as many matrices."""
        return min(self.n, self.m) <= costs.SMALL_SIDE


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

    def unfrozen(self, top_percent: float) -> Path:
        return Path(f"{self.stem}_unfrozenparameters_{top_percent:g}percent.yaml")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a scan of `source` will do.

    Attributes:
        matrices: what is scored, in the order in which it is read: by shard, then by offset.
        members: all modules of every group of the checkpoint, asked for or not.
        skipped: every other tensor, with the reason.
        top_percent: the selection to write, None for none.
        workers: how many small matrices are computed at once on a CPU.
        max_nbytes: the process's memory may not exceed this; None for no limit.
        warnings: what is odd about the checkpoint, a sentence each.
    """

    source: LocalSource
    outputs: Outputs
    matrices: tuple[Matrix, ...]
    members: Mapping[str, frozenset[str]]
    skipped: tuple[Skipped, ...]
    top_percent: float | None
    workers: int
    max_nbytes: int | None
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
        return sum({(w.shard, w.start): w.flops for w in self.matrices}.values())

    @property
    def peak_nbytes(self) -> int:
        """Expected bound on the process's own memory (anonymous, so without the mapped files): all in float32."""
        return _peak_nbytes(self.matrices, self.workers, None)

    @property
    def worst_nbytes(self) -> int:
        """The bound should the largest matrices need the most exact method, which few ever do; under a limit
        they then keep a less exact score, and the record says so."""
        worst = costs.runtime_nbytes(self.workers) + max(
            costs.svd_nbytes(w.n, w.m) * (self.workers if w.is_small else 1) for w in self.matrices
        )
        return worst if self.max_nbytes is None else min(worst, self.max_nbytes)

    @property
    def limit_nbytes(self) -> int | None:
        """What all the matrices that are computed at once may take together, under the limit."""
        return None if self.max_nbytes is None else self.max_nbytes - costs.runtime_nbytes(self.workers)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data."""
        return {
            "schema_version": 1,
            "model": self.source.model,
            "path": str(self.source.path),
            "shards": len(self.source.shards),
            "matrices": len(self.matrices),
            "groups": [
                {"name": g.name, "count": g.count, "shapes": [list(s) for s in g.shapes], "nbytes": g.nbytes}
                for g in self.groups
            ],
            "tied": {w.module: w.tied_to for w in self.matrices if w.tied_to},
            "skipped": [
                {"tensor": s.tensor, "dtype": s.dtype, "shape": list(s.shape), "reason": str(s.why)}
                for s in self.skipped
            ],
            "read_nbytes": self.read_nbytes,
            "flops": self.flops,
            "peak_nbytes": self.peak_nbytes,
            "worst_nbytes": self.worst_nbytes,
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
    modules: Sequence[str] | None = None,
    name: str | None = None,
    out: str | Path = RESULTS_FOLDER,
    max_nbytes: int | None = None,
    precision: str | None = None,
) -> Plan:
    """Plan the scan of MODEL from its headers.

    Args:
        model: a folder of safetensors shards, or one safetensors file.
        top_percent: the share of each group to select, in (0, 100].
        modules: groups to score, by exact name or glob (`mlp.*`); None for all.
        name: what to call the model in file names instead of `model` as typed.
        out: the results folder.
        max_nbytes: a limit on the process's own memory on a CPU, mapped files not counted; fewer matrices are
            computed at once to keep it.
        precision: the method that the scan will use, which the limit has to allow for; None for the choice.

    Raises:
        UsageError: bad_percent, no_such_group, bad_name; too_little_memory, with the number that would do.
        SourceError, CheckpointError: MODEL cannot be read; nothing_to_score.
    """
    if top_percent is not None:
        check_percent(top_percent)
    outputs = Outputs(Path(out), f"snr_results_{_checked_slug(name or model)}")
    checkpoint = read_checkpoint(open_source(model))
    matrices, skipped = _classify(checkpoint)
    members: dict[str, set[str]] = {}
    for matrix in matrices:
        members.setdefault(matrix.group, set()).add(matrix.module)
    if modules is not None:
        chosen = pick_groups((w.group for w in matrices), modules)
        skipped += [
            Skipped(w.tensor, w.dtype, (w.n, w.m), Skip.NOT_CHOSEN)
            for w in matrices
            if w.group not in chosen and w.tied_to is None
        ]
        matrices = [w for w in matrices if w.group in chosen]
        skipped = [
            replace(s, why=Skip.NOT_CHOSEN)
            if s.why.is_failure and group_of(module_path(s.tensor) or "") not in chosen
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
    return Plan(
        checkpoint.source,
        outputs,
        tuple(matrices),
        {group: frozenset(names) for group, names in members.items()},
        tuple(skipped),
        top_percent,
        _workers(matrices, max_nbytes, precision),
        max_nbytes,
        checkpoint.warnings,
    )


def _peak_nbytes(matrices: Sequence[Matrix], workers: int, precision: str | None) -> int:
    def one(w: Matrix) -> int:
        if precision == "svd":
            return costs.svd_nbytes(w.n, w.m)
        return costs.gram_nbytes(w.n, w.m, 8 if precision == "fp64" else 4)

    return costs.runtime_nbytes(workers) + max(one(w) * (workers if w.is_small else 1) for w in matrices)


def _workers(matrices: Sequence[Matrix], max_nbytes: int | None, precision: str | None) -> int:
    """As many as there are cores, or as fit into the limit."""
    for workers in range(costs.cores(), 0, -1):
        if max_nbytes is None or _peak_nbytes(matrices, workers, precision) <= max_nbytes:
            return workers
    enough = _peak_nbytes(matrices, 1, precision)
    raise UsageError(
        f"the scan does not fit into {max_nbytes} bytes; {enough} would do",
        reason="too_little_memory",
        hint=f"--max-memory {-(-enough // 1_000_000)}MB",
    )


def check_percent(top_percent: float) -> None:
    """Raises UsageError(bad_percent) unless 0 < top_percent <= 100."""
    if not 0 < top_percent <= 100:
        raise UsageError(f"the percentage {top_percent:g} is not above 0 and at most 100", reason="bad_percent")


def pick_groups(groups: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The groups that any pattern names, exactly or as a glob; never by a part of the name.

    Raises:
        UsageError: no_such_group, for a pattern that names none.
    """
    names = sorted(set(groups), key=group_order)
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if name == pattern or fnmatchcase(name, pattern)}
        if not matched:
            raise UsageError(
                f"no group is called or matches {pattern!r}",
                reason="no_such_group",
                hint=f"the groups are: {', '.join(names[:40])}{' ...' if len(names) > 40 else ''}",
            )
        chosen |= matched
    return chosen


def _classify(checkpoint: Checkpoint) -> tuple[list[Matrix], list[Skipped]]:
    matrices: list[Matrix] = []
    skipped: list[Skipped] = []
    tied = tied_head((tensor.name for _, tensor in checkpoint.tensors), checkpoint.source.config)
    for shard, tensor in checkpoint.tensors:
        why, module = _skip_reason(tensor), module_path(tensor.name)
        if why is not None or module is None:
            skipped.append(Skipped(tensor.name, tensor.dtype, tensor.shape, why or Skip.NOT_A_WEIGHT))
            continue
        matrix = _matrix(module, tensor, shard.name, None)
        matrices.append(matrix)
        if tied is not None and tied[1] == tensor.name:
            # Right behind its tensor, so that the scan has its singular values at hand.
            matrices.append(_matrix(tied[0], tensor, shard.name, module))
    skipped.sort(key=lambda s: model_order(s.tensor))
    return matrices, skipped


def _skip_reason(tensor: TensorInfo) -> Skip | None:
    if tensor.name.endswith(_PACKED):
        return Skip.UNSUPPORTED_DTYPE
    if module_path(tensor.name) is None:
        return Skip.NOT_A_WEIGHT
    if len(tensor.shape) not in (1, 2):
        return Skip.NOT_A_MATRIX
    if 0 in tensor.shape:
        return Skip.EMPTY
    if tensor.dtype not in FLOAT_DTYPES:
        return Skip.UNSUPPORTED_DTYPE
    return None


def _matrix(module: str, tensor: TensorInfo, shard: str, tied_to: str | None) -> Matrix:
    n, m = tensor.shape if len(tensor.shape) == 2 else (1, *tensor.shape)
    return Matrix(
        module, group_of(module), tensor.name, shard, tensor.start, tensor.dtype, n, m, tensor.nbytes, tied_to
    )


def _checked_slug(name: str) -> str:
    result = slug(name)
    if not name.strip() or len(result) > MAX_SLUG_LENGTH:
        raise UsageError(
            f"a name of {len(result)} characters cannot be made into a file name",
            reason="bad_name",
            hint="give a short one with --name",
        )
    return result
