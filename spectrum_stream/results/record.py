"""What a scan recorded of each matrix, as rows of an SQLite file, and how such a file is read without touching it."""

import contextlib
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ResultError
from ..model.matrix import NoScore
from ..model.names import module_of
from ..numerics.precision import Precision
from ..numerics.snr import Degeneracy, Score


@dataclass(frozen=True, slots=True)
class Record:
    """One matrix, scanned.

    Attributes:
        module, group, tensor: its names; two modules can share a tensor.
        parameter: the name that a trainer trains it by, alone or as a part of a bank of experts.
        quantized: how its weights were stored, if not as themselves; the noise of that is in the score.
        n, m, dtype: its shape and stored dtype.
        no_score, detail: why there is no score, None where there is one, and a clause about what went wrong.
        precision, device: how and where its singular values were computed; no precision where they were not.
        score: None where there is none.
        singular_values: float32, (min(n, m),), descending; empty where there are none.
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
        """The name that results use: the parameter without `.weight`, the same for all experts of a fused one."""
        return module_of(self.parameter)


_SCORE_COLUMNS = [field.name for field in fields(Score)]
_NUMBERS = [name for name in _SCORE_COLUMNS if name != "degeneracy"]
COLUMNS = [
    "module",
    "parameter",
    "quantized",
    "tensor",
    "group_name",
    "n",
    "m",
    "dtype",
    "no_score",
    "detail",
    "precision",
    "device",
    "compute_s",
    "singular_values",
    *_SCORE_COLUMNS,
]
# Raise it with any change of the columns or of the identity.
SCHEMA_VERSION = 6


def read_records(path: Path, *, spectra: bool = True) -> dict[str, Record]:
    """All rows of a record that no scan has open, by module. Takes no lock and creates no file.

    A record that is open, or that was left by a scan that was killed, has its last rows in a journal beside it, and
    SQLite could only read that by writing. It is refused.

    Args:
        spectra: with the singular values; they are most of a record. Without, they are empty.

    Raises:
        ResultError: no_such_result, unreadable, corrupt; locked, a scan has it open or did not end.
    """
    with stored_records(path, spectra=spectra) as stored:
        return {record.module: record for record in stored.records}


@dataclass(frozen=True, slots=True)
class Stored:
    """A record that is being read.

    Attributes:
        identity: what was scanned, as `Journal` was told.
        names: of all of the model's weights that its headers tell, scanned or not.
        weights: how many numbers all of the model's matrices have, scanned or not.
        count: of its rows.
        records: those, one by one: a large record does not fit memory. Within the context, and once.
    """

    identity: Mapping[str, Any]
    names: tuple[str, ...]
    weights: int
    count: int
    records: Iterator[Record]


@contextlib.contextmanager
def stored_records(path: Path, *, spectra: bool = True) -> Iterator[Stored]:
    """Read a record row by row, as `read_records`, and raise as that does.

    What a row has is of its type and in its range, or the record is corrupt: no reader has to look again.
    """
    columns = [name if spectra or name != "singular_values" else "x'' AS singular_values" for name in COLUMNS]
    with _reading(path) as db:
        identity = json.loads(db.execute("SELECT value FROM source WHERE key = 'identity'").fetchone()[0])
        if not _is_identity(identity):
            raise ValueError("not what was scanned")
        (count,) = db.execute("SELECT count(*) FROM matrices").fetchone()
        rows = db.execute(f"SELECT {', '.join(columns)} FROM matrices")
        yield Stored(dict(identity), *_names(db), count, (_sound(from_row(row), spectra) for row in rows))


def _is_identity(identity: Any) -> bool:
    return (
        isinstance(identity, dict)
        and isinstance(identity.get("path"), str)
        and isinstance(identity.get("commit", ...), (str, type(None)))
        and all(isinstance(identity.get(key), dict) for key in ("shards", "versions"))
        and all(isinstance(nbytes, int) and 0 <= nbytes < 2**63 for nbytes in identity["shards"].values())
        and not any("\0" in name for name in (identity["path"], *identity["shards"]))
        and isinstance(identity.get("engine"), int)
        and isinstance(identity.get("names"), str)
        and isinstance(identity.get("names_sha256", ...), (str, type(None)))
    )


def _sound(record: Record, spectra: bool) -> Record:
    """The record, if everything in it is of its type and in its range; else ValueError.

    SQLite keeps a text where a number belongs, and a record can come from a stranger, together with his result.
    """
    s, score = record.singular_values, record.score
    count = 0 if score is None else min(record.n, record.m)
    texts = (record.module, record.parameter, record.group, record.tensor, record.dtype, record.detail, record.device)
    numbers = (record.compute_s, *(() if score is None else (getattr(score, name) for name in _NUMBERS)))
    is_sound = (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(text, (str, type(None))) for text in (record.precision, record.quantized))
        and all(isinstance(number, (int, float)) for number in numbers)
        and all(isinstance(side, int) and side > 0 for side in (record.n, record.m))
        and (score is None or (isinstance(score.above, int) and 0 <= score.above <= count))
        and (score is None or all(map(math.isfinite, (score.snr, score.sigma, score.beta, score.tau))))
        and (not spectra or len(s) == count)
        and bool(np.isfinite(s).all() and (s >= 0).all() and (np.diff(s) <= 0).all())
    )
    if not is_sound:
        raise ValueError("what no scan writes")
    return record


def _names(db: sqlite3.Connection) -> tuple[tuple[str, ...], int]:
    row = db.execute("SELECT value FROM source WHERE key = 'names'").fetchone()
    kept = json.loads(row[0])
    names, weights = kept["names"], kept["weights"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or type(weights) is not int:
        raise TypeError("names that are none")
    return tuple(names), weights


def read_identity(path: Path) -> dict[str, Any]:
    """What was scanned, as `Journal` was told. Reads and raises as `read_records`."""
    with stored_records(path, spectra=False) as stored:
        return dict(stored.identity)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    before = _at_rest(path)
    try:
        # Immutable: SQLite then neither locks nor looks for a journal. That nothing was written is checked here.
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as db:
            if db.execute("PRAGMA user_version").fetchone() != (SCHEMA_VERSION,):
                raise ValueError("another version")
            yield db
    except (sqlite3.Error, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        _at_rest(path)
        raise ResultError(
            f"{path} is damaged or not a record of this version's scans",
            reason="corrupt",
            hint="start over with --fresh",
        ) from error
    if _at_rest(path) != before:
        raise _open_elsewhere(path)


def _at_rest(path: Path) -> tuple[int, int]:
    """What changes when the record is written to; raises where that may be going on."""
    try:
        found = path.stat()
        if path.with_name(f"{path.name}-wal").exists():
            raise _open_elsewhere(path)
    except FileNotFoundError as error:
        raise ResultError(f"there is no record at {path}", reason="no_such_result") from error
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}", reason="unreadable") from error
    return found.st_size, found.st_mtime_ns


def _open_elsewhere(path: Path) -> ResultError:
    return ResultError(
        f"{path} is in use by a scan, or a scan of it was killed",
        reason="locked",
        hint="let the scan end, or run it again",
    )


def to_row(record: Record) -> tuple[Any, ...]:
    score = record.score
    return (
        record.module,
        record.parameter,
        record.quantized,
        record.tensor,
        record.group,
        record.n,
        record.m,
        record.dtype,
        record.no_score,
        record.detail,
        record.precision,
        record.device,
        record.compute_s,
        record.singular_values.astype("<f4").tobytes(),
        # SQLite stores infinities, and an enum is a str.
        *(None if score is None else getattr(score, name) for name in _SCORE_COLUMNS),
    )


def from_row(row: tuple[Any, ...]) -> Record:
    values = dict(zip(COLUMNS, row, strict=True))
    score = None
    if values["snr"] is not None:
        degeneracy = values["degeneracy"]
        score = Score(
            **{name: values[name] for name in _SCORE_COLUMNS if name != "degeneracy"},
            degeneracy=None if degeneracy is None else Degeneracy(degeneracy),
        )
    return Record(
        module=values["module"],
        parameter=values["parameter"],
        quantized=values["quantized"],
        group=values["group_name"],
        tensor=values["tensor"],
        n=values["n"],
        m=values["m"],
        dtype=values["dtype"],
        no_score=None if values["no_score"] is None else NoScore(values["no_score"]),
        detail=values["detail"],
        precision=None if values["precision"] is None else Precision(values["precision"]),
        device=values["device"],
        score=score,
        singular_values=np.frombuffer(values["singular_values"], dtype="<f4"),
        compute_s=values["compute_s"],
    )
