"""A scan that is killed at any step, and then resumed, ends with the same bytes as one that is not killed.

The steps are the calls of `atomic.before`. A scan runs in a child that is forked before torch computes anything, so a
hundred of them take seconds. It ends itself with SIGKILL, as a power cut or the out-of-memory killer would.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ..support.checkpoints import Save, llama_tensors

pytestmark = pytest.mark.slow

_SCRIPT = """
    import json, os, signal, sys
    from pathlib import Path
    from spectrum_stream import pipeline
    from spectrum_stream.results import atomic  # torch is imported, and has not started a thread
    from spectrum_stream.errors import SpectrumStreamError

    model, *faults = sys.argv[1:]

    def scan(folder, before, fresh=False):
        # Scan in a separate process and folder, and return the exit status.
        folder.mkdir(exist_ok=True)
        pid = os.fork()
        if pid:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        try:
            os.chdir(folder)
            atomic.before = before
            pipeline.scan(model, name="m", top_percent=50, fresh=fresh)
            os._exit(0)
        except SpectrumStreamError as error:
            print(error.reason, file=sys.stderr)
            os._exit(1)

    def counting(path):
        def before(step, file):
            with path.open("a") as log:
                log.write(step + "\\n")
        return before

    def at(number, act):
        seen = 0
        def before(step, file):
            nonlocal seen
            seen += 1
            if seen == number:
                act(step)
        return before

    def die(step):
        os.kill(os.getpid(), signal.SIGKILL)

    def fill(step):
        if step != "close":
            raise OSError(28, "No space left on device")

    def files(folder):
        return {p.relative_to(folder).as_posix(): p.read_bytes().decode() for p in folder.rglob("*")
                if p.is_file() and p.suffix in (".json", ".yaml", ".tmp", ".holder")}

    nothing = lambda step, file: None
    fresh = faults[0] == "die fresh"
    if fresh:
        assert scan(Path("whole"), nothing) == 0
    assert scan(Path("whole"), counting(Path("steps").absolute()), fresh) == 0
    steps = Path("steps").read_text().split()
    outcomes = []
    for number in range(1, len(steps) + 1):
        folder = Path(f"run-{number}")
        if fresh:
            scan(folder, nothing)
        first = scan(folder, at(number, fill if faults[0] == "fill" else die), fresh)
        # Twice in a row, for the second time while it resumes.
        second = scan(folder, at(2, die)) if faults[0] != "fill" else 0
        before = files(folder)
        last = scan(folder, nothing)
        same = files(folder) == files(Path("whole"))
        outcomes.append([steps[number - 1], first, second, last, same, sorted(before)])
    print(json.dumps(outcomes))
"""


def outcomes(model: Path, fault: str, folder: Path) -> list[tuple[str, int, int, int, bool, list[str]]]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_SCRIPT), str(model), fault],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [tuple(outcome) for outcome in json.loads(done.stdout)]


@pytest.mark.skipif(os.name != "posix", reason="forks")
@pytest.mark.parametrize("fault", ["die", "die fresh"])
def test_scan_killed_at_any_step_and_resumed_ends_with_the_same_bytes(
    save: Save, working_folder: Path, fault: str
) -> None:
    found = outcomes(save(llama_tensors(2)), fault, working_folder)
    steps = [step for step, *_ in found]
    # One commit for the identity or the deleted rows, ten for matrices, three for norms. Then there are three files.
    assert steps.count("commit") == 1 + 13
    assert steps.count("close") == 1
    assert all(steps.count(step) == 3 for step in ("write", "fsync", "replace", "sync"))
    for step, first, second, last, same, _ in found:
        assert first == -9 and second in (-9, 0) and last == 0 and same, f"killed before {step}"


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_scan_on_a_full_disk_is_an_error_and_leaves_no_partial_file(save: Save, working_folder: Path) -> None:
    for step, first, _, last, same, left in outcomes(save(llama_tensors(1)), "fill", working_folder):
        assert first == (step != "close") and last == 0 and same, f"full before {step}"
        assert not [name for name in left if name.endswith((".tmp", ".holder"))], f"full before {step}"
