"""Check a selection or a result against the parameters of a model, by the rules of its trainer, before any training.

Trainers silently ignore wrong names. If a pattern matches nothing, the chosen parameter stays frozen. If it matches
too much, other parameters are trained too. An empty list trains all parameters.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..errors import ResultError, UsageError
from ..model.names import is_head
from ..results.result import Result, read_text
from ..selection.select import ALWAYS
from ..text import listed
from . import DEFAULT, TRAINERS
from .parameters import Parameters
from .patterns import SortedNames
from .trainer import Entry, Finding, Reason, Trainer

_ALWAYS_NAMES = {f"{module}.weight" for module in ALWAYS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of `verify`.

    Attributes:
        parameters: the number of parameters of the model, tied names not counted.
        origin: the origin of their names, a noun phrase.
        trained: the parameters that would be trained; empty for a result, which chooses none.
    """

    parameters: int
    origin: str
    trained: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def is_good(self) -> bool:
        return all(finding.reason.is_note for finding in self.findings)


def verify(path: Path, parameters: Parameters, trainer: str = DEFAULT.name) -> Verdict:
    """Check a selection, a result or its record against a model's parameters.

    Args:
        trainer: the format of the selection, a name in `TRAINERS`.

    Raises:
        UsageError: no_such_format.
        ResultError: the file cannot be read; not_a_selection, the trainer does not read such files.
    """
    if trainer not in TRAINERS:
        raise UsageError(
            f"unknown format {trainer!r}", reason="no_such_format", hint=f"choose one of {', '.join(TRAINERS)}"
        )
    reader = TRAINERS[trainer]
    names = [name for name in parameters.shapes if name not in parameters.tied]
    sentence = parameters.base_model
    notes = () if sentence is None else (Finding(Reason.BASE_MODEL, "architectures", sentence),)
    if not reader.has_result_schema and (findings := _check_result(path, parameters)) is not None:
        return Verdict(parameters=len(names), origin=parameters.origin, findings=(*findings, *notes))
    text = read_text(path, "selection")
    try:
        entries, trained = reader.entries(text), reader.matches(text, names)
        conflicts = reader.conflicts(text, parameters)
    except re.error as error:
        bad = Finding(Reason.BAD_PATTERN, str(error.pattern), f"is not a regular expression: {error.msg}")
        return Verdict(parameters=len(names), origin=parameters.origin, findings=(bad,))
    except (yaml.YAMLError, SyntaxError, json.JSONDecodeError, RecursionError) as error:
        raise ResultError(f"{path} is not {reader.takes}, which {trainer} reads", reason="not_a_selection") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ResultError(
            f"{path} is not a selection for {trainer}", reason="not_a_selection", hint="pass its --format"
        ) from error
    findings = _check_entries(entries, names, parameters, reader)
    if not trained:
        findings.append(Finding(Reason.ALL_FROZEN, "", "no parameter would be trained"))
    elif len(trained) == len(names) > 1:
        findings.append(Finding(Reason.NOTHING_FROZEN, "", f"all {len(names)} parameters would be trained"))
    return Verdict(
        parameters=len(names),
        origin=parameters.origin,
        trained=tuple(name for name in names if name in trained),
        findings=(*findings, *conflicts, *notes),
    )


def _check_entries(
    entries: Iterable[Entry], names: Iterable[str], parameters: Parameters, trainer: Trainer
) -> list[Finding]:
    own, tied = SortedNames(names), SortedNames(parameters.tied)
    findings = []
    for entry in entries:
        matches = list(own.found(entry.pattern, anchored=entry.anchored))
        if more := sorted(match.string for match in matches if not _is_whole(match)):
            findings.append(Finding(Reason.TOO_MANY, entry.text, f"also matches {listed(more)}"))
        if matches:
            continue
        if (alias := next(tied.found(entry.pattern, anchored=entry.anchored), None)) is not None:
            findings.append(_report_tied(entry.text, parameters.tied[alias.string]))
        # Spectrum writes these two for every model, and trainers ignore those that the model lacks.
        elif _read_name(entry.text) not in _ALWAYS_NAMES:
            advice = trainer.advise(entry.text) or _find_nearest(entry.text, parameters)
            detail = f"matches no parameter; {advice}" if advice else "matches no parameter"
            findings.append(Finding(Reason.NO_MATCH, entry.text, detail))
    return findings


def _check_result(path: Path, parameters: Parameters) -> list[Finding] | None:
    """Check the modules of a result; return None for a file that is not a result."""
    if path.suffix not in (".json", ".sqlite"):
        return None
    try:
        result = Result.open(path)
    except ResultError as error:
        if path.suffix == ".json" and error.reason == "not_a_result":
            return None
        raise
    findings = []
    for module in result.modules:
        name = module.parameter_name
        is_missing = name not in parameters.shapes
        if name in parameters.tied or module.shares is not None or (is_head(module.name) and is_missing):
            findings.append(_report_tied(module.name, parameters.tied.get(name) or module.shares or "the embedding"))
        elif is_missing and module.name not in parameters.shapes:
            advice = _find_nearest(module.name, parameters)
            detail = f"is not a parameter of the model; {advice}" if advice else "is not a parameter of the model"
            findings.append(Finding(Reason.NOT_IN_MODEL, module.name, detail))
    return findings


def _report_tied(entry: str, owner: str) -> Finding:
    return Finding(Reason.TIED_HEAD, entry, f"is tied to {owner}: both are trained, or neither")


def _is_whole(match: re.Match[str]) -> bool:
    """Whether a match has whole components: `layers.1`, but not in `layers.10`."""
    name, start, end = match.string, match.start(), match.end()
    begins = start == 0 or "." in (name[start - 1], name[start : start + 1])
    return begins and (end == len(name) or "." in (name[end], name[end - 1 : end]))


def _read_name(entry: str) -> str | None:
    """Return the name that an entry spells; None for a pattern that stands for several names."""
    name = re.sub(r"\[[0-9:]*\]$", "", entry).removeprefix("^").removesuffix("$")
    name = re.sub(r"^\(\?:(.*)\)$", r"\1", name).replace("\\.", ".").replace("\\-", "-").replace("\\_", "_")
    return name if re.fullmatch(r"[A-Za-z0-9_.\-]+", name) else None


def _find_nearest(entry: str, parameters: Parameters) -> str | None:
    """Return a clause with a parameter of the model that ends like the entry, or None."""
    name = _read_name(entry)
    if name is None:
        return None
    tail = name.split(".", 1)[-1]
    ends = (name, f"{name}.weight", f"{tail}.weight", tail)
    near = next((name for name in parameters.shapes if name.endswith(ends)), None)
    return None if near is None else f"the model has {near}"
