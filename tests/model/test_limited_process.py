"""The limited process ends in time, with its parent, and has no network."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spectrum_stream.model import limited_process
from spectrum_stream.model.limited_process import LimitedProcess, ProcessFailed

from ..support import limited

PROGRAM = "tests.support.limited"
# A limit for answers that come at once; the machine may be busy.
SOON = 60
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit of memory needs Linux")


@pytest.fixture
def process() -> Iterator[LimitedProcess]:
    with LimitedProcess(PROGRAM) as one:
        yield one


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_process_answers_and_its_prints_do_not_count(process: LimitedProcess) -> None:
    noise = {"print": '{"a": 1}\n'}
    assert process.ask(noise, SOON) == noise
    assert process.ask(["b" * 1_000_000], SOON) == ["b" * 1_000_000]


@pytest.mark.parametrize(
    ("request_", "says"), [({"exit": 0}, "without an answer"), ({"exit": 3}, "ended"), ({"signal": 9}, "signal 9")]
)
def test_process_that_ends_gives_a_reason(process: LimitedProcess, request_: dict[str, int], says: str) -> None:
    for _ in range(2):
        with pytest.raises(ProcessFailed, match=says):
            process.ask(request_, SOON)


def test_process_that_hangs_is_ended(process: LimitedProcess) -> None:
    pid = process.ask("state", SOON)["pid"]
    started = time.monotonic()
    with pytest.raises(ProcessFailed, match="more than 1 s"):
        process.ask({"sleep": 600}, 1)
    assert time.monotonic() - started < SOON
    process.close()
    assert not is_running(pid)


def test_process_that_does_not_read_is_ended(process: LimitedProcess) -> None:
    """A large request does not fit into a pipe."""
    os.kill(process.ask("state", SOON)["pid"], signal.SIGSTOP)
    with pytest.raises(ProcessFailed, match="more than 1 s"):
        process.ask("x" * 10_000_000, 1)


def test_process_with_too_long_an_answer_fails(process: LimitedProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_process, "MAX_ANSWER", 1000)
    with pytest.raises(ProcessFailed, match="too large"):
        process.ask({"long": 2000}, SOON)


def test_process_that_cannot_start_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(ProcessFailed, match="cannot be started"):
        LimitedProcess(PROGRAM)


@pytest.mark.parametrize(("name", "value"), [("executable", None), ("executable", "/bin/echo"), ("frozen", True)])
def test_process_of_a_program_that_is_not_python_does_not_start(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setattr(sys, name, value, raising=False)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(ProcessFailed, match="not run by python"):
        LimitedProcess(PROGRAM)


@needs_proc
def test_process_has_a_limit_of_memory_after_its_first_answer(process: LimitedProcess) -> None:
    assert process.ask({"allocate": limited.NBYTES}, SOON) == limited.NBYTES
    assert process.ask({"allocate": limited.NBYTES // 2}, SOON) == limited.NBYTES // 2
    assert process.ask({"allocate": 2 * limited.NBYTES}, SOON) == "MemoryError"


def test_process_has_no_network_and_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.syspath_prepend("")
    monkeypatch.chdir(tmp_path)
    with LimitedProcess(PROGRAM) as process:
        assert process.ask({"connect": 9}, SOON) == "PermissionError"
        state = process.ask("state", SOON)
    assert "hf_secret" not in state["environment"].values() and state["environment"]["HF_HUB_OFFLINE"] == "1"
    # Code in the working folder is not code of the program.
    assert state["path"] and all(Path(path).is_absolute() for path in state["path"])
    assert str(tmp_path) not in state["path"] and state["folder"] != str(tmp_path)


# Start a busy process, print its number, and end in the way of argv.
PARENT = f"""
import os, signal, sys, threading
from spectrum_stream.model.limited_process import LimitedProcess
# A shell lets its background jobs ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
process = LimitedProcess({PROGRAM!r})
print(process.ask("state", {SOON})["pid"], flush=True)
threading.Thread(target=process.ask, args=({{"sleep": 600}}, 600), daemon=True).start()
os._exit(1) if sys.argv[1] == "exit" else signal.pause()
"""


@pytest.mark.parametrize("how", ["exit", "SIGTERM", "SIGINT", "SIGKILL"])
def test_process_ends_with_its_parent(how: str) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", PARENT, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if how != "exit":
            parent.send_signal(signal.Signals[how])
        parent.wait(SOON)
    for _ in range(SOON * 10):
        if not is_running(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the process still runs")
