"""Match regular expressions with a time limit, in a process that can be ended.

Python's `re` backtracks, and can take centuries for `(a+)+b` and a name of 40 characters. It cannot be interrupted in
a thread. Compiling can be as slow, e.g. for `(?:a{1,60000}){1,60000}`.
"""

import json
import queue
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import ResultError
from ..model.limited_process import ProcessFailed, find_python
from . import expression_process

# An expression takes a second for 300,000 names if it does not backtrack much.
MAX_SECONDS_EACH = 3.0
# The limit for all expressions of a file together.
MAX_SECONDS = 12.0
MAX_NBYTES = 1_000_000_000

_START_SECONDS = 30.0
_SLOW = f"takes longer than {MAX_SECONDS_EACH:g} s to match: write it without nested repeats"
_NO_TIME_LEFT = f"was not matched, because the {MAX_SECONDS:g} s for all expressions together were used up"

Answer = dict[str, Any] | str
"""An answer of `expression_process`, or a clause about the problem."""


class Expressions:
    """Matches regular expressions in other processes, within one time limit."""

    def __init__(self) -> None:
        self._seconds_left = MAX_SECONDS

    def match(self, requests: Sequence[tuple[str, str]], names: Sequence[str]) -> list[Answer]:
        """Match expressions against names.

        Args:
            requests: each expression, and `match`, `search` or `whole`.

        Raises:
            ResultError: no_process, another Python process cannot be started.
        """
        answers: list[Answer] = []
        while len(answers) < len(requests) and self._seconds_left > 0:
            answers += self._run(requests[len(answers) :], names)
        return answers + [_NO_TIME_LEFT] * (len(requests) - len(answers))

    def _run(self, requests: Sequence[tuple[str, str]], names: Sequence[str]) -> Iterator[Answer]:
        """Yield the answers of one process, up to the first expression that is too slow."""
        process = _start()
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        reader = threading.Thread(target=_read_lines, args=(process.stdout, lines), daemon=True)
        try:
            reader.start()
            given = {
                "names": names,
                "requests": requests,
                "max_nbytes": MAX_NBYTES,
                "max_seconds": round(MAX_SECONDS + _START_SECONDS),
            }
            _send(process, json.dumps(given).encode())
            if _next(lines, _START_SECONDS).strip() != expression_process.READY:
                raise _no_process("it ended at once")
            for _ in requests:
                started = time.monotonic()
                limit = min(MAX_SECONDS_EACH, self._seconds_left)
                line = _next(lines, limit)
                self._seconds_left -= time.monotonic() - started
                if not line.endswith("\n"):
                    is_slow = time.monotonic() - started >= limit
                    self._seconds_left -= 0 if is_slow else MAX_SECONDS_EACH
                    # An expression that had only the rest of the time may be quick.
                    late = _SLOW if limit >= MAX_SECONDS_EACH else _NO_TIME_LEFT
                    yield late if is_slow else "ends the process that matches it"
                    return
                answer = json.loads(line)
                yield f"is not a regular expression ({answer['error']})" if "error" in answer else answer
        finally:
            process.kill()
            process.wait()
            reader.join()


def _start() -> subprocess.Popen[bytes]:
    try:
        python = find_python()
    except ProcessFailed as error:
        raise _no_process(str(error)) from error
    script = Path(expression_process.__file__)
    if not script.is_file():
        raise _no_process("the package is not in a folder")
    try:
        return subprocess.Popen(
            [python, "-I", "-S", "-X", "utf8", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except OSError as error:
        raise _no_process(str(error.strerror)) from error


def _send(process: subprocess.Popen[bytes], data: bytes) -> None:
    assert process.stdin is not None
    try:
        with process.stdin as stdin:
            stdin.write(data)
    except OSError:
        # The process has ended. Its output shows which expressions it has matched.
        return


def _read_lines(stdout: IO[bytes], lines: "queue.SimpleQueue[str]") -> None:
    with stdout:
        for line in stdout:
            lines.put(line.decode())
    lines.put("")


def _next(lines: "queue.SimpleQueue[str]", seconds: float) -> str:
    """Return the next line, or "" if there is none in this time."""
    try:
        return lines.get(timeout=max(seconds, 0))
    except queue.Empty:
        return ""


def _no_process(why: str) -> ResultError:
    return ResultError(
        f"the file has regular expressions that need another Python process, but none can be started: {why}",
        reason="no_process",
        hint="write only names, `.` and `[0-9]+`, which need no process",
    )
