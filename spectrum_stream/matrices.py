"""Tensors to the matrices that are scored, or to a reason why one is not; and the groups that they are ranked in."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase

from . import costs
from .checkpoint import Checkpoint
from .errors import UsageError
from .header import TensorInfo
from .naming import bank_of, group_of, group_order, is_expert_bank, model_order, module_path, tied_head
from .quantised import FLOAT8_DTYPES, MXFP4, MXFP4_BLOCK, SCALE_SUFFIXES, ScaleIndex, Scales

# How GPTQ and AWQ, and compressed-tensors checkpoints call weights that are packed into integers.
_PACKED = (".qweight", ".weight_packed")
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class Skip(StrEnum):
    """Why a tensor is not scored."""

    NOT_A_WEIGHT = "not_a_weight"  # a bias, a buffer, a bare parameter: Spectrum scores `.weight`s
    NOT_A_MATRIX = "not_a_matrix"  # a scalar, a convolution
    EMPTY = "empty"  # a dimension of 0
    NOT_CHOSEN = "not_chosen"  # its group was not asked for
    UNSUPPORTED_DTYPE = "unsupported_dtype"  # quantised or integer: its numbers are not the weights
    MISSING_SCALES = "missing_scales"  # float8 without the scales that make weights of its numbers
    BAD_SCALES = "bad_scales"  # float8 with scales that do not fit it

    @property
    def is_failure(self) -> bool:
        """Whether the user would expect a score here, so that the scan is not complete without it."""
        return self in (Skip.UNSUPPORTED_DTYPE, Skip.MISSING_SCALES, Skip.BAD_SCALES)


@dataclass(frozen=True, slots=True)
class Skipped:
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    why: Skip
    detail: str = ""

    @property
    def group(self) -> str:
        """The group that it would be ranked in."""
        return group_of(module_path(self.tensor) or self.tensor.removesuffix("_blocks"))


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
        scales: what its stored numbers are to be multiplied by; None where they are the weights.
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
    scales: Scales | None = None

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
        """Rows and columns as they are stored: of MXFP4, two columns a byte."""
        return (self.n, self.m // 2) if self.scales is not None and self.scales.scheme == MXFP4 else (self.n, self.m)

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


def classify(checkpoint: Checkpoint) -> tuple[list[Matrix], list[Skipped]]:
    """What is scored, in file order, and everything else, in model order."""
    matrices: list[Matrix] = []
    skipped: list[Skipped] = []
    scales = ScaleIndex(checkpoint)
    tied = tied_head((tensor.name for _, tensor in checkpoint.tensors), checkpoint.source.config)
    for shard, tensor in checkpoint.tensors:
        if _is_bank(tensor):
            matrices += _experts(tensor, shard.name)
            continue
        if _is_mxfp4(tensor):
            found = scales.find_mxfp4(tensor)
            if isinstance(found, list):
                matrices += _mxfp4_experts(tensor, shard.name, found)
            else:
                fault = Skip.MISSING_SCALES if found is None else Skip.BAD_SCALES
                skipped.append(Skipped(tensor.name, tensor.dtype, tensor.shape, fault, found or ""))
            continue
        why, module, scaled = _skip_reason(tensor), module_path(tensor.name), None
        if why is None and tensor.dtype in FLOAT8_DTYPES:
            scaled = scales.find(tensor)
            why = Skip.MISSING_SCALES if scaled is None else Skip.BAD_SCALES if isinstance(scaled, str) else None
        if why is not None or module is None:
            detail = scaled if isinstance(scaled, str) else ""
            skipped.append(Skipped(tensor.name, tensor.dtype, tensor.shape, why or Skip.NOT_A_WEIGHT, detail))
            continue
        matrix = replace(_matrix(module, tensor, shard.name), scales=scaled if isinstance(scaled, Scales) else None)
        matrices.append(matrix)
        if tied is not None and tied[1] == tensor.name:
            # Right behind its tensor, so that the scan has its singular values at hand.
            matrices.append(
                replace(
                    matrix, module=tied[0], parameter=f"{tied[0]}.weight", group=group_of(tied[0]), tied_to=module
                )
            )
    skipped.sort(key=lambda s: model_order(s.tensor))
    return matrices, skipped


def _is_bank(tensor: TensorInfo) -> bool:
    """Whether it is the matrices of all experts of a layer, stacked: (experts, n, m), as models with fused experts
    store them. A trainer freezes such a bank as one."""
    return (
        len(tensor.shape) == 3
        and 0 not in tensor.shape
        and tensor.dtype in FLOAT_DTYPES
        and is_expert_bank(module_path(tensor.name) or tensor.name)
    )


def _experts(tensor: TensorInfo, shard: str) -> list[Matrix]:
    bank = module_path(tensor.name) or tensor.name
    count, n, m = tensor.shape
    nbytes = tensor.nbytes // count
    return [
        Matrix(
            f"{bank}.{e}", tensor.name, group_of(bank), tensor.name, shard, tensor.start + e * nbytes, tensor.dtype,
            n, m, nbytes, expert=e,
        )
        for e in range(count)
    ]  # fmt: skip


def _is_mxfp4(tensor: TensorInfo) -> bool:
    return (
        tensor.name.endswith("_blocks")
        and tensor.dtype == "U8"
        and len(tensor.shape) == 4
        and tensor.shape[3] == MXFP4_BLOCK // 2
        and 0 not in tensor.shape
    )


def _mxfp4_experts(tensor: TensorInfo, shard: str, scales: Sequence[Scales]) -> list[Matrix]:
    bank = tensor.name.removesuffix("_blocks")
    _, n, groups, width = tensor.shape
    nbytes = n * groups * width
    return [
        Matrix(
            f"{bank}.{e}", bank, group_of(bank), tensor.name, shard, tensor.start + e * nbytes, tensor.dtype, n,
            groups * MXFP4_BLOCK, nbytes, expert=e, scales=part,
        )
        for e, part in enumerate(scales)
    ]  # fmt: skip


def _skip_reason(tensor: TensorInfo) -> Skip | None:
    # A bank of experts that is no bank of floats, nor one in MXFP4: its numbers are packed or lack their scales here.
    packed_bank = (
        len(tensor.shape) >= 3 and "experts" in tensor.name.split(".")[:-1] and tensor.dtype not in FLOAT_DTYPES
    )
    if tensor.name.endswith(_PACKED) or (packed_bank and not tensor.name.endswith(SCALE_SUFFIXES)):
        return Skip.UNSUPPORTED_DTYPE
    if module_path(tensor.name) is None:
        return Skip.NOT_A_WEIGHT
    if len(tensor.shape) not in (1, 2):
        return Skip.NOT_A_MATRIX
    if 0 in tensor.shape:
        return Skip.EMPTY
    if tensor.dtype not in FLOAT_DTYPES and not (tensor.dtype in FLOAT8_DTYPES and len(tensor.shape) == 2):
        return Skip.UNSUPPORTED_DTYPE
    return None


def _matrix(module: str, tensor: TensorInfo, shard: str) -> Matrix:
    n, m = tensor.shape if len(tensor.shape) == 2 else (1, *tensor.shape)
    return Matrix(
        module, tensor.name, group_of(module), tensor.name, shard, tensor.start, tensor.dtype, n, m, tensor.nbytes
    )


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
