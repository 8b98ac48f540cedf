"""The record of a scan: an SQLite file with one row a matrix, and functions that read it without changing it.

    snr_results_{slug}.sqlite   a row for each matrix: its names, score, error estimate and singular values; and a row
                                each for the checkpoint that was scanned and for the names of all of its weights

A record can come with an untrusted result. Every value is checked when it is read.
"""

import contextlib
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from ..errors import ResultError
from ..model.names import module_of
from ..model.no_score import NoScore
from ..numerics.metrics import SPECTRUM, Metric
from ..numerics.precision import Precision
from ..numerics.snr import Degeneracy, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One scanned matrix.

    Attributes:
        module, group, tensor: its names; two modules can share a tensor.
        parameter: the name of the parameter in the trainer, which can hold all experts of a layer.
        quantized: the format of its weights if they were quantized. The score then includes the quantization noise.
        n, m, dtype: its shape and stored dtype.
        no_score, detail: the reason why there is no score, and a clause about it; None and "" with a score.
        precision, device: the precision of its singular values, None without them, and the device that computed them.
        score: None if there is none.
        singular_values: float32, (min(n, m),), descending; empty where there is no score or they were not read.
        compute_s: seconds from the first byte to the score.
    """

    module: str
    parameter: str
    group: str
    tensor: str
    n: int
    m: int
    dtype: str
    no_score: NoScore | None
    detail: str
    precision: Precision | None
    device: str
    score: Score | None
    singular_values: np.ndarray
    compute_s: float
    quantized: str | None = None

    @property
    def result_name(self) -> str:
        """The name in results: the parameter without `.weight`.

        It is the same for all experts of a fused parameter.
        """
        return module_of(self.parameter)

    def value_of(self, metric: Metric) -> float | None:
        """Compute a metric from the singular values; None without a score.

        Spectrum's score is not computed again, because the singular values are rounded to float32.
        """
        if self.score is None:
            return None
        if metric == SPECTRUM:
            return self.score.snr
        return metric.value_of(self.singular_values, self.n, self.m, self.precision)


_NUMBER = (int, float)
# The types that SQLite may return for each column; it accepts a text in a column of numbers.
_TYPES: Mapping[str, tuple[type, ...]] = {
    "module": (str,),
    "parameter": (str,),
    "quantized": (str, NoneType),
    "tensor": (str,),
    "group_name": (str,),
    "n": (int,),
    "m": (int,),
    "dtype": (str,),
    "no_score": (str, NoneType),
    "detail": (str,),
    "precision": (str, NoneType),
    "device": (str,),
    "compute_s": _NUMBER,
}
_SCORE_TYPES: Mapping[str, tuple[type, ...]] = {
    **{field.name: _NUMBER for field in fields(Score)},
    "above": (int,),
    "degeneracy": (str, NoneType),
}
# The spectrum is last, so that SQLite reads the other columns without its pages.
COLUMNS = (*_TYPES, *_SCORE_TYPES, "singular_values")
# Raise it with any change of the columns or of the identity.
SCHEMA_VERSION = 6


def record_path(result: Path) -> Path:
    """Return the path of a result's record: the same with another suffix."""
    return result.with_suffix(".sqlite")


@dataclass(frozen=True, slots=True)
class Records:
    """A record, open for reading.

    Attributes:
        identity: the checkpoint that was scanned: `path`, `commit`, `shards`, `versions`, `engine` and more.
        names: the weights of the model that its headers list, scanned or not.
        weights: the number of weights in all matrices of the model, scanned or not.
        count: the number of rows.
        rows: an iterator over the rows, since a large record does not fit into memory. It ends when the record is
            closed.
    """

    identity: Mapping[str, Any]
    names: tuple[str, ...]
    weights: int
    count: int
    rows: Iterator[Record]


@contextlib.contextmanager
def open_records(path: Path, *, spectra: bool = True) -> Iterator[Records]:
    """Open a record that no scan is writing. Takes no lock and creates no file.

    While a scan writes a record, and after it was killed, the last rows are in a second file. SQLite could merge it
    only by writing, so such a record is not read. A row with a value of a wrong type or out of range is an error, so
    callers need not check it.

    Args:
        spectra: whether to read the singular values, which are most of a record. They are empty otherwise.

    Raises:
        ResultError: no_record; unreadable; corrupt; locked, a scan is writing it or was killed.
    """
    columns = [name if spectra or name != "singular_values" else "NULL" for name in COLUMNS]
    with _connect(path) as db:
        identity = _read_source(db, "identity")
        if not _is_identity(identity):
            raise ValueError("invalid identity")
        names = _read_source(db, "names")
        if not _is_names(names):
            raise ValueError("invalid names")
        (count,) = db.execute("SELECT count(*) FROM matrices").fetchone()
        rows = db.execute(f"SELECT {', '.join(columns)} FROM matrices")
        yield Records(
            identity, tuple(names["names"]), names["weights"], count, (from_row(row, spectra=spectra) for row in rows)
        )


def _read_source(db: sqlite3.Connection, key: str) -> Any:
    (text,) = db.execute("SELECT value FROM source WHERE key = ?", (key,)).fetchone()
    return json.loads(text)


def _is_identity(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("path"), str)
        and isinstance(value.get("commit", ...), (str, NoneType))
        and all(isinstance(value.get(key), dict) for key in ("shards", "versions"))
        and all(isinstance(nbytes, int) and 0 <= nbytes < 2**63 for nbytes in value["shards"].values())
        and not any("\0" in name for name in (value["path"], *value["shards"]))
        and isinstance(value.get("engine"), int)
        and isinstance(value.get("names"), str)
        and isinstance(value.get("names_sha256", ...), (str, NoneType))
    )


def _is_names(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("names"), list)
        and all(isinstance(name, str) for name in value["names"])
        and type(value.get("weights")) is int
    )


@contextlib.contextmanager
def _connect(path: Path) -> Iterator[sqlite3.Connection]:
    before = _check_unused(path)
    try:
        # SQLite neither locks an immutable file nor looks for a journal, so this function checks both itself.
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as db:
            if db.execute("PRAGMA user_version").fetchone() != (SCHEMA_VERSION,):
                raise ValueError("another version")
            yield db
    except (sqlite3.Error, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        _check_unused(path)
        raise ResultError(
            f"{path} is damaged or not a record of this version",
            reason="corrupt",
            hint="start over with --fresh",
        ) from error
    if _check_unused(path) != before:
        raise _in_use(path)


def _check_unused(path: Path) -> tuple[int, int]:
    """Raise if a scan is writing a record.

    Return its size and time, which change when one does.
    """
    try:
        found = path.stat()
        if path.with_name(f"{path.name}-wal").exists():
            raise _in_use(path)
    except FileNotFoundError as error:
        raise ResultError(
            f"there is no record at {path}, and only a record has singular values",
            reason="no_record",
            hint="`spectrum-stream scan MODEL` writes one next to its result",
        ) from error
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}", reason="unreadable") from error
    return found.st_size, found.st_mtime_ns


def _in_use(path: Path) -> ResultError:
    return ResultError(
        f"{path} is in use by a scan, or its scan was killed",
        reason="locked",
        hint="wait for the end of the scan, or run it again",
    )


def to_row(record: Record) -> tuple[Any, ...]:
    """Return the values of `COLUMNS`."""
    score = record.score
    values = {
        **{name: getattr(record, name) for name in _TYPES if name != "group_name"},
        **{name: None if score is None else getattr(score, name) for name in _SCORE_TYPES},
        "group_name": record.group,
        "singular_values": record.singular_values.astype("<f4").tobytes(),
    }
    return tuple(values[name] for name in COLUMNS)


def from_row(row: tuple[Any, ...], *, spectra: bool = True) -> Record:
    """Make a record of the values of `COLUMNS`.

    Without `spectra`, ignore the last one.

    Raises:
        ValueError, TypeError: a value is of a wrong type or out of range.
    """
    values = dict(zip(COLUMNS, row, strict=True))
    spectrum, group = values.pop("singular_values"), values["group_name"]
    score_values = {name: values.pop(name) for name in _SCORE_TYPES}
    _check_types(values, _TYPES)
    score = None
    if any(value is not None for value in score_values.values()):
        _check_types(score_values, _SCORE_TYPES)
        degeneracy = score_values["degeneracy"]
        score_values["degeneracy"] = None if degeneracy is None else Degeneracy(degeneracy)
        score = Score(**score_values)
    del values["group_name"]
    values["no_score"] = None if values["no_score"] is None else NoScore(values["no_score"])
    values["precision"] = None if values["precision"] is None else Precision(values["precision"])
    s = np.frombuffer(spectrum if spectra else b"", dtype="<f4")
    record = Record(**values, group=group, score=score, singular_values=s)
    _check_ranges(record, spectra=spectra)
    return record


def _check_types(values: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]) -> None:
    for name, value in values.items():
        if not isinstance(value, types[name]):
            raise ValueError(f"{name} has a wrong type")


def _check_ranges(record: Record, *, spectra: bool) -> None:
    s, score = record.singular_values, record.score
    count = 0 if score is None else min(record.n, record.m)
    is_sound = (
        record.n > 0
        and record.m > 0
        and (score is None or 0 <= score.above <= count)
        and (score is None or all(map(math.isfinite, (score.snr, score.sigma, score.beta, score.tau))))
        and (not spectra or len(s) == count)
        and bool(np.isfinite(s).all() and (s >= 0).all() and (np.diff(s) <= 0).all())
    )
    if not is_sound:
        raise ValueError("a value is out of range")
