"""The numbers of a run, and the ratios that follow from them. A saved run is their JSON.

Times and sizes are in seconds and bytes. Ratios are made repetition by repetition, from times that were taken
right after one another, so that what slows the machine down for a while slows down both.
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
    """Our scores against those that follow from the known singular values, on the float32 checkpoint.

    Attributes:
        max_error: the largest relative error.
        estimated: what the record of that matrix says its error is.
        limit: the largest error that is acceptable where the record does not estimate a larger one.
        excused: how many matrices exceed the limit and say so.
        unexcused: how many exceed it and do not say so.
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
        matrices: how many the other has scored.
        max_difference: the largest relative one.
        same_sets: as in `Accuracy`; None where the other has not scored all.
    """

    matrices: int
    max_difference: float
    same_sets: dict[str, bool] | None


@dataclass(frozen=True, slots=True)
class ShapeResult:
    """All matrices of one shape, computed from memory, once.

    Attributes:
        seconds: of all of them.
        floor_share: what the floor of their flops is of that time.
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
        dtype: as the timed checkpoint stores the weights.
        matrices: the modules of the plan that have more than one singular value.
        nbytes, flops: the plan's.
        planned_nbytes: the bound on memory that the plan states, for the float32 path.
        seconds: by contender (`ours`, `spectrum`, `numpy`) and part (`reading`, `computing`).
        sgemm: flop/s of a matrix product.
        ratios: by name, all without a unit:
            times_spectrum, times_numpy   their time in ours: how many times faster a scan is
            scan_over_parts               a scan in the larger of reading alone and computing alone
            floor_share                   what the floor is of a scan
        numpy_matrices: how many matrices numpy's time stands on; it is scaled up by shape.
        read_rate: bytes a second of our scan.
        peak_anonymous, peak_resident: by contender, the largest of the repetitions.
        others_cpu_share: how much of the machine other programs took while this was measured. A few percent spoil
            it: threads that wait for one another then wait for those programs too.
        precisions: the number of matrices of each precision, on the timed checkpoint.
        failed: modules without a score.
        accuracy: None where the singular values are not known.
        agreement: by contender.
        shapes: see there.
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
        machine: what it ran on, and the versions that matter.
        settings: what it was asked for.
    """

    machine: dict[str, str | int]
    settings: dict[str, str | int | bool]
    workloads: list[WorkloadResult]
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", "utf-8")
