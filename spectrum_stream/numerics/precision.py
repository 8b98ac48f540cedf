"""How exactly singular values are computed. Without torch, so that a plan and the options can name it."""

from enum import StrEnum


class Precision(StrEnum):
    """How singular values are computed, in order of cost; `spectra` explains the steps."""

    AUTO = "auto"  # the first of the others that is exact enough for each matrix
    FP32 = "fp32"
    FP64 = "fp64"
    SVD = "svd"

    @property
    def steps(self) -> "tuple[Precision, ...]":
        """What is tried, cheapest first."""
        return tuple(Precision)[1:] if self is Precision.AUTO else (self,)
