"""Tensors to the matrices that are scored, or to a reason why one is not; and the groups that they are ranked in."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from ..checkpoint.header import TensorInfo
from ..checkpoint.tensors import Checkpoint
from ..errors import UsageError
from ..numerics import costs
from .families import expert_count
from .names import (
    bank_of,
    expert_bank_of,
    group_of,
    group_order,
    is_expert_bank,
    is_extra_layer,
    is_flat_expert_bank,
    layer_count,
    model_order,
    module_path,
    tied_head,
    tower_of,
    without_expert,
)
from .quantization import Quantisation, Unreadable, is_companion, parameter_of
from .schemes import QuantisationIndex

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class Skip(StrEnum):
    """Why a tensor is not scored."""

    NOT_A_WEIGHT = "not_a_weight"  # a bias, a buffer, a bare parameter: Spectrum scores `.weight`s
    NOT_A_MATRIX = "not_a_matrix"  # a scalar, a convolution
    EMPTY = "empty"  # a dimension of 0
    NOT_CHOSEN = "not_chosen"  # its group was not asked for
    UNSUPPORTED_DTYPE = "unsupported_dtype"  # quantised or integer: its numbers are not the weights
    MISSING_SCALES = "missing_scales"  # quantised, without the scales that make weights of its numbers
    BAD_SCALES = "bad_scales"  # quantised, with scales that do not fit it
    STORED_TWICE = "stored_twice"  # another tensor holds the same weight
    MISSING_EXPERTS = "missing_experts"  # not a tensor: the experts of a layer of which some are not there
    NOT_LOADED = "not_loaded"  # a layer that predicts further tokens, which transformers leaves out of its model

    @property
    def is_failure(self) -> bool:
        """Whether the user would expect a score here, so that the scan is not complete without it."""
        return self in (
            Skip.UNSUPPORTED_DTYPE,
            Skip.MISSING_SCALES,
            Skip.BAD_SCALES,
            Skip.STORED_TWICE,
            Skip.MISSING_EXPERTS,
        )


class Experts(StrEnum):
    """How the experts of a layer are ranked that are stored apart."""

    SEPARATE = "separate"  # each among the experts of its number, as Spectrum does
    POOLED = "pooled"  # as one, by the median of their scores


@dataclass(frozen=True, slots=True)
class Skipped:
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    why: Skip
    detail: str = ""

    def is_among(self, groups: Collection[str], patterns: Sequence[str], parameter: str) -> bool:
        """Whether it would be ranked in one of these groups, or in one that a pattern names.

        Experts that are not there have the groups of those that are: with their numbers, or pooled.

        Args:
            parameter: what it is, or is a part of, by the names of the groups.
        """
        module = module_path(parameter) or parameter
        own = {group_of(module), group_of(expert_bank_of(module) or module)}
        known = {without_expert(group) for group in groups} | set(groups)
        # A tower, or what else a group is kept apart by, is in front of its name.
        names = own | {group for group in known if group.endswith(tuple(f".{name}" for name in own))}
        return bool(names & known) or any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight to score, as an n x m matrix; a vector of k numbers is 1 x k.

    Attributes:
        module: the module's name, `model.layers.0.mlp.up_proj`.
        parameter: the name of the parameter that a trainer trains it by, `model.layers.0.mlp.up_proj.weight`. Several
            matrices can be parts of one parameter, a bank of experts.
        group: the group in which it is ranked, `mlp.up_proj`.
        tensor, shard, start: the stored tensor, its shard, and where in it the bytes begin.
        dtype, nbytes: as stored.
        tied_to: the module that stores the tensor, where this one only shares it.
        quantisation: how weights come of what is stored; None where it is the weights.
        expert: its place in the tensor, where that is a bank of experts; None for all others.
    """

    module: str
    parameter: str
    group: str
    tensor: str
    shard: str
    start: int
    dtype: str
    n: int
    m: int
    nbytes: int
    tied_to: str | None = None
    expert: int | None = None
    quantisation: Quantisation | None = None

    @property
    def bank(self) -> str | None:
        """What results call it, together with all of its parameter, where that is not `module`."""
        return bank_of(self.module, self.parameter)

    @property
    def key(self) -> str:
        """What is stored: the tensor, or the part of it. Two modules that share it have the same."""
        return self.tensor if self.expert is None else f"{self.tensor}[{self.expert}]"

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Rows and columns as they are stored: of packed numbers, several a word."""
        return (self.n, self.m) if self.quantisation is None else self.quantisation.stored_shape

    @property
    def flops(self) -> float:
        return costs.flops(self.n, self.m)

    @property
    def work(self) -> float:
        return costs.work(self.n, self.m)

    @property
    def decoding_nbytes(self) -> int:
        """Memory to multiply it out, block by block; none for what is stored as it is."""
        return 0 if self.quantisation is None else costs.decoding_nbytes(self.quantisation.scales)

    @property
    def is_small(self) -> bool:
        """Whether one core computes it as fast as several would, shared out over as many matrices."""
        return min(self.n, self.m) <= costs.SMALL_SIDE


def classify(checkpoint: Checkpoint) -> tuple[list[Matrix], list[Skipped]]:
    """What is scored, in file order, and everything else, in model order."""
    matrices: list[Matrix] = []
    skipped: list[Skipped] = []
    index = QuantisationIndex(checkpoint)
    tied = tied_head((tensor.name for _, tensor in checkpoint.tensors), checkpoint.source.config)
    for shard, tensor in checkpoint.tensors:
        found = index.find(tensor)
        if isinstance(found, Unreadable):
            skipped.append(Skipped(tensor.name, tensor.dtype, tensor.shape, Skip(found.why), found.detail))
        elif found is not None:
            matrices += _quantised(tensor, shard.name, found)
        elif _is_bank(tensor):
            matrices += _experts(tensor, shard.name, tensor.shape[0])
        elif (count := _flat_experts(tensor, checkpoint.source.config)) is not None:
            matrices += _experts(tensor, shard.name, count)
        elif (why := _skip_reason(tensor)) is not None:
            skipped.append(Skipped(tensor.name, tensor.dtype, tensor.shape, why))
        else:
            matrices.append(_matrix(tensor, shard.name))
        if tied is not None and tied[1] == tensor.name and matrices and matrices[-1].tensor == tensor.name:
            # Right behind its tensor, so that the scan has its singular values at hand.
            embedding, head = matrices[-1], tied[0]
            matrices.append(
                replace(
                    embedding,
                    module=head,
                    parameter=f"{head}.weight",
                    group=group_of(head),
                    tied_to=embedding.module,
                )
            )
    matrices, twice = _stored_once(matrices)
    config = checkpoint.source.config
    matrices = _kept_apart(matrices, layer_count(config))
    missing = _missing_experts(matrices, skipped, expert_count(config))
    # A tensor that is no whole bank is not what the config says, whichever of its experts it has.
    short = {s.tensor for s in missing}
    matrices = [w for w in matrices if w.expert is None or _bank(w) not in short]
    skipped += twice + missing
    skipped.sort(key=lambda s: model_order(s.tensor))
    return matrices, skipped


def _stored_once(matrices: list[Matrix]) -> tuple[list[Matrix], list[Skipped]]:
    """Without weights that two tensors hold, packed and plain: nothing says which of them counts."""
    tensors: dict[str, set[str]] = {}
    for w in matrices:
        tensors.setdefault(w.module, set()).add(w.tensor)
    twice = {module for module, found in tensors.items() if len(found) > 1}
    dropped = {w.tensor: w for w in matrices if w.module in twice}
    skipped = [Skipped(name, w.dtype, (w.n, w.m), Skip.STORED_TWICE) for name, w in dropped.items()]
    return [w for w in matrices if w.tensor not in dropped], skipped


def _kept_apart(matrices: list[Matrix], layers: int | None) -> list[Matrix]:
    """With the groups of another tower, and of layers behind the model's own, under a name of their own.

    Spectrum ranks a layer of a vision tower among those of the language model, where both call it the same.
    """
    towers = {tower_of(w.module) for w in matrices if group_of(w.module) != w.module}
    apart = []
    for w in matrices:
        tower = tower_of(w.module) if len(towers) > 1 and group_of(w.module) != w.module else ""
        prefix = "mtp" if is_extra_layer(w.module, layers) else tower
        apart.append(replace(w, group=f"{prefix}.{w.group}") if prefix else w)
    return apart


def _missing_experts(matrices: Sequence[Matrix], skipped: Sequence[Skipped], count: int | None) -> list[Skipped]:
    """The banks of experts that are not whole: some of the experts, or all of one projection, are not there."""
    # Those that are there and cannot be read have a reason of their own.
    failed = {module_path(parameter_of(s.tensor)) or parameter_of(s.tensor) for s in skipped if s.why.is_failure}
    present = Counter(bank for w in matrices if (bank := _bank(w)) is not None)
    present.update(bank for name in failed if (bank := expert_bank_of(name)) is not None)
    most: dict[str, int] = {}
    for bank, found in present.items():
        most[group_of(bank)] = max(most.get(group_of(bank), count or 0), found)
    short = {bank: found for bank, found in present.items() if found < most[group_of(bank)]}
    # What the experts of any layer have, those of each must have.
    owners: dict[str, dict[str, None]] = {}
    for bank in present:
        owner, _, projection = bank.rpartition(".")
        owners.setdefault(owner, {})[projection] = None
    every: dict[str, dict[str, None]] = {}
    for owner, projections in owners.items():
        every.setdefault(group_of(owner), {}).update(projections)
    for owner, projections in owners.items():
        for projection in every[group_of(owner)].keys() - projections.keys():
            if (bank := f"{owner}.{projection}") not in failed:
                short[bank] = 0
    return [
        Skipped(bank, "", (), Skip.MISSING_EXPERTS, f"{found} of {most[group_of(bank)]} experts")
        for bank, found in short.items()
    ]


def _bank(w: Matrix) -> str | None:
    """The bank that an expert is in, however that is stored."""
    return expert_bank_of(w.module) if w.expert is None else w.module.rpartition(".")[0]


def _is_bank(tensor: TensorInfo) -> bool:
    """Whether it is the matrices of all experts of a layer, stacked: (experts, n, m), as models with fused experts
    store them. A trainer freezes such a bank as one."""
    return (
        len(tensor.shape) == 3
        and 0 not in tensor.shape
        and tensor.dtype in FLOAT_DTYPES
        and not is_companion(tensor.name)
        and is_expert_bank(module_path(tensor.name) or tensor.name)
    )


def _flat_experts(tensor: TensorInfo, config: Mapping[str, Any]) -> int | None:
    """How many experts lie one above the other in a tensor of two dimensions; None where it is no such bank."""
    if len(tensor.shape) != 2 or tensor.dtype not in FLOAT_DTYPES or not is_flat_expert_bank(tensor.name):
        return None
    count = expert_count(config)
    return count if count is not None and 0 not in tensor.shape and tensor.shape[0] % count == 0 else None


def _experts(tensor: TensorInfo, shard: str, count: int) -> list[Matrix]:
    n, m = tensor.shape[1:] if len(tensor.shape) == 3 else (tensor.shape[0] // count, tensor.shape[1])
    return [_expert(tensor, shard, e, count, (n, m), None) for e in range(count)]


def _quantised(tensor: TensorInfo, shard: str, found: Quantisation | list[Quantisation]) -> list[Matrix]:
    if isinstance(found, list):
        return [_expert(tensor, shard, e, len(found), how.shape, how) for e, how in enumerate(found)]
    parameter, (n, m) = parameter_of(tensor.name), found.shape
    module = module_path(parameter) or parameter
    return [
        Matrix(
            module, parameter, group_of(module), tensor.name, shard, tensor.start, tensor.dtype, n, m, tensor.nbytes,
            quantisation=found,
        )
    ]  # fmt: skip


def _expert(
    tensor: TensorInfo, shard: str, e: int, count: int, shape: tuple[int, int], how: Quantisation | None
) -> Matrix:
    parameter, nbytes = parameter_of(tensor.name), tensor.nbytes // count
    bank = module_path(parameter) or parameter
    return Matrix(
        f"{bank}.{e}", parameter, group_of(bank), tensor.name, shard, tensor.start + e * nbytes, tensor.dtype, *shape,
        nbytes, expert=e, quantisation=how,
    )  # fmt: skip


def _skip_reason(tensor: TensorInfo) -> Skip | None:
    if module_path(tensor.name) is None:
        return Skip.NOT_A_WEIGHT
    if len(tensor.shape) not in (1, 2):
        return Skip.NOT_A_MATRIX
    if 0 in tensor.shape:
        return Skip.EMPTY
    return None if tensor.dtype in FLOAT_DTYPES else Skip.UNSUPPORTED_DTYPE


def _matrix(tensor: TensorInfo, shard: str) -> Matrix:
    module = module_path(tensor.name) or tensor.name
    n, m = tensor.shape if len(tensor.shape) == 2 else (1, *tensor.shape)
    return Matrix(
        module, tensor.name, group_of(module), tensor.name, shard, tensor.start, tensor.dtype, n, m, tensor.nbytes
    )


def pooled(matrices: Sequence[Matrix], skipped: Sequence[Skipped]) -> list[Matrix]:
    """With the experts of a layer, where they are parameters of their own, in one group for all numbers.

    Experts of a layer of which some have no score cannot be ranked as one; they stay as they are.
    """
    failed = {module_path(parameter_of(s.tensor)) or s.tensor for s in skipped if s.why.is_failure}
    broken = failed | {bank for name in failed if (bank := expert_bank_of(name)) is not None}
    return [
        replace(w, group=w.group.removesuffix(group_of(w.bank or w.module)) + group_of(bank))
        if (bank := expert_bank_of(w.bank or w.module)) is not None and expert_bank_of(w.module) not in broken
        else w
        for w in matrices
    ]


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
