"""The process: `python -m spectrum_stream`, and both console scripts. What ends it from outside is met here.

The command line takes a third of a second to import, so signals are met before that.
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
    b"hint: the same command starts over when the file is complete; earlier results are as they were\n"
)
# What C calls has to stay alive.
_kept: list[object] = []


def main() -> NoReturn:
    """Run the command line and exit: 130 after Ctrl-C, 143 after SIGTERM, else with its own code."""
    _open_standard_streams()
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        # An exception in the middle of torch's import would abort the process; before a scan nothing is to be closed.
        if not hasattr(sys.modules.get("spectrum_stream.pipeline"), "run"):
            os._exit(128 + number)
        received.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    _meet_lost_pages()
    code = 0
    try:
        from .cli.app import main as run

        code = run()
    except KeyboardInterrupt:
        pass
    if received:
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: the interpreter would wait for threads, and one of them may be waiting for a server.
        os._exit(128 + received[0])
    sys.exit(code)


def _meet_lost_pages() -> None:
    # A map has no pages behind the end of a file that was cut, nor of one whose disk or server is gone, and who
    # touches them gets SIGBUS. Python's own handlers run when the instruction is done, which it never is.
    if not hasattr(signal, "SIGBUS"):
        return

    def end(number: int) -> None:
        os.write(2, _LOST_PAGES)
        os._exit(1)

    _kept.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(end))
    ctypes.CDLL(None).signal(signal.SIGBUS, _kept[-1])


def _open_standard_streams() -> None:
    # The next file that is opened would get the number of a closed one, and with it what libraries print.
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal of another encoding gets an escape for what it cannot show.
            stream.reconfigure(errors="backslashreplace")


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


if __name__ == "__main__":
    main()
