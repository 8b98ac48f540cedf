"""The process: `python -m spectrum_stream`, and both console scripts.

It handles closed standard streams. It sets the signal handlers before it imports the command line, because that
import takes a third of a second, and a signal may arrive meanwhile.
"""

import atexit
import contextlib
import io
import os
import sys
from typing import NoReturn, TextIO

from .cli import limits, signals

_LOST_PAGES = (
    b"error: a shard was cut while it was read, or its disk is gone (changed)\n"
    b"hint: run the same command again when the file is complete; earlier results are intact\n"
)
_NO_MEMORY = b"error: the system does not give this process the memory or the threads that it needs (no_memory)\n"
# Python must not free a function that C may call.
_kept: list[object] = []


def main() -> NoReturn:
    """Run the command line and exit with its code, or with 128 + a signal's number."""
    signals.catch_signals()
    # The first function that is registered is the last one to run.
    atexit.register(signals.ignore_signals)
    _open_standard_streams()
    limits.limit_threads()
    _end_when_pages_are_lost()
    code = 0
    with contextlib.suppress(KeyboardInterrupt):
        code = _run()
    code = signals.exit_code() or _flush(code)
    if signals.exit_code() is not None:
        # The interpreter would wait for its threads, and one of them may be waiting for a server.
        os._exit(code)
    sys.exit(code)


def _run() -> int:
    """Run the command line and return its exit code."""
    from .errors import is_out_of_memory

    try:
        from .cli.app import main as run
    # The class of the error depends on the place where the import of a library fails.
    except Exception as error:
        words = str(error) or type(error).__name__
        os.write(2, _NO_MEMORY if is_out_of_memory(error) else f"error: {words} (no_library)\n".encode())
        return 1
    try:
        return run()
    except Exception as error:
        # This import restates the error, unless memory is too short for it too.
        if not is_out_of_memory(error):
            raise
    os.write(2, _NO_MEMORY)
    return 1


def _flush(code: int) -> int:
    """Flush stdout and stderr; return the exit code of the process, 1 if that fails."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # The interpreter would flush again, and print a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = code or 1
    return code


def _end_when_pages_are_lost() -> None:
    """End the process with an error message on SIGBUS, instead of a silent crash.

    A memory map has no pages behind the end of a file that was cut, and loses them when the disk or the server of
    the file is gone. A thread that touches such a page gets SIGBUS. Python's own signal handlers do not help: they
    run after the instruction, and the instruction never completes. So C calls this handler, in the faulting thread.

    The handler is Python, so the thread has to hold the GIL to run it. That cannot end in a deadlock:

    - A thread that holds the GIL already, as one that copies bytes out of a map, takes it again.
    - A thread that gave it up, as torch does while it computes, or a thread of BLAS that never had it, waits until
      another thread lets go of it. Python code does that every few milliseconds; a call into C, when it returns.
    - Only a thread that holds the GIL and waits for the faulting thread would never let go of it. torch gives up the
      GIL before it shares a matrix with other threads. Everything else that waits (locks, queues, joins) does so too.
    """
    import ctypes
    import signal

    if not hasattr(signal, "SIGBUS"):
        return

    def end(number: int) -> None:
        os.write(2, _LOST_PAGES)
        os._exit(1)

    _kept.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(end))
    ctypes.CDLL(None).signal(signal.SIGBUS, _kept[-1])


def _open_standard_streams() -> None:
    # The next file to be opened would get the number of a closed stream, and libraries would print into it.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or _open_null()
    sys.stderr = sys.stderr or _open_null()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal of another encoding shows escapes for the characters that it lacks.
            stream.reconfigure(errors="backslashreplace")


def _open_null() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123


if __name__ == "__main__":
    main()
