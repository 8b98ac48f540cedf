"""Run commands that get a signal at a chosen step.

Each command runs in a fork of one process that has imported everything.

    python -m tests.support.interrupted SIGNALS STEPS ARGS...

SIGNALS are names with commas, sent 2 ms apart. STEPS is `files`, for each step that changes a file, or a number: so
many calls of functions, evenly between the start and the end of the command. Print a JSON line for each run: the exit
code, the output, and the files that are left.
"""

import atexit
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from spectrum_stream.__main__ import main
from spectrum_stream.results import atomic

_GAP_S = 0.002
_HANG_S = 120


class _Steps:
    """Counts steps, and sends signals at one of them.

    Another thread sends them, in the same way as another process would.
    """

    def __init__(self, at: int, signals: Sequence[int]) -> None:
        self.count = 0
        self._at, self._signals = at, signals
        self._reached, self._sent = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._send, daemon=True).start()

    def step(self, *_: object) -> None:
        self.count += 1
        if self.count == self._at:
            self._reached.release()
            # Otherwise the command may end before the first signal is sent.
            self._sent.acquire()

    def _send(self) -> None:
        self._reached.acquire()
        for number in self._signals:
            os.kill(os.getpid(), number)
            self._sent.release()
            time.sleep(_GAP_S)


def _command(args: Sequence[str], at: int, signals: Sequence[int], by_files: bool) -> None:
    """Run the command line in this fork, and end it as the interpreter does."""
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["spectrum-stream", *args]
    # A background job of a shell ignores SIGINT, and one of nohup SIGHUP.
    for name in ("SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    # The other thread then takes the GIL at once.
    sys.setswitchinterval(1e-6)
    steps = _Steps(at, signals)
    if by_files:
        atomic.before = steps.step
    else:

        def profile(frame: FrameType, event: str, arg: Any) -> None:
            steps.step()

        sys.setprofile(profile)
    try:
        main()
    except SystemExit as end:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.setprofile(None)
        Path("steps").write_text(str(steps.count))
        os._exit(end.code if isinstance(end.code, int) else 99)


def _fork(folder: Path, run: Callable[[], None]) -> int | str:
    """Run a function in a fork, and return its exit code, or `hangs`."""
    child = os.fork()
    if not child:
        try:
            os.chdir(folder)
            run()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(98)
    deadline = time.monotonic() + _HANG_S
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


def _run(args: Sequence[str], at: int, signals: Sequence[int], by_files: bool) -> tuple[dict[str, Any], int]:
    # TemporaryDirectory would delete it at the exit of the fork.
    folder = Path(tempfile.mkdtemp())
    for path in Path().iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
    code = _fork(folder, lambda: _command(args, at, signals, by_files))
    steps = int((folder / "steps").read_text()) if (folder / "steps").exists() else 0
    output = (folder / "output").read_text()
    (folder / "steps").unlink(missing_ok=True)
    (folder / "output").unlink()
    files = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
    shutil.rmtree(folder)
    return {"at": at, "code": code, "output": output, "files": files}, steps


def _main() -> None:
    names, kind, *args = sys.argv[1:]
    numbers = [signal.Signals[name] for name in names.split(",")]
    by_files = kind == "files"
    undisturbed, total = _run(args, -1, numbers, by_files)
    # A fork would print the content of the buffer again.
    sys.stdout.write(f"{json.dumps(undisturbed)}\n")
    sys.stdout.flush()
    count = total if by_files else int(kind)
    for i in range(1, count + 1):
        at = i if by_files else total * i // (count + 1)
        sys.stdout.write(f"{json.dumps(_run(args, at, numbers, by_files)[0])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
