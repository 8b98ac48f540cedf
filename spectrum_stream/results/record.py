"""The record of a scan: an SQLite file with one row a matrix, and functions that read it without changing it.

    snr_results_{slug}.sqlite   a row for each matrix: its names, score, error estimate and singular values; and a row
                                each for the checkpoint that was scanned and for the names of all of its weights

A record can come with an untrusted result, so it is data and never code. It is opened for reading only, its schema
must be ours to the letter, SQLite works within limits, and every value is checked when it is read.
"""

import contextlib
import math
import os
import sqlite3
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from types import NoneType
from typing import Any

import numpy as np

from ..checkpoint.header import DTYPE_BITS
from ..errors import ResultError
from ..files import parse_json
from ..model.names import module_of
from ..model.no_score import NoScore
from ..numerics.metrics import SPECTRUM, Metric
from ..numerics.precision import Precision
from ..numerics.snr import Degeneracy, Score, is_score_of
from ..text import printable
from . import atomic

# The relative distance of float32 numbers, in which singular values are recorded.
FLOAT32_STEP = 2.0**-23
_LAST = "singular_values"
_NO_VALUES = np.empty(0, dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One scanned matrix.

    Attributes:
        module, group, tensor: its names; two modules can share a tensor.
        parameter: the name of the parameter in the trainer, which can hold all experts of a layer.
        quantized: the format of its weights if they were quantized. The score then includes the quantization noise.
        n, m, dtype: its shape and stored dtype.
        no_score: the reason why there is no score; None with a score.
        detail: a clause about that reason. With a score, the reason why it was computed again; "" in most cases.
        precision, device: the precision of its singular values, None without them, and the device that computed them.
        refined: the number of singular values that were refined.
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
    refined: int = 0
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
    "refined": (int,),
    "device": (str,),
    "compute_s": _NUMBER,
}
_SCORE_TYPES: Mapping[str, tuple[type, ...]] = {
    **{field.name: _NUMBER for field in fields(Score)},
    "above": (int,),
    "degeneracy": (str, NoneType),
}
# The spectrum is last, so that SQLite reads the other columns without its pages.
COLUMNS = (*_TYPES, *_SCORE_TYPES, _LAST)
# Raise it with any change of the columns or of the identity.
SCHEMA_VERSION = 8

TABLES = (
    f"CREATE TABLE matrices ({', '.join(COLUMNS)}, PRIMARY KEY (module))",
    "CREATE TABLE source (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
)
# A complete record has these entries and no other: no view, trigger or index can run while it is read or written.
_SCHEMA = [
    *[("index", f"sqlite_autoindex_{name}_1", name, None) for name in ("matrices", "source")],
    *[("table", name, name, sql) for name, sql in zip(("matrices", "source"), TABLES, strict=True)],
]

# Limits of every record. README.md has a table with the reasons.
MAX_ROWS = 400_000
MAX_NBYTES = 4_000_000_000
_MAX_NAME_LENGTH = 65_536
_MAX_WORD_LENGTH = 1_000
_MAX_SIDE = 2**40
# The names of 300,000 tensors are 30 MB.
_MAX_VALUE_NBYTES = 50_000_000
_LIMITS: Mapping[str, int] = {
    "SQLITE_LIMIT_LENGTH": _MAX_VALUE_NBYTES,
    "SQLITE_LIMIT_SQL_LENGTH": 10_000,
    "SQLITE_LIMIT_COLUMN": 100,
    "SQLITE_LIMIT_EXPR_DEPTH": 20,
    "SQLITE_LIMIT_COMPOUND_SELECT": 2,
    "SQLITE_LIMIT_VDBE_OP": 10_000,
    "SQLITE_LIMIT_FUNCTION_ARG": 10,
    "SQLITE_LIMIT_ATTACHED": 0,
    "SQLITE_LIMIT_LIKE_PATTERN_LENGTH": 100,
    "SQLITE_LIMIT_VARIABLE_NUMBER": 100,
    "SQLITE_LIMIT_TRIGGER_DEPTH": 1,
    "SQLITE_LIMIT_WORKER_THREADS": 0,
}
# Steps of SQLite's virtual machine: for the schema, and for each row. A row takes about sixty.
_SCHEMA_STEPS = 100_000
_ROW_STEPS = 200
_STEPS_AT_ONCE = 10_000


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
        ResultError: no_record; not_a_file, unreadable; corrupt, damaged or not a record of
            this version or above its limits; locked, a scan is writing it or was killed.
    """
    with _connect(path) as (db, nbytes):
        identity, names, weights = read_source(db)
        yield Records(identity, tuple(names), weights, count_rows(db), read_rows(db, nbytes, spectra=spectra))


def protect(db: sqlite3.Connection) -> None:
    """Set limits for an untrusted database; nothing in its schema can run or do harm."""
    for name, limit in _LIMITS.items():
        db.setlimit(getattr(sqlite3, name), limit)
    # Python 3.11 cannot set these. The check of the schema also rejects triggers and views.
    for name, value in (("DEFENSIVE", True), ("ENABLE_TRIGGER", False), ("ENABLE_VIEW", False)):
        if (option := getattr(sqlite3, f"SQLITE_DBCONFIG_{name}", None)) is not None:
            db.setconfig(option, value)  # type: ignore[attr-defined, unused-ignore]
    limit_steps(db, _SCHEMA_STEPS)
    db.execute("PRAGMA trusted_schema = OFF")
    db.execute("PRAGMA cell_size_check = ON")
    db.execute("PRAGMA mmap_size = 0")


def limit_steps(db: sqlite3.Connection, steps: int = MAX_ROWS * _ROW_STEPS) -> None:
    """Interrupt the statements of a connection after so many steps, all together."""
    left = steps // _STEPS_AT_ONCE

    def is_over() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    db.set_progress_handler(is_over, _STEPS_AT_ONCE)


def check_schema(db: sqlite3.Connection) -> None:
    """Raise a ValueError unless a database has exactly the tables of a record of this version."""
    # The header of a database can ask for a cache of any size. This reads the header, and then sets 2 MB.
    db.execute("PRAGMA cache_size = -2000")
    if db.execute("PRAGMA user_version").fetchone() != (SCHEMA_VERSION,):
        raise ValueError("another version")
    found = db.execute(f"SELECT type, name, tbl_name, sql FROM sqlite_master LIMIT {len(_SCHEMA) + 1}").fetchall()
    if sorted(found, key=repr) != sorted(_SCHEMA, key=repr):
        raise ValueError("another schema")


def read_source(db: sqlite3.Connection) -> tuple[dict[str, Any], list[str], int]:
    """Read the identity, the names and the number of weights.

    Raises:
        ValueError, TypeError, sqlite3.Error: one is missing or has wrong types.
    """
    identity, names = (_read_json(db, key) for key in ("identity", "names"))
    if not _is_identity(identity):
        raise ValueError("invalid identity")
    if not _is_names(names):
        raise ValueError("invalid names")
    return identity, names["names"], names["weights"]


def count_rows(db: sqlite3.Connection) -> int:
    """Count the rows, in less time than it takes to read them.

    Raises:
        ValueError: there are too many. sqlite3.Error.
    """
    # SQLite counts a whole table in one step, which the limit of steps cannot stop. It counts row by row if it
    # has to read a column.
    some = f"SELECT module FROM matrices NOT INDEXED LIMIT {MAX_ROWS + 1}"
    (count,) = db.execute(f"SELECT count(*) FROM ({some})").fetchone()
    if count > MAX_ROWS:
        raise ValueError("too many rows")
    return int(count)


def read_rows(db: sqlite3.Connection, nbytes: int, *, spectra: bool = True) -> Iterator[Record]:
    """Read all rows.

    Args:
        nbytes: the size of the files. Pages of a damaged database can be part of many rows, so that a small file has
            endless ones.

    Raises, from the iteration:
        ValueError, TypeError, sqlite3.Error: a value is of a wrong type or out of range, a module occurs twice, or
        the record is above a limit.
    """
    last = _LAST if spectra else f"CASE typeof({_LAST}) WHEN 'blob' THEN length({_LAST}) END"
    rows = db.execute(f"SELECT {', '.join(COLUMNS[:-1])}, {last} FROM matrices NOT INDEXED")
    if nbytes > MAX_NBYTES:
        raise ValueError("too large")
    seen: set[str] = set()
    left = nbytes
    for count, row in enumerate(rows, 1):
        record = from_row(row, spectra=spectra)
        left -= len(record.module) + len(record.parameter) + len(record.tensor) + len(record.group)
        left -= len(record.detail) + record.singular_values.nbytes
        seen.add(record.module)
        if len(seen) < count or left < 0:
            raise ValueError("a row occurs twice")
        yield record


def _read_json(db: sqlite3.Connection, key: str) -> Any:
    row = db.execute("SELECT value FROM source WHERE key = ?", (key,)).fetchone()
    if row is None or not isinstance(row[0], str):
        raise ValueError(f"no {key}")
    return parse_json(row[0])


def _is_identity(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_word(value.get("path"), _MAX_NAME_LENGTH)
        and (value.get("commit", ...) is None or _is_word(value["commit"]))
        and all(isinstance(value.get(key), dict) for key in ("shards", "versions"))
        and all(_is_word(name) and _is_inside(name) for name in (*value["shards"], *value["versions"]))
        and all(type(nbytes) is int and 0 <= nbytes < 2**63 for nbytes in value["shards"].values())
        and all(_is_version(version) for version in value["versions"].values())
        and type(value.get("engine")) is int
        and _is_word(value.get("names"))
        and (value.get("names_sha256", ...) is None or _is_word(value["names_sha256"]))
    )


def _is_word(value: Any, limit: int = _MAX_WORD_LENGTH) -> bool:
    return isinstance(value, str) and 0 < len(value) <= limit and "\0" not in value and _is_encodable(value)


def _is_encodable(text: str) -> bool:
    """Whether a text can be a part of a path.

    JSON can express half of a surrogate pair, and a path cannot.
    """
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _is_inside(shard: str) -> bool:
    """Whether the name of a shard stays inside the folder of its checkpoint."""
    path = PurePath(shard)
    return not path.anchor and ".." not in path.parts


def _is_version(value: Any) -> bool:
    # The time and the inode of a shard, as a list because JSON has no tuples.
    return isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)


def _is_names(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("names"), list)
        and all(isinstance(name, str) and len(name) <= _MAX_NAME_LENGTH for name in value["names"])
        and _is_encodable("".join(value["names"]))
        and type(value.get("weights")) is int
        and value["weights"] >= 0
    )


@contextlib.contextmanager
def _connect(path: Path) -> Iterator[tuple[sqlite3.Connection, int]]:
    """Open a database for reading, and give its size."""
    before = _check_unused(path)
    try:
        # SQLite neither locks an immutable file nor plays back a journal, so this function checks both itself.
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as db:
            protect(db)
            check_schema(db)
            limit_steps(db)
            yield db, before[0]
    except (sqlite3.Error, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        _check_unused(path)
        raise corrupt(path) from error
    if _check_unused(path) != before:
        raise _in_use(path)


def _check_unused(path: Path) -> tuple[int, int]:
    """Raise if a record is not a file, or a scan is writing it.

    Return its size and time, which change when one does.
    """
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise ResultError(
            f"there is no record at {path}, and only a record has singular values",
            reason="no_record",
            hint="`spectrum-stream scan MODEL` writes one next to its result",
        ) from error
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}", reason="unreadable") from error
    if not stat.S_ISREG(found.st_mode):
        raise ResultError(f"{path} is not a regular file", reason="not_a_file")
    # If the record is a link, the files that SQLite keeps next to a database are next to the target.
    wal, _, journal = atomic.companions(Path(os.path.realpath(path)))
    if os.path.lexists(wal):
        raise _in_use(path)
    if os.path.lexists(journal):
        raise foreign_journal(journal)
    return found.st_size, found.st_mtime_ns


def corrupt(path: Path) -> ResultError:
    return ResultError(
        f"{path} is damaged or not a record of this version", reason="corrupt", hint="start over with --fresh"
    )


def foreign_journal(journal: Path) -> ResultError:
    # SQLite would play it back into the record, and delete the files that it names.
    return ResultError(
        f"{journal} is next to a record, and scans leave no such file",
        reason="corrupt",
        hint="delete it, or start over with --fresh",
    )


def _in_use(path: Path) -> ResultError:
    return ResultError(
        f"{path} is in use by a scan, or its scan was killed",
        reason="locked",
        hint="wait for the end of the scan, or run it again",
    )


def follows_from_spectrum(record: Record) -> bool:
    """Whether the score of a record is the one of its singular values, as far as float32 can tell.

    Without a score there is nothing to follow.
    """
    found = record.score
    return found is None or is_score_of(
        found, record.singular_values.astype(np.float64), record.n, record.m, rounding=FLOAT32_STEP / 2
    )


def to_row(record: Record) -> tuple[Any, ...]:
    """Return the values of `COLUMNS`."""
    score = record.score
    values = {
        **{name: getattr(record, name) for name in _TYPES if name != "group_name"},
        **{name: None if score is None else getattr(score, name) for name in _SCORE_TYPES},
        "group_name": record.group,
        "detail": printable(record.detail)[: _MAX_WORD_LENGTH // 2],
        "singular_values": record.singular_values.astype("<f4").tobytes(),
    }
    return tuple(values[name] for name in COLUMNS)


def from_row(row: tuple[Any, ...], *, spectra: bool = True) -> Record:
    """Make a record of the values of `COLUMNS`.

    Without `spectra`, the last one is the size of the singular values in bytes.

    Raises:
        ValueError, TypeError: a value is of a wrong type or out of range.
    """
    values = dict(zip(COLUMNS, row, strict=True))
    last, group = values.pop(_LAST), values["group_name"]
    score_values = {name: values.pop(name) for name in _SCORE_TYPES}
    _check_types(values, _TYPES)
    found = None
    if any(value is not None for value in score_values.values()):
        _check_types(score_values, _SCORE_TYPES)
        degeneracy = score_values["degeneracy"]
        score_values["degeneracy"] = None if degeneracy is None else Degeneracy(degeneracy)
        found = Score(**score_values)
    del values["group_name"]
    values["no_score"] = None if values["no_score"] is None else NoScore(values["no_score"])
    values["precision"] = None if values["precision"] is None else Precision(values["precision"])
    s, nbytes = _NO_VALUES, last
    if spectra:
        if not isinstance(last, bytes):
            raise ValueError("the singular values have a wrong type")
        s, nbytes = np.frombuffer(last, dtype="<f4"), len(last)
    record = Record(**values, group=group, score=found, singular_values=s)
    _check_ranges(record, nbytes)
    # Every comparison with a NaN is false.
    if len(s) and not (s[0] < math.inf and s[-1] >= 0 and (s[1:] <= s[:-1]).all()):
        raise ValueError("the singular values are not a spectrum")
    return record


def _check_types(values: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]) -> None:
    for name, value in values.items():
        if not isinstance(value, types[name]):
            raise ValueError(f"{name} has a wrong type")


def _check_ranges(record: Record, spectrum_nbytes: object) -> None:
    found, n, m = record.score, record.n, record.m
    names = (record.module, record.parameter, record.tensor, record.group)
    words = f"{record.detail}{record.device}{record.quantized}"
    is_sound = (
        0 < n <= _MAX_SIDE
        and 0 < m <= _MAX_SIDE
        and (found is None) == (record.precision is None) == (record.no_score is not None)
        and spectrum_nbytes == (0 if found is None else 4 * min(n, m))
        and 0 <= record.refined <= (0 if found is None else min(n, m))
        and 0 <= record.compute_s < math.inf
        and max(map(len, names)) <= _MAX_NAME_LENGTH
        and len(words) <= _MAX_WORD_LENGTH
        and words.isprintable()
        and record.dtype in DTYPE_BITS
        and (found is None or _is_sound(found, n, m))
    )
    if not is_sound:
        raise ValueError("a value is out of range")


def _is_sound(found: Score, n: int, m: int) -> bool:
    # SQLite has no NaN. The error and the two last ones may be infinite.
    return (
        0 <= found.snr < math.inf
        and found.error >= 0
        and 0 <= found.sigma < math.inf
        and 0 <= found.tau < math.inf
        and math.isclose(found.beta, min(n, m) / max(n, m), rel_tol=1e-9)
        and 0 <= found.above <= min(n, m)
        and found.margin >= 0
        and found.sigma1_over_q25 >= 0
    )
