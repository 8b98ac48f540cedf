"""A result by another measure: its record's singular values in, lines to choose from out; nothing is scanned."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ResultError
from ..numerics.metrics import MEASURES, Metric, random_value
from .record import Record, stored_records
from .result import Module, in_order, is_record_of, lines_of, read_results

# Squares summed in float32 lose what is smaller, relative to the largest, than the square root of float32's step:
# a condition above this is rounding.
_FP32_CONDITION = 2.0**11.5


@dataclass(frozen=True, slots=True)
class Recorded:
    """The record of a scan, as it was when it was read.

    Attributes:
        identity: what was scanned, as `scanning` says it: `path`, `commit`, `shards`, `engine` and more.
        records: one a matrix.
    """

    identity: Mapping[str, Any]
    records: tuple[Record, ...]


def record_path(result: Path) -> Path:
    """Where the record of a result is, if there is one: beside it."""
    return result.with_suffix(".sqlite")


def read_recorded(path: Path) -> Recorded:
    """Read a record, and leave it as it is.

    Raises:
        ResultError: no_record; locked, a scan is writing it; corrupt.
    """
    if not path.exists():
        raise ResultError(
            f"there is no record at {path}, and a result alone holds no singular values",
            reason="no_record",
            hint="`spectrum-stream scan MODEL` leaves one beside its result",
        )
    with stored_records(path) as stored:
        return Recorded(stored.identity, tuple(stored.records))


def measured(result: Path | Iterable[Record], metric: Metric, seed: int = 0) -> list[Module]:
    """The lines of a result, with what `metric` ranks them by in the place of the score: the largest is chosen first.

    That is the measure, negated where its smaller values are chosen first, and -inf where a matrix has none. A bank
    has the median of its experts'. A condition above 2900 that was scanned in float32 counts as none, since its
    smallest singular value is rounding. Spectrum's own are those of the result, which were computed before the
    singular values were rounded to float32.

    Args:
        result: a result file with its record beside it, or the records.
        seed: of `random`; the others have no use for it.

    Raises:
        ResultError: what `read_results` and `read_recorded` raise; other_record, the record is of other
            scores.
    """
    if not isinstance(result, Path):
        return _measured(result, metric, seed)
    lines = read_results(result)
    if metric is Metric.SPECTRUM:
        return lines
    if metric is Metric.RANDOM:
        return [line._replace(snr=random_value(seed, line.name)) for line in lines]
    # A result can have fewer groups than its record, and is what was asked for.
    records = read_recorded(record_path(result)).records
    if not is_record_of(records, lines):
        raise ResultError(
            f"{record_path(result)} is the record of other scores than {result} has",
            reason="other_record",
            hint="scan the model again with --fresh",
        )
    found = {line.name: line for line in _measured(records, metric, seed)}
    return [found[line.name] for line in lines]


def _measured(records: Iterable[Record], metric: Metric, seed: int) -> list[Module]:
    ordered = in_order(records)
    if metric is Metric.RANDOM:
        return [line._replace(snr=random_value(seed, line.name)) for line in lines_of(ordered)]
    return lines_of([_by(record, metric) for record in ordered])


def value_of(record: Record, metric: Metric) -> float | None:
    """A measure of a matrix, from its singular values; None where it has none."""
    of_spectrum = MEASURES[metric].of_spectrum
    if record.score is None or of_spectrum is None or not len(record.singular_values):
        return None
    value = of_spectrum(record.singular_values, record.n, record.m)
    return (
        None
        if metric is Metric.CONDITION and record.precision == "fp32" and (value or 0) > _FP32_CONDITION
        else value
    )


def _by(record: Record, metric: Metric) -> Record:
    if record.score is None or metric is Metric.SPECTRUM or MEASURES[metric].of_spectrum is None:
        return record
    key = MEASURES[metric].rank_key(value_of(record, metric))
    return replace(record, score=replace(record.score, snr=key))
