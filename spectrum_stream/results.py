"""Results: the scores of a model's modules, as Spectrum's readers take them, Axolotl among them.

    snr_results_{slug}.json     {module: {"snr": number, "type": group}}, in Spectrum's order, and nothing else

Ours appear whole or not at all; those of others are read as far as they can be.
"""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .durable import write_atomically
from .errors import ResultError
from .naming import group_order, model_order, pool_of
from .store import Record

# The largest published result (28,800 modules) is 3 MB.
MAX_RESULT_NBYTES = 200_000_000


class Scored(NamedTuple):
    """A module's line in a result: all that a selection needs.

    Attributes:
        parameter: the name of the parameter that it is trained by; None where only a result file is known, which does
            not say. It is then `module`.weight, but for banks of experts, which models hold under their own name.
        numel: how many weights that has; None where it is not known.
    """

    module: str
    group: str
    snr: float
    parameter: str | None = None
    numel: int | None = None


def write_results(path: Path, records: Iterable[Record]) -> None:
    """Publish the JSON: Spectrum's schema and nothing else, in Spectrum's order; failed matrices are left out."""
    write_atomically(
        path,
        json.dumps(
            {line.module: {"snr": line.snr, "type": line.group} for line in lines_of(in_order(records))},
            indent=4,
            allow_nan=False,
        ),
    )


def lines_of(records: Iterable[Record]) -> list[Scored]:
    """The lines of a result: a module each, and one for a whole bank of experts.

    A bank is frozen as one, so it has one score: the median of its experts', which a few odd ones do not move. It
    has none while an expert has none. Experts that are pooled have a line each, with that score of theirs.
    """
    units: dict[str, list[Record]] = {}
    for record in records:
        name = record.bank or record.module
        units.setdefault(pool_of(name, record.group) or name, []).append(record)
    lines: list[Scored] = []
    for unit in units.values():
        scores = [record.score.snr for record in unit if record.score is not None]
        if len(scores) < len(unit):
            continue
        named: dict[str, list[Record]] = {}
        for record in unit:
            named.setdefault(record.bank or record.module, []).append(record)
        for name, parts in named.items():
            first, numel = parts[0], sum(part.n * part.m for part in parts)
            lines.append(Scored(name, first.group, statistics.median(scores), first.parameter, numel))
    return lines


def in_order(records: Iterable[Record]) -> list[Record]:
    """In the order of Spectrum's files: groups sorted, the modules of a group as the model has them."""
    return sorted(records, key=lambda r: (group_order(r.group), model_order(r.module)))


def read_results(path: Path) -> list[Scored]:
    """The modules of a result file, ours or one published with Spectrum, in the file's order.

    Infinity, which older ones hold where the noise set was empty, is read as such, and ranks first as it
    does in Spectrum; NaN ranks last. Files in the schema of `_sorted.json`, which Spectrum itself cannot read,
    are read too.

    Raises:
        ResultError: no_such_result, unreadable, too_large, not_a_result.
    """
    try:
        if path.stat().st_size > MAX_RESULT_NBYTES:
            raise ResultError(f"{path} is too large for a result", reason="too_large")
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ResultError(f"there is no result at {path}", reason="no_such_result") from error
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}", reason="unreadable") from error
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{path} is not JSON", reason="not_a_result") from error
    scored = _from_modules(data) or _from_groups(data)
    if not scored:
        raise ResultError(f"{path} is not a Spectrum result", reason="not_a_result")
    return scored


def _from_modules(data: Any) -> list[Scored] | None:
    if not isinstance(data, dict):
        return None
    scored = []
    for module, entry in data.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("type"), str) or not _is_number(entry.get("snr")):
            return None
        scored.append(Scored(module, entry["type"], _ranked(entry["snr"])))
    return scored


def _from_groups(data: Any) -> list[Scored] | None:
    if not isinstance(data, dict):
        return None
    scored = []
    for group, modules in data.items():
        if not isinstance(modules, dict) or not all(_is_number(snr) for snr in modules.values()):
            return None
        scored += [Scored(module, group, _ranked(snr)) for module, snr in modules.items()]
    return scored


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _ranked(snr: float) -> float:
    # A NaN compares false with everything and would scramble a sort.
    try:
        return -math.inf if math.isnan(snr) else float(snr)
    except OverflowError:
        return math.inf
