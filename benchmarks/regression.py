"""Compare a run with an earlier one.

The numbers are ratios and others that do not depend on time. Both runs are JSON data from `RunResult.to_dict`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .results import SCHEMA_VERSION

# Each ratio, and whether a larger one is better.
_RATIOS = {"times_spectrum": True, "times_numpy": True, "scan_over_parts": False, "floor_share": True}
# Rounding differs between machines and versions of LAPACK. Growth by more than this factor is our fault.
_ERROR_GROWTH = 10
# Errors below this may grow.
NEGLIGIBLE_ERROR = 1e-6


class NotComparable(Exception):
    """The earlier run cannot be read, or has other settings.

    The message is a sentence.
    """


def load(path: Path) -> dict[str, Any]:
    """Load a saved run.

    Raises:
        NotComparable: there is no run at `path`, or it has another version.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise NotComparable(f"{path} is not a saved run: {error}") from error
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
        raise NotComparable(f"{path} is not a saved run of version {SCHEMA_VERSION}")
    return data


def regressions(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> list[str]:
    """List the regressions, one sentence each.

    Args:
        tolerance: the share by which the best turn of a ratio may be worse than the old median: with 0.2, 10 times as
            fast may become 8 times.

    Raises:
        NotComparable: the runs have no workload in common, or a workload has other weights.
    """
    try:
        return list(_worse(old, new, tolerance))
    except (KeyError, TypeError) as error:
        raise NotComparable(f"the saved run is damaged, or of another version: {error!r}") from error


def _worse(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> Iterator[str]:
    for setting in ("cold", "device"):
        if old["settings"][setting] != new["settings"][setting]:
            raise NotComparable(
                f"the runs differ in {setting}: {old['settings'][setting]} and {new['settings'][setting]}"
            )
    before = {w["name"]: w for w in old["workloads"]}
    pairs = [(before[w["name"]], w) for w in new["workloads"] if w["name"] in before]
    if not pairs:
        raise NotComparable("the two runs have no workload in common")
    for was, now in pairs:
        if any(was[key] != now[key] for key in ("dtype", "matrices", "nbytes")):
            raise NotComparable(f"{now['name']} has changed: its weights are not the same")
    for was, now in pairs:
        yield from _slower(was, now, tolerance)
        yield from _less_exact(was, now)


def _slower(was: dict[str, Any], now: dict[str, Any], tolerance: float) -> Iterator[str]:
    for name, more_is_better in _RATIOS.items():
        if name in was["ratios"] and name in now["ratios"]:
            # Turns of one run differ by as much as the tolerance, so a regression must show in the best of them.
            a, b = was["ratios"][name]["median"], now["ratios"][name]["max" if more_is_better else "min"]
            if b < a * (1 - tolerance) if more_is_better else b > a * (1 + tolerance):
                yield f"{now['name']}: {name} was {a:.3g} and is {b:.3g} at best"


def _less_exact(was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if now["failed"] > was["failed"]:
        yield f"{now['name']}: {now['failed']} modules have no score, up from {was['failed']}"
    a, b = was["accuracy"], now["accuracy"]
    if a is None or b is None:
        return
    if b["unexcused"] > a["unexcused"]:
        yield f"{now['name']}: {b['unexcused']} scores are off by more than {b['limit']:g} and by their estimates"
    if b["max_error"] > max(_ERROR_GROWTH * a["max_error"], NEGLIGIBLE_ERROR):
        yield f"{now['name']}: the largest error was {a['max_error']:.1e} and is {b['max_error']:.1e}"
    for name, same in b["same_sets"].items():
        if a["same_sets"].get(name) and not same:
            yield f"{now['name']}: the {name.replace('_', ' ')} percent are no longer the exact ones"
