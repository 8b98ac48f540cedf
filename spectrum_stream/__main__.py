"""The process: `python -m spectrum_stream`, and both console scripts.

It handles signals and closed standard streams. The handlers are set before the command line is imported, because
that import takes a third of a second and a signal may arrive meanwhile.
"""

import ctypes
import io
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

_LOST_PAGES = (
    b"error: a shard was cut while it was read, or its disk is gone (changed)\n"
    b"hint: run the same command again when the file is complete; earlier results are intact\n"
)
# Python must not free a function that C may call.
_kept: list[object] = []


def main() -> NoReturn:
    """Run the command line and exit: 130 after Ctrl-C, 143 after SIGTERM, else with its own code."""
    _open_standard_streams()
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        # An exception during the import of torch would abort the process. Before a scan nothing has to be closed.
        if not hasattr(sys.modules.get("spectrum_stream.pipeline"), "run"):
            os._exit(128 + number)
        received.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    _end_when_pages_are_lost()
    code = 0
    try:
        from .cli.app import main as run

        code = run()
    except KeyboardInterrupt:
        pass
    if received:
        sys.stdout.flush()
        sys.stderr.flush()
        # The interpreter would wait for its threads, and one of them may be waiting for a server.
        os._exit(128 + received[0])
    sys.exit(code)


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
    return Path(os.devnull).open("w", encoding="utf-8")


if __name__ == "__main__":
    main()
