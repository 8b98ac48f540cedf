"""Write a file that the user named, such as with -o.

absent, regular     written as a whole, also behind a link, which stays a link
FIFO, terminal      opened and written, never replaced: `-o /dev/stdout`, `-o >(less)`
open file           continued where it stands: `-o /dev/stdout >> all.yaml`
other link of /proc an error: /proc/self/exe is the program that runs Python
result, record      an error: a scan takes hours, and no other output may replace what it wrote
anything else       an error: a folder, a socket, a disk
"""

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import FileError, ResultError, UsageError
from ..files import FileKind, open_regular, parse_json, read_file
from .atomic import unwritable, write_atomically
from .provenance import is_provenance
from .result import is_result

_SQLITE = b"SQLite format 3\0"
# Long enough for the reader of a FIFO to start, and too short to look like a hang.
_READER_WAIT_S = 5.0
_ASK_AGAIN_S = 0.05
# Linux follows the same number of links.
_MAX_LINKS = 40


def write_output(path: Path, text: str, inputs: Sequence[Path] = ()) -> None:
    """Write a file that the user named.

    Args:
        inputs: the files that the command read.

    Raises:
        UsageError: conflicting_options, the file is one of the inputs, a result, its record or its provenance.
        ResultError: unwritable; a file that was there is intact.
    """
    try:
        try:
            status = path.stat()
        except FileNotFoundError:
            if path.is_symlink():
                raise ResultError(f"{path} is a broken link", reason="unwritable") from None
            status = None
        if status is None or stat.S_ISREG(status.st_mode):
            real = check_output(path, inputs)
            descriptor = _find_descriptor(path)
            if descriptor is None:
                write_atomically(real, text)
            else:
                with os.fdopen(os.dup(descriptor), "w", encoding="utf-8") as file:
                    file.write(text)
        elif stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode):
            _write_into(path, text, _READER_WAIT_S if stat.S_ISFIFO(status.st_mode) else 0)
        else:
            raise ResultError(f"{path} is not a file that can be written", reason="unwritable")
    except (OSError, UnicodeEncodeError) as error:
        raise unwritable(path, error) from error


def check_output(path: Path, inputs: Sequence[Path] = ()) -> Path:
    """Raise if a file is an input, a result, its record or its provenance, or a new file has the name of a record.

    Returns:
        The file that was checked. It is not a link, because another process can change a link after the check.

    Raises:
        UsageError: conflicting_options.
    """
    real = Path(os.path.realpath(path))
    # The result of a record was read with it.
    read = [*inputs, *(path.with_suffix(".json") for path in inputs if path.suffix == ".sqlite")]
    is_input = any(_is_same(real, file) for file in read)
    if not is_input and not real.suffix.startswith(".sqlite") and not _is_of_a_scan(real):
        return real
    raise UsageError(
        f"{path} is {'an input of this command' if is_input else 'a result, its record or its provenance'}",
        reason="conflicting_options",
        hint="write to another file, or delete this one first",
    )


def _find_descriptor(path: Path) -> int | None:
    """Return the open descriptor that a path such as /dev/stdout leads to, or None.

    A link in /proc leads to an open file, not to a name. Its text can be the name of a program, of another file or of
    no file.

    Raises:
        ResultError: unwritable, a link in /proc leads to a file that is not open for writing here. OSError.
    """
    own = re.compile(rf"/proc/{os.getpid()}(?:/task/[0-9]+)?/fd/([0-9]+)")
    for _ in range(_MAX_LINKS):
        path = Path(os.path.realpath(path.parent), path.name)
        if not path.is_symlink():
            return None
        if path.is_relative_to("/proc"):
            if (found := own.fullmatch(str(path))) is None:
                raise ResultError(f"{path} is not a file that can be written", reason="unwritable")
            return int(found[1])
        path = path.parent / path.readlink()
    return None


def _is_same(path: Path, other: Path) -> bool:
    # On a file system that ignores case, one file has many paths.
    with contextlib.suppress(OSError):
        return path.samefile(other)
    return str(path) == os.path.realpath(other)


def _is_of_a_scan(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            begin = file.read(len(_SQLITE))
            if begin == _SQLITE:
                return True
            if begin.lstrip()[:1] not in (b"", b"{"):
                return False
        data: Any = parse_json(read_file(path, FileKind.RESULT))
    except (OSError, FileError, ValueError):
        return False
    return is_result(data) or is_provenance(data)


def _write_into(path: Path, text: str, wait_s: float) -> None:
    """Write to a FIFO or a device.

    Args:
        wait_s: seconds to wait for a reader.
    """
    # A FIFO without a reader would block, and a terminal could become the one that controls this process.
    flags = os.O_WRONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            handle = os.open(path, flags)
            break
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() >= deadline:
                raise
            time.sleep(_ASK_AGAIN_S)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            # Another process put it there after the check.
            raise ResultError(f"{path} was replaced while it was opened", reason="unwritable")
        if hasattr(os, "set_blocking"):
            os.set_blocking(handle, True)
        file.write(text)
