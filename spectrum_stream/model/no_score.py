"""The reasons why a tensor or a matrix has no score."""

from enum import StrEnum

_GATHER = (
    "save the model again with stage3_gather_16bit_weights_on_model_save (DeepSpeed) or a full state dict (FSDP), or "
    "convert the sharded checkpoint of the run with zero_to_fp32.py"
)


class NoScore(StrEnum):
    """The reason why a tensor or a matrix has no score.

    Attributes:
        sentence: the reason in words, a clause after the name of the tensor.
        is_failure: whether users expect a score, so that a scan without it is not complete.
        is_by_rule: whether Spectrum's rule leaves such a tensor out; it scores `.weight`s of one or two dimensions.
        hint: how to get a checkpoint without it, an imperative; "" if there is no way.
    """

    sentence: str
    is_failure: bool
    is_by_rule: bool
    hint: str

    def __new__(
        cls, code: str, sentence: str = "", is_failure: bool = False, is_by_rule: bool = False, hint: str = ""
    ) -> "NoScore":
        member = str.__new__(cls, code)
        member._value_ = code
        member.sentence, member.is_failure = sentence, is_failure
        member.is_by_rule, member.hint = is_by_rule, hint
        return member

    # These follow from the name, the shape or the plan.
    NOT_A_WEIGHT = "not_a_weight", "is a bias, a buffer or a small bare parameter, not a `.weight`", False, True
    NOT_A_MATRIX = "not_a_matrix", "is a scalar or has three or more dimensions, as a convolution has", False, True
    BARE_WEIGHT = "bare_weight", "is a weight of a layer, but its name does not end in `.weight`", True, True
    STACKED = "stacked", "is a stack of matrices, and its name does not show that they are experts", True, True
    EMPTY = (
        "empty",
        "is empty, as in a model that a sharded run saved without gathering its weights",
        True,
        False,
        _GATHER,
    )
    FLATTENED = (
        "flattened",
        "is a flat piece of a weight, as in a model that a sharded run saved without gathering its weights",
        True,
        False,
        _GATHER,
    )
    NOT_CHOSEN = "not_chosen", "is in a group that was not requested", False
    NOT_LOADED = "not_loaded", "is not in the model that transformers loads", False
    # These follow from the storage.
    UNSUPPORTED_DTYPE = "unsupported_dtype", "is stored in a format that cannot be read", True
    NOT_UNDERSTOOD = "not_understood", "is quantized, and something about it is not understood", True
    MISSING_SCALES = "missing_scales", "is quantized and its scales are missing", True
    BAD_SCALES = "bad_scales", "is quantized and its scales do not fit it", True
    STORED_TWICE = "stored_twice", "is stored by two tensors", True
    TOO_MANY_EXPERTS = "too_many_experts", "has more experts than the limit of 10,000", True
    MISSING_EXPERTS = "missing_experts", "lacks some of its experts", True
    # These follow from the weights.
    NOT_FINITE = "not_finite", "has weights that are NaN or infinite", True
    OUT_OF_RANGE = "out_of_range", "has weights whose squares the precision cannot hold", True
    NOT_CONVERGED = "not_converged", "has singular values that did not converge", True
    FAILED_CHECK = "failed_check", "has singular values that disagree with the sum of its squared weights", True
    NO_MEMORY = "no_memory", "does not fit into the memory that the system gives to the scan", True
