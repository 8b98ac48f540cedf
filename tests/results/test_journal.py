import json
import math
import multiprocessing
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectrum_stream.errors import ResultError
from spectrum_stream.model.no_score import NoScore
from spectrum_stream.numerics.precision import Precision
from spectrum_stream.results import atomic
from spectrum_stream.results.journal import Journal
from spectrum_stream.results.record import Record
from spectrum_stream.results.result import write_results

from ..support.records import IDENTITY, change_record, read_all, record


def dataclass_items(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def equal(a: Record, b: Record) -> bool:
    items_a, items_b = dataclass_items(a), dataclass_items(b)
    return bool(np.array_equal(items_a.pop("singular_values"), items_b.pop("singular_values"))) and items_a == items_b


@contextmanager
def refused(reason: str) -> Iterator[None]:
    with pytest.raises(ResultError) as error:
        yield
    assert error.value.reason == reason


def test_journal_returns_the_records_that_were_added(tmp_path: Path) -> None:
    written = [record(), record("head", "head")]
    written[1] = replace(
        written[1],
        no_score=NoScore.NOT_FINITE,
        score=None,
        precision=None,
        singular_values=np.empty(0, dtype=np.float32),
    )
    with Journal(tmp_path / "r.sqlite", IDENTITY) as journal:
        for one in written:
            journal.add(one)
    with Journal(tmp_path / "r.sqlite", IDENTITY) as journal:
        found = journal.records()
    assert list(found) == [one.module for one in written]
    assert all(equal(found[one.module], one) for one in written)
    # A reader accepts the rows that the journal writes.
    assert all(equal(one, found[one.module]) for one in read_all(tmp_path / "r.sqlite").values())


def test_journal_keeps_how_a_score_was_computed(tmp_path: Path) -> None:
    one = replace(record(), detail="fp32 on cuda:0 failed the check", refined=3, precision=Precision.MIXED)
    with Journal(tmp_path / "r.sqlite", IDENTITY) as journal:
        journal.add(one)
    assert equal(read_all(tmp_path / "r.sqlite")[one.module], one)


def test_record_without_a_score_has_no_refined_values(tmp_path: Path) -> None:
    failed = replace(
        record(), no_score=NoScore.FAILED_CHECK, score=None, precision=None, singular_values=np.empty(0, np.float32)
    )
    with Journal(tmp_path / "r.sqlite", IDENTITY) as journal:
        journal.add(failed)
    assert read_all(tmp_path / "r.sqlite")
    change_record(tmp_path / "r.sqlite", "UPDATE matrices SET refined = 1")
    with refused("corrupt"):
        read_all(tmp_path / "r.sqlite")


def test_journal_keeps_infinite_numbers(tmp_path: Path) -> None:
    one = record()
    assert one.score is not None
    endless = replace(one.score, margin=math.inf, sigma1_over_q25=math.inf)
    with Journal(tmp_path / "r.sqlite", IDENTITY) as journal:
        journal.add(replace(one, score=endless))
        assert journal.records()[one.module].score == endless


def test_journal_keeps_the_rows_of_a_killed_process(tmp_path: Path) -> None:
    def die() -> None:
        journal = Journal(tmp_path / "r.sqlite", IDENTITY)
        journal.add(record())
        os.kill(os.getpid(), 9)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    assert process.exitcode == -9
    with Journal(tmp_path / "r.sqlite", IDENTITY) as journal:
        assert list(journal.records()) == ["layers.0.up"]


@pytest.mark.parametrize(
    "change",
    [
        {"shards": {"model.safetensors": 11}},
        {"versions": {"model.safetensors": [21, 30]}},
        {"files": "1" * 64},
        {"engine": 4},
    ],
)
def test_journal_drops_the_rows_of_another_state_of_the_checkpoint(tmp_path: Path, change: dict[str, Any]) -> None:
    with Journal(tmp_path / "r.sqlite", IDENTITY) as journal:
        journal.add(record())
    with Journal(tmp_path / "r.sqlite", {**IDENTITY, **change}) as journal:
        assert journal.dropped == 1
        assert not journal.records()


def test_journal_rejects_and_keeps_the_record_of_another_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    with Journal(path, IDENTITY) as journal:
        journal.add(record())
    with refused("other_model"):
        Journal(path, {**IDENTITY, "path": "/models/b"})
    with Journal(path, IDENTITY) as journal:
        assert len(journal.records()) == 1
    with Journal(path, {**IDENTITY, "path": "/models/b"}, fresh=True) as journal:
        assert not journal.records()


def test_journal_reports_a_row_of_another_version_as_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    with Journal(path, IDENTITY) as journal:
        journal.add(record())
    database = sqlite3.connect(path)
    database.execute("UPDATE matrices SET no_score = 'from the future'")
    database.commit()
    database.close()
    with Journal(path, IDENTITY) as journal, refused("corrupt"):
        journal.records()


def test_journal_is_locked_for_a_second_scan(tmp_path: Path) -> None:
    with Journal(tmp_path / "r.sqlite", IDENTITY), refused("locked"):
        Journal(tmp_path / "r.sqlite", IDENTITY)
    with Journal(tmp_path / "r.sqlite", IDENTITY, fresh=True), refused("locked"):
        Journal(tmp_path / "r.sqlite", IDENTITY, fresh=True)


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + b"\xff" * 200])
def test_journal_rejects_a_file_that_is_not_a_database(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.sqlite"
    path.write_bytes(content)
    with refused("corrupt"):
        Journal(path, IDENTITY)
    assert path.read_bytes() == content
    with Journal(path, IDENTITY, fresh=True) as journal:
        assert not journal.records()


def test_journal_rejects_a_database_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE matrices (a)")
    database.execute("INSERT INTO matrices VALUES (1)")
    database.commit()
    database.close()
    with refused("corrupt"):
        Journal(path, IDENTITY)
    with Journal(path, IDENTITY, fresh=True) as journal:
        assert not journal.records()


def test_journal_reports_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused("unwritable"):
        Journal(tmp_path / "file" / "r.sqlite", IDENTITY)


def test_write_results_uses_spectrums_schema_and_order(tmp_path: Path) -> None:
    modules = [("head", "head"), *((f"layers.{i}.up", "up") for i in (10, 2)), ("layers.2.down", "down")]
    write_results(tmp_path / "r.json", [record(m, g) for m, g in modules])
    text = (tmp_path / "r.json").read_text()
    data = json.loads(text)
    assert list(data) == ["layers.2.down", "head", "layers.2.up", "layers.10.up"]
    assert data["head"].keys() == {"snr", "type"}
    assert text.startswith('{\n    "layers.2.down": {\n        "snr": ') and not text.endswith("\n")


def test_write_results_leaves_out_a_matrix_without_a_score(tmp_path: Path) -> None:
    failed = replace(record("bad", "bad"), no_score=NoScore.NOT_FINITE, score=None)
    write_results(tmp_path / "r.json", [record(), failed])
    assert list(json.loads((tmp_path / "r.json").read_text())) == ["layers.0.up"]


@pytest.mark.parametrize("holder", ["", "nonsense", "12", "x" * 10_000, "\0", "-1 host"])
def test_journal_ignores_a_holder_file_without_a_process(tmp_path: Path, holder: str) -> None:
    path = tmp_path / "r.sqlite"
    with Journal(path, IDENTITY):
        (tmp_path / ".r.holder").write_text(holder)
        with pytest.raises(ResultError) as error:
            Journal(path, IDENTITY)
    assert error.value.reason == "locked"
    assert str(error.value).endswith("another scan")


@pytest.mark.parametrize("keep", [0, 10, 100, 5000])
def test_journal_cut_by_a_power_failure_keeps_the_rows_before_the_cut(tmp_path: Path, keep: int) -> None:
    path, wal = tmp_path / "r.sqlite", tmp_path / "r.sqlite-wal"
    journal = Journal(path, IDENTITY)
    for i in range(3):
        journal.add(record(f"layers.{i}.up"))
    # After a power failure, the file with the last rows lacks its end.
    files = {p: p.read_bytes() for p in (path, wal)}
    journal.__exit__()
    for p, data in files.items():
        p.write_bytes(data)
    whole = files[wal]
    wal.write_bytes(whole[: len(whole) - keep])
    with Journal(path, IDENTITY) as again:
        found = again.records()
    assert keep or len(found) == 3
    assert list(found) == [f"layers.{i}.up" for i in range(len(found))]


def test_journal_reports_a_commit_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(step: str, path: Path) -> None:
        if step == "commit":
            raise OSError(28, "No space left on device")

    with Journal(tmp_path / "r.sqlite", IDENTITY) as journal, refused("unwritable"):
        monkeypatch.setattr(atomic, "before", full)
        journal.add(record())


def test_journal_is_locked_while_another_program_writes_the_record(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    with Journal(path, IDENTITY) as journal:
        journal.add(record())
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with refused("locked"):
        Journal(path, IDENTITY)
    assert not (tmp_path / ".r.holder").exists()
    other.close()
    with Journal(path, IDENTITY) as journal:
        assert len(journal.records()) == 1
