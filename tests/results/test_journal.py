import json
import math
import multiprocessing
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spectrum_stream.errors import ResultError
from spectrum_stream.model.no_score import NoScore
from spectrum_stream.results import atomic as durable
from spectrum_stream.results.atomic import write_atomically
from spectrum_stream.results.journal import Journal
from spectrum_stream.results.record import Record
from spectrum_stream.results.result import write_results

from ..support.records import IDENTITY, read_all, record


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


def test_a_record_survives_the_round_trip(tmp_path: Path) -> None:
    written = [record(), record("head", "head")]
    written[1] = replace(
        written[1],
        no_score=NoScore.NOT_FINITE,
        score=None,
        precision=None,
        singular_values=np.empty(0, dtype=np.float32),
    )
    with Journal(tmp_path / "r.sqlite", IDENTITY) as store:
        for one in written:
            store.add(one)
    with Journal(tmp_path / "r.sqlite", IDENTITY) as store:
        found = store.records()
    assert list(found) == [one.module for one in written]
    assert all(equal(found[one.module], one) for one in written)
    # A reader accepts what the journal writes.
    assert all(equal(one, found[one.module]) for one in read_all(tmp_path / "r.sqlite").values())


def test_infinite_diagnostics_are_kept(tmp_path: Path) -> None:
    one = record()
    assert one.score is not None
    endless = replace(one.score, margin=math.inf, sigma1_over_q25=math.inf)
    with Journal(tmp_path / "r.sqlite", IDENTITY) as store:
        store.add(replace(one, score=endless))
        assert store.records()[one.module].score == endless


def test_rows_outlive_a_process_that_is_killed(tmp_path: Path) -> None:
    def die() -> None:
        store = Journal(tmp_path / "r.sqlite", IDENTITY)
        store.add(record())
        os.kill(os.getpid(), 9)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    assert process.exitcode == -9
    with Journal(tmp_path / "r.sqlite", IDENTITY) as store:
        assert list(store.records()) == ["layers.0.up"]


@pytest.mark.parametrize(
    "change",
    [
        {"shards": {"model.safetensors": 11}},
        {"versions": {"model.safetensors": [21, 30]}},
        {"quantization": {"bits": 4}},
        {"engine": 4},
    ],
)
def test_rows_of_another_state_of_the_checkpoint_are_dropped(tmp_path: Path, change: dict[str, Any]) -> None:
    with Journal(tmp_path / "r.sqlite", IDENTITY) as store:
        store.add(record())
    with Journal(tmp_path / "r.sqlite", {**IDENTITY, **change}) as store:
        assert store.dropped == 1 and not store.records()


def test_the_record_of_another_checkpoint_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    with Journal(path, IDENTITY) as store:
        store.add(record())
    with refused("other_model"):
        Journal(path, {**IDENTITY, "path": "/models/b"})
    with Journal(path, IDENTITY) as store:
        assert len(store.records()) == 1
    with Journal(path, {**IDENTITY, "path": "/models/b"}, fresh=True) as store:
        assert not store.records()


def test_a_row_of_another_version_is_corrupt_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    with Journal(path, IDENTITY) as store:
        store.add(record())
    database = sqlite3.connect(path)
    database.execute("UPDATE matrices SET no_score = 'from the future'")
    database.commit()
    database.close()
    with Journal(path, IDENTITY) as store, refused("corrupt"):
        store.records()


def test_two_scans_of_one_model_do_not_share_a_record(tmp_path: Path) -> None:
    with Journal(tmp_path / "r.sqlite", IDENTITY), refused("locked"):
        Journal(tmp_path / "r.sqlite", IDENTITY)
    with Journal(tmp_path / "r.sqlite", IDENTITY, fresh=True), refused("locked"):
        Journal(tmp_path / "r.sqlite", IDENTITY, fresh=True)


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + b"\xff" * 200])
def test_a_file_that_is_no_record(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.sqlite"
    path.write_bytes(content)
    with refused("corrupt"):
        Journal(path, IDENTITY)
    assert path.read_bytes() == content
    with Journal(path, IDENTITY, fresh=True) as store:
        assert not store.records()


def test_a_database_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE matrices (a)")
    database.execute("INSERT INTO matrices VALUES (1)")
    database.commit()
    database.close()
    with refused("corrupt"):
        Journal(path, IDENTITY)
    with Journal(path, IDENTITY, fresh=True) as store:
        assert not store.records()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused("unwritable"):
        Journal(tmp_path / "file" / "r.sqlite", IDENTITY)


def test_results_are_in_spectrums_schema_and_order(tmp_path: Path) -> None:
    modules = [("head", "head"), *((f"layers.{i}.up", "up") for i in (10, 2)), ("layers.2.down", "down")]
    write_results(tmp_path / "r.json", [record(m, g) for m, g in modules])
    text = (tmp_path / "r.json").read_text()
    data = json.loads(text)
    assert list(data) == ["layers.2.down", "head", "layers.2.up", "layers.10.up"]
    assert data["head"].keys() == {"snr", "type"}
    assert text.startswith('{\n    "layers.2.down": {\n        "snr": ') and not text.endswith("\n")


def test_a_failed_matrix_is_left_out_of_the_results(tmp_path: Path) -> None:
    failed = replace(record("bad", "bad"), no_score=NoScore.NOT_FINITE, score=None)
    write_results(tmp_path / "r.json", [record(), failed])
    assert list(json.loads((tmp_path / "r.json").read_text())) == ["layers.0.up"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_written_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        write_atomically(tmp_path / "new" / "r.json", "text")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "new" / "r.json").stat().st_mode) == 0o644


def test_a_target_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "r.json").mkdir()
    with refused("unwritable"):
        write_atomically(tmp_path / "r.json", "text")


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".r.json.99999999-abc.tmp").write_text("half")
    (tmp_path / f".r.json.{os.getpid()}-abc.tmp").write_text("of one that runs")
    (tmp_path / ".r.json.1-abc.tmp").write_text("of one that runs and is another's")
    write_atomically(tmp_path / "r.json", "whole")
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [".r.json.1-abc.tmp", f".r.json.{os.getpid()}-abc.tmp", "r.json"]


@pytest.mark.parametrize("holder", ["", "nonsense", "12", "x" * 10_000, "\0", "-1 host"])
def test_a_note_of_the_holder_that_says_nothing_is_left_out(tmp_path: Path, holder: str) -> None:
    path = tmp_path / "r.sqlite"
    with Journal(path, IDENTITY):
        (tmp_path / ".r.holder").write_text(holder)
        with pytest.raises(ResultError) as error:
            Journal(path, IDENTITY)
    assert error.value.reason == "locked" and str(error.value).endswith("another scan")


@pytest.mark.parametrize("keep", [0, 10, 100, 5000])
def test_a_journal_that_was_torn_loses_no_row_before_the_tear(tmp_path: Path, keep: int) -> None:
    path, wal = tmp_path / "r.sqlite", tmp_path / "r.sqlite-wal"
    store = Journal(path, IDENTITY)
    for i in range(3):
        store.add(record(f"layers.{i}.up"))
    # As the power leaves it: the journal is there and its end is not.
    files = {p: p.read_bytes() for p in (path, wal)}
    store.__exit__()
    for p, data in files.items():
        p.write_bytes(data)
    whole = files[wal]
    wal.write_bytes(whole[: len(whole) - keep])
    with Journal(path, IDENTITY) as again:
        found = again.records()
    assert set(found) <= {f"layers.{i}.up" for i in range(3)} and (keep or len(found) == 3)
    assert list(found) == [f"layers.{i}.up" for i in range(len(found))]


def test_a_commit_that_fails_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(step: str, path: Path) -> None:
        if step == "commit":
            raise OSError(28, "No space left on device")

    with Journal(tmp_path / "r.sqlite", IDENTITY) as store, refused("unwritable"):
        monkeypatch.setattr(durable, "before", full)
        store.add(record())
