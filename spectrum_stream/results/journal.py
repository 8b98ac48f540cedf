"""The record of a scan (SQLite): one row a matrix, written as it is done.

    snr_results_{slug}.sqlite   each matrix: its singular values, score, diagnostics and status; and a row each for
                                what was scanned and for the names of all of the model's weights. The journal while
                                the scan runs, the record afterwards.

SQLite because it is crash-safe, locked, and in the standard library.
"""

import contextlib
import json
import logging
import os
import socket
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ..errors import ResultError
from ..model.parameters import GIVEN
from . import atomic as durable
from .record import COLUMNS, SCHEMA_VERSION, Record, from_row, to_row

_log = logging.getLogger("spectrum_stream")

# Long enough for another scan to finish a row, short enough not to look like a hang.
_LOCK_WAIT_S = 1.0


_SCHEMA = f"""
PRAGMA user_version = {SCHEMA_VERSION};
CREATE TABLE IF NOT EXISTS source (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS matrices ({", ".join(COLUMNS)}, PRIMARY KEY (module));
"""


class Journal:
    """The record of one model, open for writing by one process at a time. A context manager."""

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        *,
        names: Sequence[str] = (),
        weights: int = 0,
        fresh: bool = False,
        wait: bool = False,
    ) -> None:
        """Open the record at `path`, or start it.

        Args:
            identity: what the rows depend on: `path`, the checkpoint; its commit; the size of each shard;
                `versions`, the time and inode of those on this machine; the version of the program that changes
                a number; `names` and `names_sha256`, the names that the rows use. Rows made for another state of
                the same checkpoint are dropped. A shard of a commit that came to this machine, or left it, is the
                same state.
            names: of all of the model's weights.
            weights: how many numbers its matrices have. Both are kept, and no row depends on them.
            fresh: replace what is there if it is damaged, another checkpoint's, or by other names.
            wait: for a scan that holds it, instead of raising.

        Raises:
            ResultError: other_model, the record is of another checkpoint; other_names, its rows have other names;
                locked; corrupt; unwritable.
        """
        self.path = path
        self.dropped = 0
        # Says who has the record open, for others to read. The lock itself is SQLite's, and ends with the process.
        self._holder = path.with_name(f".{path.stem}.holder")
        told = False
        while True:
            try:
                self._open(identity, json.dumps({"names": list(names), "weights": weights}), fresh)
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

    def _open(self, identity: Mapping[str, Any], names: str, fresh: bool) -> None:
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
                self._adopt(dict(identity), names, fresh)
        except BaseException:
            self._db.close()
            raise

    def records(self) -> dict[str, Record]:
        """All rows, by module."""
        with self._faults():
            rows = self._db.execute(f"SELECT {', '.join(COLUMNS)} FROM matrices").fetchall()
            return {record.module: record for record in map(from_row, rows)}

    def drop(self, modules: Sequence[str]) -> None:
        """Forget the rows of some modules; they are to be computed again."""
        if not modules:
            return
        with self._faults():
            durable.before("commit", self.path)
            self._db.executemany("DELETE FROM matrices WHERE module = ?", [(module,) for module in modules])

    def rename(self, records: Iterable[Record]) -> None:
        """Write the groups and parameters of rows that are there; another plan can give them other names."""
        with self._faults():
            durable.before("commit", self.path)
            self._db.execute("BEGIN")
            self._db.executemany(
                "UPDATE matrices SET parameter = ?, group_name = ? WHERE module = ?",
                [(record.parameter, record.group, record.module) for record in records],
            )
            self._db.execute("COMMIT")

    def add(self, record: Record) -> None:
        """Write one row, or replace it; it is there for good when this returns, even if the process dies."""
        marks = ", ".join("?" * len(COLUMNS))
        with self._faults():
            durable.before("commit", self.path)
            self._db.execute(f"INSERT OR REPLACE INTO matrices VALUES ({marks})", to_row(record))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        durable.before("close", self.path)
        self._holder.unlink(missing_ok=True)
        self._db.close()

    def _check_version(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and version != SCHEMA_VERSION:
            raise ResultError(
                f"{self.path} is the record of another version of this program, or of another program",
                reason="corrupt",
                hint="start over with --fresh",
            )

    def _adopt(self, identity: dict[str, Any], names: str, fresh: bool) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        row = self._db.execute("SELECT value FROM source WHERE key = 'identity'").fetchone()
        stored = json.loads(row[0]) if row else None
        if stored is not None and not fresh and stored["path"] != identity["path"]:
            raise ResultError(
                f"{self.path} is the record of another checkpoint, {stored['path']}",
                reason="other_model",
                hint="give this one a name with --name, or start over with --fresh",
            )
        if stored is not None and not fresh and _names_of(stored) != _names_of(identity):
            given = "FILE, with the same list," if stored["names"] == GIVEN else stored["names"]
            raise ResultError(
                f"{self.path} uses other names ({stored['names']}) than this scan ({identity['names']})",
                reason="other_names",
                hint=f"use the names of the record with --names {given} or give this scan a name with --name, "
                "or start over with --fresh",
            )
        identity = json.loads(json.dumps(identity))
        named = self._db.execute("SELECT value FROM source WHERE key = 'names'").fetchone()
        if stored != identity or named != (names,):
            durable.before("commit", self.path)
            if stored is None or not _is_same_state(stored, identity):
                self.dropped = self._db.execute("DELETE FROM matrices").rowcount
            self._db.execute("INSERT OR REPLACE INTO source VALUES ('identity', ?)", (json.dumps(identity),))
            self._db.execute("INSERT OR REPLACE INTO source VALUES ('names', ?)", (names,))
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
        except (sqlite3.DatabaseError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ResultError(
                f"{self.path} is damaged or not a record of a scan",
                reason="corrupt",
                hint="start over with --fresh",
            ) from error


def _names_of(identity: Mapping[str, Any]) -> tuple[str, str | None]:
    return identity["names"], identity["names_sha256"]


def _is_same_state(stored: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    before, now = (dict(one) for one in (stored, identity))
    versions_before, versions_now = before.pop("versions", {}), now.pop("versions", {})
    if before != now:
        return False
    if now.get("commit") is None:
        return bool(versions_before == versions_now)
    return all(versions_before[name] == versions_now[name] for name in versions_before.keys() & versions_now.keys())
