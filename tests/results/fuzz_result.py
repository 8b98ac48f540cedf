"""A coverage-guided fuzzer of all readers of results, to be run by hand.

    pip install atheris && python -m tests.results.fuzz_result -max_total_time=300

Only errors of the package may be raised. Trainers' files must be read back unchanged.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import atheris

from ..support.fuzzing import fuzz

with atheris.instrument_imports(include=["spectrum_stream"]):
    from spectrum_stream.errors import SpectrumStreamError
    from spectrum_stream.results.check import check

    from ..support.results import use_result

_FOLDER = Path(tempfile.mkdtemp())


def one(data: bytes) -> None:
    path = _FOLDER / "snr_results_x.json"
    path.write_bytes(data)
    check(path)
    try:
        use_result(path)
    except SpectrumStreamError as error:
        assert error.reason


_SEEDS: tuple[Any, ...] = (
    {"l.0.a": {"snr": 1.5, "type": "a"}, "l.1.a": {"snr": 1e308, "type": "a"}},
    {"a": {"l.0.a": 1.0, "l.1.a": float("nan")}},
    {f"l.{i}.experts.{j}.w": {"snr": 1.0 * j, "type": f"experts.{j}.w"} for i in range(2) for j in range(3)},
    {"lm_head": {"snr": 2, "type": "lm_head"}, "model.embed_tokens": {"snr": -1, "type": "\u2028"}},
)


if __name__ == "__main__":
    fuzz(one, (json.dumps(seed).encode() for seed in _SEEDS))
