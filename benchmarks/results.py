"""The numbers of a run, and the ratios that follow from them.

A saved run is their JSON. Times and sizes are in seconds and bytes. Ratios are computed for each repetition, from
times that were taken right after one another, so that a temporary slowdown of the machine affects both.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Spread:
    """Repetitions of one number."""

    median: float
    min: float
    max: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Our scores compared with the exact ones, on the float32 checkpoint.

    Attributes:
        max_error: the largest relative error.
        estimated: the estimate of this error in the record of the matrix.
        limit: the largest acceptable error, unless the record estimates a larger one.
        excused: the number of matrices with an error above the limit but within their estimate.
        unexcused: the number of matrices with an error above the limit and above their estimate.
        same_sets: whether the top 50 and the top 25 percent of every group are the exact ones.
        precisions: the number of matrices of each precision.
    """

    max_error: float
    estimated: float
    limit: float
    excused: int
    unexcused: int
    same_sets: dict[str, bool]
    precisions: dict[str, int]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Our scores against another contender's, on the same bytes.

    Attributes:
        matrices: the number of matrices that the other one scored.
        max_difference: the largest relative difference.
        same_sets: as in `Accuracy`; None if the other one did not score all matrices.
    """

    matrices: int
    max_difference: float
    same_sets: dict[str, bool] | None


@dataclass(frozen=True, slots=True)
class ShapeResult:
    """All matrices of one shape, computed from memory, once.

    Attributes:
        seconds: the time for all of them.
        floor_share: the floor of their flops as a share of that time.
    """

    n: int
    m: int
    matrices: int
    seconds: float
    floor_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadResult:
    """One workload.

    Attributes:
        dtype: the dtype of the weights in the timed checkpoint.
        matrices: the number of modules of the plan that have more than one singular value.
        nbytes, flops: those of the plan.
        planned_nbytes: the limit of memory in the plan, for float32.
        seconds: by contender (`ours`, `spectrum`, `numpy`) and part (`reading`, `computing`).
        sgemm: flop/s of a matrix product.
        ratios: by name, all without a unit:
            times_spectrum, times_numpy   their time over the time of a scan
            scan_over_parts               the time of a scan over the larger of reading alone and computing alone
            floor_share                   the floor over the time of a scan
        numpy_matrices: the number of matrices that numpy computed; its time is scaled up by shape.
        read_rate: bytes a second of our scan.
        peak_anonymous, peak_resident: by contender, the largest of the repetitions.
        others_cpu_share: the share of the machine that other programs used during the measurement. A few percent
            distort it, because threads that wait for one another then wait for those programs too.
        precisions: the number of matrices of each precision, on the timed checkpoint.
        failed: the number of modules without a score.
        accuracy: None if the singular values are not known.
        agreement: by contender.
        shapes: the times by shape.
    """

    name: str
    dtype: str
    matrices: int
    nbytes: int
    flops: float
    planned_nbytes: int
    seconds: dict[str, Spread]
    sgemm: Spread | None
    ratios: dict[str, Spread]
    numpy_matrices: int
    read_rate: float
    peak_anonymous: dict[str, int]
    peak_resident: dict[str, int]
    others_cpu_share: float
    precisions: dict[str, int]
    failed: int
    accuracy: Accuracy | None
    agreement: dict[str, Agreement]
    shapes: list[ShapeResult]


@dataclass(frozen=True, slots=True)
class RunResult:
    """A run of the benchmark.

    Attributes:
        machine: the machine, and the versions that matter.
        settings: the options of the run.
    """

    machine: dict[str, str | int]
    settings: dict[str, str | int | bool]
    workloads: list[WorkloadResult]
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", "utf-8")
