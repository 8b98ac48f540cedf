"""Soup: `training.unfrozen_parameters`.

An entry is a regular expression. Soup trains the parameters with a name in which an entry is found. It accepts at
most 50,000 entries of at most 512 characters. (soup-cli 0.77.0, soup_cli/utils/freeze.py, apply_unfrozen_parameters;
soup_cli/config/schema.py)
"""

import re
from collections.abc import Collection

import yaml

from ..errors import ResultError
from ..selection.select import Selection
from .targets import exactly, targets_of
from .trainer import Entry, Trainer, strings
from .yaml_text import listing

_MAX_ENTRIES = 50_000
_MAX_LENGTH = 512


class Soup(Trainer):
    """Soup, by a list of expressions."""

    name = "soup"
    suffix = "yaml"
    advice = "copy the list into your soup.yaml"
    loads_causal = True

    def render(self, selection: Selection, parameters: Collection[str] | None = None) -> str:
        """Write the part of the config.

        Raises:
            ResultError: too_large, more or longer entries than Soup accepts; no_such_parameter, nothing_chosen.
        """
        entries = [exactly([name]) for name in targets_of(selection, parameters).parameters]
        if len(entries) > _MAX_ENTRIES or any(len(entry) > _MAX_LENGTH for entry in entries):
            raise ResultError(
                f"Soup accepts at most {_MAX_ENTRIES} entries of at most {_MAX_LENGTH} characters", reason="too_large"
            )
        return f"training:\n{listing('unfrozen_parameters', entries, '  ')}"

    def entries(self, text: str) -> list[Entry]:
        patterns = strings(yaml.safe_load(text)["training"]["unfrozen_parameters"])
        return [Entry(pattern, re.compile(pattern), False) for pattern in patterns]
