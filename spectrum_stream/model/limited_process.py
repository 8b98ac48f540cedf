"""A separate process for work that an untrusted file may make too large.

The process is a new Python that answers requests, each one line of JSON. It ends when an answer takes too long or
needs too much memory, and when its parent process ends in any way.
"""

import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Self

from ..errors import FileError
from ..files import FileKind, read_file

# The longest answer, in bytes.
MAX_ANSWER = 256_000_000
# If the parent can no longer end the process, the process ends itself after this much more processor time.
_LAST_SECONDS = 120
_LAST_WAIT_S = 2.0
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
    "USE_HUB_KERNELS": "NO",
}
_PYTHON = re.compile(r"(?:python|pypy)[0-9.tdm]*(?:\.exe)?|pythonw(?:\.exe)?", re.IGNORECASE)
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendmsg", "socket.sendto")
_START = (
    "import sys, json, importlib; sys.path[:] = json.loads(sys.argv[1]); importlib.import_module(sys.argv[2]).serve()"
)


class ProcessFailed(Exception):
    """The process gave no answer. The message is the end of a sentence."""


def find_python() -> str:
    """Return the path of the Python that runs this program.

    If a program is frozen or embeds Python, the executable is that program, which would start again.

    Raises:
        ProcessFailed: there is none.
    """
    if getattr(sys, "frozen", False) or not _PYTHON.fullmatch(Path(sys.executable or "").name):
        raise ProcessFailed("this program is not run by python")
    return sys.executable


class LimitedProcess:
    """A Python process that runs the function `serve` of a module.

    Args:
        module: its full name; `serve` calls `answer_requests`.

    Raises:
        ProcessFailed: it cannot be started.
    """

    def __init__(self, module: str) -> None:
        python = find_python()
        environment = {name: value for name, value in os.environ.items() if name not in _SECRETS} | _ENVIRONMENT
        # The process finds the same packages. Relative paths, such as the working folder, are left out.
        paths = [path for path in sys.path if Path(path).is_absolute()]
        paths += [str(Path(__file__).parents[2])]
        try:
            self._process = subprocess.Popen(
                [python, "-P", "-c", _START, json.dumps(paths), module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd=Path(python).anchor or None,
            )
        except (OSError, ValueError) as error:
            raise ProcessFailed(f"its process cannot be started: {error}") from error
        # The process also ends with this object, for example after Ctrl-C.
        self.close = weakref.finalize(self, _end, self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: Any, seconds: float) -> Any:
        """Send a request and wait for the answer.

        Raises:
            ProcessFailed: no answer in this time, the answer is too long, or the process ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            self._process.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline(MAX_ANSWER)
        except OSError:
            line = b""
        finally:
            timer.cancel()
        if is_late.is_set():
            raise ProcessFailed(f"it takes more than {seconds:.0f} s")
        if len(line) >= MAX_ANSWER:
            raise ProcessFailed("it is too large")
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            code = None
            # Its output can end a moment before the process does.
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(_LAST_WAIT_S)
            ended = "ended without an answer" if code is None or code >= 0 else f"was ended by signal {-code}"
            raise ProcessFailed(f"its process {ended}") from error


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    # The rest of a request cannot be written to a process that has ended.
    with contextlib.suppress(OSError):
        process.communicate()


def answer_requests(answer: Callable[[Any], Any], nbytes: int) -> None:
    """Answer the requests of the parent process until it ends.

    Args:
        nbytes: the memory that it can take after the first answer. The first request imports the libraries.
    """
    # Libraries print to the standard output, and only answers belong there.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(sys.stdin.buffer, requests), daemon=True).start()
    sys.addaudithook(_deny_network)
    is_first = True
    while True:
        answers.write(json.dumps(answer(json.loads(requests.get()))).encode() + b"\n")
        answers.flush()
        if is_first:
            _limit_memory(nbytes)
            is_first = False


def _read_requests(stream: BinaryIO, requests: "queue.SimpleQueue[bytes]") -> None:
    for line in stream:
        requests.put(line)
    # The parent process has ended, so nothing else can end this process.
    os._exit(0)


def _deny_network(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _NETWORK:
        raise PermissionError(f"no network here ({event})")


def _limit_memory(nbytes: int) -> None:
    """Limit the memory that this process can still allocate, if the system can."""
    try:
        import resource

        status = read_file(Path("/proc/self/status"), FileKind.NOTE)
        used = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(b"VmData:"))
        _lower_limit(resource.RLIMIT_DATA, used + nbytes)
        _lower_limit(resource.RLIMIT_CPU, int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + _LAST_SECONDS)
        _lower_limit(resource.RLIMIT_CORE, 0)
    except (ImportError, FileError, OSError, ValueError, StopIteration):
        # The limit of time holds everywhere.
        return


def _lower_limit(kind: int, value: int) -> None:
    import resource

    _, hard = resource.getrlimit(kind)
    limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (limit, limit))
