"""The time of commands that read no weights: `python -m benchmarks.startup`.

Targets: `--help` in 0.4 s, and the plan of 1,000 tensors in 1 s, each a whole process. The median of five counts.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .headers import write_header

_REPETITIONS = 5


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model.safetensors"
        write_header(checkpoint, 1_000, 0)
        for args, target_s in ((("--help",), 0.4), (("plan", str(checkpoint), "-q"), 1.0)):
            seconds = statistics.median(_time(args, folder) for _ in range(_REPETITIONS))
            verdict = "within" if seconds <= target_s else "beyond"
            print(f"{args[0]}: {seconds:.2f} s, {verdict} the target of {target_s:g} s")


def _time(args: tuple[str, ...], folder: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "spectrum_stream", *args], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
