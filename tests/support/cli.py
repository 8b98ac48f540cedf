"""Run the command line in this process or in a separate one.

A separate process imports torch, which takes longer than most tests. Only tests of signals, closed streams, terminals
and the start of the process need one.
"""

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from spectrum_stream.cli.app import DEBUG_VARIABLE, main

# The same as `spectrum-stream`, even if that is not on the path.
COMMAND: Sequence[str] = (sys.executable, "-m", "spectrum_stream")

_ESCAPE = "\x1b"
_LOGGERS = ("spectrum_stream", "huggingface_hub.utils._http")


class Cli(Protocol):
    """The type of the fixture `cli`."""

    def __call__(self, *args: str | Path, code: int | None = 0, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `spectrum-stream ARGS` with variables, and assert its exit code.

        None stands for any code.
        """


def run_here(
    capsys: pytest.CaptureFixture[str], *args: str | Path, code: int | None = 0, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process, and restore the state of the process."""
    words = list(map(str, args))
    capsys.readouterr()
    with _process_kept_as_it_is():
        sys.argv = ["spectrum-stream", *words]
        os.environ.update({"COLUMNS": "100", **env})
        returncode = main()
    stdout, stderr = capsys.readouterr()
    assert code in (None, returncode), stdout + stderr
    assert DEBUG_VARIABLE in env or "Traceback" not in stderr
    assert _ESCAPE not in stdout + stderr
    return subprocess.CompletedProcess(words, returncode, stdout, stderr)


def run_process(*args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a separate process, with pipes for its output."""
    command = [*COMMAND, *map(str, args)]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return the reason code in brackets at the end of the error line."""
    found = re.search(r"^error: .+ \((\w+)\)$", done.stderr, re.MULTILINE)
    assert found is not None, done.stderr
    return found[1]


@contextmanager
def _process_kept_as_it_is() -> Iterator[None]:
    environment, folder, argv = dict(os.environ), Path.cwd(), sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    loggers = [(log, log.handlers, log.propagate, log.level) for log in map(logging.getLogger, _LOGGERS)]
    try:
        yield
    finally:
        sys.argv = argv
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for log, log_handlers, propagate, level in loggers:
            log.handlers, log.propagate = log_handlers, propagate
            log.setLevel(level)
