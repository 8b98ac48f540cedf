"""The cost of planning large headers: `python -m benchmarks.headers`.

Targets: 100,000 tensors in under 5 s and 500 MB of memory; a header of 90 MB is bounded by its own size.
"""

import json
import tempfile
import time
from pathlib import Path

from spectrum_stream import plan

from .worker import Worker

_MAX_S = 5.0
_MAX_NBYTES = 500_000_000


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, tensors, padding in (
            ("100,000 tensors", 100_000, 0),
            ("a header of 25 MB", 1_000, 25_000_000),
            ("a header of 99 MB", 1_000, 99_000_000),
            ("600,000 tensors", 600_000, 0),
        ):
            path = Path(folder) / "model.safetensors"
            header = write_header(path, tensors, padding)
            with Worker(_nothing) as worker:
                worker.wait_until_ready()
                watched = worker.run(_plan, str(path))
            within = watched.value < _MAX_S and watched.peak_anonymous < _MAX_NBYTES
            print(
                f"{name}: {header / 1e6:.0f} MB of header, {watched.value:.2f} s, "
                f"{watched.peak_anonymous / 1e6:.0f} MB of memory"
                + ("" if tensors > 100_000 else ", within the target" if within else ", beyond the target")
            )


def write_header(path: Path, tensors: int, padding: int) -> int:
    """Write a sparse checkpoint of small tensors, and return the bytes of its header."""
    entries: dict[str, object] = {"__metadata__": {"note": "x" * padding}} if padding else {}
    for i in range(tensors):
        entries[f"model.layers.{i // 700}.mlp.experts.{i % 700}.up_proj.weight"] = {
            "dtype": "BF16",
            "shape": [2, 4],
            "data_offsets": [16 * i, 16 * (i + 1)],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 16 * tensors)
    return len(header)


def _plan(path: str) -> float:
    started = time.perf_counter()
    plan(path)
    return time.perf_counter() - started


def _nothing() -> None:
    pass


if __name__ == "__main__":
    main()
