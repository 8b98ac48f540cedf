"""A weight to score, and a tensor that is not scored."""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from .names import fused_name_of, group_of, module_of, without_expert
from .no_score import NoScore
from .quantization import Quantization

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class Experts(StrEnum):
    """How to rank experts that are separate parameters."""

    SEPARATE = "separate"  # each among the experts with the same number, as Spectrum does
    POOLED = "pooled"  # all experts of a layer as one, by the median of their scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A tensor without a score, or missing experts.

    Attributes:
        tensor: the name in the checkpoint; for missing experts, the name that they would have as fused experts.
        dtype, shape, nbytes: as stored.
        detail: a few words about the reason.
        parameter: the parameter that it is, or is a part of, by the names of results; None if it is not known.
    """

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    no_score: NoScore
    nbytes: int = 0
    detail: str = ""
    parameter: str | None = None

    @property
    def groups(self) -> set[str]:
        """The groups of its parameter: its own group, and that of all experts."""
        module = module_of(self.parameter or "")
        return {group_of(module), group_of(fused_name_of(module) or module)}


class GroupIndex:
    """An index of groups that finds their skipped tensors in almost linear time.

    Args:
        groups: the groups of matrices.
        patterns: exact names or globs of groups.
    """

    def __init__(self, groups: Collection[str], patterns: Sequence[str]) -> None:
        self._groups = {without_expert(group) for group in groups} | set(groups)
        self._patterns = patterns
        # The groups are sorted by their ends, so that groups with the same end are neighbors.
        self._reversed = sorted(group[::-1] for group in self._groups)

    def has(self, s: Skipped) -> bool:
        """Whether a skipped tensor belongs to a group or matches a pattern.

        Missing experts belong to the groups of the other experts: those with their numbers, and those of all.
        """
        own = s.groups
        # The group of another tower or of an extra layer has a prefix.
        return any(group in self._groups or self._has_end(f".{group}") for group in own) or any(
            fnmatchcase(group, pattern) for group in own for pattern in self._patterns
        )

    def _has_end(self, end: str) -> bool:
        start = end[::-1]
        i = bisect_left(self._reversed, start)
        return i < len(self._reversed) and self._reversed[i].startswith(start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One weight to score, as an n x m matrix; a vector of k numbers is 1 x k.

    Attributes:
        module: the name of the module, `model.layers.0.mlp.up_proj`.
        parameter: the name of the parameter in the trainer, `model.layers.0.mlp.up_proj.weight`. Several matrices
            can be parts of one parameter: fused experts.
        group: the group in which it is ranked, `mlp.up_proj`.
        tensor, shard, start: the stored tensor, its shard, and the offset in the shard where the bytes begin.
        dtype, nbytes: as stored.
        tied_to: the module that stores the tensor, if this one only shares it.
        expert: its index in the tensor, if the tensor holds fused experts.
        quantization: the way the weight is stored; None if it is not quantized.
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
    quantization: Quantization | None = None

    @property
    def result_name(self) -> str:
        """The name in results: the parameter without `.weight`.

        It is the same for all experts of a fused parameter.
        """
        return module_of(self.parameter)

    @property
    def key(self) -> str:
        """The name of the stored tensor, or of the expert in it.

        It is the same for two modules that share a tensor.
        """
        return self.tensor if self.expert is None else f"{self.tensor}[{self.expert}]"

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Rows and columns as stored; a column of packed values holds several."""
        return (self.n, self.m) if self.quantization is None else self.quantization.stored_shape

    @property
    def scales(self) -> int | None:
        """The number of scales of a quantized matrix; None for a plain one."""
        return None if self.quantization is None else self.quantization.scales

    def skip(self, no_score: NoScore) -> Skipped:
        """Return the matrix as one that is not scored."""
        return Skipped(
            tensor=self.key,
            dtype=self.dtype,
            shape=(self.n, self.m),
            no_score=no_score,
            nbytes=self.nbytes,
            parameter=self.parameter,
        )
