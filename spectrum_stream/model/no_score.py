"""The reasons why a tensor or a matrix has no score."""

from enum import StrEnum


class NoScore(StrEnum):
    """The reason why a tensor or a matrix has no score.

    Attributes:
        sentence: the reason in words, a clause after the name of the tensor.
        is_failure: whether users expect a score, so that a scan without it is not complete.
    """

    sentence: str
    is_failure: bool

    def __new__(cls, code: str, sentence: str = "", is_failure: bool = False) -> "NoScore":
        member = str.__new__(cls, code)
        member._value_ = code
        member.sentence, member.is_failure = sentence, is_failure
        return member

    # These follow from the name, the shape or the plan.
    NOT_A_WEIGHT = "not_a_weight", "is a bias, a buffer or a bare parameter; Spectrum scores `.weight`s", False
    NOT_A_MATRIX = "not_a_matrix", "is a scalar or a convolution", False
    EMPTY = "empty", "has a dimension of 0", False
    NOT_CHOSEN = "not_chosen", "is in a group that was not requested", False
    NOT_LOADED = "not_loaded", "is not in the model that transformers loads", False
    # These follow from the storage.
    UNSUPPORTED_DTYPE = "unsupported_dtype", "is stored in a format that cannot be read", True
    MISSING_SCALES = "missing_scales", "is quantized and its scales are missing", True
    BAD_SCALES = "bad_scales", "is quantized and its scales do not fit it", True
    STORED_TWICE = "stored_twice", "is stored by two tensors", True
    MISSING_EXPERTS = "missing_experts", "lacks some of its experts", True
    # These follow from the weights.
    NOT_FINITE = "not_finite", "has weights that are NaN or infinite", True
    OUT_OF_RANGE = "out_of_range", "has weights whose squares the precision cannot hold", True
    NOT_CONVERGED = "not_converged", "has singular values that did not converge", True
