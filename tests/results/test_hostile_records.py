"""Untrusted records: nothing in them runs, is followed or is believed without a check.

Each attack gives an error of ours or no effect: with readers, with a scan that resumes the record, and with a fresh
scan, which must not even open it.
"""

import json
import math
import os
import socket
import sqlite3
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from spectrum_stream import scan
from spectrum_stream.errors import ResultError, SpectrumStreamError
from spectrum_stream.model.no_score import NoScore
from spectrum_stream.numerics.metrics import METRICS, SPECTRUM
from spectrum_stream.numerics.snr import Degeneracy, Score, score
from spectrum_stream.report.data import read_shown
from spectrum_stream.results import journal as journal_module
from spectrum_stream.results import record as records_module
from spectrum_stream.results.check import check
from spectrum_stream.results.journal import Journal
from spectrum_stream.results.provenance import write_provenance
from spectrum_stream.results.record import COLUMNS, TABLES, follows_from_spectrum, record_path
from spectrum_stream.results.result import Result, modules_of, write_results

from ..support.checkpoints import Save, llama_tensors
from ..support.records import IDENTITY, change_record, read_all, record

posix_only = pytest.mark.skipif(os.name != "posix", reason="files that only POSIX has")
MODULES = [f"layers.{i}.up" for i in range(3)]
ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"


def write(folder: Path) -> Path:
    """Write a result with its record, and return the record."""
    path = folder / "snr_results_org-x.sqlite"
    rows = [record(module) for module in MODULES]
    with Journal(path, IDENTITY, names=[f"{module}.weight" for module in MODULES], weights=72) as journal:
        for row in rows:
            journal.add(row)
    write_results(path.with_suffix(".json"), rows)
    return path


def alter(path: Path, *statements: str) -> None:
    """Change a record without this program, and leave no journal."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = DELETE")
    db.execute("PRAGMA synchronous = OFF")
    for statement in statements:
        db.execute(statement)
    db.close()


def reason_of(action: Callable[[], object]) -> str | None:
    """Return the reason of the error of an action; any exception that is not ours is raised."""
    try:
        action()
    except SpectrumStreamError as error:
        return error.reason
    return None


def resume(path: Path) -> dict[str, Any]:
    with Journal(path, IDENTITY) as journal:
        return dict(journal.reuse({}, {}, lambda row: False))


def replaced(path: Path) -> None:
    """Replace a record by a fresh one, and check that it has nothing of the old one."""
    with Journal(path, IDENTITY, fresh=True) as journal:
        assert not journal.records()
        journal.add(record())
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (4,)
    db.close()
    assert list(read_all(path)) == ["layers.0.up"]


def readings(path: Path) -> Iterator[str | None]:
    """Use a record in all ways, except for a scan; yield the reasons of the errors."""
    yield reason_of(lambda: read_all(path))
    yield reason_of(lambda: read_all(path, spectra=False))
    yield reason_of(lambda: Result.open(path))
    for metric in METRICS.values():
        if metric.of_spectrum is not None and metric != SPECTRUM:
            result = Result.open(path.with_suffix(".json"))
            yield reason_of(lambda result=result, metric=metric: result.by(metric))  # type: ignore[misc]
    yield reason_of(lambda: write_provenance(path.with_suffix(".json"), "org/x"))
    # These two report a bad record, and work without it.
    assert read_shown(path.with_suffix(".json")).notes
    assert "bad_record" in {finding.reason for finding in check(path.with_suffix(".json"))}


def rebuilt(table: int, sql: str, *more: str) -> list[str]:
    """Return statements that change the SQL of a table, as another program could write it."""
    name = ("matrices", "source")[table]
    insert = f"INSERT INTO {name} SELECT * FROM old"
    return [f"ALTER TABLE {name} RENAME TO old", sql, insert, "DROP TABLE old", *more]


def put(column: str, expression: str) -> str:
    return ", ".join(f"{expression} AS {name}" if name == column else name for name in COLUMNS)


def view(body: str) -> list[str]:
    return ["ALTER TABLE matrices RENAME TO old", f"CREATE VIEW matrices AS {body}"]


SCHEMAS: dict[str, list[str]] = {
    "view without end": view(f"SELECT {', '.join(COLUMNS)} FROM old, (SELECT 1 FROM ({ENDLESS} SELECT x FROM c))"),
    "view with an endless count": view(
        f"SELECT {', '.join(COLUMNS)} FROM old WHERE (SELECT count(*) FROM ({ENDLESS} SELECT x FROM c)) > 0"
    ),
    "view of 900 MB": view(f"SELECT {put('detail', 'hex(zeroblob(450000000))')} FROM old"),
    "view as source": [
        "ALTER TABLE source RENAME TO olds",
        "CREATE VIEW source AS SELECT key, hex(zeroblob(450000000)) AS value FROM olds",
    ],
    "trigger on rows": ["CREATE TRIGGER t AFTER INSERT ON matrices BEGIN UPDATE matrices SET snr = 99.0; END"],
    "trigger without end": [
        f"CREATE TRIGGER t AFTER DELETE ON matrices BEGIN SELECT count(*) FROM ({ENDLESS} SELECT x FROM c); END"
    ],
    "trigger on the source": ["CREATE TRIGGER t AFTER UPDATE ON source BEGIN DELETE FROM matrices; END"],
    "table": ["CREATE TABLE more (a)"],
    "statistics": ["ANALYZE"],
    "index": ["CREATE INDEX i ON matrices (snr)"],
    "index of an expression": ["CREATE INDEX i ON matrices (abs(n))"],
    "partial index": ["CREATE INDEX i ON matrices (module) WHERE snr > 0"],
    "generated column": ["ALTER TABLE matrices ADD COLUMN g AS (hex(zeroblob(1000)))"],
    "column": ["ALTER TABLE matrices ADD COLUMN g"],
    "another order of columns": [
        "DROP TABLE matrices",
        f"CREATE TABLE matrices ({', '.join(COLUMNS[::-1])}, PRIMARY KEY (module))",
    ],
    "check": rebuilt(0, TABLES[0].replace("(module))", "(module), CHECK (length(hex(zeroblob(9))) > 0))")),
    "default": rebuilt(0, TABLES[0].replace("detail,", "detail DEFAULT (hex(zeroblob(9))),")),
    "collation": rebuilt(1, TABLES[1].replace("KEY,", "KEY COLLATE NOCASE,")),
    "no key": rebuilt(0, TABLES[0].replace(", PRIMARY KEY (module)", "")),
    "no rowid": rebuilt(0, f"{TABLES[0]} WITHOUT ROWID"),
    "comment": rebuilt(0, TABLES[0].replace("(module)", "(module) /* harmless */")),
    "foreign key": rebuilt(0, TABLES[0].replace("detail,", "detail REFERENCES source (key) ON DELETE CASCADE,")),
    "another version": ["PRAGMA user_version = 5"],
    "no matrices": ["DROP TABLE matrices"],
    "virtual table": ["CREATE VIRTUAL TABLE v USING rtree (id, a, b)"],
    "virtual table as source": ["DROP TABLE source", "CREATE VIRTUAL TABLE source USING fts5 (key, value)"],
    "1,000 tables": [f"CREATE TABLE t{i} (a)" for i in range(1_000)],
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_record_with_another_schema_is_corrupt_and_a_fresh_scan_replaces_it(tmp_path: Path, name: str) -> None:
    path = write(tmp_path)
    alter(path, *SCHEMAS[name])
    assert set(readings(path)) == {"corrupt"}
    before = path.read_bytes()
    assert reason_of(lambda: resume(path)) == "corrupt"
    assert path.read_bytes() == before
    replaced(path)


@contextmanager
def opened_by_reader(path: Path) -> Iterator[sqlite3.Connection]:
    with records_module._connect(path) as (db, _):
        yield db


@contextmanager
def opened_by_scan(path: Path) -> Iterator[sqlite3.Connection]:
    with Journal(path, IDENTITY) as journal:
        yield journal._db


# It ends after some seconds, so that the tests end without the limit.
LONG = f"SELECT count(*) FROM ({ENDLESS} SELECT x FROM c LIMIT 30000000)"
OPENED = pytest.mark.parametrize("opened", [opened_by_reader, opened_by_scan])
Opened = Callable[[Path], AbstractContextManager[sqlite3.Connection]]


@OPENED
def test_record_is_opened_with_the_defensive_settings_of_sqlite(tmp_path: Path, opened: Opened) -> None:
    with opened(write(tmp_path)) as db:
        # An SQLite without one of these settings returns nothing.
        for name, value in (("trusted_schema", 0), ("cell_size_check", 1), ("mmap_size", 0)):
            assert db.execute(f"PRAGMA {name}").fetchone() in [(value,), None], name
        for name, limit in records_module._LIMITS.items():
            assert db.getlimit(getattr(sqlite3, name)) <= limit, name
        # Python 3.11 cannot read these.
        for name, is_on in (("DEFENSIVE", True), ("ENABLE_TRIGGER", False), ("ENABLE_VIEW", False)):
            if (option := getattr(sqlite3, f"SQLITE_DBCONFIG_{name}", None)) is not None:
                assert db.getconfig(option) is is_on, name  # type: ignore[attr-defined, unused-ignore]


@OPENED
def test_statement_without_end_on_a_record_is_interrupted(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records_module.limit_steps, "__defaults__", (1_000_000,))
    with opened(write(tmp_path)) as db, pytest.raises(sqlite3.OperationalError, match="interrupted"):
        db.execute(LONG)


def test_statement_without_end_is_interrupted_before_the_schema_is_checked(tmp_path: Path) -> None:
    db = sqlite3.connect(write(tmp_path))
    records_module.protect(db)
    with pytest.raises(sqlite3.OperationalError, match="interrupted"):
        db.execute(LONG)
    db.close()


# One value of the first row.
VALUES: dict[str, list[object]] = {
    "module": [5, None, b"layers.0.up", "x" * 70_000],
    "parameter": [5, None, "x" * 70_000],
    "tensor": [1.5, None],
    "group_name": [5, None],
    "quantized": [5, "a\x1b[2J"],
    "n": ["abc", 4.0, 0, -4, 5, 2**62, b"\0", None],
    "m": ["abc", 0, 2**62, None],
    "dtype": ["BF17", "", 5, "\x1b[2J", None],
    "no_score": ["pwned", "not_finite", 5],
    "detail": ["\x1b]0;owned\x07", "a\nb", "\u202e", 5, None, "x" * 2_000],
    "precision": ["fp128", 32, None],
    "refined": [-1, 5, 1.0, "1", None],
    "device": ["\x1b[2J", 5, None, "x" * 2_000],
    "compute_s": ["1", -1.0, math.inf, None],
    "snr": ["abc", "٣", -5.0, math.inf, -math.inf, None, b"\0", ""],
    "error": ["abc", -1.0, None],
    "sigma": ["0", -1.0, math.inf, None],
    "beta": ["1", 0.0, 2.0, 0.5, math.inf, None],
    "tau": ["1", -1.0, math.inf, None],
    "above": [-7, 5, 1.0, "1", None],
    "margin": ["NaN", -1.0, None],
    "sigma1_over_q25": ["x", -1.0, None],
    "degeneracy": ["a little", 5, b""],
    "singular_values": [
        b"\0\1\2",
        b"",
        None,
        "text",
        5,
        np.array([1, 2, 3, 4], "<f4").tobytes(),
        np.array([4, 3, 2, -1], "<f4").tobytes(),
        np.array([math.inf, 3, 2, 1], "<f4").tobytes(),
        np.array([4, math.nan, 2, 1], "<f4").tobytes(),
        np.array([math.nan, 3, 2, 1], "<f4").tobytes(),
        np.array([4, 3, 2, 1, 0], "<f4").tobytes(),
    ],
}


def test_record_with_a_wrong_value_is_corrupt(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole, published = path.read_bytes(), path.with_suffix(".json").read_bytes()
    for column, values in VALUES.items():
        for value in values:
            path.write_bytes(whole)
            change_record(path, f"UPDATE matrices SET {column} = ? WHERE module = 'layers.0.up'", value)
            # Without the spectra, only their size is known.
            is_order = column == "singular_values" and isinstance(value, bytes) and len(value) == 16
            allowed = {"corrupt", None} if is_order else {"corrupt"}
            assert {"corrupt"} <= set(readings(path)) <= allowed, (column, value)
            assert reason_of(lambda: resume(path)) == "corrupt", (column, value)
    assert path.with_suffix(".json").read_bytes() == published


SOURCES: dict[str, list[str]] = {
    "identity": [
        "[1]",
        "5",
        "null",
        "{}",
        "[" * 100_000,
        '{"path": "/a", "commit": null}',
        *(
            f"json_set(value, '$.{key}', {value})"
            for key, value in (
                ("versions", "json('[1]')"),
                ("versions", "5"),
                ("versions", """json('{"model.safetensors": 5}')"""),
                ("versions", """json('{"model.safetensors": [1.5, 2]}')"""),
                ("shards", """json('{"../../etc/passwd": 1}')"""),
                ("shards", """json('{"/etc/passwd": 1}')"""),
                ("shards", """json('{"a": true}')"""),
                ("shards", """json('{"a": -1}')"""),
                ("shards", """json('{"a": 1e5}')"""),
                ("path", r"""json('"\ud800"')"""),
                ("shards", r"""json('{"\ud800": 1}')"""),
                ("names", r"""json('"\udfff"')"""),
                ("path", "7"),
                ("path", "''"),
                ("commit", "7"),
                ("engine", "json('true')"),
                ("engine", "'3'"),
                ("names", "json('[]')"),
                ("names_sha256", "7"),
            )
        ),
    ],
    "names": [
        "[]",
        "5",
        '{"names": 5, "weights": 1}',
        '{"names": ["a", 5], "weights": 1}',
        r'{"names": ["\ud800"], "weights": 1}',
        '{"names": ["a"], "weights": -1}',
        '{"names": ["a"], "weights": true}',
        '{"names": ["a"], "weights": 1e3}',
        f'{{"names": ["{"x" * 70_000}"], "weights": 1}}',
        "[" * 1_000_000,
        f'{{"names": [], "weights": {"1" * 5_000}}}',
    ],
}


def test_record_with_a_wrong_source_is_corrupt(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()
    for key, values in SOURCES.items():
        for value in values:
            path.write_bytes(whole)
            expression = value if value.startswith("json_set") else "'" + value + "'"
            change_record(path, f"UPDATE source SET value = {expression} WHERE key = ?", key)
            assert set(readings(path)) == {"corrupt"}, value[:200]
            assert reason_of(lambda: resume(path)) == "corrupt", value[:200]


@posix_only
def test_record_of_a_folder_whose_name_is_not_utf_8_is_resumed(tmp_path: Path) -> None:
    identity = {**IDENTITY, "path": os.fsdecode(b"/models/\xff")}
    for _ in range(2):
        with Journal(tmp_path / "r.sqlite", identity) as journal:
            journal.add(record())
    with records_module.open_records(tmp_path / "r.sqlite") as records:
        assert records.identity["path"] == identity["path"]


@pytest.mark.parametrize("key", ["identity", "names"])
def test_record_with_millions_of_values_is_corrupt(tmp_path: Path, key: str) -> None:
    path = write(tmp_path)
    start = {"identity": """'{"quantization": ['""", "names": """'{"weights": 1, "names": ['"""}[key]
    change_record(
        path,
        f"UPDATE source SET value = {start} || replace(hex(zeroblob(1100000)), '0', '[],') || '1]}}' WHERE key = ?",
        key,
    )
    tracemalloc.start()
    assert reason_of(lambda: read_all(path)) == reason_of(lambda: resume(path)) == "corrupt"
    assert tracemalloc.get_traced_memory()[1] < 60_000_000
    tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("key", ["identity", "names"])
def test_record_with_60_mb_in_one_value_is_corrupt(tmp_path: Path, key: str) -> None:
    path = write(tmp_path)
    change_record(path, "UPDATE source SET value = hex(zeroblob(30000000)) WHERE key = ?", key)
    assert reason_of(lambda: read_all(path)) == reason_of(lambda: resume(path)) == "corrupt"


def test_record_with_too_many_rows_is_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    monkeypatch.setattr(records_module, "MAX_ROWS", 2)
    assert reason_of(lambda: read_all(path)) == reason_of(lambda: resume(path)) == "corrupt"


def test_record_that_is_too_large_is_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    monkeypatch.setattr(records_module, "MAX_NBYTES", 4_096)
    assert reason_of(lambda: read_all(path)) == reason_of(lambda: resume(path)) == "corrupt"


def test_header_of_a_record_does_not_set_the_size_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    data = bytearray(path.read_bytes())
    data[48:52] = (2**31 - 1).to_bytes(4, "big")
    path.write_bytes(data)
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA cache_size").fetchone() == (2**31 - 1,)
    db.close()
    sizes = []

    def read_source(db: sqlite3.Connection) -> Any:
        sizes.extend(db.execute("PRAGMA cache_size").fetchone())
        return records_module.read_source(db)

    monkeypatch.setattr(journal_module, "read_source", read_source)
    resume(path)
    path.write_bytes(data)
    with records_module._connect(path) as (reader, _):
        sizes.extend(reader.execute("PRAGMA cache_size").fetchone())
    assert sizes == [-2000, -2000]


def test_rows_that_are_not_resumed_are_not_kept_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    s = np.linspace(4, 1, 100_000)
    with Journal(path, IDENTITY) as journal:
        for i in range(30):
            journal.add(record(f"layers.{i}.up", s=s))
    tracemalloc.start()
    with Journal(path, IDENTITY) as journal:
        assert journal.reuse({}, {}, lambda row: True) == {}
        assert not journal.records()
    assert tracemalloc.get_traced_memory()[1] < 10 * s.nbytes < 30 * s.nbytes / 2
    tracemalloc.stop()


def test_rows_that_are_larger_than_their_file_are_corrupt(tmp_path: Path) -> None:
    db = sqlite3.connect(write(tmp_path))
    assert len(list(records_module.read_rows(db, 4_096))) == 3
    with pytest.raises(ValueError, match="row"):
        list(records_module.read_rows(db, 100))
    db.close()


def long_record(folder: Path) -> tuple[Path, int, int]:
    """Write a record with some hundred rows; return it, its size of pages and the root page of its rows."""
    path = write(folder)
    with Journal(path, IDENTITY) as journal:
        for i in range(300):
            journal.add(record(f"layers.{i}.down", "down"))
    db = sqlite3.connect(path)
    (size,), (root,) = (
        db.execute(text).fetchone()
        for text in ("PRAGMA page_size", "SELECT rootpage FROM sqlite_master WHERE name = 'matrices'")
    )
    db.close()
    return path, size, root


@pytest.mark.parametrize("target", ["first child", "itself"])
def test_record_with_pages_that_occur_twice_is_corrupt(tmp_path: Path, target: str) -> None:
    path, size, root = long_record(tmp_path)
    data = bytearray(path.read_bytes())
    page = memoryview(data)[(root - 1) * size : root * size]
    assert page[0] == 5, "an interior page"
    cells = [int.from_bytes(page[12 + 2 * i : 14 + 2 * i], "big") for i in range(int.from_bytes(page[3:5], "big"))]
    child = bytes(page[cells[0] : cells[0] + 4]) if target == "first child" else root.to_bytes(4, "big")
    for cell in cells:
        page[cell : cell + 4] = child
    page[8:12] = child
    page.release()
    path.write_bytes(data)
    assert reason_of(lambda: read_all(path)) == reason_of(lambda: resume(path)) == "corrupt"
    replaced(path)


def test_record_with_an_index_that_lacks_a_row_has_no_row_twice(tmp_path: Path) -> None:
    path = write(tmp_path)
    db = sqlite3.connect(path, isolation_level=None)
    (sql,) = db.execute("SELECT sql FROM sqlite_master WHERE name = 'matrices'").fetchone()
    db.execute("PRAGMA writable_schema = ON")
    # SQLite does not know of the index while this row is written.
    db.execute("UPDATE sqlite_master SET sql = replace(sql, ', PRIMARY KEY (module)', '') WHERE name = 'matrices'")
    db.execute("DELETE FROM sqlite_master WHERE name = 'sqlite_autoindex_matrices_1'")
    db.close()
    db = sqlite3.connect(path, isolation_level=None)
    db.execute(f"INSERT INTO matrices SELECT {put('snr', '99.0')} FROM matrices WHERE module = 'layers.0.up'")
    db.execute("PRAGMA writable_schema = ON")
    db.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'matrices'", (sql,))
    db.close()
    assert reason_of(lambda: read_all(path)) == reason_of(lambda: resume(path)) == "corrupt"


# Files next to a record, and in its place


def journal_of_a_change(path: Path) -> None:
    """Leave a hot journal that changes a score back, as a process that was killed in a transaction leaves it."""
    alter(path, "UPDATE matrices SET snr = 99.0")
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA cache_size = 1")
    db.execute("PRAGMA cache_spill = 1")
    db.execute("BEGIN IMMEDIATE")
    db.execute("UPDATE matrices SET snr = 5.0")
    db.execute("CREATE TABLE filler (a)")
    db.executemany("INSERT INTO filler VALUES (?)", [("x" * 3_000,)] * 50)
    files = {p: p.read_bytes() for p in (path, path.with_name(f"{path.name}-journal"))}
    db.close()
    journal = path.with_name(f"{path.name}-journal")
    whole = files[path]
    path.write_bytes(whole)
    journal.write_bytes(files[journal])


def with_super_journal(journal: Path, victim: Path) -> None:
    """Let a hot journal name a file, which SQLite deletes after it has played the journal back."""
    name = str(victim).encode()
    checksum = sum(name).to_bytes(4, "big")
    magic = bytes.fromhex("d9d505f920a163d7")
    page = (0x40000000 // 4096 + 1).to_bytes(4, "big")
    with journal.open("ab") as file:
        file.write(page + name + len(name).to_bytes(4, "big") + checksum + magic)


def test_record_with_a_hot_journal_is_not_played_back(tmp_path: Path) -> None:
    path = write(tmp_path)
    journal = path.with_name(f"{path.name}-journal")
    journal_of_a_change(path)
    # Another program would play it back.
    for p in (path, journal):
        (tmp_path / f"copy{p.name.removeprefix(path.stem)}").write_bytes(p.read_bytes())
    with sqlite3.connect(tmp_path / "copy.sqlite") as db:
        db.execute("SELECT count(*) FROM matrices").fetchone()
    db.close()
    assert not (tmp_path / "copy.sqlite-journal").exists()
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    with_super_journal(journal, victim)
    before = path.read_bytes(), journal.read_bytes()
    assert set(readings(path)) == {"corrupt"}
    assert reason_of(lambda: resume(path)) == "corrupt"
    assert (path.read_bytes(), journal.read_bytes()) == before
    replaced(path)
    assert not journal.exists()
    assert victim.read_text() == "precious"


@posix_only
@pytest.mark.parametrize("suffix", ["-journal", "-wal"])
@pytest.mark.parametrize("kind", ["link", "dangling", "hard", "folder", "fifo"])
def test_scan_rejects_something_else_in_the_place_of_a_journal(tmp_path: Path, kind: str, suffix: str) -> None:
    path = write(tmp_path)
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    place(path.with_name(f"{path.name}{suffix}"), kind, victim)
    expected = "corrupt" if suffix == "-journal" else "unwritable"
    assert reason_of(lambda: resume(path)) == expected
    assert reason_of(lambda: read_all(path)) == ("corrupt" if suffix == "-journal" else "locked")
    assert victim.read_text() == "precious"


def place(path: Path, kind: str, victim: Path) -> Callable[[], object]:
    """Put something at a path that is not a file of its own; return what closes it."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        bound = socket.socket(socket.AF_UNIX)
        # The path of a socket is limited to about a hundred characters.
        folder = Path.cwd()
        os.chdir(path.parent)
        bound.bind(path.name)
        os.chdir(folder)
        return bound.close
    elif kind == "hard":
        path.hardlink_to(victim)
    else:
        path.symlink_to(
            {"link": victim, "dangling": victim.with_name("new"), "itself": path, "zero": Path("/dev/zero")}[kind]
        )
    return lambda: None


IN_THE_WAY = ["link", "dangling", "hard", "itself", "zero", "folder", "fifo", "socket"]


@posix_only
@pytest.mark.parametrize("kind", IN_THE_WAY)
@pytest.mark.parametrize("content", ["", "precious"])
def test_scan_writes_no_record_through_a_link(tmp_path: Path, kind: str, content: str) -> None:
    path, victim = tmp_path / "r.sqlite", tmp_path / "victim.txt"
    victim.write_text(content)
    close = place(path, kind, victim)
    assert reason_of(lambda: resume(path)) == "unwritable"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.sqlite", "victim.txt"]
    if kind in ("folder", "fifo", "socket"):
        assert reason_of(lambda: replaced(path)) == "unwritable"
    else:
        replaced(path)
    assert victim.read_text() == content
    assert not (tmp_path / "new").exists()
    close()


@pytest.fixture
def at_the_last_moment(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], object]], None]:
    """Change a database as another process, after SQLite has opened it."""

    def set_action(action: Callable[[Path], object]) -> None:
        def protect(db: sqlite3.Connection) -> None:
            records_module.protect(db)
            action(Path(db.execute("PRAGMA database_list").fetchone()[2]))

        monkeypatch.setattr(journal_module, "protect", protect)

    return set_action


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("kind", ["journal", "wal of a new record", "another file", "link"])
def test_scan_reads_nothing_if_a_record_is_exchanged_while_it_is_opened(
    tmp_path: Path, at_the_last_moment: Callable[[Callable[[Path], object]], None], kind: str, fresh: bool
) -> None:
    path = write(tmp_path)
    (tmp_path / "evil").mkdir()
    evil = write(tmp_path / "evil")
    journal_of_a_change(evil)
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    hot = evil.with_name(f"{evil.name}-journal")
    with_super_journal(hot, victim)

    def exchange(opened: Path) -> None:
        if kind == "journal":
            opened.with_name(f"{opened.name}-journal").write_bytes(hot.read_bytes())
        elif kind == "wal of a new record":
            opened.with_name(f"{opened.name}-wal").write_bytes(b"wal")
        else:
            opened.unlink()
            opened.write_bytes(evil.read_bytes()) if kind == "another file" else opened.symlink_to(evil)

    at_the_last_moment(exchange)
    with suppress(ResultError), Journal(path, IDENTITY, fresh=fresh) as journal:
        # Only the WAL of a record that this process did not just make may be there.
        assert kind == "wal of a new record" and not fresh and len(journal.records()) == len(MODULES)
    assert victim.read_text() == "precious"
    assert hot.exists()


@posix_only
@pytest.mark.parametrize("kind", IN_THE_WAY)
def test_scan_writes_no_holder_through_a_link(tmp_path: Path, kind: str) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    close = place(tmp_path / ".r.holder", kind, victim)
    assert reason_of(lambda: resume(tmp_path / "r.sqlite")) == "unwritable"
    assert victim.read_text() == "precious"
    assert not (tmp_path / "new").exists()
    close()


@posix_only
@pytest.mark.parametrize("kind", ["itself", "zero", "folder", "fifo", "socket"])
def test_readers_reject_a_record_that_is_not_a_file(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path)
    path.unlink()
    close = place(path, kind, tmp_path / "victim.txt")
    assert set(readings(path)) == {"unreadable" if kind == "itself" else "not_a_file"}
    close()


def test_reader_looks_for_the_journal_of_the_target_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = write(tmp_path / "a")
    link = tmp_path / "r.sqlite"
    link.symlink_to(path)
    assert list(read_all(link)) == MODULES
    path.with_name(f"{path.name}-wal").write_bytes(b"")
    assert reason_of(lambda: read_all(link)) == "locked"


def test_empty_file_in_the_place_of_a_record_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "r.sqlite").touch()
    assert resume(tmp_path / "r.sqlite") == {}


def test_journal_without_its_record_is_deleted(tmp_path: Path) -> None:
    path = write(tmp_path)
    journal_of_a_change(path)
    path.unlink()
    assert resume(path) == {}
    assert not path.with_name(f"{path.name}-journal").exists()


def test_journal_removes_the_temporary_files_of_killed_processes(tmp_path: Path) -> None:
    path = write(tmp_path)
    for suffix in ("", ".sqlite", ".sqlite-wal", ".sqlite-journal"):
        (tmp_path / f".{path.name}.99999999-abc.tmp{suffix}").write_bytes(b"half")
    (tmp_path / f".{path.name}.99999998-abc.tmp").mkdir()
    replaced(path)
    assert sorted(p.name for p in tmp_path.iterdir() if "tmp" in p.name) == [f".{path.name}.99999998-abc.tmp"]


# Scores that are resumed


@pytest.fixture
def model(save: Save, working_folder: Path) -> str:
    return str(save(llama_tensors(2)))


RESULT = Path("model_snr_results/snr_results_x.json")
MODULE = "model.layers.1.mlp.up_proj"


@contextmanager
def same_result() -> Iterator[None]:
    before = RESULT.read_bytes()
    yield
    assert RESULT.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        "snr = snr * 2",
        "snr = snr * 1.000001",
        "above = above + 1",
        "tau = tau * 1.01",
        "degeneracy = 'zero_noise'",
        f"{', '.join(f'{name} = NULL' for name in ('precision', *records_module._SCORE_TYPES))}, "
        "singular_values = x'', no_score = 'not_finite', detail = 'it vanishes from the result'",
        "snr = 0.0",
        "snr = 1e300",
        "singular_values = (SELECT singular_values FROM matrices WHERE module = 'model.layers.0.mlp.up_proj')",
        "tensor = 'lm_head.weight'",
        "tensor = 'none'",
        "n = m, m = n",
        "dtype = 'F32'",
        "quantized = 'gptq'",
        "module = 'model.layers.9.mlp.up_proj'",
        "group_name = 'other', parameter = 'other.weight'",
    ],
)
def test_scan_computes_a_row_again_that_does_not_fit(model: str, change: str) -> None:
    scan(model, name="x")
    assert change_record(record_path(RESULT), f"UPDATE matrices SET {change} WHERE module = '{MODULE}'") == 1
    with same_result():
        scan(model, name="x")
    assert Result.open(record_path(RESULT)).notes == ()


def test_scan_drops_rows_of_modules_that_the_model_lacks(model: str) -> None:
    scan(model, name="x")
    select = put("module", "'model.layers.' || x || '.mlp.up_proj'")
    statement = f"""INSERT INTO matrices
        WITH RECURSIVE c(x) AS (SELECT 10 UNION ALL SELECT x + 1 FROM c LIMIT 500)
        SELECT {select} FROM c, (SELECT * FROM matrices WHERE module = '{MODULE}')"""
    assert change_record(record_path(RESULT), statement) == 500
    with same_result():
        scan(model, name="x")
    assert len(read_all(record_path(RESULT))) == len(llama_tensors(2))


def test_scan_does_not_publish_the_number_of_a_trigger(model: str) -> None:
    scan(model, name="x")
    body = f"UPDATE matrices SET snr = 99.0 WHERE module = '{MODULE}'"
    alter(record_path(RESULT), f"CREATE TRIGGER t AFTER INSERT ON matrices BEGIN {body}; END")
    with same_result():
        assert reason_of(lambda: scan(model, name="x")) == "corrupt"
        scan(model, name="x", fresh=True)
        scan(model, name="x")


def test_fresh_scan_keeps_nothing_from_a_record_of_another_model(model: str) -> None:
    scan(model, name="x")
    alter(
        record_path(RESULT),
        "UPDATE source SET value = json_set(value, '$.path', '/elsewhere') WHERE key = 'identity'",
        f"UPDATE matrices SET snr = 99.0 WHERE module = '{MODULE}'",
    )
    inode = record_path(RESULT).stat().st_ino
    with same_result():
        assert reason_of(lambda: scan(model, name="x")) == "other_model"
        # The hint of that error says this.
        scan(model, name="x", fresh=True)
        scan(model, name="x")
    assert record_path(RESULT).stat().st_ino != inode


@pytest.mark.parametrize("is_sound", [True, False])
def test_fresh_scan_of_a_group_copies_only_sound_rows_of_the_others(model: str, is_sound: bool) -> None:
    scan(model, name="x")
    if not is_sound:
        change_record(record_path(RESULT), f"UPDATE matrices SET snr = snr * 2 WHERE module = '{MODULE}'")
    scan(model, name="x", groups=["mlp.down_proj"], fresh=True)
    assert (MODULE in read_all(record_path(RESULT))) == is_sound
    # A group that lacks a row is not published.
    assert any(m.group == "mlp.up_proj" for m in Result.open(RESULT).modules) == is_sound


@st.composite
def spectra(draw: st.DrawFn) -> np.ndarray:
    """Draw singular values, with ties and zeros, of any scale that float32 can hold."""
    count = draw(st.integers(1, 40))
    values = st.one_of(st.floats(1e-6, 10), st.sampled_from([0.0, 1.0, 2.0]), st.floats(1e-9, 1e-6))
    s = np.array(sorted(draw(st.lists(values, min_size=count, max_size=count)), reverse=True))
    return s * 10.0 ** draw(st.integers(-20, 20))


@given(spectra(), st.integers(0, 60))
@settings(max_examples=300)
def test_score_of_a_scan_follows_from_its_recorded_spectrum(s: np.ndarray, more: int) -> None:
    found = score(s, len(s), len(s) + more)
    one = replace(record(), n=len(s), m=len(s) + more, score=found, singular_values=s.astype(np.float32))
    assert follows_from_spectrum(one)


CHANGED_SCORES: dict[str, Callable[[Score], Any]] = {
    "snr": lambda found: found.snr * 1.000001 or 1e-9,
    "sigma": lambda found: found.sigma * 1.000001,
    "tau": lambda found: found.tau * 1.000001,
    "above": lambda found: found.above - 1 if found.above else 1,
    "margin": lambda found: found.margin * 1.00001 + 0.00001,
    "sigma1_over_q25": lambda found: found.sigma1_over_q25 * 1.00001,
    "degeneracy": lambda found: Degeneracy.ZERO_NOISE,
}


@pytest.mark.parametrize("field", CHANGED_SCORES)
@given(st.lists(st.floats(0.01, 10), min_size=8, max_size=40, unique=True), st.integers(0, 60))
def test_score_that_does_not_follow_is_found(field: str, values: list[float], more: int) -> None:
    s = np.array(sorted(values, reverse=True))
    found = score(s, len(s), len(s) + more)
    one = replace(record(), n=len(s), m=len(s) + more, singular_values=s.astype(np.float32))
    # Close to tau, another number of values above it is possible.
    assume(found.degeneracy is None and found.margin > 1e-3 and found.sigma > 1e-2 * s[0])
    assert follows_from_spectrum(replace(one, score=found))
    changed = replace(found, **{field: CHANGED_SCORES[field](found)})
    assert not follows_from_spectrum(replace(one, score=changed))


@pytest.mark.parametrize("snr", [0.0, 1e-9, 12345.0, 1e300])
def test_value_at_tau_does_not_allow_every_score(snr: float) -> None:
    s = np.array([1.5, 1.0, 1.0, 1e-7, 1e-7, 1e-7, 1e-7, 1e-7, 1e-7])
    s[1] = score(s, 9, 9).tau
    found = score(s, 9, 9)
    assert score(s, 9, 9, errors=s * 2**-23).error > 1
    one = replace(record(), n=9, m=9, singular_values=s.astype(np.float32))
    assert follows_from_spectrum(replace(one, score=found))
    assert not follows_from_spectrum(replace(one, score=replace(found, snr=snr)))


def test_journal_escapes_the_detail_of_a_row(tmp_path: Path) -> None:
    failed = replace(
        record(),
        no_score=NoScore.NOT_FINITE,
        detail="\x1b]0;owned\x07" * 1_000,
        score=None,
        precision=None,
        singular_values=np.empty(0, np.float32),
    )
    with Journal(tmp_path / "r.sqlite", IDENTITY) as journal:
        journal.add(failed)
    (read,) = read_all(tmp_path / "r.sqlite").values()
    assert read.detail.isprintable()
    assert len(read.detail) < 1_000


# A fuzzer of records as SQL

TEXTS = st.one_of(
    st.sampled_from(["", "layers.0.up", "fp32", "not_finite", "zero", "BF16", "\x1b[2J", "{}", "[]", "\0", "9e999"]),
    st.text(max_size=20),
)
CELLS = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-3, 9),
    st.floats(allow_nan=True, allow_infinity=True),
    TEXTS,
    st.binary(max_size=40),
    st.lists(st.floats(0, 10, width=32), max_size=6).map(lambda s: np.array(sorted(s)[::-1], "<f4").tobytes()),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)
FRAGMENTS = st.sampled_from(
    [
        *[statement for statements in SCHEMAS.values() for statement in statements if len(statements) < 100],
        "DROP TABLE source",
        "DELETE FROM source",
        "DELETE FROM matrices",
        "INSERT INTO source VALUES ('more', 'x')",
        "PRAGMA encoding = 'UTF-16'",
        "PRAGMA journal_mode = WAL",
        "PRAGMA auto_vacuum = 1",
        "PRAGMA page_size = 512",
        "VACUUM",
        "PRAGMA application_id = 7",
        "REINDEX",
    ]
)
CHANGES = st.one_of(
    st.tuples(
        st.sampled_from([f"UPDATE matrices SET {column} = ?" for column in COLUMNS]),
        CELLS,
    ),
    st.tuples(st.sampled_from([f"UPDATE matrices SET {c} = ? WHERE rowid = 2" for c in COLUMNS]), CELLS),
    st.tuples(st.just("UPDATE source SET value = ? WHERE key = 'identity'"), JSON),
    st.tuples(st.just("UPDATE source SET value = ? WHERE key = 'names'"), JSON),
    st.tuples(
        st.sampled_from(
            [
                f"UPDATE source SET value = json_set(value, '$.{key}', json(?)) WHERE key = 'identity'"
                for key in IDENTITY
            ]
        ),
        JSON,
    ),
    st.tuples(FRAGMENTS, st.just(...)),
)

# A grammar of statements over our tables and what SQLite has besides


def words(*texts: str) -> st.SearchStrategy[str]:
    return st.sampled_from(texts)


def line(*parts: st.SearchStrategy[str] | str) -> st.SearchStrategy[str]:
    return st.tuples(*(st.just(part) if isinstance(part, str) else part for part in parts)).map(" ".join)


TABLE = words("matrices", "source", "old", "sqlite_master", "v", "t", "(SELECT 1)")
COLUMN = words(*COLUMNS, "key", "value", "rowid", "sql", "type", "name", "rootpage", "*")
EXPRESSION = st.recursive(
    st.one_of(
        COLUMN.filter(lambda name: name != "*"),
        words(
            "1", "-1", "0.5", "9e999", "NULL", "'x'", "x'00ff'", "'layers.0.up'", "9223372036854775807", "random()"
        ),
        words("hex(zeroblob(450000000))", "zeroblob(60000000)", "printf('%.*c', 900000000, 'x')", "char(27, 93, 0)"),
        words(f"(SELECT count(*) FROM ({ENDLESS} SELECT x FROM c))", f"({ENDLESS} SELECT x FROM c LIMIT 99)"),
    ),
    lambda inner: st.one_of(
        line(inner, words("+", "*", "||", "<", "IS NOT", "LIKE", "COLLATE NOCASE ="), inner),
        line(words("abs", "json", "length", "typeof", "load_extension", "quote", "sum"), "(", inner, ")"),
        line("CASE WHEN", inner, "THEN", inner, "END"),
    ),
    max_leaves=4,
)
SELECT = line(
    words("SELECT", "SELECT DISTINCT", f"{ENDLESS} SELECT"),
    st.one_of(words("*", ", ".join(COLUMNS), "key, value"), EXPRESSION),
    "FROM",
    TABLE,
    st.one_of(
        st.just(""), line("WHERE", EXPRESSION), line("LIMIT", EXPRESSION), words(", matrices", "UNION ALL SELECT 1")
    ),
)
DO = st.one_of(
    line("UPDATE", TABLE, "SET", COLUMN, "=", EXPRESSION, st.one_of(st.just(""), line("WHERE", EXPRESSION))),
    line("INSERT OR REPLACE INTO", TABLE, SELECT),
    line("DELETE FROM", TABLE, st.one_of(st.just(""), line("WHERE", EXPRESSION))),
    SELECT,
)
STATEMENT = st.one_of(
    DO,
    line("CREATE VIEW", words("v", "matrices", "source"), "AS", SELECT),
    line(
        "CREATE TRIGGER t",
        words("AFTER", "BEFORE"),
        words("INSERT", "UPDATE", "DELETE"),
        "ON",
        TABLE,
        "BEGIN",
        DO,
        "; END",
    ),
    line("CREATE", words("", "UNIQUE"), "INDEX i ON", TABLE, "(", EXPRESSION, ")", words("", "WHERE snr > 0")),
    line(
        "CREATE TABLE",
        words("t", "old", "matrices"),
        words("AS SELECT 1", "(a, b AS (a + 1))", "(a PRIMARY KEY) WITHOUT ROWID"),
    ),
    line(
        "ALTER TABLE", TABLE, words("RENAME TO old", "RENAME TO matrices", "ADD COLUMN g AS (1)", "DROP COLUMN tau")
    ),
    line("DROP", words("TABLE", "VIEW", "INDEX", "TRIGGER"), words("matrices", "source", "old", "v", "t", "i")),
    line("PRAGMA", words("writable_schema = ON", "user_version = 6", "journal_mode = WAL", "auto_vacuum = 1"), ""),
    words("VACUUM", "ANALYZE", "REINDEX", "BEGIN", "COMMIT", "ROLLBACK", "SAVEPOINT s", "ATTACH ':memory:' AS m"),
)
BYTES = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=4)


@given(st.lists(st.one_of(CHANGES, st.tuples(STATEMENT, st.just(...))), max_size=5), BYTES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_record_gives_a_result_or_an_error_of_ours(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, Any]], flips: list[tuple[int, int]]
) -> None:
    path = write(tmp_path_factory.mktemp("fuzz"))
    published = path.with_suffix(".json").read_bytes()
    db = sqlite3.connect(path, isolation_level=None)
    db.set_progress_handler(lambda: True, 100_000)
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000)
    for statement, value in changes:
        if "source SET" in statement and value is not ...:
            value = json.dumps(value)
        with suppress(sqlite3.Error, UnicodeError, ValueError, OverflowError):
            db.execute(statement, () if value is ... else (value,)).fetchmany(10)
    db.close()
    data = bytearray(path.read_bytes())
    for at, byte in flips:
        data[at % len(data)] = byte
    path.write_bytes(data)
    started = time.process_time()
    for action in (
        lambda: read_all(path),
        lambda: Result.open(path),
        lambda: [Result.open(path.with_suffix(".json")).by(metric) for metric in METRICS.values()],
        lambda: write_provenance(path.with_suffix(".json"), "org/x"),
    ):
        reason_of(action)
    read_shown(path.with_suffix(".json"))
    check(path.with_suffix(".json"))
    reason = reason_of(lambda: resume(path))
    assert reason in (None, "corrupt", "other_model", "other_names", "unwritable", "locked")
    if reason is None:
        with Journal(path, IDENTITY) as journal:
            rows = journal.records()
        assert all(map(follows_from_spectrum, rows.values()))
        assert all(m.value is not None and m.value >= 0 for m in modules_of(rows.values()))
    assert time.process_time() - started < 10
    replaced(path)
    assert path.with_suffix(".json").read_bytes() == published


def test_error_of_a_damaged_record_says_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path)
    alter(path, "CREATE TABLE more (a)")
    with pytest.raises(ResultError, match="r") as error:
        read_all(path)
    assert error.value.hint == "start over with --fresh"
