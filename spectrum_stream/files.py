"""Open, read and parse files that this program did not write, within limits.

Files of a checkpoint, of a user and of other programs are untrusted. A FIFO or a device with the name of such a file
could block, or never end. Short JSON can need a hundred times its size in memory. So this module opens, reads and
parses every such file, and checks its limits before it builds anything from it.
"""

import io
import json
import os
import re
import stat
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from .errors import FileError
from .text import si_bytes

# 300,000 layers with five settings each in config.json, or a result of 500,000 modules.
MAX_JSON_VALUES = 2_000_000
MAX_JSON_DEPTH = 100
# Python rejects longer integers by default, because it takes quadratic time to read them.
_MAX_DIGITS = 4300

# Windows has no FIFOs in its file system, and one more kind of file.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_STRING = re.compile(rb'"[^"]*"')
_OTHER_BYTES = bytes(set(range(256)) - set(b'"[]{},'))


class JsonTooLarge(ValueError):
    """JSON has too many values, too many levels, or an integer with too many digits."""


class FileKind(Enum):
    """A kind of untrusted file: its name in messages, and the limit of its size."""

    CONFIG = ("config", 50_000_000)
    INDEX = ("index", 100_000_000)
    RESULT = ("result", 100_000_000)
    SELECTION = ("selection", 100_000_000)
    NAMES = ("list of names", 50_000_000)
    PROVENANCE = ("provenance", 10_000_000)
    # Small files in which programs keep a commit or a process number.
    NOTE = ("note", 10_000)

    def __init__(self, label: str, max_nbytes: int) -> None:
        self.label = label
        self.max_nbytes = max_nbytes

    def check_size(self, nbytes: int, where: object) -> None:
        """Check the size of a file, or the number of bytes that were received so far.

        Raises:
            FileError: file_too_large.
        """
        if nbytes > self.max_nbytes:
            raise FileError(
                f"{where} is larger than {si_bytes(self.max_nbytes)}, the limit for a {self.label}",
                reason="file_too_large",
            )


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file for reading without waiting, if it is a regular file.

    A link is followed.

    Raises:
        FileError: not_a_file; unreadable. FileNotFoundError.
    """
    try:
        # Without O_NONBLOCK a FIFO would block until another process writes to it.
        file = os.fdopen(os.open(path, _FLAGS), "rb")
    except FileNotFoundError:
        raise
    except IsADirectoryError as error:
        # Python cannot open the descriptor of a folder.
        raise _not_a_file(path) from error
    except OSError as error:
        # A socket cannot be opened at all.
        raise _not_a_file(path) if _is_special(path) else _unreadable(path, error) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _not_a_file(path)
    return file


def read_file(path: Path, kind: FileKind) -> bytes:
    """Read a file as a whole, up to the limit of its kind.

    Raises:
        FileError: file_too_large; as `open_regular`. FileNotFoundError.
    """
    with open_regular(path) as file:
        try:
            nbytes = os.fstat(file.fileno()).st_size
            kind.check_size(nbytes, path)
            # This is None if a file of the system has no data now.
            data = file.read(nbytes + 1) or b""
            if len(data) > nbytes:
                # A file can grow while it is read, and the files of /proc have the size 0.
                data += file.read(kind.max_nbytes + 1 - len(data)) or b""
        except OSError as error:
            raise _unreadable(path, error) from error
    kind.check_size(len(data), path)
    return data


def parse_json(data: bytes | str, *, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse JSON within the limits of `check_json`.

    Args:
        data: UTF-8, with or without a byte order mark; or text, without one.
        object_pairs_hook: as in `json.loads`; by default the last of equal keys counts.

    Raises:
        JsonTooLarge: it is above a limit. ValueError: it is not JSON.
    """
    encoded = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    check_json(encoded)
    # Editors on Windows write a byte order mark.
    text = data if isinstance(data, str) else data.decode("utf-8-sig")
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook, parse_int=_integer)
    except RecursionError as error:
        # Only text that is not JSON can hide its nesting from `check_json`.
        raise ValueError("it is not JSON, and nested too deeply") from error


def check_json(data: bytes, max_values: int = MAX_JSON_VALUES) -> None:
    """Check the number and nesting of values in JSON, in linear time.

    Call it before the JSON is parsed. It does not check that the data is JSON. If it is not, the parser stops anyway.

    Args:
        max_values: the limit of commas and opening brackets outside of strings. Each value that is not the first of
            its list or object has one of them.

    Raises:
        JsonTooLarge.
    """
    # A backslash can hide the end of a string.
    rest = data.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in data else data
    # Two quotes without a bracket or comma between them change nothing for the bytes around them.
    rest = rest.translate(None, _OTHER_BYTES).replace(b'""', b"")
    # A value has at most a name and a string.
    if rest.count(b'"') > 4 * (max_values + 1):
        raise JsonTooLarge(f"it has more than {max_values:,} values")
    rest = _STRING.sub(b"", rest)
    opened = rest.count(b"[") + rest.count(b"{")
    if opened + rest.count(b",") > max_values:
        raise JsonTooLarge(f"it has more than {max_values:,} values")
    if opened != rest.count(b"]") + rest.count(b"}"):
        # This is not JSON, so the parser stops within these limits.
        return
    rest = rest.translate(None, b',"')
    for _ in range(MAX_JSON_DEPTH):
        if not rest:
            return
        # This finds the innermost brackets.
        rest = rest.replace(b"[]", b"").replace(b"{}", b"")
    if rest:
        raise JsonTooLarge(f"it is nested deeper than {MAX_JSON_DEPTH} levels")


def above_limit(where: object, error: JsonTooLarge) -> FileError:
    """Make the error of a file with JSON above a limit."""
    return FileError(f"{where} is above a limit: {error}", reason="file_too_large")


def _integer(literal: str) -> int:
    if len(literal) > _MAX_DIGITS:
        raise JsonTooLarge(f"it has an integer of {len(literal):,} digits")
    return int(literal)


def _is_special(path: Path) -> bool:
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def _not_a_file(path: Path) -> FileError:
    return FileError(f"{path} is not a regular file", reason="not_a_file")


def _unreadable(path: Path, error: OSError) -> FileError:
    return FileError(f"{path} cannot be read: {error.strerror}", reason="unreadable")
