"""Check a selection or a result against the parameters of a model, by the rules of its trainer, before any training.

Trainers silently ignore wrong names. If a pattern matches nothing, the chosen parameter stays frozen. If it matches
too much, other parameters are trained too. An empty list trains all parameters.
"""

import contextlib
import difflib
import json
import re
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
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
# A class of characters such as [10-20], which people write for a range of numbers.
_NUMBERS = re.compile(r"\[([0-9]{2,4})-([0-9]{1,4})\]|\[([0-9])-([0-9]{2,4})\]")
_MAX_NUMBERS = 100
# Expressions for any number of a layer.
_ANY_NUMBER = re.compile(r"\\d\+?|\[[0-9\-]+\][+*]?|\(\??:?[0-9|]+\)|\.[+*]|\*|\{[0-9.,\-]+\}")
_LEAVES = ("weight", "bias")
# Characters of a file that is tried with all formats, a second at most.
_MAX_TRIED = 100_000
_SIMILAR = 0.7
# A search compares an entry with the names of a model without their numbers, in 0.1 s at most.
_MAX_SEARCHES = 20
_MAX_LENGTH = 120
_MAX_SHAPES = 300


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
    names = parameters.own
    sentence = parameters.base_model
    notes = () if sentence is None else (Finding(Reason.BASE_MODEL, "architectures", sentence),)
    if not reader.has_result_schema and (findings := _check_result(path, parameters)) is not None:
        return Verdict(parameters=len(names), origin=parameters.origin, findings=(*notes, *findings))
    text = read_text(path, "selection")
    try:
        if reader.loads_classifier(text):
            parameters = parameters.with_classifier()
            names = parameters.own
        entries, trained = reader.entries(text), reader.trained(text, parameters)
        conflicts = reader.conflicts(text, parameters)
    except re.error as error:
        mend = "write `.+` for any characters" if "repeat" in error.msg else "correct it"
        detail = f"is not a regular expression ({error.msg}): {mend}"
        bad = Finding(Reason.BAD_PATTERN, str(error.pattern), detail)
        return Verdict(parameters=len(names), origin=parameters.origin, findings=(bad,))
    except ResultError as error:
        raise ResultError(f"{path}: {error}", reason=error.reason, hint=error.hint or _find_format(text)) from error
    except (yaml.YAMLError, SyntaxError, json.JSONDecodeError, RecursionError) as error:
        where, hint = _find_place(error, text)
        raise ResultError(
            f"{path} is not {reader.takes}, which {trainer} reads{where}", reason="not_a_selection", hint=hint
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ResultError(
            f"{path} is not a selection for {trainer}", reason="not_a_selection", hint=_find_format(text)
        ) from error
    findings = _check_entries(entries, trained, parameters, reader)
    if not entries and conflicts:
        # The settings have to be corrected before anybody can say which parameters are trained.
        trained = set()
    elif not trained:
        findings.append(
            Finding(Reason.ALL_FROZEN, "", "no parameter would be trained: add an entry that matches one")
        )
    elif len(trained) == len(names) > 1:
        detail = f"all {len(names)} parameters would be trained: {reader.advise_all(text)}"
        findings.append(Finding(Reason.NOTHING_FROZEN, "", detail))
    return Verdict(
        parameters=len(names),
        origin=parameters.origin,
        trained=tuple(name for name in names if name in trained),
        findings=(*notes, *findings, *conflicts),
    )


def _find_place(error: Exception, text: str) -> tuple[str, str | None]:
    """Return the place of an error in YAML as text, and a hint for a common mistake."""
    mark, problem = getattr(error, "problem_mark", None), str(getattr(error, "problem", None) or "")[:200]
    if mark is None:
        return "", None
    line = text.splitlines()[mark.line][:200] if mark.line < len(text.splitlines()) else ""
    hint = None
    if "\t" in line:
        hint = "indent with spaces instead of tabs"
    elif "document" in problem:
        hint = "keep one document: remove the line `---` between them"
    elif "quoted" in str(getattr(error, "context", None)):
        hint = "close the quotes"
    elif re.match(r"\s*(- |\S+: )?\s*[*&!%@`|>{\[]", line):
        hint = "quote entries that begin with one of * & ! % @ ` | > { ["
    return f": line {mark.line + 1}: {problem}", hint


def _find_format(text: str) -> str:
    """Return a hint with the formats that read a text."""
    found = []
    for name, trainer in TRAINERS.items() if len(text) <= _MAX_TRIED else ():
        # Each trainer fails in its own way on a file of another trainer, and Python warns about escapes in it.
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found += [name] if trainer.entries(text) else []
    return f"pass --format {' or '.join(found[:3])}, which reads it" if found else "pass its --format"


def _check_entries(
    entries: Iterable[Entry], trained: Collection[str], parameters: Parameters, trainer: Trainer
) -> list[Finding]:
    own = SortedNames(parameters.own)
    tied, nearest = SortedNames(parameters.tied), _Nearest(parameters)
    findings = []
    for entry in entries:
        if (numbers := _NUMBERS.search(entry.text)) is not None:
            findings.append(Finding(Reason.DIGIT_RANGE, entry.text, _explain_numbers(numbers)))
        matches = list(own.found(entry.pattern, anchored=entry.anchored))
        # A lookahead matches without a character, so it names nothing.
        if more := sorted(match.string for match in matches if match.end() and not _is_whole(match)):
            mend = f": end the entry in `{trainer.dot}`" if trainer.dot else ""
            findings.append(Finding(Reason.TOO_MANY, entry.text, f"also matches {listed(more)}{mend}"))
        if matches:
            continue
        is_always = _read_name(entry.text) in _ALWAYS_NAMES
        alias = next(tied.found(entry.pattern, anchored=entry.anchored), None)
        owner = None if alias is None else parameters.tied[alias.string]
        if owner is not None and (owner in trained or is_always):
            findings.append(_report_tied(entry.text, owner))
        elif owner is not None:
            detail = f"matches no parameter, because the head is tied to {owner}: write that name to train both"
            findings.append(Finding(Reason.NO_MATCH, entry.text, detail))
        # Spectrum writes these two for every model, and trainers ignore those that the model lacks.
        elif not is_always:
            advice = trainer.advise(entry.text) or nearest.find(entry)
            if advice is None:
                advice = "the model has no similar name, so check that the file is for this model"
            detail = f"matches no parameter; {advice}"
            findings.append(Finding(Reason.NO_MATCH, entry.text, detail))
    return findings


def _explain_numbers(found: re.Match[str]) -> str:
    """Return the meaning of a class of characters that looks like a range of numbers, and what to write."""
    first, last = (int(found[i] or found[i + 2]) for i in (1, 2))
    numbers = "|".join(map(str, range(first, min(last, first + _MAX_NUMBERS) + 1))) or f"{first}|..."
    return f"`{found[0]}` is one character, not a number from {first} to {last}: write `(?:{numbers})`"


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
    findings, nearest = [], _Nearest(parameters)
    for module in result.modules:
        name = module.parameter_name
        is_missing = name not in parameters.shapes
        if name in parameters.tied or module.shares is not None or (is_head(module.name) and is_missing):
            findings.append(_report_tied(module.name, parameters.tied.get(name) or module.shares or "the embedding"))
        elif is_missing and module.name not in parameters.shapes:
            near = nearest.find_name(module.name)
            detail = "is not a parameter of the model" + (f"; the model has {near}" if near else "")
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


class _Nearest:
    """Finds the parameter that an entry without a match most likely means."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._searches = 0

    @cached_property
    def _stored(self) -> SortedNames:
        return SortedNames(self._parameters.stored)

    @cached_property
    def _first(self) -> dict[str, str]:
        """The first parameter of each name without its numbers."""
        first: dict[str, str] = {}
        for name in self._parameters.shapes:
            first.setdefault(_without_numbers(name), name)
        return first

    @cached_property
    def _last(self) -> dict[str, str]:
        """The last parameter of each name without its numbers, by the names of parameters and modules."""
        last = {_without_numbers(name): name for name in self._parameters.shapes}
        return {shape.removesuffix(".weight"): name for shape, name in last.items()} | last

    def find(self, entry: Entry) -> str | None:
        """Return a clause about that parameter, or None."""
        stored = next(self._stored.found(entry.pattern, anchored=entry.anchored), None)
        there = None if stored is None else self._parameters.stored[stored.string]
        if stored is not None and there != stored.string:
            return f"{stored.string} is the name in the checkpoint: write {there}, its name in the model"
        if (inside := entry.text.strip(" \t\r\n,;'\"")) != entry.text:
            return f"spaces, quotes and commas are a part of it: write {inside}"
        if (last := self._last.get(_without_numbers(entry.text), None)) is not None:
            return f"the model has such names with other numbers, up to {last}: correct the number"
        near = self.find_name(entry.text)
        return None if near is None else f"the model has {near}: write its name"

    def find_name(self, entry: str) -> str | None:
        """Return the parameter that ends like an entry, or that looks most like it."""
        # The search takes time for each entry, and a file can have many entries for another model.
        self._searches += 1
        if self._searches > _MAX_SEARCHES or len(entry) > _MAX_LENGTH:
            return None
        if (name := _read_name(entry)) is not None:
            tail = name.split(".", 1)[-1]
            for end in (name, f"{name}.weight", *((f"{tail}.weight", tail) if tail not in _LEAVES else ())):
                names = self._parameters.shapes
                if (near := next((n for n in names if f".{n}".endswith(f".{end}")), None)) is not None:
                    return near
        wanted = _ANY_NUMBER.sub("0", re.sub(r"\[[0-9:]*\]$", "", entry).strip("^$")).replace("\\", "")
        wanted = _without_numbers(wanted)
        shapes = [shape for shape in self._first if len(shape) <= _MAX_LENGTH][:_MAX_SHAPES]
        for shape in (wanted, f"{wanted}.weight"):
            if found := difflib.get_close_matches(shape, shapes, n=1, cutoff=_SIMILAR):
                same = found[0]
                for number in re.findall(r"[0-9]+", entry):
                    same = same.replace("#", number, 1)
                same = same.replace("#", "0")
                return same if same in self._parameters.shapes else self._first[found[0]]
        return None


def _without_numbers(name: str) -> str:
    return re.sub(r"[0-9]+", "#", name)
