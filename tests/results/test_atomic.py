"""Files are whole or absent, even after an error (see also `test_crashes`)."""

import os
import stat
from pathlib import Path

import pytest

from spectrum_stream.errors import ResultError
from spectrum_stream.results import atomic
from spectrum_stream.results.atomic import write_atomically


def test_write_atomically_keeps_the_old_file_if_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")
    with pytest.raises(ResultError) as error:
        write_atomically(path, "\ud800")
    assert error.value.reason == "unwritable"
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_write_atomically_gives_a_file_the_usual_permissions(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        write_atomically(tmp_path / "new" / "r.json", "text")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "new" / "r.json").stat().st_mode) == 0o644


def test_write_atomically_reports_a_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "r.json").mkdir()
    with pytest.raises(ResultError) as error:
        write_atomically(tmp_path / "r.json", "text")
    assert error.value.reason == "unwritable"


def test_write_atomically_removes_the_files_of_killed_processes(tmp_path: Path) -> None:
    (tmp_path / ".r.json.99999999-abc.tmp").write_text("half")
    (tmp_path / f".r.json.{os.getpid()}-abc.tmp").write_text("of one that runs")
    (tmp_path / ".r.json.1-abc.tmp").write_text("of one that runs and is another's")
    write_atomically(tmp_path / "r.json", "whole")
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [".r.json.1-abc.tmp", f".r.json.{os.getpid()}-abc.tmp", "r.json"]


@pytest.mark.skipif(os.name != "posix", reason="links")
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_write_atomically_does_not_write_through_a_link_in_the_place_of_its_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    victim.chmod(0o600)
    (tmp_path / "d").mkdir()

    def exchange(now: str, path: Path) -> None:
        if now == step:
            (temporary,) = path.parent.glob(".*.tmp")
            temporary.unlink()
            temporary.symlink_to(victim)

    monkeypatch.setattr(atomic, "before", exchange)
    write_atomically(tmp_path / "d" / "r.json", "text")
    assert victim.read_text() == "precious"
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600


def test_write_atomically_leaves_the_umask_of_the_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other threads make files too.
    monkeypatch.delattr(os, "umask")
    write_atomically(tmp_path / "r.json", "text")


def test_write_atomically_removes_a_limited_number_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_MAX_LEFTOVERS", 3)
    for i in range(5):
        (tmp_path / f".r.json.{99999990 + i}-abc.tmp").touch()
    write_atomically(tmp_path / "r.json", "text")
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.skipif(os.name != "posix", reason="links")
@pytest.mark.parametrize("target", ["victim.txt", "absent", "r.json", "/dev/null", "."])
def test_write_atomically_replaces_a_link_and_leaves_its_target_alone(tmp_path: Path, target: str) -> None:
    (tmp_path / "victim.txt").write_text("precious")
    (tmp_path / "r.json").symlink_to(target)
    write_atomically(tmp_path / "r.json", "text")
    assert not (tmp_path / "r.json").is_symlink()
    assert (tmp_path / "r.json").read_text() == "text"
    assert (tmp_path / "victim.txt").read_text() == "precious"
    assert not (tmp_path / "absent").exists()
    assert Path("/dev/null").is_char_device()
