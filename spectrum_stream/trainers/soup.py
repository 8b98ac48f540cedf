"""Soup: `training.unfrozen_parameters`.

The parameters are trained in whose names an entry is found, a regular expression. At most 50,000 entries of at most
512 characters. (soup_cli/utils/freeze.py, apply_unfrozen_parameters; soup_cli/config/schema.py)
"""

import re
from collections.abc import Collection, Iterable

import yaml

from ..errors import ResultError
from ..selection.select import Selection
from .patterns import Names
from .targets import exactly, targets_of

SUFFIX = "yaml"
ADVICE = "the list is a part of soup.yaml"

_MAX_ENTRIES = 50_000
_MAX_LENGTH = 512


def render(selection: Selection, parameters: Collection[str] | None = None) -> str:
    """The part of the config.

    Raises:
        ResultError: too_large, more or longer entries than Soup takes; no_such_parameter.
    """
    entries = [exactly([name]) for name in targets_of(selection, parameters).parameters]
    if len(entries) > _MAX_ENTRIES or any(len(entry) > _MAX_LENGTH for entry in entries):
        raise ResultError(
            f"Soup takes {_MAX_ENTRIES} entries of {_MAX_LENGTH} characters at most", reason="too_large"
        )
    return yaml.safe_dump({"training": {"unfrozen_parameters": entries}}, width=10_000)


def matches(text: str, parameter_names: Iterable[str]) -> set[str]:
    """The parameters that Soup trains, given a config with this text."""
    patterns = [re.compile(entry) for entry in yaml.safe_load(text)["training"]["unfrozen_parameters"]]
    names = Names(parameter_names)
    return {match.string for pattern in patterns for match in names.found(pattern, anchored=False)}
