"""What is on disk: the record of a scan (SQLite) and the results that Spectrum's readers take (JSON).

    snr_results_{slug}.sqlite   one row a matrix, written as it is done: its singular values, the score's
                                diagnostics, its status; and one row for what was scanned. The journal while
                                the scan runs, the record afterwards.
    snr_results_{slug}.json     {module: {"snr": number, "type": group}}, for Axolotl and Spectrum itself

SQLite because it is crash-safe, locked, and in the standard library. The JSON appears whole or not at all.
"""

import contextlib
import json
import logging
import math
import os
import socket
import sqlite3
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from . import durable
from .durable import write_atomically
from .errors import ResultError
from .naming import group_order, model_order
from .snr import Degeneracy, Score

_log = logging.getLogger("spectrum_stream")

# The largest published result (28,800 modules) is 3 MB.
MAX_RESULT_NBYTES = 200_000_000
# Long enough for another scan to finish a row, short enough not to look like a hang.
_LOCK_WAIT_S = 1.0


class Status(StrEnum):
    """What became of a matrix."""

    OK = "ok"
    NOT_FINITE = "not_finite"  # the weights hold NaN or Inf
    OUT_OF_RANGE = "out_of_range"  # finite, but their squares do not fit the method that was asked for
    NO_CONVERGENCE = "no_convergence"  # LAPACK gave up


@dataclass(frozen=True, slots=True)
class Record:
    """One matrix, scanned.

    Attributes:
        module, group, tensor: its names; two modules can share a tensor.
        bank: the bank of experts that it is a part of, which is what a trainer freezes; None for all others.
        n, m, dtype: its shape and stored dtype.
        status, detail: what became of it, and a clause about what went wrong.
        method, device: how and where its singular values were computed; no method where they were not.
        score: None where there is none.
        singular_values: float32, (min(n, m),), descending; empty where there are none.
        compute_s: seconds from the first byte to the score.
    """

    module: str
    group: str
    tensor: str
    n: int
    m: int
    dtype: str
    status: Status
    detail: str
    method: str | None
    device: str
    score: Score | None
    singular_values: np.ndarray
    compute_s: float
    bank: str | None = None


class Scored(NamedTuple):
    """A module's line in a result: all that a selection needs."""

    module: str
    group: str
    snr: float


_SCORE_COLUMNS = [field.name for field in fields(Score)]
_COLUMNS = [
    "module",
    "bank",
    "tensor",
    "group_name",
    "n",
    "m",
    "dtype",
    "status",
    "detail",
    "method",
    "device",
    "compute_s",
    "singular_values",
    *_SCORE_COLUMNS,
]
# Raise it with any change of the tables.
_SCHEMA_VERSION = 2
_SCHEMA = f"""
PRAGMA user_version = {_SCHEMA_VERSION};
CREATE TABLE IF NOT EXISTS source (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS matrices ({", ".join(_COLUMNS)}, PRIMARY KEY (module));
"""


class Store:
    """The record of one model, open for writing by one process at a time. A context manager."""

    def __init__(self, path: Path, identity: Mapping[str, Any], *, fresh: bool = False, wait: bool = False) -> None:
        """Open the record at `path`, or start it.

        Args:
            identity: what the rows depend on: `path`, the checkpoint; the size and time of each shard; the
                options and the version that change a number. Rows made for another state of the same
                checkpoint are dropped.
            fresh: replace what is there if it is damaged or another checkpoint's.
            wait: for a scan that holds it, instead of raising.

        Raises:
            ResultError: other_model, the record is of another checkpoint; locked; corrupt; unwritable.
        """
        self.path = path
        self.dropped = 0
        # Says who has the record open, for others to read. The lock itself is SQLite's, and ends with the process.
        self._holder = path.with_name(f".{path.stem}.holder")
        told = False
        while True:
            try:
                self._open(identity, fresh)
                break
            except ResultError as error:
                if error.reason == "corrupt" and fresh:
                    for leftover in (path, path.with_name(f"{path.name}-wal")):
                        leftover.unlink(missing_ok=True)
                    fresh = False
                elif error.reason == "locked" and wait:
                    if not told:
                        _log.warning("%s; waiting for it to end", error)
                    told = True
                else:
                    raise
        with contextlib.suppress(OSError):
            self._holder.write_text(f"{os.getpid()} {socket.gethostname()}", "utf-8")

    def _open(self, identity: Mapping[str, Any], fresh: bool) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, isolation_level=None, timeout=_LOCK_WAIT_S)
        except (OSError, sqlite3.OperationalError) as error:
            raise ResultError(f"{self.path} cannot be written: {error}", reason="unwritable") from error
        try:
            with self._faults():
                # Exclusive: one scan at a time, and no shared memory file, which network file systems lack.
                self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = NORMAL")
                self._check_version()
                self._db.executescript(_SCHEMA)
                self._adopt(dict(identity), fresh)
        except BaseException:
            self._db.close()
            raise

    def records(self) -> dict[str, Record]:
        """All rows, by module."""
        with self._faults():
            rows = self._db.execute(f"SELECT {', '.join(_COLUMNS)} FROM matrices").fetchall()
            return {record.module: record for record in map(_from_row, rows)}

    def drop(self, modules: Iterable[str]) -> None:
        """Forget the rows of some modules; they are to be computed again."""
        with self._faults():
            self._db.executemany("DELETE FROM matrices WHERE module = ?", [(module,) for module in modules])

    def add(self, record: Record) -> None:
        """Write one row, or replace it; it is there for good when this returns, even if the process dies."""
        marks = ", ".join("?" * len(_COLUMNS))
        with self._faults():
            durable.before("commit", self.path)
            self._db.execute(f"INSERT OR REPLACE INTO matrices VALUES ({marks})", _to_row(record))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        durable.before("close", self.path)
        self._holder.unlink(missing_ok=True)
        self._db.close()

    def _check_version(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and version != _SCHEMA_VERSION:
            raise ResultError(
                f"{self.path} is the record of another version of this program, or of another program",
                reason="corrupt",
                hint="start over with --fresh",
            )

    def _adopt(self, identity: dict[str, Any], fresh: bool) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        row = self._db.execute("SELECT value FROM source WHERE key = 'identity'").fetchone()
        stored = json.loads(row[0]) if row else None
        if stored is not None and not fresh and stored["path"] != identity["path"]:
            raise ResultError(
                f"{self.path} is the record of another checkpoint, {stored['path']}",
                reason="other_model",
                hint="give this one a name with --name, or start over with --fresh",
            )
        if stored != json.loads(json.dumps(identity)):
            self.dropped = self._db.execute("DELETE FROM matrices").rowcount
            self._db.execute("INSERT OR REPLACE INTO source VALUES ('identity', ?)", (json.dumps(identity),))
        self._db.execute("COMMIT")

    def _held_by(self) -> str:
        try:
            with self._holder.open(encoding="utf-8") as file:
                pid, _, host = file.read(300).partition(" ")
        except (OSError, ValueError):
            return ""
        return f", process {pid} on {host}" if pid.isdecimal() and host else ""

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise ResultError(f"{self.path} cannot be written: {error}", reason="unwritable") from error
            raise ResultError(
                f"{self.path} is in use by another scan{self._held_by()}",
                reason="locked",
                hint="--wait waits for it to end",
            ) from error
        except OSError as error:
            raise ResultError(f"{self.path} cannot be written: {error.strerror}", reason="unwritable") from error
        except (sqlite3.DatabaseError, ValueError, KeyError, TypeError) as error:
            raise ResultError(
                f"{self.path} is damaged or not a record of a scan",
                reason="corrupt",
                hint="start over with --fresh",
            ) from error


def write_results(path: Path, records: Iterable[Record]) -> None:
    """Publish the JSON: Spectrum's schema and nothing else, in Spectrum's order; failed matrices are left out."""
    write_atomically(
        path,
        json.dumps(
            {line.module: {"snr": line.snr, "type": line.group} for line in lines_of(in_order(records))},
            indent=4,
            allow_nan=False,
        ),
    )


def lines_of(records: Iterable[Record]) -> list[Scored]:
    """The lines of a result: a module each, and one for a whole bank of experts.

    A bank is frozen as one, so it has one score: the median of its experts', which a few odd ones do not move. It
    has none while an expert has none.
    """
    banks: dict[str, list[Record]] = {}
    lines: dict[str, Scored | None] = {}
    for record in records:
        name = record.bank or record.module
        if record.bank is not None:
            banks.setdefault(name, []).append(record)
        # A bank is where its first expert is.
        lines.setdefault(name, None)
        if record.bank is None and record.score is not None:
            lines[name] = Scored(name, record.group, record.score.snr)
    for name, experts in banks.items():
        scores = [expert.score.snr for expert in experts if expert.score is not None]
        if len(scores) == len(experts):
            lines[name] = Scored(name, experts[0].group, statistics.median(scores))
    return [line for line in lines.values() if line is not None]


def in_order(records: Iterable[Record]) -> list[Record]:
    """In the order of Spectrum's files: groups sorted, the modules of a group as the model has them."""
    return sorted(records, key=lambda r: (group_order(r.group), model_order(r.module)))


def read_results(path: Path) -> list[Scored]:
    """The modules of a result file, ours or one published with Spectrum, in the file's order.

    Infinity, which older ones hold where the noise set was empty, is read as such, and ranks first as it
    does in Spectrum; NaN ranks last. Files in the schema of `_sorted.json`, which Spectrum itself cannot read,
    are read too.

    Raises:
        ResultError: no_such_result, unreadable, too_large, not_a_result.
    """
    try:
        if path.stat().st_size > MAX_RESULT_NBYTES:
            raise ResultError(f"{path} is too large for a result", reason="too_large")
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ResultError(f"there is no result at {path}", reason="no_such_result") from error
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}", reason="unreadable") from error
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{path} is not JSON", reason="not_a_result") from error
    scored = _from_modules(data) or _from_groups(data)
    if not scored:
        raise ResultError(f"{path} is not a Spectrum result", reason="not_a_result")
    return scored


def _from_modules(data: Any) -> list[Scored] | None:
    if not isinstance(data, dict):
        return None
    scored = []
    for module, entry in data.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("type"), str) or not _is_number(entry.get("snr")):
            return None
        scored.append(Scored(module, entry["type"], _ranked(entry["snr"])))
    return scored


def _from_groups(data: Any) -> list[Scored] | None:
    if not isinstance(data, dict):
        return None
    scored = []
    for group, modules in data.items():
        if not isinstance(modules, dict) or not all(_is_number(snr) for snr in modules.values()):
            return None
        scored += [Scored(module, group, _ranked(snr)) for module, snr in modules.items()]
    return scored


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _ranked(snr: float) -> float:
    # A NaN compares false with everything and would scramble a sort.
    try:
        return -math.inf if math.isnan(snr) else float(snr)
    except OverflowError:
        return math.inf


def _to_row(record: Record) -> tuple[Any, ...]:
    score = record.score
    return (
        record.module,
        record.bank,
        record.tensor,
        record.group,
        record.n,
        record.m,
        record.dtype,
        str(record.status),
        record.detail,
        record.method,
        record.device,
        record.compute_s,
        record.singular_values.astype("<f4").tobytes(),
        # SQLite stores infinities, and an enum is a str.
        *(None if score is None else getattr(score, name) for name in _SCORE_COLUMNS),
    )


def _from_row(row: tuple[Any, ...]) -> Record:
    values = dict(zip(_COLUMNS, row, strict=True))
    score = None
    if values["snr"] is not None:
        degeneracy = values["degeneracy"]
        score = Score(
            **{name: values[name] for name in _SCORE_COLUMNS if name != "degeneracy"},
            degeneracy=None if degeneracy is None else Degeneracy(degeneracy),
        )
    return Record(
        module=values["module"],
        bank=values["bank"],
        group=values["group_name"],
        tensor=values["tensor"],
        n=values["n"],
        m=values["m"],
        dtype=values["dtype"],
        status=Status(values["status"]),
        detail=values["detail"],
        method=values["method"],
        device=values["device"],
        score=score,
        singular_values=np.frombuffer(values["singular_values"], dtype="<f4"),
        compute_s=values["compute_s"],
    )
