"""The ratios of a run in the format of github-action-benchmark.

The action keeps their history and compares them. The format is a JSON list of {name, unit, value, range, extra}, for
the tool `customBiggerIsBetter` (https://github.com/benchmark-action/github-action-benchmark). A larger number is
always better, so one file and one threshold are enough:

    times faster than Spectrum, than numpy    `times_spectrum`, `times_numpy`
    share of the floor                        `floor_share`
    share of the slower part                  1 / `scan_over_parts`
    planned / peak memory                     of the whole process
    correct digits                            -log10 of the largest error of a score, at most 6
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .regression import NEGLIGIBLE_ERROR
from .results import RunResult, Spread, WorkloadResult

_RATIOS = {
    "times_spectrum": "times faster than Spectrum",
    "times_numpy": "times faster than numpy",
    "floor_share": "share of the floor",
}


def entries(run: RunResult) -> list[dict[str, Any]]:
    """Return the entries of all workloads, as JSON data."""
    machine = run.machine
    facts = f"{machine['processor']}, {machine['cpus']} cores, {machine['matrix_units']}; torch {machine['torch']}"
    found = []
    for w in run.workloads:
        extra = f"{facts}\n{w.matrices} matrices, {w.dtype}; other programs: {w.others_cpu_share:.0%} of the cores"
        for name, unit, spread in _numbers(w):
            entry = {"name": f"{w.name}: {name}", "unit": unit, "value": _rounded(spread.median), "extra": extra}
            if spread.runs > 1:
                entry["range"] = f"{_rounded(spread.min)} to {_rounded(spread.max)}"
            found.append(entry)
    return found


def save(run: RunResult, path: Path) -> None:
    path.write_text(json.dumps(entries(run), indent=2, allow_nan=False) + "\n", "utf-8")


def _numbers(w: WorkloadResult) -> Iterator[tuple[str, str, Spread]]:
    for ratio, name in _RATIOS.items():
        if ratio in w.ratios:
            yield name, "share" if ratio == "floor_share" else "times", w.ratios[ratio]
    if "scan_over_parts" in w.ratios:
        over = w.ratios["scan_over_parts"]
        yield "share of the slower part", "share", Spread(1 / over.median, 1 / over.max, 1 / over.min, over.runs)
    yield "planned / peak memory", "times", Spread.of([w.planned_nbytes / w.peak_anonymous["ours"]])
    if w.accuracy is not None:
        # A module without a score counts as an error of 1, which is no correct digit.
        digits = -math.log10(max(w.accuracy.max_error, NEGLIGIBLE_ERROR))
        yield "correct digits", "digits", Spread.of([max(digits, 0.0)])


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")
