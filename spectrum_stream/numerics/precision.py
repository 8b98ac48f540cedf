"""The precision of singular values.

This module does not import torch, so that plans and options can import it.
"""

from enum import StrEnum


class Precision(StrEnum):
    """The precision of singular values, cheapest first; see `spectra`."""

    AUTO = "auto"  # for each matrix, the first step that is exact enough
    FP32 = "fp32"
    MIXED = "mixed"
    FP64 = "fp64"
    SVD = "svd"

    @property
    def steps(self) -> "tuple[Precision, ...]":
        """The precisions that are tried, cheapest first.

        On a CUDA device with slow float64 products, AUTO also tries MIXED before FP64.
        """
        return (Precision.FP32, Precision.FP64, Precision.SVD) if self is Precision.AUTO else (self,)
