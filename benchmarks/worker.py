"""A process for one contender, with its peak memory measured from outside.

Only anonymous memory counts, which the system cannot drop. Pages of mapped files are left out: they belong to the
page cache, and the system drops them when it needs the memory.
"""

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import psutil

Argument = TypeVar("Argument")
Result = TypeVar("Result")

_SAMPLE_EVERY_S = 0.01


class WorkerError(Exception):
    """A contender failed; the message is its traceback."""


@dataclass(frozen=True, slots=True)
class Watched(Generic[Result]):
    """The return value of a contender, and its cost.

    Attributes:
        value: the return value.
        peak_anonymous: bytes of the whole process with Python and torch, the largest of samples every 10 ms.
        peak_resident: bytes, by the kernel's count, since the start of the process, with mapped files. None if the
            system does not have it.
        cpu_seconds: the processor time that the machine had during the call.
        others_seconds: the part of it that other programs used.
    """

    value: Result
    peak_anonymous: int
    peak_resident: int | None
    cpu_seconds: float
    others_seconds: float


class Worker:
    """A process that runs one function after another in a temporary folder.

    Use it as a context manager.
    """

    def __init__(self, warm_up: Callable[[], object]) -> None:
        # A forked process would start with the memory of this one.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark-worker-")
        self._process = context.Process(target=_serve, args=(theirs, self._folder.name, warm_up))
        self._process.start()
        # Otherwise the end of the process would not close the pipe.
        theirs.close()

    def wait_until_ready(self) -> None:
        """Wait until the process has warmed up and no longer needs the processors."""
        self.run(bool, 0)

    def run(self, function: Callable[[Argument], Result], argument: Argument) -> Watched[Result]:
        """Call an importable function in the process and measure it.

        Argument and result are pickled.

        Raises:
            WorkerError: the function raised, or the process died.
        """
        peak = 0
        try:
            started, own, busy = time.monotonic(), self._own_seconds(), _busy_seconds()
            self._connection.send((function, argument))
            while not self._connection.poll(_SAMPLE_EVERY_S):
                peak = max(peak, _anonymous_nbytes(self._process.pid))
            failure, value = self._connection.recv()
        except (EOFError, OSError, psutil.NoSuchProcess) as error:
            self._process.join()
            raise WorkerError(f"the process ended with {self._process.exitcode}, perhaps out of memory") from error
        if failure is not None:
            raise WorkerError(failure)
        return Watched(
            value,
            max(peak, _anonymous_nbytes(self._process.pid)),
            _status(self._process.pid).get("VmHWM"),
            (time.monotonic() - started) * (os.cpu_count() or 1),
            # Both are counted in hundredths of a second, so the difference can be a little below zero.
            max(0.0, _busy_seconds() - busy - (self._own_seconds() - own)),
        )

    def _own_seconds(self) -> float:
        times = [psutil.Process(pid).cpu_times() for pid in (self._process.pid, os.getpid())]
        return sum(t.user + t.system for t in times)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        if kind is not None:
            self._process.terminate()
        self._process.join()
        self._process.close()
        self._folder.cleanup()


def _serve(connection: Connection, folder: str, warm_up: Callable[[], object]) -> None:
    # Ctrl-C belongs to the process that started this one. That one then ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.chdir(folder)
    warm_up()
    while True:
        try:
            function, argument = connection.recv()
        except EOFError:
            return
        answer: tuple[str | None, Any]
        try:
            answer = None, function(argument)
        except Exception:
            answer = traceback.format_exc(), None
        connection.send(answer)


def _anonymous_nbytes(pid: int | None) -> int:
    status = _status(pid)
    # Only Linux tells mapped files apart cheaply. On other systems this is an upper bound.
    return status["RssAnon"] if "RssAnon" in status else int(psutil.Process(pid).memory_info().rss)


def _busy_seconds() -> float:
    """Return the seconds that all processors were busy, including stolen time."""
    times = psutil.cpu_times()._asdict()
    # Linux counts the time of guests as its own user time already.
    return float(sum(t for kind, t in times.items() if kind not in ("idle", "iowait", "guest", "guest_nice")))


def _status(pid: int | None) -> dict[str, int]:
    """Read the sizes in /proc/PID/status, in bytes; empty if there is no such file."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return {}
    fields = (line.split() for line in lines)
    return {f[0].rstrip(":"): int(f[1]) * 1024 for f in fields if f[-1] == "kB"}
