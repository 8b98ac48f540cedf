"""The journal: the record of a scan (see `record`) while the scan writes it, row by row.

It is an SQLite file because SQLite survives crashes, has locks and is in the standard library.
"""

import contextlib
import json
import os
import socket
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from ..errors import ResultError
from ..model.parameters import GIVEN
from . import atomic
from .record import COLUMNS, SCHEMA_VERSION, Record, from_row, to_row

# Long enough for another scan to finish a row, and too short to look like a hang.
_LOCK_WAIT_S = 1.0


_SCHEMA = f"""
PRAGMA user_version = {SCHEMA_VERSION};
CREATE TABLE IF NOT EXISTS source (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS matrices ({", ".join(COLUMNS)}, PRIMARY KEY (module));
"""


class Journal:
    """The record of one model, open for writing by one process at a time.

    It is a context manager.

    Attributes:
        path: the file.
        dropped: the number of rows of an earlier state of the checkpoint that were deleted when it was opened.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        *,
        names: Sequence[str] = (),
        weights: int = 0,
        fresh: bool = False,
    ) -> None:
        """Open the record at `path`, or start one.

        Args:
            identity: the state of the checkpoint and of the program that the rows depend on: `path`; `commit`;
                `shards`, the size of each; `versions`, the time and inode of those on this machine; `engine`;
                `names` and `names_sha256`, the names that the rows use. Rows of another state of the same checkpoint
                are deleted. Downloading or deleting a shard of a commit does not change the state.
            names: the weights of the model. No row depends on them, nor on `weights`.
            weights: the number of weights in its matrices.
            fresh: replace a record that is damaged, belongs to another checkpoint, or uses other names.

        Raises:
            ResultError: other_model, the record belongs to another checkpoint; other_names; locked; corrupt;
                unwritable.
        """
        self.path = path
        self.dropped = 0
        # This file tells other scans which process has the record open. SQLite's lock ends with the process.
        self._holder = path.with_name(f".{path.stem}.holder")
        kept = json.dumps({"names": list(names), "weights": weights})
        try:
            self._open(identity, kept, fresh)
        except ResultError as error:
            if error.reason != "corrupt" or not fresh:
                raise
            for leftover in (path, path.with_name(f"{path.name}-wal")):
                leftover.unlink(missing_ok=True)
            self._open(identity, kept, False)
        with contextlib.suppress(OSError):
            self._holder.write_text(f"{os.getpid()} {socket.gethostname()}", "utf-8")

    def _open(self, identity: Mapping[str, Any], names: str, fresh: bool) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, isolation_level=None, timeout=_LOCK_WAIT_S)
        except (OSError, sqlite3.OperationalError) as error:
            raise ResultError(f"{self.path} cannot be written: {error}", reason="unwritable") from error
        try:
            with self._report_errors():
                # An exclusive lock needs no shared memory, which network file systems do not have.
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
        """Read all rows, by module."""
        with self._report_errors():
            rows = self._db.execute(f"SELECT {', '.join(COLUMNS)} FROM matrices").fetchall()
            return {record.module: record for record in map(from_row, rows)}

    def reuse(
        self,
        members: Mapping[str, Iterable[str]],
        parameters: Mapping[str, str],
        is_stale: Callable[[Record], bool],
    ) -> dict[str, Record]:
        """Read the rows that need not be computed again, by module, and delete the others.

        The rows get the groups and parameters of this scan. The grouping of experts changes no number, but a record
        must have the names of its result.

        Args:
            members: the modules of each group.
            parameters: the parameter of each module.
            is_stale: whether a row must be computed again.
        """
        groups = {module: group for group, modules in members.items() for module in modules}
        rows = self.records()
        renamed = {
            module: replace(
                record, group=groups.get(module, record.group), parameter=parameters.get(module, record.parameter)
            )
            for module, record in rows.items()
        }
        self._rename(
            record
            for module, record in renamed.items()
            if (record.group, record.parameter) != (rows[module].group, rows[module].parameter)
        )
        stale = {module for module, record in renamed.items() if is_stale(record)}
        self._delete(sorted(stale))
        return {module: record for module, record in renamed.items() if module not in stale}

    def _delete(self, modules: Sequence[str]) -> None:
        if not modules:
            return
        with self._report_errors():
            atomic.before("commit", self.path)
            self._db.executemany("DELETE FROM matrices WHERE module = ?", [(module,) for module in modules])

    def _rename(self, records: Iterable[Record]) -> None:
        names = [(record.parameter, record.group, record.module) for record in records]
        if not names:
            return
        with self._report_errors():
            atomic.before("commit", self.path)
            self._db.execute("BEGIN")
            self._db.executemany("UPDATE matrices SET parameter = ?, group_name = ? WHERE module = ?", names)
            self._db.execute("COMMIT")

    def add(self, record: Record) -> None:
        """Write or replace one row.

        Once this returns, the row survives the end of the process.
        """
        marks = ", ".join("?" * len(COLUMNS))
        with self._report_errors():
            atomic.before("commit", self.path)
            self._db.execute(f"INSERT OR REPLACE INTO matrices VALUES ({marks})", to_row(record))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        atomic.before("close", self.path)
        self._holder.unlink(missing_ok=True)
        self._db.close()

    def _check_version(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and version != SCHEMA_VERSION:
            raise ResultError(
                f"{self.path} was written by another version of this program, or by another program",
                reason="corrupt",
                hint="start over with --fresh",
            )

    def _adopt(self, identity: dict[str, Any], names: str, fresh: bool) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        row = self._db.execute("SELECT value FROM source WHERE key = 'identity'").fetchone()
        recorded = json.loads(row[0]) if row else None
        if recorded is not None and not fresh and recorded["path"] != identity["path"]:
            raise ResultError(
                f"{self.path} is the record of another checkpoint, {recorded['path']}",
                reason="other_model",
                hint="give this scan a name with --name, or start over with --fresh",
            )
        if recorded is not None and not fresh and _names_of(recorded) != _names_of(identity):
            given = "FILE, with the same list," if recorded["names"] == GIVEN else f"{recorded['names']},"
            raise ResultError(
                f"{self.path} uses other names ({recorded['names']}) than this scan ({identity['names']})",
                reason="other_names",
                hint=f"use the names of the record with --names {given} give this scan a name with --name, "
                "or start over with --fresh",
            )
        # JSON has no tuples, so both sides of the comparison must have been read from JSON.
        identity = json.loads(json.dumps(identity))
        recorded_names = self._db.execute("SELECT value FROM source WHERE key = 'names'").fetchone()
        if recorded != identity or recorded_names != (names,):
            atomic.before("commit", self.path)
            if recorded is None or not _is_same_state(recorded, identity):
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
    def _report_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise ResultError(f"{self.path} cannot be written: {error}", reason="unwritable") from error
            raise ResultError(
                f"{self.path} is in use by another scan{self._held_by()}",
                reason="locked",
                hint="run the same command when that scan has ended",
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


def _is_same_state(recorded: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    before, now = dict(recorded), dict(identity)
    versions_before, versions_now = before.pop("versions", {}), now.pop("versions", {})
    if before != now:
        return False
    if now.get("commit") is None:
        return bool(versions_before == versions_now)
    # A commit fixes the content of its shards, so one that is only in one of them did not change.
    return all(versions_before[name] == versions_now[name] for name in versions_before.keys() & versions_now.keys())
