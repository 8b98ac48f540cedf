"""One weight to score, and the reasons why a weight has no score."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from .names import fused_name_of, group_of, module_of, without_expert
from .quantization import Quantization

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class NoScore(StrEnum):
    """Why there is no score: of a tensor that is not scored, or of a matrix whose scores could not be computed.

    Attributes:
        sentence: what to tell a person, a clause after the name of the tensor.
        is_failure: whether a user would expect a score, so that a scan without it is not complete.
    """

    sentence: str
    is_failure: bool

    def __new__(cls, code: str, sentence: str = "", is_failure: bool = False) -> "NoScore":
        member = str.__new__(cls, code)
        member._value_ = code
        member.sentence, member.is_failure = sentence, is_failure
        return member

    # By its name, its shape or the plan.
    NOT_A_WEIGHT = "not_a_weight", "is a bias, a buffer or a bare parameter; Spectrum scores `.weight`s", False
    NOT_A_MATRIX = "not_a_matrix", "is a scalar or a convolution", False
    EMPTY = "empty", "has a dimension of 0", False
    NOT_CHOSEN = "not_chosen", "is in a group that was not asked for", False
    NOT_LOADED = "not_loaded", "is in a layer that transformers leaves out of its model", False
    # By how it is stored.
    UNSUPPORTED_DTYPE = "unsupported_dtype", "is stored in a format that cannot be read", True
    MISSING_SCALES = "missing_scales", "is quantized and its scales are missing", True
    BAD_SCALES = "bad_scales", "is quantized and its scales do not fit it", True
    STORED_TWICE = "stored_twice", "is stored by two tensors", True
    MISSING_EXPERTS = "missing_experts", "lacks some of its experts", True
    # By its weights.
    NOT_FINITE = "not_finite", "has weights that are NaN or infinite", True
    OUT_OF_RANGE = "out_of_range", "has weights whose squares the precision cannot hold", True
    NOT_CONVERGED = "not_converged", "has singular values that did not converge", True


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
