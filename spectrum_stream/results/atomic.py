"""Write files that are whole or absent, even after a crash.

    write     to a temporary file in the same folder, since a rename is atomic only within a file system
    fsync     the bytes, or a rename could reach the disk before them
    replace   so that the name is the old file or the new one at any time
    sync      the folder, or the rename itself could be lost in a power cut

Every step that changes the disk calls `before` first, the commits of a record included. Tests use it to count the
steps, to let one fail, or to end the process.
"""

import glob
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..errors import ResultError


def _nothing(step: str, path: Path) -> None:
    pass


# It is called with `write`, `fsync`, `replace`, `sync`, `commit` or `close`, and with the file.
before: Callable[[str, Path], None] = _nothing


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is the whole old one or the whole new one at any time.

    Raises:
        ResultError: unwritable; the old file is intact.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        before("write", path)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{_prefix(path)}{os.getpid()}-", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                before("fsync", path)
                os.fsync(file.fileno())
            # mkstemp makes files for one user only; a result is as readable as any other file.
            umask = os.umask(0)
            os.umask(umask)
            Path(temporary).chmod(0o666 & ~umask)
            before("replace", path)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        before("sync", path)
        _sync_folder(path.parent)
    except OSError as error:
        raise ResultError(f"{path} cannot be written: {error.strerror}", reason="unwritable") from error


def _prefix(path: Path) -> str:
    # A long name is cut, so that the temporary name is not too long for the file system.
    return f".{path.name[:100]}."


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of killed processes that wrote this file."""
    for leftover in path.parent.glob(f"{glob.escape(_prefix(path))}*.tmp"):
        pid = leftover.name.removeprefix(_prefix(path)).split("-", 1)[0]
        if pid.isdecimal() and not _is_running(int(pid)):
            leftover.unlink(missing_ok=True)


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


def _sync_folder(folder: Path) -> None:
    # Windows cannot open folders.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
