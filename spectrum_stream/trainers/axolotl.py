"""Axolotl: `unfrozen_parameters`, as Spectrum writes it, and the matcher that reads it.

Axolotl trains the parameters whose name matches a pattern of the list and freezes the rest. A pattern is a
regular expression that has to match from the start of the name, not to its end, in which a dot is a dot
unless a plus follows; `[a:b]` at its end names rows. (axolotl/utils/freeze.py)

An entry is a module's name, as Spectrum writes it, so that its bias is trained with its weight.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import ResultError
from ..selection.select import ALWAYS as _ALWAYS
from ..selection.select import Selection
from .patterns import Names
from .targets import Target, Targets, targets_of

SUFFIX = "yaml"
ADVICE = "the list is a part of a config of Axolotl; it trains a module's bias with its weight"

ALWAYS = tuple(f"^{module}.weight$" for module in _ALWAYS)

# Unquoted in YAML, unescaped in a regular expression: names of other characters do not mean themselves in both.
_PLAIN = re.compile(r"[A-Za-z0-9_.\-]*")
_ROWS = re.compile(r"^(.+)\[[0-9]*(?::[0-9]*)?\]$")
_DOT = re.compile(r"\.(?!\+)")


def render(selection: Selection, parameters: Collection[str] | None = None) -> str:
    """The YAML, byte for byte what Spectrum writes, but for names that would match others as well.

    Raises:
        ResultError: unsafe_name, a name that would mean something else in YAML or as a pattern; no_such_parameter.
    """
    targets = targets_of(selection, parameters)
    by_group: dict[str, list[Target]] = {name: [] for name in selection.chosen}
    for target in targets.chosen:
        by_group[target.group].append(target)
    lines = ["unfrozen_parameters:", *(f"- {pattern}" for pattern in _always(selection))]
    for group, chosen in by_group.items():
        lines.append(f"# {plain(group)} layers")
        lines += [f"- {pattern}" for target in chosen for pattern in entries(target, targets)]
    return "\n".join(lines) + "\n"


def patterns(selection: Selection, parameters: Collection[str] | None = None) -> tuple[str, ...]:
    """The patterns that `render` writes."""
    targets = targets_of(selection, parameters)
    return (*_always(selection), *(pattern for target in targets.chosen for pattern in entries(target, targets)))


def whole_names(selection: Selection, parameters: Collection[str] | None = None) -> tuple[str, ...]:
    """The entries of `render` that are a parameter's whole name, where Spectrum has the module's."""
    return tuple(p for p in patterns(selection, parameters) if p.endswith("$") and p not in ALWAYS)


def matches(text: str, parameter_names: Iterable[str]) -> set[str]:
    """The parameters that Axolotl trains, given a config with this text."""
    return matched([Pattern(text) for text in yaml.safe_load(text)["unfrozen_parameters"]], parameter_names)


def matched(patterns: Sequence["Pattern"], parameter_names: Iterable[str]) -> set[str]:
    """The parameters that any of the patterns matches."""
    names = Names(parameter_names)
    # An empty list is none: everything is trained then. (axolotl/train.py, `if cfg.unfrozen_parameters`)
    if not patterns:
        return set(names.all)
    return {match.string for pattern in patterns for match in names.found(pattern.compiled, anchored=True)}


def entries(target: Target, targets: Targets) -> tuple[str, ...]:
    """The entries for a chosen module: its name, or its parameter's, where its own is the start of others'."""
    module = plain(target.module)
    if target.tied:
        # Spectrum writes the head's own name, which matches nothing; its pattern trains the embedding, or an entry.
        by_pattern = target.parameter in targets.always and f"^{target.parameter}$" in ALWAYS
        embedding = () if by_pattern else (f"{plain(target.parameter)}$",)
        return (module if not targets.starting_with(module) else f"{module}.weight$", *embedding)
    if target.is_bare:
        # What was read is the whole name. Else it can be the module's, after all.
        return (f"{module}$",) if target.certain else (module,)
    own = {name for name in targets.starting_with(f"{module}.") if "." not in name[len(module) + 1 :]}
    return (module,) if own.issuperset(targets.starting_with(module)) else (f"{plain(target.parameter)}$",)


def _always(selection: Selection) -> list[str]:
    return [f"^{module}.weight$" for module in selection.always]


def read_patterns(path: Path) -> tuple[str, ...]:
    """The patterns of a YAML file with `unfrozen_parameters`, a whole Axolotl config or Spectrum's.

    Raises:
        ResultError: no_such_result, unreadable, not_a_selection.
    """
    try:
        data: Any = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ResultError(f"there is no selection at {path}", reason="no_such_result") from error
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror}", reason="unreadable") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ResultError(f"{path} is not YAML", reason="not_a_selection") from error
    found = data.get("unfrozen_parameters") if isinstance(data, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(p, str) for p in found):
        raise ResultError(f"{path} has no list of unfrozen_parameters", reason="not_a_selection")
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Pattern:
    """One entry of `unfrozen_parameters`, as Axolotl understands it."""

    text: str

    @property
    def names_rows(self) -> bool:
        """Whether it picks rows of a parameter, which takes gradient hooks and not `requires_grad`."""
        return _ROWS.match(self.text) is not None

    @property
    def compiled(self) -> re.Pattern[str]:
        """What has to match from a name's start. Raises re.error, OverflowError or RecursionError."""
        rows = _ROWS.match(self.text)
        return re.compile(_DOT.sub(r"\\.", rows[1] if rows else self.text))

    def matches(self, parameter: str) -> bool:
        return self.compiled.match(parameter) is not None


def plain(name: str) -> str:
    """A name that means itself, unquoted in YAML and unescaped as a pattern of Axolotl; others are refused."""
    # `2`, `null` and `no` are plain and still no strings in YAML.
    if not _PLAIN.fullmatch(name) or (name and yaml.safe_load(name) != name):
        raise ResultError(f"the name {name!r} cannot be written as a pattern for Axolotl", reason="unsafe_name")
    return name
