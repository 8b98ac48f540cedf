"""Signals that end the process: at once, or after the scan is closed.

    a scan is under way   its record, its temporary shards and the terminal are closed first
    any other time        the process ends at once; only temporary files are removed

The handler runs in the main thread between any two steps of Python. If it raised an exception inside a library, a
destructor or the code that closes a file, the exception could print a traceback, leave a lock taken, or be lost. So
it raises KeyboardInterrupt only where the scan computes or waits. Elsewhere it tries again a little later.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

# SIGHUP: the terminal is closed. SIGXCPU: the limit of processor time is near.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGXCPU")
_LOOK_AGAIN_S = 0.02
# If closing the scan takes longer, for example because a disk or a terminal hangs, the process ends without it.
_PATIENCE_S = 5.0


class _Process:
    """The signals that the process got, and whether a scan must be closed first."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.since = 0.0
        self.is_held = False
        self.is_closing = False


_process = _Process()


def catch_signals() -> None:
    """Let signals end the process with exit code 128 + the number of the signal."""
    for name in _NAMES:
        number = getattr(signal, name, None)
        # nohup lets the process ignore SIGHUP.
        if number is not None and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
            signal.signal(number, _on_signal)


def ignore_signals() -> None:
    """Ignore signals, because the work is done and only memory is freed."""
    for name in _NAMES:
        if (number := getattr(signal, name, None)) is not None:
            signal.signal(number, signal.SIG_IGN)


def exit_code() -> int | None:
    """Return 128 + the number of the first signal, or None if there was none."""
    return 128 + _process.received[0] if _process.received else None


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold signals back in the block, except where a scan computes or waits.

    Raises:
        KeyboardInterrupt: a signal arrived.
    """
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, _on_signal)
    _process.is_held = True
    try:
        yield
    finally:
        _process.is_held = False
    check_signals()


def check_signals() -> None:
    """Raise KeyboardInterrupt if a signal was held back."""
    if _process.received and not _process.is_closing:
        _process.is_closing = True
        raise KeyboardInterrupt


def _on_signal(number: int, frame: FrameType | None) -> None:
    process = _process
    is_timer = number == getattr(signal, "SIGALRM", None)
    if not is_timer:
        if not process.received:
            process.since = time.monotonic()
        process.received.append(number)
    if not process.received:
        return
    is_late = time.monotonic() > process.since + _PATIENCE_S
    if not process.is_held or (is_late and not _is_interruptible(frame)):
        _end()
    if process.is_closing:
        return
    if _is_interruptible(frame):
        process.is_closing = True
        raise KeyboardInterrupt
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, _LOOK_AGAIN_S)


def _is_interruptible(frame: FrameType | None) -> bool:
    """Whether the main thread computes, or waits for a matrix or a worker."""
    if frame is None:
        return False
    module = frame.f_globals.get("__name__", "")
    waits = module == "spectrum_stream.streaming.prefetch" and frame.f_code.co_name == "__iter__"
    return waits or module.startswith("spectrum_stream.numerics.")


def _end() -> None:
    """End the process at once.

    The interpreter would wait for threads, and one may be waiting for a server.
    """
    # The module may be in the middle of its import.
    remove = getattr(sys.modules.get("spectrum_stream.results.atomic"), "remove_own_files", None)
    if remove is not None:
        remove()
    os._exit(exit_code() or 1)
