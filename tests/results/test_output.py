"""The file of -o: what may be replaced, what is opened and written, and what is refused."""

import json
import os
import shutil
import socket
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from spectrum_stream.errors import SpectrumStreamError
from spectrum_stream.results import output
from spectrum_stream.results.journal import Journal
from spectrum_stream.results.output import check_output, write_output
from spectrum_stream.results.result import write_results

from ..support.cli import Cli, reason
from ..support.records import IDENTITY, record

posix_only = pytest.mark.skipif(os.name != "posix", reason="files that only POSIX has")


def refusal(path: Path, *inputs: Path) -> str | None:
    try:
        write_output(path, "text", inputs)
    except SpectrumStreamError as error:
        return error.reason
    return None


@pytest.fixture
def result(tmp_path: Path) -> Path:
    path = tmp_path / "snr_results_x.json"
    rows = [record(f"layers.{i}.up") for i in range(4)]
    with Journal(path.with_suffix(".sqlite"), IDENTITY) as journal:
        for row in rows:
            journal.add(row)
    write_results(path, rows)
    return path


def test_output_replaces_a_regular_file(tmp_path: Path) -> None:
    for path in (tmp_path / "a.yaml", tmp_path / "new" / "b.yaml"):
        for _ in range(2):
            assert refusal(path) is None
            assert path.read_text() == "text"


@posix_only
def test_output_replaces_the_target_of_a_link_and_keeps_the_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target.yaml", tmp_path / "link.yaml"
    target.write_text("mine")
    link.symlink_to("target.yaml")
    assert refusal(link) is None
    assert link.is_symlink()
    assert target.read_text() == "text"


@posix_only
@pytest.mark.parametrize("kind", ["loop", "dangling", "folder", "socket", "below a file"])
def test_output_to_what_cannot_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("o")
    bound = socket.socket(socket.AF_UNIX)
    if kind == "folder":
        path.mkdir()
    elif kind == "socket":
        bound.bind("o")
    elif kind == "below a file":
        path.touch()
        path = path / "o"
    else:
        path.symlink_to("o" if kind == "loop" else "none")
    assert refusal(path) == "unwritable"
    assert not Path("none").exists()
    bound.close()


@posix_only
@pytest.mark.parametrize("path", ["", ".", "/", "x" * 300, "/proc/self/mem", "/proc/version", "/dev/fd/99"])
def test_output_to_a_name_that_cannot_be_a_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(Path(path)) == "unwritable"
    assert list(tmp_path.iterdir()) == []


@posix_only
def test_output_is_written_into_a_fifo_that_has_a_reader(tmp_path: Path) -> None:
    path, read = tmp_path / "fifo", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    assert refusal(path) is None
    reader.join()
    assert read == ["text"]
    assert stat.S_ISFIFO(path.lstat().st_mode)


@posix_only
def test_output_to_a_fifo_without_a_reader_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_READER_WAIT_S", 0.1)
    os.mkfifo(tmp_path / "fifo")
    assert refusal(tmp_path / "fifo") == "unwritable"
    assert stat.S_ISFIFO((tmp_path / "fifo").lstat().st_mode)


@posix_only
def test_output_is_written_into_a_device_behind_a_link(tmp_path: Path) -> None:
    # A link of this test, since a fault would replace the device itself.
    for name, expected in (("null", None), ("full", "unwritable")):
        if not Path("/dev", name).is_char_device():
            continue
        link = tmp_path / name
        link.symlink_to(f"/dev/{name}")
        assert refusal(link) == expected
        assert link.is_symlink()
        assert link.is_char_device()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux only")
def test_output_to_a_deleted_file_that_is_open_is_written_into_it(tmp_path: Path) -> None:
    with (tmp_path / "gone").open("w+") as file:
        (tmp_path / "gone").unlink()
        assert refusal(Path(f"/proc/self/fd/{file.fileno()}")) is None
        file.seek(0)
        assert file.read() == "text"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux only")
@pytest.mark.parametrize("place", ["/proc/self/fd", "/proc/thread-self/fd", "/dev/fd"])
def test_output_to_an_open_file_continues_it(tmp_path: Path, place: str) -> None:
    path = tmp_path / "all.yaml"
    path.write_text("before\n")
    with path.open("a") as file:
        inode = path.stat().st_ino
        (tmp_path / "link").symlink_to(f"{place}/{file.fileno()}")
        assert refusal(tmp_path / "link") is None
    assert path.read_text() == "before\ntext"
    assert path.stat().st_ino == inode


@pytest.mark.skipif(not Path("/proc/self/exe").exists(), reason="Linux only")
def test_output_never_replaces_a_program_behind_a_link_of_the_system(tmp_path: Path) -> None:
    # A process of another program, since a fault would replace the program.
    program = tmp_path / "sleep"
    shutil.copy(shutil.which("sleep") or "", program)
    before = program.read_bytes()
    running = subprocess.Popen([program, "60"])
    try:
        (tmp_path / "link").symlink_to(f"/proc/{running.pid}/exe")
        for path in (Path(f"/proc/{running.pid}/exe"), tmp_path / "link"):
            assert refusal(path) == "unwritable"
    finally:
        running.kill()
        running.wait()
    assert program.read_bytes() == before


def test_output_never_replaces_a_result_or_what_belongs_to_it(result: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    provenance = folder / "p.txt"
    provenance.write_text(json.dumps({"schema_version": 1, "result_sha256": "0"}))
    (folder / "renamed.yaml").write_bytes(result.read_bytes())
    (folder / "spaces.yaml").write_bytes(b" \n" * 50 + result.read_bytes())
    (folder / "database.html").write_bytes(result.with_suffix(".sqlite").read_bytes())
    (folder / "hard.yaml").hardlink_to(result)
    (folder / "link.yaml").symlink_to(result.with_suffix(".sqlite"))
    names = [Path(name) for name in ("new.sqlite", "new.sqlite-wal", "new.sqlite-journal")]
    before = {path: path.read_bytes() for path in (result, result.with_suffix(".sqlite"), *folder.iterdir())}
    for path in (*before, *(folder / name for name in names)):
        assert refusal(path) == "conflicting_options", path
    assert {path: path.read_bytes() for path in before} == before
    assert not any((folder / name).exists() for name in names)


def test_output_never_replaces_an_input(tmp_path: Path) -> None:
    path, link = tmp_path / "sorted.json", tmp_path / "link.json"
    path.write_text('{"up": {"layers.0.up": 1.0}}')
    link.symlink_to(path)
    assert refusal(path, path) == refusal(link, path) == refusal(path, link) == "conflicting_options"
    assert refusal(path, path.with_suffix(".sqlite")) == "conflicting_options"
    assert refusal(path) is None


def test_output_never_replaces_an_input_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "sorted.json"
    path.write_text('{"up": {"layers.0.up": 1.0}}')
    # This imitates a file system that ignores case.
    (tmp_path / "SORTED.JSON").hardlink_to(path)
    assert refusal(tmp_path / "SORTED.JSON", path) == "conflicting_options"


@posix_only
def test_output_follows_a_link_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: Path) -> None:
    link, target = tmp_path / "link.yaml", tmp_path / "target.yaml"
    target.touch()
    link.symlink_to(target)
    before = result.read_bytes()

    def exchange(path: Path) -> bool:
        link.unlink()
        link.symlink_to(result)
        return False

    monkeypatch.setattr(output, "_is_of_a_scan", exchange)
    assert refusal(link) is None
    assert target.read_text() == "text"
    assert result.read_bytes() == before


@posix_only
def test_output_is_not_written_into_a_file_that_takes_the_place_of_a_fifo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, victim = tmp_path / "fifo", tmp_path / "victim.txt"
    victim.write_text("precious")
    os.mkfifo(path)

    def is_fifo(mode: int) -> bool:
        if path.is_fifo():
            path.unlink()
            path.hardlink_to(victim)
        return stat.S_IFMT(mode) == stat.S_IFIFO

    monkeypatch.setattr(stat, "S_ISFIFO", is_fifo)
    assert refusal(path) == "unwritable"
    assert victim.read_text() == "precious"


@posix_only
@pytest.mark.parametrize("name", ["🦙" * 62 + ".yaml", "ж" * 125 + ".yaml", "x" * 255, "a\nb", os.fsdecode(b"\xff")])
def test_output_can_have_any_name_that_a_file_can_have(tmp_path: Path, name: str) -> None:
    try:
        (tmp_path / name).touch()
    except OSError:
        pytest.skip("this file system does not have such names")
    assert refusal(tmp_path / name) is None
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_output_with_text_that_is_not_unicode_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpectrumStreamError) as error:
        write_output(tmp_path / "o", "\ud800")
    assert error.value.reason == "unwritable"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]", '{"a": 1}', "{" * 100_000, "\0" * 99, "SQLite format 2"])
def test_output_replaces_a_file_that_only_looks_like_a_result(tmp_path: Path, content: str) -> None:
    (tmp_path / "o").write_text(content)
    check_output(tmp_path / "o")
    assert refusal(tmp_path / "o") is None


# The command line


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_select_to_stdout_prints_the_file_and_nothing_else(
    cli: Cli, result: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name != "-" and not Path(name).exists():
        return
    monkeypatch.chdir(tmp_path)
    cli("select", result, "--top-percent", "50", "-o", "file.yaml")
    done = cli("select", result, "--top-percent", "50", "-o", name)
    assert done.stdout == Path("file.yaml").read_text()
    assert not Path("-").exists()


@pytest.mark.parametrize("command", ["select", "report"])
def test_stdout_cannot_have_a_file_and_json(cli: Cli, result: Path, command: str) -> None:
    done = cli(command, result, "--top-percent", "50", "-o", "-", "--json", code=2)
    assert reason(done) == "conflicting_options"
    assert done.stdout == ""


def test_report_to_stdout_is_the_page(cli: Cli, result: Path) -> None:
    page = cli("report", result, "-o", "-").stdout
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")


@pytest.mark.parametrize("command", [["select", "--top-percent", "50"], ["report"]])
@pytest.mark.parametrize("suffix", [".json", ".sqlite"])
def test_commands_do_not_replace_the_result_or_its_record(
    cli: Cli, result: Path, command: list[str], suffix: str
) -> None:
    path = result.with_suffix(suffix)
    before = path.read_bytes()
    assert reason(cli(command[0], result, *command[1:], "-o", path, code=2)) == "conflicting_options"
    assert path.read_bytes() == before


@posix_only
@pytest.mark.parametrize("command", [["select", "--top-percent", "50"], ["report"]])
@pytest.mark.parametrize("kind", ["fifo", "null", "link", "record of a link"])
def test_commands_keep_the_kind_of_the_file_that_they_write(
    cli: Cli, result: Path, tmp_path: Path, command: list[str], kind: str
) -> None:
    path, target, read = tmp_path / "o", tmp_path / "target.yaml", []
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    if kind == "fifo":
        os.mkfifo(path)
        reader.start()
    else:
        target.write_text("mine")
        path.symlink_to({"null": Path("/dev/null"), "link": target}.get(kind, result.with_suffix(".sqlite")))
    before, status = result.with_suffix(".sqlite").read_bytes(), path.lstat()
    cli(command[0], result, *command[1:], "-o", path, code=2 if "record" in kind else 0)
    assert os.path.samestat(path.lstat(), status)
    assert result.with_suffix(".sqlite").read_bytes() == before
    if kind == "fifo":
        reader.join()
        assert read[0]
    else:
        assert (target.read_text() != "mine") == (kind == "link")
