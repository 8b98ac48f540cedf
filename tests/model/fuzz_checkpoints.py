"""A fuzzer of plan and scan over made-up checkpoints, to be run by hand.

    python -m tests.model.fuzz_checkpoints SECONDS [SEED]

It makes random checkpoints. With `pip install atheris` and `--atheris` it is guided by coverage. Only errors of this
package may be raised. For every other exception, the random run shows the seed and a traceback, and goes on.
"""

import contextlib
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from spectrum_stream import plan, scan
from spectrum_stream.errors import SpectrumStreamError

from ..support.made_checkpoints import Choose, make_checkpoint

_NAMES = ("transformers-v5", "transformers-v4", "checkpoint")
_EXPERTS = ("separate", "pooled")


def try_one(folder: Path, choose: Choose) -> str:
    """Plan and scan one checkpoint, and return the outcome: a reason, or `scanned`."""
    model = make_checkpoint(folder / "m", choose)
    names, experts = _NAMES[choose(3)], _EXPERTS[choose(2)]
    try:
        found = plan(str(model), names=names, experts=experts)
        found.to_dict()
        if found.groups:
            found.only([found.groups[choose(len(found.groups))].name]).to_dict()
        scan(str(model), names=names, experts=experts, out=folder / "results", fresh=True)
    except SpectrumStreamError as error:
        return error.reason
    return "scanned"


def _run(seconds: float, seed: int) -> None:
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + seconds
    # A scan also writes into the working folder.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        while time.monotonic() < end:
            choose = random.Random(seed).randrange
            try:
                outcomes[try_one(Path(folder), choose)] += 1
            except Exception:
                outcomes["ANOTHER EXCEPTION"] += 1
                sys.stderr.write(f"seed {seed}\n")
                traceback.print_exc()
            seed += 1
    sys.stdout.write(f"{outcomes.total()} checkpoints, next seed {seed}: {outcomes.most_common()}\n")


def _run_atheris() -> None:
    import atheris

    atheris.instrument_all()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):

        def one(data: bytes) -> None:
            provider = atheris.FuzzedDataProvider(data)
            try_one(Path(folder), lambda count: provider.ConsumeIntInRange(0, count - 1))

        atheris.Setup([argument for argument in sys.argv if argument != "--atheris"], one)
        atheris.Fuzz()


if __name__ == "__main__":
    if "--atheris" in sys.argv:
        _run_atheris()
    else:
        _run(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
