"""The precision of singular values. This module is free of torch, so that plans and options can import it."""

from enum import StrEnum


class Precision(StrEnum):
    """The precision of singular values, cheapest first; see `spectra`."""

    AUTO = "auto"  # the first of the others that is exact enough, for each matrix
    FP32 = "fp32"
    MIXED = "mixed"
    FP64 = "fp64"
    SVD = "svd"

    @property
    def steps(self) -> "tuple[Precision, ...]":
        """The precisions that are tried, cheapest first, where float64 products are fast."""
        return (Precision.FP32, Precision.FP64, Precision.SVD) if self is Precision.AUTO else (self,)
