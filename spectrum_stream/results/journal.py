"""The journal: the record of a scan (see `record`) while the scan writes it, row by row.

It is an SQLite file because SQLite survives crashes, has locks and is in the standard library.
"""

import contextlib
import errno
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from ..errors import ResultError
from ..model.parameters import GIVEN
from . import atomic
from .holder import Holder, holder_of
from .record import (
    COLUMNS,
    SCHEMA_VERSION,
    TABLES,
    Record,
    check_schema,
    corrupt,
    count_rows,
    follows_from_spectrum,
    foreign_journal,
    limit_steps,
    open_records,
    protect,
    read_rows,
    read_source,
    to_row,
)

_INSERT = f"INSERT OR REPLACE INTO matrices VALUES ({', '.join('?' * len(COLUMNS))})"

# Long enough for another scan to end, and too short to look like a hang.
_LOCK_WAIT_S = 1.0
# The error codes of SQLite which mean that a file is in use, or cannot be written. All others are about its content.
_IN_USE = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_UNWRITABLE = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_NOLFS,
    sqlite3.SQLITE_PROTOCOL,
)


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
        others: Set[str] = frozenset(),
    ) -> None:
        """Open the record at `path`, or start one.

        Args:
            identity: the state of the checkpoint and of the program that the rows depend on: `path`; `commit`;
                `shards`, the size of each; `versions`, the time and inode of those on this machine; `engine`;
                `names` and `names_sha256`, the names that the rows use. Rows of another state of the same checkpoint
                are deleted. Downloading or deleting a shard of a commit does not change the state.
            names: the weights of the model. No row depends on them, nor on `weights`.
            weights: the number of weights in its matrices.
            fresh: replace the record by a new file; a record that is damaged, belongs to another checkpoint, or uses
                other names is an error otherwise.
            others: the modules that a fresh scan does not compute. Their rows are copied from the old record if it
                is sound and of the same state; otherwise they are lost. Without such modules it is not even opened.

        Raises:
            ResultError: other_model, the record belongs to another checkpoint; other_names; locked; corrupt;
                unwritable, also if a link or something else has the name of one of the files.
        """
        self.path = path
        self.dropped = 0
        # JSON has no tuples, so both sides of a comparison must have been read from JSON.
        state: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        kept = json.dumps({"names": list(names), "weights": weights})
        with contextlib.ExitStack() as opened:
            with self._report_errors():
                path.parent.mkdir(parents=True, exist_ok=True)
                # This lock keeps other scans from the record while it is replaced.
                self._holder = Holder(path.with_name(f".{path.stem}.holder"), _LOCK_WAIT_S)
            opened.callback(self._holder.close)
            with self._report_errors():
                if is_new := fresh or not self._exists():
                    self._create(state, kept, self._copy_of(state, others) if fresh else [])
                self._db = self._open(is_new)
                opened.callback(self._db.close)
                self._adopt(state, kept)
            opened.pop_all()

    def _exists(self) -> bool:
        """Whether there is a record that may be opened for writing."""
        status = atomic.check_own_file(self.path)
        return status is not None and status.st_size > 0

    def _create(self, identity: Mapping[str, Any], names: str, records: Iterable[Record]) -> None:
        """Put a new record in place of the old one, which is not opened."""
        with atomic.temporary_file(self.path, ".tmp.sqlite") as (temporary, file):
            status = os.fstat(file.fileno())
            # Closing a file ends the locks that SQLite has on it.
            file.close()
            with contextlib.closing(self._connect(temporary, status, is_new=True)) as db:
                # The file is not in its place yet, so it needs no journal.
                db.execute("PRAGMA journal_mode = MEMORY")
                db.execute("BEGIN")
                for table in TABLES:
                    db.execute(table)
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                db.execute("INSERT INTO source VALUES ('identity', ?)", (json.dumps(identity),))
                db.execute("INSERT INTO source VALUES ('names', ?)", (names,))
                db.executemany(_INSERT, map(to_row, records))
                db.execute("COMMIT")
                db.execute("PRAGMA journal_mode = WAL")
            atomic.before("commit", self.path)
            for left in atomic.companions(self.path):
                left.unlink(missing_ok=True)
            temporary.replace(self.path)
        atomic.sync_folder(self.path.parent)

    def _copy_of(self, identity: Mapping[str, Any], modules: Set[str]) -> list[Record]:
        """Read the rows of some modules from an old record, if it is sound and of the same state."""
        if not modules:
            return []
        with contextlib.suppress(ResultError), open_records(self.path) as old:
            if _is_same_state(old.identity, identity):
                return [r for r in old.rows if r.module in modules and follows_from_spectrum(r)]
        return []

    def _open(self, is_new: bool) -> sqlite3.Connection:
        status = atomic.check_own_file(self.path)
        if status is None:
            raise _replaced(self.path)
        db = self._connect(self.path, status, is_new=is_new)
        try:
            check_schema(db)
            limit_steps(db)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            db.close()
            raise
        return db

    def _connect(self, path: Path, status: os.stat_result, *, is_new: bool) -> sqlite3.Connection:
        """Open a database for writing, and read nothing yet.

        Args:
            status: the status of the file to open.
            is_new: whether this process made the file, so that it has no journal of any kind.
        """
        # This mode does not create a file.
        uri = f"{path.absolute().as_uri()}?mode=rw"
        db = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=_LOCK_WAIT_S)
        try:
            protect(db)
            # An exclusive lock needs no shared memory, which network file systems do not have.
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            # SQLite opened the file by its name, which could have become a link meanwhile. It applies journals
            # when it reads for the first time, so this is the last moment to look for them.
            wal, _, journal = atomic.companions(path)
            if os.path.lexists(journal):
                raise foreign_journal(journal)
            if atomic.check_own_file(wal) is not None and is_new:
                raise _replaced(wal)
            if not os.path.samestat(path.lstat(), status):
                raise _replaced(path)
        except BaseException:
            db.close()
            raise
        return db

    def records(self) -> dict[str, Record]:
        """Read all rows, by module."""
        with self._report_errors():
            return {record.module: record for record in self._rows()}

    def _rows(self) -> Iterator[Record]:
        limit_steps(self._db)
        count_rows(self._db)
        files = (self.path, *atomic.companions(self.path))
        return read_rows(self._db, sum(file.stat().st_size for file in files if file.exists()))

    def reuse(
        self,
        members: Mapping[str, Iterable[str]],
        parameters: Mapping[str, str],
        is_stale: Callable[[Record], bool],
    ) -> dict[str, Record]:
        """Read the rows that need not be computed again, by module, and delete the others.

        A score that does not follow from its singular values is computed again.

        The rows get the groups and parameters of this scan. The grouping of experts changes no number, but a record
        must have the names of its result.

        Args:
            members: the modules of each group.
            parameters: the parameter of each module.
            is_stale: whether a row must be computed again.
        """
        groups = {module: group for group, modules in members.items() for module in modules}
        kept: dict[str, Record] = {}
        renamed: list[tuple[str, str, str]] = []
        stale: list[tuple[str]] = []
        with self._report_errors():
            # Rows are read one after another, because those of an untrusted record may not fit into memory.
            for record in self._rows():
                if is_stale(record) or not follows_from_spectrum(record):
                    stale.append((record.module,))
                    continue
                names = (parameters.get(record.module, record.parameter), groups.get(record.module, record.group))
                if names != (record.parameter, record.group):
                    renamed.append((*names, record.module))
                    record = replace(record, parameter=names[0], group=names[1])
                kept[record.module] = record
        self._change("DELETE FROM matrices WHERE module = ?", stale)
        self._change("UPDATE matrices SET parameter = ?, group_name = ? WHERE module = ?", renamed)
        return kept

    def _change(self, statement: str, values: Sequence[tuple[str, ...]]) -> None:
        if not values:
            return
        with self._report_errors():
            atomic.before("commit", self.path)
            limit_steps(self._db)
            self._db.execute("BEGIN")
            self._db.executemany(statement, values)
            self._db.execute("COMMIT")

    def add(self, record: Record) -> None:
        """Write or replace one row.

        Once this returns, the row survives the end of the process.
        """
        with self._report_errors():
            atomic.before("commit", self.path)
            self._db.execute(_INSERT, to_row(record))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        atomic.before("close", self.path)
        # The lock goes last, since the next scan may open the record as soon as it is gone.
        self._db.close()
        self._holder.close()

    def _adopt(self, identity: dict[str, Any], names: str) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        recorded, *others = read_source(self._db)
        if recorded["path"] != identity["path"]:
            raise ResultError(
                f"{self.path} is the record of another checkpoint, {recorded['path']}",
                reason="other_model",
                hint="give this scan a name with --name, or start over with --fresh",
            )
        if _names_of(recorded) != _names_of(identity):
            given = "FILE, with the same list," if recorded["names"] == GIVEN else f"{recorded['names']},"
            raise ResultError(
                f"{self.path} uses other names ({recorded['names']}) than this scan ({identity['names']})",
                reason="other_names",
                hint=f"use the names of the record with --names {given} give this scan a name with --name, "
                "or start over with --fresh",
            )
        if recorded != identity or json.dumps(dict(zip(("names", "weights"), others, strict=True))) != names:
            atomic.before("commit", self.path)
            if not _is_same_state(recorded, identity):
                self.dropped = self._db.execute("DELETE FROM matrices").rowcount
            self._db.execute("INSERT OR REPLACE INTO source VALUES ('identity', ?)", (json.dumps(identity),))
            self._db.execute("INSERT OR REPLACE INTO source VALUES ('names', ?)", (names,))
        self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _report_errors(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError as error:
            raise self._locked(holder_of(self.path.with_name(f".{self.path.stem}.holder"))) from error
        except OSError as error:
            raise ResultError(f"{self.path} cannot be written: {error.strerror}", reason="unwritable") from error
        except (sqlite3.Error, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            # The lower bits of a code tell variants of it apart.
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in _IN_USE:
                # The holder file names this process.
                raise self._locked("") from error
            if code in _UNWRITABLE:
                raise ResultError(f"{self.path} cannot be written: {error}", reason="unwritable") from error
            raise corrupt(self.path) from error

    def _locked(self, by: str) -> ResultError:
        return ResultError(
            f"{self.path} is in use by another scan{by and f', {by}'}",
            reason="locked",
            hint="run the same command when that scan has ended",
        )


def _replaced(path: Path) -> OSError:
    return OSError(errno.ESTALE, "another process put a file in its place", str(path))


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
