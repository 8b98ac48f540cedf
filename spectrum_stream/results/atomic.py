"""Write files that are whole or absent, even after a crash, and never through a link.

    write     to a temporary file in the same folder, since a rename is atomic only within a file system
    fsync     the bytes, or a rename could reach the disk before them
    replace   so that the name is the old file or the new one at any time
    sync      the folder, or the rename itself could be lost in a power cut

Every step that changes the disk calls `before` first, the commits of a record included. Tests use it to count the
steps, to let one fail, or to end the process.

Other programs can put links, FIFOs and devices under our names. A rename replaces a link and leaves its target alone.
Other things that are not regular files stay as they are, and are an error. Only a folder may be a link, since users
move the folder of results to another disk in this way.
"""

import contextlib
import glob
import itertools
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from ..errors import ResultError

# Windows has only the last of these flags.
_UNFOLLOWED = getattr(os, "O_NOFOLLOW", 0)
_UNBLOCKED = getattr(os, "O_NONBLOCK", 0)
_FOLDER = getattr(os, "O_DIRECTORY", 0)
_BINARY = getattr(os, "O_BINARY", 0)
# A killed process leaves one or two of these files. Other programs can leave any number.
_MAX_LEFTOVERS = 1_000


def _nothing(step: str, path: Path) -> None:
    pass


# It is called with `write`, `fsync`, `replace`, `sync`, `commit` or `close`, and with the file.
before: Callable[[str, Path], None] = _nothing

# The files that are being written. If a signal ends the process, their temporary files are removed first.
_in_work: list[Path] = []


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is the whole old one or the whole new one at any time.

    Raises:
        ResultError: unwritable; the old file is intact.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(path) as (temporary, file):
            before("write", path)
            file.write(text)
            file.flush()
            before("fsync", path)
            os.fsync(file.fileno())
            # Windows cannot rename an open file.
            file.close()
            before("replace", path)
            temporary.replace(path)
        before("sync", path)
        sync_folder(path.parent)
    except (OSError, UnicodeEncodeError) as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError | UnicodeEncodeError) -> ResultError:
    """Make the error for a file or text that cannot be written."""
    # The names of files, and escapes in JSON, can contain characters that UTF-8 does not have.
    why = error.strerror if isinstance(error, OSError) else "its text is not valid Unicode"
    return ResultError(f"{path} cannot be written: {why}", reason="unwritable")


@contextlib.contextmanager
def temporary_file(path: Path, suffix: str = ".tmp") -> Iterator[tuple[Path, TextIO]]:
    """Make an empty file next to `path`, which is to be renamed to it, and remove what is left of it.

    Args:
        suffix: the end of its name, which begins with `.tmp`.

    Yields:
        Its path, and the open file. Another process can replace the path, but not the open file.

    Raises:
        ResultError: unwritable, a FIFO, a device or a folder has the name `path`. OSError: it cannot be made.
    """
    check_replaceable(path)
    remove_leftovers(path)
    temporary = path.with_name(f"{_prefix(path)}{os.getpid()}-{secrets.token_hex(8)}{suffix}")
    _in_work.append(path)
    try:
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | _UNFOLLOWED | _BINARY, 0o666)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield temporary, file
    finally:
        for left in (temporary, *companions(temporary)):
            left.unlink(missing_ok=True)
        _in_work.remove(path)


def remove_own_files() -> None:
    """Remove the temporary files of this process, which is about to end."""
    for target in _in_work:
        for left in target.parent.glob(f"{glob.escape(_prefix(target))}{os.getpid()}-*"):
            with contextlib.suppress(OSError):
                left.unlink()


def companions(database: Path) -> list[Path]:
    """Return the paths of the files that SQLite keeps next to a database."""
    return [database.with_name(f"{database.name}{suffix}") for suffix in ("-wal", "-shm", "-journal")]


def check_replaceable(path: Path) -> None:
    """Raise unless a rename may replace `path`: it is absent, a regular file or a link.

    Raises:
        ResultError: unwritable. OSError.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise _in_the_way(path, "not a regular file")


def check_own_file(path: Path) -> os.stat_result | None:
    """Return the status of a file that is to be opened for writing, or None if it is absent.

    A hard link is as unsafe as a symbolic link, because its other name may belong to another user.

    Raises:
        ResultError: unwritable, it is not a regular file or has more than one name. OSError.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    _check_alone(path, status)
    return status


def _check_alone(path: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise _in_the_way(path, "a link")
    if not stat.S_ISREG(status.st_mode):
        raise _in_the_way(path, "not a regular file")
    if status.st_nlink > 1:
        raise _in_the_way(path, "a hard link to another file")


def _in_the_way(path: Path, what: str) -> ResultError:
    return ResultError(f"{path} is {what}", reason="unwritable", hint="move it away, or use another name")


def open_own_file(path: Path) -> int:
    """Open a file for reading and writing, without following a link; make it if it is absent.

    Raises:
        ResultError: unwritable, as `check_own_file`. OSError.
    """
    check_own_file(path)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | _UNFOLLOWED | _UNBLOCKED | _BINARY, 0o666)
    try:
        _check_alone(path, os.fstat(handle))
    except ResultError:
        os.close(handle)
        raise
    return handle


def _prefix(path: Path) -> str:
    # A long name is cut, so that the temporary name is not too long for the file system. Its limit is in bytes.
    return f".{os.fsencode(path.name)[:100].decode(errors='ignore')}."


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of killed processes that wrote this file."""
    for leftover in itertools.islice(path.parent.glob(f"{glob.escape(_prefix(path))}*.tmp*"), _MAX_LEFTOVERS):
        pid = leftover.name.removeprefix(_prefix(path)).split("-", 1)[0]
        if pid.isdecimal() and not _is_running(int(pid)):
            # A folder of this name is not ours, and does no harm.
            with contextlib.suppress(OSError):
                leftover.unlink()


def _is_running(pid: int) -> bool:
    # On Windows signal 0 would end the process.
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def sync_folder(folder: Path) -> None:
    """Write the entries of a folder to the disk."""
    # Windows cannot open folders.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY | _FOLDER)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
