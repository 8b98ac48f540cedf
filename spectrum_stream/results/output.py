"""Write a file that the user named, such as with -o.

absent, regular     written as a whole, also behind a link, which stays a link
FIFO, terminal      opened and written, never replaced: `-o /dev/stdout`, `-o >(less)`
result, record      an error: a scan takes hours, and no other output may replace what it wrote
anything else       an error: a folder, a socket, a disk
"""

import contextlib
import errno
import os
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
            if status is None or real.exists():
                write_atomically(real, text)
                return
        elif not stat.S_ISFIFO(status.st_mode) and not stat.S_ISCHR(status.st_mode):
            raise ResultError(f"{path} is not a file that can be written", reason="unwritable")
        # A deleted file is still there for a process that has it open, as /dev/fd/3.
        _write_into(path, text, _READER_WAIT_S if stat.S_ISFIFO(status.st_mode) else 0)
    except (OSError, UnicodeEncodeError) as error:
        raise unwritable(path, error) from error


def check_output(path: Path, inputs: Sequence[Path] = ()) -> Path:
    """Raise if a file is an input, a result, its record or its provenance, or a new file has the name of a record.

    Returns:
        The file that was checked, which is not a link: another process can change a link after the check.

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


def _is_same(path: Path, other: Path) -> bool:
    # A file system that ignores case has many paths of one file.
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
    """Write to a FIFO, to a device, or to an open file that has no name.

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
        status = os.fstat(handle)
        if stat.S_ISREG(status.st_mode):
            if status.st_nlink:
                # Another process put it there after the check.
                raise ResultError(f"{path} was replaced while it was opened", reason="unwritable")
            file.truncate()
        if hasattr(os, "set_blocking"):
            os.set_blocking(handle, True)
        file.write(text)
