"""Untrusted files: regular files only, with limits of size, values and nesting."""

import json
import os
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum_stream.errors import FileError
from spectrum_stream.files import (
    MAX_JSON_DEPTH,
    MAX_JSON_VALUES,
    FileKind,
    check_json,
    open_regular,
    parse_json,
    read_file,
)

PACKAGE = Path(__file__).parents[1] / "spectrum_stream"


def refused(path: Path, kind: FileKind = FileKind.CONFIG) -> FileError:
    with pytest.raises(FileError) as error:
        read_file(path, kind)
    assert str(path) in str(error.value)
    return error.value


def test_read_file_returns_the_bytes_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf{}\r\n")
    (tmp_path / "link").symlink_to("a")
    assert read_file(tmp_path / "a", FileKind.CONFIG) == b"\xef\xbb\xbf{}\r\n"
    assert read_file(tmp_path / "link", FileKind.CONFIG) == b"\xef\xbb\xbf{}\r\n"


@pytest.mark.parametrize("name", ["absent", "dangling"])
def test_absent_file_is_left_to_the_caller(tmp_path: Path, name: str) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / name, FileKind.CONFIG)


def bind(path: Path) -> None:
    # The name of a socket must be short.
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


NOT_FILES: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
    "socket": bind,
    "endless device": lambda p: p.symlink_to("/dev/zero"),
    "terminal": lambda p: p.symlink_to("/dev/tty"),
    "folder of a device": lambda p: p.symlink_to("/dev"),
}


@pytest.mark.parametrize("kind", NOT_FILES)
def test_other_things_than_regular_files_are_rejected_at_once(tmp_path: Path, kind: str) -> None:
    NOT_FILES[kind](tmp_path / "x")
    (tmp_path / "link").symlink_to("x")
    began = time.monotonic()
    assert refused(tmp_path / "x").reason == "not_a_file"
    assert refused(tmp_path / "link").reason == "not_a_file"
    assert time.monotonic() - began < 5


def test_fifo_with_a_writer_is_rejected_too(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    writer = threading.Thread(target=lambda: os.close(os.open(tmp_path / "x", os.O_WRONLY)))
    writer.start()
    try:
        while writer.is_alive():
            assert refused(tmp_path / "x").reason == "not_a_file"
    finally:
        writer.join()


@pytest.mark.parametrize("name", ["loop", "ring-a", "file/below", "n" * 300])
def test_path_that_leads_nowhere_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "ring-a").symlink_to("ring-b")
    (tmp_path / "ring-b").symlink_to("ring-a")
    (tmp_path / "file").write_text("")
    assert refused(tmp_path / name).reason == "unreadable"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="Linux only")
@pytest.mark.parametrize(
    ("path", "reason"),
    [("/proc/self/mem", "unreadable"), ("/proc/self/pagemap", "file_too_large"), ("/proc/self/fd", "not_a_file")],
)
def test_files_of_the_system_are_read_within_limits(tmp_path: Path, path: str, reason: str) -> None:
    (tmp_path / "x").symlink_to(path)
    assert refused(tmp_path / "x", FileKind.NOTE).reason == reason


@pytest.mark.parametrize("kind", FileKind)
def test_size_is_limited_by_kind_before_anything_is_read(tmp_path: Path, kind: FileKind) -> None:
    path = tmp_path / "x"
    path.touch()
    os.truncate(path, kind.max_nbytes + 1)
    tracemalloc.start()
    assert refused(path, kind).reason == "file_too_large"
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_limit_holds_for_a_file_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"x" * 10)
    with open_regular(tmp_path / "x") as file:
        (tmp_path / "x").write_bytes(b"x" * (FileKind.NOTE.max_nbytes + 100))
        before = os.stat_result((0o100644, *(0,) * 5, 10, *(0,) * 3))
        monkeypatch.setattr(os, "fstat", lambda handle: before)
        monkeypatch.setattr("spectrum_stream.files.open_regular", lambda path: file)
        assert refused(tmp_path / "x", FileKind.NOTE).reason == "file_too_large"


def test_file_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * FileKind.NOTE.max_nbytes)
    assert len(read_file(tmp_path / "x", FileKind.NOTE)) == FileKind.NOTE.max_nbytes


def test_opened_file_is_closed_on_exec_and_readable(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    with open_regular(tmp_path / "x") as file:
        assert not os.get_inheritable(file.fileno())
        assert file.read(2) == b"ab"


def test_limits_are_those_of_the_readme() -> None:
    table = (PACKAGE / "README.md").read_text()
    for kind in FileKind:
        assert f"| {kind.name} | {kind.max_nbytes:,} bytes |" in table
    assert f"{MAX_JSON_VALUES:,} values" in table
    assert f"{MAX_JSON_DEPTH} levels" in table


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def count(value: Any) -> int:
    """Count the containers, and the commas between values."""
    if not isinstance(value, (list, dict)):
        return 0
    inside = list(value.values()) if isinstance(value, dict) else value
    return 1 + max(0, len(inside) - 1) + sum(map(count, inside))


def depth(value: Any) -> int:
    if not isinstance(value, (list, dict)):
        return 0
    return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)


@given(JSON, st.booleans())
def test_parse_json_gives_what_json_gives(value: Any, is_ascii: bool) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii)
    assert repr(parse_json(text)) == repr(json.loads(text)) == repr(parse_json(f"\ufeff{text}".encode()))


@given(JSON)
def test_check_json_counts_values_outside_of_strings(value: Any) -> None:
    data = json.dumps(value).encode()
    check_json(data, count(value))
    if count(value):
        with pytest.raises(ValueError, match="values"):
            check_json(data, count(value) - 1)


ALMOST_JSON = st.text(alphabet='[]{},:"\\ 0-1.eE\ud800\x00tN').map(lambda text: text.encode("utf-8", "surrogatepass"))


@given(st.binary() | ALMOST_JSON)
def test_parse_json_raises_nothing_but_value_errors(data: bytes) -> None:
    try:
        found = parse_json(data)
    except ValueError:
        return
    assert depth(found) <= MAX_JSON_DEPTH


@pytest.mark.parametrize("levels", [MAX_JSON_DEPTH, MAX_JSON_DEPTH + 1, 100_000])
@pytest.mark.parametrize("brackets", ["[]", '{"a":x}'])
def test_nesting_is_limited(levels: int, brackets: str) -> None:
    begin, end = ("[", "]") if brackets == "[]" else ('{"a":', "}")
    text = f"{begin * levels}0{end * levels}"
    if levels <= MAX_JSON_DEPTH:
        assert depth(parse_json(text)) == levels
    else:
        with pytest.raises(ValueError, match="nested"):
            parse_json(text)


@pytest.mark.parametrize(
    "text",
    [
        f"[{'[],' * MAX_JSON_VALUES}[]]",
        f'{{"a":{{"x":[{"{}," * MAX_JSON_VALUES}1]}}}}',
        f"[{'1,' * MAX_JSON_VALUES}1]",
        "[" * MAX_JSON_VALUES * 4,
        "]" * MAX_JSON_VALUES * 4,
        f'["{"]" * 1000}", {"[" * 200}',
        '{"a":' * 100_000,
        '""' * MAX_JSON_VALUES * 4,
        '"["' * MAX_JSON_VALUES * 4,
        '"[",' * MAX_JSON_VALUES * 4,
    ],
    ids=["lists", "objects", "numbers", "open", "closed", "in strings", "deep", "empty", "joined", "quoted"],
)
def test_json_above_a_limit_is_rejected_before_it_is_parsed(text: str) -> None:
    data = text.encode()
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"values|nested|Expecting|Extra"):
        parse_json(data)
    assert time.monotonic() - began < 10
    assert tracemalloc.get_traced_memory()[1] < 4 * len(data) + 1_000_000
    tracemalloc.stop()


def test_brackets_and_commas_in_strings_do_not_count_as_values() -> None:
    names = {"a": "[" * 500 + '\\"' + "{," * MAX_JSON_VALUES, '"]\\': ["\\", '\\"[' * 200]}
    assert parse_json(json.dumps(names)) == names


@pytest.mark.parametrize("literal", ["1" * 4301, "-" + "1" * 10_000_000])
def test_integers_have_a_limit_of_digits(literal: str) -> None:
    with pytest.raises(ValueError, match="digits"):
        parse_json(f'{{"a": {literal}}}')


def test_equal_keys_reach_the_caller() -> None:
    assert parse_json(b'{"a": 1, "a": 2}') == {"a": 2}
    assert parse_json(b'{"a": 1, "a": 2}', object_pairs_hook=list) == [("a", 1), ("a", 2)]
