"""A result: the scores of a model's modules, as Spectrum and Axolotl read them, and one way to open it.

    snr_results_{slug}.json     {module: {"snr": number, "type": group}}, in Spectrum's order, and nothing else
    snr_results_{slug}.sqlite   the record of the scan next to it (see `record`): parameters, sizes, spectra

Other programs read the JSON, so its modules, groups and scores count. The record adds to them if it has the same
scores; otherwise it belongs to another scan. Results of other programs can be read too.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from ..errors import FileError, ResultError
from ..files import FileKind, JsonTooLarge, above_limit, parse_json, read_file
from ..model.names import MAX_NAME_LENGTH, group_order, is_single_expert, model_order, module_of, pool_of
from ..model.schemes import parameter_of
from ..numerics.metrics import SPECTRUM, Metric, rank_key
from .atomic import write_atomically
from .record import Record, Records, open_records, record_path

# Published results have up to 28,800 modules. More modules than the limit need more than about 1 GB.
MAX_MODULES = 500_000
_SURROGATE = re.compile("[\ud800-\udfff]")


class Module(NamedTuple):
    """A module in a result: all that a selection needs.

    Attributes:
        name, group: as in the result.
        value: Spectrum's score, or the value of the metric that ranks the result; None if there is none.
        parameter: the name of its parameter; None without a record, because a result does not have it.
        numel: the number of weights of the parameter; None without a record.
        shares: the module that owns the parameter, such as the embedding of a tied head; None if it is this one. The
            parameter is trained as a whole, and counted for its owner.
        larger_first: whether the larger value is chosen first.
    """

    name: str
    group: str
    value: float | None
    parameter: str | None = None
    numel: int | None = None
    shares: str | None = None
    larger_first: bool = True

    @property
    def rank_key(self) -> float:
        """The number that a selection sorts by, largest first; -inf without a value."""
        return rank_key(self.value, self.larger_first)

    @property
    def owner(self) -> str:
        """The module that its weights are counted for."""
        return self.shares or self.name

    @property
    def parameter_name(self) -> str:
        """The name of its parameter.

        Without a record the likely one: `name`.weight, or `name` for fused experts.
        """
        is_fused = "experts" in self.name.split(".")[:-1] and not is_single_expert(f"{self.name}.")
        return self.parameter or (self.name if is_fused else f"{self.name}.weight")


@dataclass(frozen=True, slots=True)
class ModuleDiagnostics:
    """Flags of a score that may not be meaningful.

    Attributes:
        degenerate: the score does not compare signal with noise. Fused experts are degenerate if at least half are.
        inexact: the score may be wrong by more than the tolerance. Fused experts are inexact if one of them is.
    """

    degenerate: bool
    inexact: bool


@dataclass(frozen=True, slots=True)
class Result:
    """The modules of a model with their scores and all other known data.

    Attributes:
        modules: in the order of the file, with parameters and sizes if there is a record.
        metric: the metric that ranks them.
        path: the JSON file; None for a result that was not read from a file.
        notes: notes about the files for the user, a sentence each.
        covered: the share of the model's weights that was scanned; None if there is no record.
        parameters: the parameters that the scan saw, with or without a score; a tied one once.
        model: the id or path of the model that was scanned; None if there is no record.
        names: the names that the scan used, one of `model.parameters.Names` or "given"; None if there is no record.
    """

    modules: tuple[Module, ...]
    _: KW_ONLY
    metric: Metric = SPECTRUM
    path: Path | None = None
    notes: tuple[str, ...] = ()
    covered: float | None = None
    parameters: tuple[str, ...] = ()
    model: str | None = None
    names: str | None = None
    _diagnostics: Mapping[str, ModuleDiagnostics] = field(default_factory=dict, repr=False)
    # The reason why there is no record that can be read again; None if there is one.
    _no_record: ResultError | None = field(default=None, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a result file, and its record without the spectra.

        Older files have an infinite score if the noise set was empty. It is kept and ranks first, as in Spectrum. A
        NaN becomes None. The schema of `_sorted.json`, which Spectrum itself cannot read, is also accepted.

        Args:
            path: the JSON, or its record. With the JSON, an unusable record is a note and not an error.

        Raises:
            FileError: not_a_file, file_too_large, unreadable.
            ResultError: no_such_result, too_large (modules or names), not_a_result; unfinished, a record without a
                result.
                With the path of a record also: other_record, it has other scores; locked; corrupt.
        """
        asked = path = Path(path)
        wants_record = asked.suffix == ".sqlite"
        if wants_record:
            path = asked.with_suffix(".json")
            if os.path.lexists(asked) and not os.path.lexists(path):
                # The matrices of an unfinished scan are parts of groups and would be ranked like whole groups.
                raise ResultError(
                    f"{asked} has no result next to it, so its scan has not ended",
                    reason="unfinished",
                    hint="run the scan again",
                )
        modules, is_sorted = _read(path)
        notes = []
        if is_sorted:
            notes.append(f"{path} is in the schema of _sorted.json, which Spectrum and Axolotl cannot read")
        alone = cls(tuple(modules), path=path, notes=tuple(notes))
        try:
            return alone._with_record(record_path(path))
        except ResultError as error:
            if wants_record:
                raise
            if error.reason != "no_record":
                notes.append(f"parameter names, sizes, degenerate and inexact scores are not known: {error}")
            return replace(alone, notes=tuple(notes), _no_record=error)

    @classmethod
    def of(cls, result: "str | Path | Result | Iterable[Module]") -> "Result":
        """Return a result unchanged, open one at a path, or make one of modules.

        Raises:
            ResultError: as `open`.
        """
        if isinstance(result, Result):
            return result
        return cls.open(result) if isinstance(result, (str, Path)) else cls(tuple(result))

    @classmethod
    def from_records(cls, records: Sequence[Record]) -> Self:
        """Make a result of the records of a scan that just ended."""
        return cls(tuple(modules_of(records)), _diagnostics=_diagnose(records))

    def by(self, metric: Metric) -> "Result":
        """Rank the same modules by another metric.

        Reads the spectra of the record if the metric needs them.

        Fused experts have the median of their values. Diagnostics belong to Spectrum's score, so the new result has
        none.

        Raises:
            ResultError: no_record; other_record, the record has other scores; locked; corrupt; unreadable.
        """
        if metric == self.metric:
            return self
        if metric.of_name is not None:
            values: Mapping[str, float | None] = {module.name: metric.of_name(module.name) for module in self.modules}
        else:
            with self.records() as records:
                pairs = [(_without_spectrum(record), record.value_of(metric)) for record in records.rows]
            values = {module.name: module.value for module in _combine(pairs, metric)}
            if not all(module.name in values for module in self.modules):
                raise _other_record(self.path)
        modules = (m._replace(value=values[m.name], larger_first=metric.larger_first) for m in self.modules)
        return replace(self, modules=tuple(modules), metric=metric, _diagnostics={})

    def diagnostics(self) -> Mapping[str, ModuleDiagnostics]:
        """Return the diagnostics of each module.

        It is empty without a record and for another metric than the score.
        """
        return self._diagnostics

    @contextlib.contextmanager
    def records(self) -> Iterator[Records]:
        """Open the record with the spectra.

        Raises:
            ResultError: no_record; other_record, the record has other scores; locked; corrupt; unreadable.
        """
        if self._no_record is not None:
            raise self._no_record
        if self.path is None:
            raise ResultError("the result was not read from a file, so there is no record of it", reason="no_record")
        with open_records(record_path(self.path)) as records:
            yield records

    def _with_record(self, path: Path) -> Self:
        """Add the data of a record that has all modules with equal groups and scores.

        A record may have more modules than the result. A record with other scores belongs to another scan.
        """
        with open_records(path, spectra=False) as opened:
            records = list(opened.rows)
        recorded = {module.name: module for module in modules_of(records)}
        for module in self.modules:
            same = recorded.get(module.name)
            if same is None or (same.group, same.value) != (module.group, module.value):
                raise _other_record(self.path)
        # A scanned matrix may have no module: fused experts have none if one of them has no score.
        left_out = recorded.keys() - {module.name for module in self.modules}
        scanned = {r.tensor: r.n * r.m for r in records if r.result_name not in left_out}
        return replace(
            self,
            modules=tuple(recorded[module.name] for module in self.modules),
            covered=sum(scanned.values()) / opened.weights if opened.weights else None,
            parameters=opened.names,
            model=opened.identity["path"],
            names=opened.identity["names"],
            _diagnostics=_diagnose(records),
        )


def write_results(path: Path, records: Iterable[Record]) -> None:
    """Write a result in Spectrum's schema and order.

    Matrices without a score are left out.

    Raises:
        ResultError: unwritable.
    """
    data = {m.name: {"snr": m.value, "type": m.group} for m in modules_of(sort_records(records))}
    write_atomically(path, json.dumps(data, indent=4, allow_nan=False))


def sort_records(records: Iterable[Record]) -> list[Record]:
    """Sort records like Spectrum's files: groups by name, modules by model order."""
    return sorted(records, key=lambda r: (group_order(r.group), model_order(r.module)))


def modules_of(records: Iterable[Record]) -> list[Module]:
    """Combine records into the modules of a result, in the same order.

    Fused experts are one parameter, trained as a whole, so they are one module. Its score is the median of their
    scores, because a few outliers do not change it much. It has none if one of the experts has none. Experts that are
    ranked together but are separate parameters are a module each, all with the median of their scores.
    """
    return _combine([(record, record.value_of(SPECTRUM)) for record in records], SPECTRUM)


def _combine(pairs: Sequence[tuple[Record, float | None]], metric: Metric) -> list[Module]:
    """Combine records, each with its value of the metric, as `modules_of` does."""
    # A unit has one value: a module, or the modules of experts that are ranked together.
    units: dict[str, list[tuple[Record, float | None]]] = {}
    for record, value in pairs:
        name = record.result_name
        units.setdefault(pool_of(name, record.group) or name, []).append((record, value))
    owners = _owners([record for record, _ in pairs])
    modules: list[Module] = []
    for unit in units.values():
        if any(record.score is None for record, _ in unit):
            continue
        # The median of the sort keys, since no value ranks last.
        key = median_of(metric.rank_key(value) for _, value in unit)
        value = None if key == -math.inf else key if metric.larger_first else -key
        by_name: dict[str, list[Record]] = {}
        for record, _ in unit:
            by_name.setdefault(record.result_name, []).append(record)
        for name, records in by_name.items():
            first, owner = records[0], owners[records[0].tensor]
            modules.append(
                Module(
                    name,
                    first.group,
                    value,
                    parameter=first.parameter,
                    numel=sum(record.n * record.m for record in records),
                    shares=None if owner == name else owner,
                    larger_first=metric.larger_first,
                )
            )
    return modules


def median_of(values: Iterable[float]) -> float:
    """Compute the median of numbers of any size, at least one and none of them NaN.

    The mean of the middle two is finite if both are, although their sum may not be. It is -inf if one of them is.
    """
    ordered = sorted(values)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    if low == high or math.isinf(low):
        return low
    mean = (low + high) / 2
    return mean if math.isfinite(mean) or math.isinf(high) else low / 2 + high / 2


def _owners(records: Iterable[Record]) -> dict[str, str]:
    """Find the module that owns each tensor, by its name in results.

    If it is missing, take the first module.
    """
    owners: dict[str, str] = {}
    for record in records:
        if record.tensor not in owners or module_of(parameter_of(record.tensor)) == record.module:
            owners[record.tensor] = record.result_name
    return owners


def _diagnose(records: Iterable[Record]) -> dict[str, ModuleDiagnostics]:
    members: dict[str, list[Record]] = {}
    for record in records:
        members.setdefault(record.result_name, []).append(record)
    diagnostics = {}
    for name, together in members.items():
        scores = [record.score for record in together if record.score is not None]
        degenerate = sum(score.is_degenerate for score in scores)
        diagnostics[name] = ModuleDiagnostics(
            degenerate=degenerate > 0 and 2 * degenerate >= len(together),
            inexact=not all(score.is_exact for score in scores),
        )
    return diagnostics


def _without_spectrum(record: Record) -> Record:
    # The spectra of a large model do not fit into memory. A view would keep them there, so this is a copy.
    return replace(record, singular_values=record.singular_values[:0].copy())


def _other_record(result: Path | None) -> ResultError:
    return ResultError(
        f"the record of {result} has other scores",
        reason="other_record",
        hint="scan the model again with --fresh",
    )


def read_text(path: Path, what: Literal["result", "selection"], hint: str | None = None) -> str:
    """Read a result or a selection as text.

    Args:
        what: what it should be.
        hint: what to do if there is no such file.

    Raises:
        FileError: not_a_file, file_too_large, unreadable.
        ResultError: no_such_result; not_a_result or not_a_selection, it is not text.
    """
    kind = FileKind.RESULT if what == "result" else FileKind.SELECTION
    try:
        return read_file(path, kind).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError as error:
        raise ResultError(f"there is no {what} at {path}", reason="no_such_result", hint=hint) from error
    except FileError as error:
        if what == "result" and path.is_dir():
            error.hint = "give a result; `spectrum-stream scan MODEL` writes one"
        raise
    except ValueError as error:
        raise ResultError(f"{path} is not text", reason=f"not_a_{what}") from error


def _read(path: Path) -> tuple[list[Module], bool]:
    """Read the modules of a JSON file, and whether it is in the schema of `_sorted.json`."""
    text = read_text(path, "result", "a scan writes one: model_snr_results/snr_results_….json by default")
    try:
        data = parse_json(text)
    except JsonTooLarge as error:
        raise above_limit(path, error) from error
    except ValueError as error:
        raise ResultError(f"{path} is not JSON", reason="not_a_result") from error
    for parse, is_sorted in ((_parse_modules, False), (_parse_groups, True)):
        # Neither a file nor a terminal accepts half of a surrogate pair.
        if (modules := parse(data)) and not any(_SURROGATE.search(f"{m.name}{m.group}") for m in modules):
            _check_limits(path, modules)
            return modules, is_sorted
    raise ResultError(f"{path} is not a Spectrum result", reason="not_a_result")


def _check_limits(path: Path, modules: Sequence[Module]) -> None:
    if len(modules) > MAX_MODULES:
        raise ResultError(
            f"{path} has {len(modules):,} modules, and the limit is {MAX_MODULES:,}", reason="too_large"
        )
    longest = max(max(len(module.name), len(module.group)) for module in modules)
    if longest > MAX_NAME_LENGTH:
        raise ResultError(
            f"{path} has a name of {longest:,} characters, and the limit is {MAX_NAME_LENGTH:,}", reason="too_large"
        )


def is_result(data: Any) -> bool:
    """Whether the content of a JSON file is a result, in the schema that scans write."""
    return bool(_parse_modules(data))


def _parse_modules(data: Any) -> list[Module] | None:
    if not isinstance(data, dict):
        return None
    modules = []
    for name, entry in data.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("type"), str) or not _is_number(entry.get("snr")):
            return None
        modules.append(Module(name, entry["type"], _value_of(entry["snr"])))
    return modules


def _parse_groups(data: Any) -> list[Module] | None:
    if not isinstance(data, dict):
        return None
    modules = []
    for group, entries in data.items():
        if not isinstance(entries, dict) or not all(_is_number(snr) for snr in entries.values()):
            return None
        modules += [Module(name, group, _value_of(snr)) for name, snr in entries.items()]
    return modules


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _value_of(snr: float) -> float | None:
    try:
        # A NaN compares false with everything and would scramble a sort.
        return None if math.isnan(snr) else float(snr)
    except OverflowError:
        return math.inf if snr > 0 else -math.inf
