"""One weight to score, and the reasons why a weight has no score."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from .names import fused_name_of, group_of, module_of, without_expert
from .no_score import NoScore
from .quantization import Quantization

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class Experts(StrEnum):
    """How the experts of a layer are ranked that are stored apart."""

    SEPARATE = "separate"  # each among the experts of its number, as Spectrum does
    POOLED = "pooled"  # as one, by the median of their scores


@dataclass(frozen=True, slots=True)
class Skipped:
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    why: NoScore
    detail: str = ""

    def is_among(self, groups: Collection[str], patterns: Sequence[str], parameter: str) -> bool:
        """Whether it would be ranked in one of these groups, or in one that a pattern names.

        Experts that are not there have the groups of those that are: with their numbers, or pooled.

        Args:
            parameter: what it is, or is a part of, by the names of the groups.
        """
        module = module_of(parameter)
        own = {group_of(module), group_of(fused_name_of(module) or module)}
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
        quantization: how weights come of what is stored; None where it is the weights.
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
    quantization: Quantization | None = None

    @property
    def result_name(self) -> str:
        """The name that results use: the parameter without `.weight`, the same for all experts of a fused one."""
        return module_of(self.parameter)

    @property
    def key(self) -> str:
        """What is stored: the tensor, or the part of it. Two modules that share it have the same."""
        return self.tensor if self.expert is None else f"{self.tensor}[{self.expert}]"

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Rows and columns as they are stored: of packed numbers, several a word."""
        return (self.n, self.m) if self.quantization is None else self.quantization.stored_shape

    @property
    def scales(self) -> int | None:
        """How many scales a quantized matrix has; None for a plain one."""
        return None if self.quantization is None else self.quantization.scales
