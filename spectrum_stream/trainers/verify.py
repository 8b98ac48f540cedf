"""Check a selection or a result against the parameters of a model, by the rules of its trainer, before any training.

Trainers silently ignore wrong names. If a pattern matches nothing, the chosen parameter stays frozen. If it matches
too much, other parameters are trained too. An empty list trains all parameters.
"""

import contextlib
import difflib
import json
import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml

from ..errors import ResultError, UsageError
from ..model.names import is_head
from ..results.result import Result, read_text
from ..selection.select import ALWAYS
from . import DEFAULT, TRAINERS
from .parameters import Parameters
from .patterns import Entry, How, Names, PatternError
from .trainer import Finding, Reason, Trainer

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
# The findings that are kept. Others are only counted.
MAX_FINDINGS = 10_000
# The characters of an entry that a finding shows.
_MAX_SHOWN = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of `verify`.

    Attributes:
        parameters: the number of parameters of the model, tied names not counted.
        origin: the origin of their names, a noun phrase.
        trained: the parameters that would be trained; empty for a result, which chooses none.
        findings: at most `MAX_FINDINGS`.
        more_findings: the number of others, which are not kept.
    """

    parameters: int
    origin: str
    trained: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    more_findings: int = 0

    @property
    def is_good(self) -> bool:
        return not self.more_findings and all(finding.reason.is_note for finding in self.findings)


@dataclass(slots=True)
class _Findings:
    """Findings up to a limit. Others are only counted."""

    kept: list[Finding] = field(default_factory=list)
    more: int = 0

    @property
    def is_full(self) -> bool:
        return len(self.kept) >= MAX_FINDINGS

    def add(self, reason: Reason, entry: str, detail: str) -> None:
        if not self.is_full:
            self.kept.append(Finding(reason, entry[:_MAX_SHOWN], detail))
        else:
            self.more += 1

    def verdict(self, parameters: Parameters, trained: Collection[str] = ()) -> Verdict:
        names = parameters.own
        return Verdict(
            parameters=len(names),
            origin=parameters.origin,
            trained=tuple(name for name in names if name in trained),
            findings=tuple(self.kept),
            more_findings=self.more,
        )


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
    findings = _Findings()
    if parameters.base_model is not None:
        findings.add(Reason.BASE_MODEL, "architectures", parameters.base_model)
    if not reader.has_result_schema and _check_result(path, parameters, findings):
        return findings.verdict(parameters)
    text = read_text(path, "selection")
    try:
        if reader.loads_classifier(text):
            parameters = parameters.with_classifier()
        entries = reader.entries(text)
        trained = reader.trained(text, parameters)
        conflicts = reader.conflicts(text, parameters)
        _check_entries(entries, trained, parameters, reader, findings)
    except PatternError as error:
        # It is unknown which parameters the other entries train.
        bad = _Findings()
        for entry, problem in error.problems:
            bad.add(Reason.BAD_PATTERN, entry, _mended(problem))
        return bad.verdict(parameters)
    except ResultError as error:
        hint = error.hint or (_find_format(text) if error.reason == "not_a_selection" else None)
        raise ResultError(f"{path}: {error}", reason=error.reason, hint=hint) from error
    except (yaml.YAMLError, SyntaxError, json.JSONDecodeError, RecursionError) as error:
        where, hint = _find_place(error, text)
        raise ResultError(
            f"{path} is not {reader.takes}, which {trainer} reads{where}", reason="not_a_selection", hint=hint
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ResultError(
            f"{path} is not a selection for {trainer}", reason="not_a_selection", hint=_find_format(text)
        ) from error
    if not entries and conflicts:
        # The settings have to be corrected before anybody can say which parameters are trained.
        trained = set()
    elif not trained:
        findings.add(Reason.ALL_FROZEN, "", "no parameter would be trained: add an entry that matches one")
    elif len(trained) == len(parameters.own) > 1:
        detail = f"all {len(trained)} parameters would be trained: {reader.advise_all(text)}"
        findings.add(Reason.NOTHING_FROZEN, "", detail)
    for conflict in conflicts:
        findings.add(conflict.reason, conflict.entry, conflict.detail)
    return findings.verdict(parameters, trained)


def _mended(problem: str) -> str:
    """Add a correction to the problem of an expression."""
    if "is not a regular expression" not in problem:
        return problem
    return f"{problem}: {'write `.+` for any characters' if 'repeat' in problem else 'correct it'}"


def _find_place(error: Exception, text: str) -> tuple[str, str | None]:
    """Return the place of an error in YAML as text, and a hint for a common mistake."""
    mark, problem = getattr(error, "problem_mark", None), str(getattr(error, "problem", None) or "")[:200]
    if mark is None:
        return "", None
    # Both readers of YAML count the position from the beginning of the text.
    line = text[text.rfind("\n", 0, mark.index) + 1 :][:200].split("\n", 1)[0]
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
    entries: Sequence[Entry], trained: Collection[str], parameters: Parameters, trainer: Trainer, findings: _Findings
) -> None:
    nearest = _Nearest(parameters)
    hits = parameters.names.search(entries)
    unmatched = [entry for entry, found in zip(entries, hits, strict=True) if not found.spans]
    tied = _first_matches(unmatched, Names(parameters.tied, parameters.expressions))
    stored = _first_matches(unmatched[:MAX_FINDINGS], Names(parameters.stored, parameters.expressions))
    for entry, found in zip(entries, hits, strict=True):
        if "[" in entry.text and (numbers := _NUMBERS.search(entry.text)) is not None:
            findings.add(Reason.DIGIT_RANGE, entry.text, _explain_numbers(numbers))
        if found.partial:
            mend = f": end the entry in `{trainer.dot}`" if trainer.dot else ""
            more = found.partial_count - len(found.partial)
            others = ", ".join(found.partial) + (f" and {more} more" if more else "")
            findings.add(Reason.TOO_MANY, entry.text, f"also matches {others}{mend}")
        if found.spans:
            continue
        # Reading a name takes longer than everything else here.
        is_always = ("head" in entry.text or "embed" in entry.text) and _read_name(entry.text) in _ALWAYS_NAMES
        key = (entry.pattern, entry.how)
        alias = tied.get(key)
        owner = None if alias is None else parameters.tied[alias]
        if owner is not None and (owner in trained or is_always):
            findings.add(Reason.TIED_HEAD, entry.text, _tied_to(owner))
        elif owner is not None:
            detail = f"matches no parameter, because the head is tied to {owner}: write that name to train both"
            findings.add(Reason.NO_MATCH, entry.text, detail)
        # Spectrum writes these two for every model, and trainers ignore those that the model lacks.
        elif not is_always:
            advice = None if findings.is_full else trainer.advise(entry.text) or nearest.find(entry, stored.get(key))
            if advice is None:
                advice = "the model has no similar name, so check that the file is for this model"
            findings.add(Reason.NO_MATCH, entry.text, f"matches no parameter; {advice}")


def _first_matches(entries: Sequence[Entry], names: Names) -> dict[tuple[str, How], str]:
    """Return the first name that each entry matches, by pattern."""
    if not names.all:
        return {}
    found = zip(entries, names.search(entries), strict=True)
    return {(entry.pattern, entry.how): names.all[hits.spans[0][0]] for entry, hits in found if hits.spans}


def _explain_numbers(found: re.Match[str]) -> str:
    """Return the meaning of a class of characters that looks like a range of numbers, and what to write."""
    first, last = (int(found[i] or found[i + 2]) for i in (1, 2))
    numbers = "|".join(map(str, range(first, min(last, first + _MAX_NUMBERS) + 1))) or f"{first}|..."
    return f"`{found[0]}` is one character, not a number from {first} to {last}: write `(?:{numbers})`"


def _check_result(path: Path, parameters: Parameters, findings: _Findings) -> bool:
    """Check the modules of a result; return False for a file that is not a result."""
    if path.suffix not in (".json", ".sqlite"):
        return False
    try:
        result = Result.open(path)
    except ResultError as error:
        if path.suffix == ".json" and error.reason == "not_a_result":
            return False
        raise
    nearest = _Nearest(parameters)
    for module in result.modules:
        name = module.parameter_name
        is_missing = name not in parameters.shapes
        if name in parameters.tied or module.shares is not None or (is_head(module.name) and is_missing):
            owner = parameters.tied.get(name) or module.shares or "the embedding"
            findings.add(Reason.TIED_HEAD, module.name, _tied_to(owner))
        elif is_missing and module.name not in parameters.shapes:
            near = None if findings.is_full else nearest.find_name(module.name)
            detail = "is not a parameter of the model" + (f"; the model has {near}" if near else "")
            findings.add(Reason.NOT_IN_MODEL, module.name, detail)
    return True


def _tied_to(owner: str) -> str:
    return f"is tied to {owner}: both are trained, or neither"


def _read_name(entry: str) -> str | None:
    """Return the name that an entry spells; None for a pattern that stands for several names."""
    if len(entry) > _MAX_SHOWN:
        return None
    name = re.sub(r"\[[0-9:]*\]$", "", entry).removeprefix("^").removesuffix("$")
    name = re.sub(r"^\(\?:(.*)\)$", r"\1", name).replace("\\.", ".").replace("\\-", "-").replace("\\_", "_")
    return name if re.fullmatch(r"[A-Za-z0-9_.\-]+", name) else None


class _Nearest:
    """Finds the parameter that an entry without a match most likely means."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._searches = 0

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

    def find(self, entry: Entry, stored: str | None) -> str | None:
        """Return a clause about that parameter, or None.

        Args:
            stored: a name in the checkpoint that the entry matches.
        """
        if len(entry.text) > _MAX_SHOWN:
            return None
        there = None if stored is None else self._parameters.stored[stored]
        if stored is not None and there != stored:
            return f"{stored} is the name in the checkpoint: write {there}, its name in the model"
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
                after_dot = f".{end}"
                ending = (n for n in self._parameters.shapes if n.endswith(after_dot) or n == end)
                if (near := next(ending, None)) is not None:
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
