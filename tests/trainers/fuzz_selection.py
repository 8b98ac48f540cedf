"""A coverage-guided fuzzer of the readers of all trainers, to be run by hand.

    pip install atheris && python -m tests.trainers.fuzz_selection [--trainers a,b] -max_total_time=300

`verify` may only raise our errors, and an input takes at most 5 seconds of processor time.
"""

import sys
import tempfile
import time
from pathlib import Path

import atheris

from ..support.fuzzing import fuzz
from ..support.selections import FRAGMENTS, SEEDS

with atheris.instrument_imports(include=["spectrum_stream.trainers", "spectrum_stream.files"]):
    from spectrum_stream.errors import SpectrumStreamError
    from spectrum_stream.trainers import TRAINERS
    from spectrum_stream.trainers.parameters import Parameters
    from spectrum_stream.trainers.verify import verify

_NAMES = (
    "model.embed_tokens.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.10.q.weight",
    "lm_head.weight",
)
_FOLDER = tempfile.TemporaryDirectory()
_MAX_SECONDS = 5
_trainers = sorted(TRAINERS)


def one(data: bytes) -> None:
    if not data:
        return
    path = Path(_FOLDER.name, "selection")
    path.write_bytes(data[1:])
    started = time.process_time()
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if data[0] & 1 else {}
    parameters = Parameters(
        shapes=dict.fromkeys(_NAMES, (8, 4)), origin="given", tied=tied, stored={"old.weight": _NAMES[1]}
    )
    try:
        verify(path, parameters, _trainers[(data[0] >> 1) % len(_trainers)])
    except SpectrumStreamError as error:
        assert error.reason
    assert time.process_time() - started < _MAX_SECONDS


def main() -> None:
    global _trainers
    if sys.argv[1:2] == ["--trainers"]:
        _trainers = sys.argv[2].split(",")
        del sys.argv[1:3]
    # Expressions would start a process for each input. Without an executable they are rejected.
    sys.executable = ""
    words = Path(_FOLDER.name, "words.dict")
    escaped = ("".join(f"\\x{byte:02x}" for byte in fragment.encode()) for fragment in FRAGMENTS)
    words.write_text("".join(f'"{word}"\n' for word in escaped))
    seeds = (bytes([2 * j]) + seed.encode() for seed in SEEDS for j in range(len(_trainers)))
    fuzz(one, seeds, [f"-dict={words}"])


if __name__ == "__main__":
    main()
