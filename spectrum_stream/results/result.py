"""Results: the scores of a model's modules, as Spectrum's readers take them, Axolotl among them.

    snr_results_{slug}.json     {module: {"snr": number, "type": group}}, in Spectrum's order, and nothing else

Ours appear whole or not at all; those of others are read as far as they can be.
"""

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ResultError
from ..model.names import group_order, is_single_expert, model_order, module_of, pool_of
from ..model.quantization import parameter_of as stored_parameter
from .atomic import write_atomically
from .record import Record, read_records, stored_records

# The largest published result (28,800 modules) is 3 MB.
MAX_RESULT_NBYTES = 200_000_000
_SURROGATE = re.compile("[\ud800-\udfff]")


class Module(NamedTuple):
    """A module's line in a result: all that a selection needs.

    Attributes:
        parameter: the name of the parameter that it is trained by; None where only a result file is known, which does
            not say. It is then `module`.weight, but for banks of experts, which models hold under their own name.
        numel: how many weights that has; None where it is not known.
        shares: the module whose parameter this one has as well, as a tied head has the embedding's: one parameter,
            trained as a whole or not at all, and counted there. None for a parameter of its own.
    """

    name: str
    group: str
    snr: float
    parameter: str | None = None
    numel: int | None = None
    shares: str | None = None

    @property
    def owner(self) -> str:
        """The module that its weights are counted under."""
        return self.shares or self.name


@dataclass(frozen=True, slots=True)
class Result:
    """A result file, read.

    Attributes:
        modules: in the file's order; with parameters and sizes where a record beside it knows them.
        notes: what is odd about it, a sentence each.
        covered: the share of the weights of the model's matrices that was scanned; None where it is not known.
        parameters: names that the scan saw, those without a score as well; a tied one once.
    """

    modules: tuple[Module, ...]
    notes: tuple[str, ...] = ()
    covered: float | None = None
    parameters: tuple[str, ...] = ()


def write_results(path: Path, records: Iterable[Record]) -> None:
    """Publish the JSON: Spectrum's schema and nothing else, in Spectrum's order; failed matrices are left out."""
    write_atomically(
        path,
        json.dumps(
            {line.name: {"snr": line.snr, "type": line.group} for line in lines_of(in_order(records))},
            indent=4,
            allow_nan=False,
        ),
    )


def lines_of(records: Sequence[Record]) -> list[Module]:
    """The lines of a result: a module each, and one for a whole bank of experts.

    A bank is frozen as one, so it has one score: the median of its experts', which a few odd ones do not move. It
    has none while an expert has none. Experts that are pooled have a line each, with that score of theirs.
    """
    units: dict[str, list[Record]] = {}
    for record in records:
        name = record.result_name
        units.setdefault(pool_of(name, record.group) or name, []).append(record)
    owners = _owners(records)
    lines: list[Module] = []
    for unit in units.values():
        scores = [record.score.snr for record in unit if record.score is not None]
        if len(scores) < len(unit):
            continue
        named: dict[str, list[Record]] = {}
        for record in unit:
            named.setdefault(record.result_name, []).append(record)
        for name, parts in named.items():
            first, numel, owner = parts[0], sum(part.n * part.m for part in parts), owners[parts[0].tensor]
            shares = None if owner == name else owner
            lines.append(Module(name, first.group, statistics.median(scores), first.parameter, numel, shares))
    return lines


def _owners(records: Iterable[Record]) -> dict[str, str]:
    """What results call the module that each tensor is stored for; where that is not among them, the first."""
    owners: dict[str, str] = {}
    for record in records:
        if record.tensor not in owners or module_of(stored_parameter(record.tensor)) == record.module:
            owners[record.tensor] = record.result_name
    return owners


def in_order(records: Iterable[Record]) -> list[Record]:
    """In the order of Spectrum's files: groups sorted, the modules of a group as the model has them."""
    return sorted(records, key=lambda r: (group_order(r.group), model_order(r.module)))


def parameter_of(line: Module) -> str:
    """The name of a line's parameter: the record's, or else the likely one, a bank's own name or `module`.weight."""
    bank = "experts" in line.name.split(".")[:-1] and not is_single_expert(f"{line.name}.")
    return line.parameter or (line.name if bank else f"{line.name}.weight")


def read_scored(path: Path) -> Result:
    """A result with all that is known of it: the file, and the record of the scan beside it (`.sqlite`, same stem).

    The file's modules, groups and scores are what counts: it is what was asked for, and what other programs read. The
    record adds the parameters and sizes, and only if each of the file's lines is in it with the same score; else
    it is of another scan, and says nothing about this file.

    Args:
        path: a result file, or the record itself. A record must have its result beside it, which is written when the
            scan ends: the matrices of a scan that has not are parts of groups, and would be ranked as if they were
            whole.

    Raises:
        ResultError: as `read_results` and `record.read_records`, which a result without a usable record does not;
            unfinished, a record without a result; other_result, a record that disagrees with it.
    """
    asked_for_record = path.suffix == ".sqlite"
    results, record = path.with_suffix(".json"), path.with_suffix(".sqlite")
    if asked_for_record and not results.exists():
        read_records(record, spectra=False)
        raise ResultError(
            f"{record} has no result beside it, so its scan has not ended", reason="unfinished", hint="run it again"
        )
    scored, is_sorted = _read(results if asked_for_record else path)
    notes = []
    if is_sorted:
        notes.append(f"{path} is in the schema of _sorted.json, which Spectrum and Axolotl cannot read")
    known: dict[str, Module] = {}
    covered: float | None = None
    parameters: tuple[str, ...] = ()
    try:
        if asked_for_record or (path.suffix == ".json" and record.exists()):
            known, covered, parameters = _recorded(record, scored)
    except ResultError as error:
        if asked_for_record:
            raise
        notes.append(f"sizes and names of parameters are not known: {error}")
    return Result(tuple(known.get(line.name, line) for line in scored), tuple(notes), covered, parameters)


def _recorded(path: Path, scored: Sequence[Module]) -> tuple[dict[str, Module], float | None, tuple[str, ...]]:
    """What a record has of these lines, the share of the model's weights that was scanned, and all its names."""
    with stored_records(path, spectra=False) as stored:
        records, names, weights = list(stored.records), stored.names, stored.weights
    lines = {line.name: line for line in lines_of(records)}
    if not _are_among(scored, lines):
        raise ResultError(f"{path} is the record of another scan than the result beside it", reason="other_result")
    # What has no line, as a bank of which one expert has no score, was scanned all the same.
    left_out = lines.keys() - {line.name for line in scored}
    scanned = {r.tensor: r.n * r.m for r in records if (r.result_name) not in left_out}
    return lines, sum(scanned.values()) / weights if weights else None, names


def is_record_of(records: Sequence[Record], lines: Iterable[Module]) -> bool:
    """Whether a record is of a result's scan: it has each of its lines, with that group and that very score.

    A record of other scores says nothing of these, whatever modules it has. It may have more than the result.
    """
    return _are_among(lines, {line.name: line for line in lines_of(records)})


def _are_among(lines: Iterable[Module], known: Mapping[str, Module]) -> bool:
    return all((same := known.get(line.name)) is not None and same[:3] == line[:3] for line in lines)


def read_results(path: Path) -> list[Module]:
    """The modules of a result file, ours or one published with Spectrum, in the file's order.

    Infinity, which older ones hold where the noise set was empty, is read as such, and ranks first as it
    does in Spectrum; NaN ranks last. Files in the schema of `_sorted.json`, which Spectrum itself cannot read,
    are read too.

    Raises:
        ResultError: no_such_result, unreadable, too_large, not_a_result.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Module], bool]:
    """The lines, and whether they are in the schema of `_sorted.json`."""
    try:
        if path.stat().st_size > MAX_RESULT_NBYTES:
            raise ResultError(f"{path} is too large for a result", reason="too_large")
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ResultError(
            f"there is no result at {path}",
            reason="no_such_result",
            hint="a scan writes one, model_snr_results/snr_results_….json if nothing else is said",
        ) from error
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}", reason="unreadable") from error
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{path} is not JSON", reason="not_a_result") from error
    for read, is_sorted in ((_from_modules, False), (_from_groups, True)):
        # No file and no terminal takes a half of a pair of UTF-16.
        if (scored := read(data)) and not any(_SURROGATE.search(f"{line.name}{line.group}") for line in scored):
            return scored, is_sorted
    raise ResultError(f"{path} is not a Spectrum result", reason="not_a_result")


def _from_modules(data: Any) -> list[Module] | None:
    if not isinstance(data, dict):
        return None
    scored = []
    for module, entry in data.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("type"), str) or not _is_number(entry.get("snr")):
            return None
        scored.append(Module(module, entry["type"], _ranked(entry["snr"])))
    return scored


def _from_groups(data: Any) -> list[Module] | None:
    if not isinstance(data, dict):
        return None
    scored = []
    for group, modules in data.items():
        if not isinstance(modules, dict) or not all(_is_number(snr) for snr in modules.values()):
            return None
        scored += [Module(module, group, _ranked(snr)) for module, snr in modules.items()]
    return scored


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _ranked(snr: float) -> float:
    # A NaN compares false with everything and would scramble a sort.
    try:
        return -math.inf if math.isnan(snr) else float(snr)
    except OverflowError:
        return math.inf
