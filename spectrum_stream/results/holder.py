"""The lock of a record: a file that names the process which has the record open.

    .snr_results_{slug}.holder   the process and its machine; deleted at the end of a scan

The system gives the lock back when the process ends. SQLite has a lock of its own, but asking for that one would
open the record, and a damaged or untrusted record that is replaced must not be opened.
"""

import contextlib
import errno
import os
import platform
import sys
import time
from pathlib import Path

from ..errors import FileError
from ..files import open_regular
from . import atomic

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_ASK_AGAIN_S = 0.05
# The length of a process id and the name of a machine, with room to spare.
_MAX_NBYTES = 300
_IN_USE = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
# Windows locks a range of bytes for readers too, so it is one behind the text.
_LOCKED_BYTE = 1 << 20


class Holder:
    """The lock of a record, held by this process until `close`.

    Args:
        path: the file.
        wait_s: seconds to wait for another process.

    Raises:
        BlockingIOError: another process holds it. ResultError: unwritable, a link or something else has its name.
        OSError: it cannot be made.
    """

    def __init__(self, path: Path, wait_s: float) -> None:
        self._path = path
        deadline = time.monotonic() + wait_s
        while (handle := self._try()) is None:
            if time.monotonic() > deadline:
                raise BlockingIOError(errno.EAGAIN, "in use", str(path))
            time.sleep(_ASK_AGAIN_S)
        self._handle = handle
        # On a full disk the lock works without its text.
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()} {platform.node()}".encode())

    def _try(self) -> int | None:
        handle = atomic.open_own_file(self._path)
        try:
            if _lock(handle):
                # The other process may have deleted the file after this one had opened it.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(self._path.lstat(), os.fstat(handle)):
                        return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        return None

    def close(self) -> None:
        """Delete the file and give the lock back."""
        with contextlib.suppress(OSError):
            # Only Windows cannot delete an open file.
            if sys.platform == "win32":
                os.close(self._handle)
                self._path.unlink()
            else:
                self._path.unlink()
                os.close(self._handle)


def holder_of(path: Path) -> str:
    """Return the process and its machine as the file names them; "" if it does not."""
    try:
        with open_regular(path) as file:
            pid, _, host = file.read(_MAX_NBYTES).decode().partition(" ")
    except (OSError, ValueError, FileError):
        return ""
    return f"process {pid} on {host}" if pid.isdecimal() and host else ""


def _lock(handle: int) -> bool:
    """Lock an open file, and return whether that worked."""
    try:
        if sys.platform == "win32":
            os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems have no such lock. SQLite's own lock remains.
        return error.errno not in _IN_USE
    return True
