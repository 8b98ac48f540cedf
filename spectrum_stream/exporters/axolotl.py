"""Axolotl: `unfrozen_parameters`, as Spectrum writes it, and the matcher that reads it.

Axolotl trains the parameters whose name matches a pattern of the list and freezes the rest. A pattern is a
regular expression that has to match from the start of the name, not to its end, in which a dot is a dot
unless a plus follows; `[a:b]` at its end names rows. (axolotl/utils/freeze.py)
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import ResultError
from ..selection import Selection

# Spectrum always trains these two, whatever the model calls them and whether or not it has them.
ALWAYS = ("^lm_head.weight$", "^model.embed_tokens.weight$")

# Unquoted in YAML, unescaped in a regular expression: names of other characters do not mean themselves in both.
_PLAIN = re.compile(r"[A-Za-z0-9_.\-]*")
_ROWS = re.compile(r"^(.+)\[[0-9]*(?::[0-9]*)?\]$")
_DOT = re.compile(r"\.(?!\+)")


def render(selection: Selection) -> str:
    """The YAML, byte for byte what Spectrum writes.

    Raises:
        ResultError: unsafe_name, a name that would mean something else in YAML or as a pattern.
    """
    lines = ["unfrozen_parameters:", *(f"- {pattern}" for pattern in ALWAYS)]
    for group, modules in selection.chosen.items():
        lines.append(f"# {_plain(group)} layers")
        lines += [f"- {_plain(module)}" for module in modules]
    return "\n".join(lines) + "\n"


def patterns(selection: Selection) -> tuple[str, ...]:
    """The patterns that `render` writes."""
    return (*ALWAYS, *(_plain(module) for module in selection.modules))


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
    except (yaml.YAMLError, ValueError) as error:
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

    def matches(self, parameter: str) -> bool:
        rows = _ROWS.match(self.text)
        return re.match(_DOT.sub(r"\\.", rows[1] if rows else self.text), parameter) is not None


def _plain(name: str) -> str:
    # `2`, `null` and `no` are plain and still no strings in YAML.
    if not _PLAIN.fullmatch(name) or (name and yaml.safe_load(name) != name):
        raise ResultError(f"the name {name!r} cannot be written as a pattern for Axolotl", reason="unsafe_name")
    return name
