"""Read the YAML and JSON of trainers within limits, which are checked before anything is built from the text.

A short text of YAML can stand for any number of values, because it repeats parts by name. The reader in C is fast,
but it recurses, and its nodes take half a kilobyte each.
"""

import json
import re
from functools import lru_cache
from typing import Any

import yaml

from ..errors import ResultError
from ..files import parse_json

# A list of 300,000 names has as many values. Repeated parts count each time.
MAX_YAML_VALUES = 500_000
MAX_YAML_DEPTH = 100
MAX_YAML_CHARACTERS = 50_000_000
# Digits of a number. Python neither reads nor writes numbers of more than 4,300.
_MAX_NUMBER = 100
_NUMBER = re.compile(r"[-+]?[0-9.][0-9a-fA-FxXoO_.:+-]*")
# PyYAML has the reader in C on all common systems. The other one reads a megabyte in seconds.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SLOW_LOADER_CHARACTERS = 2_000_000


@lru_cache(maxsize=1)
def read_yaml(text: str) -> Any:
    """Read a document of YAML with the types of `yaml.safe_load`. The value must not be changed.

    Raises:
        yaml.YAMLError: it is not YAML.
        ResultError: not_a_selection, it is above a limit, or has a number or a date that does not exist.
    """
    limit = MAX_YAML_CHARACTERS if _LOADER is not yaml.SafeLoader else _SLOW_LOADER_CHARACTERS
    if len(text) > limit:
        raise _above_limit(f"it has more than {limit:,} characters")
    _check(text)
    try:
        return yaml.load(text, Loader=_LOADER)
    except (ValueError, OverflowError, TypeError, KeyError, AttributeError, IndexError) as error:
        # The tag of a value does not fit it, or there is no such date.
        problem = str(error)[:200] if isinstance(error, ValueError) else "it does not fit its tag"
        raise _above_limit(f"a value cannot be read: {problem}") from error


@lru_cache(maxsize=1)
def read_json(text: str) -> Any:
    """Read JSON. The value must not be changed.

    Raises:
        json.JSONDecodeError: it is not JSON.
        ResultError: not_a_selection, it is above a limit.
    """
    try:
        return parse_json(text)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise _above_limit(str(error)) from error


def _check(text: str) -> None:
    """Check nesting, repeated parts and numbers, and count the values."""
    count = 0
    # The number of values before each part that is open, and the name of that part.
    opened: list[tuple[int, str | None]] = []
    sizes: dict[str, int] = {}
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
            if len(event.value) > _MAX_NUMBER and (event.tag or _is_number(event)):
                raise _above_limit(f"it has a number of more than {_MAX_NUMBER} characters")
        elif isinstance(event, yaml.AliasEvent):
            if any(event.anchor == name for _, name in opened):
                raise _above_limit("a part of it contains itself")
            # PyYAML reports a name that does not exist.
            count += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((count, event.anchor))
            count += 1
            if len(opened) > MAX_YAML_DEPTH:
                raise _above_limit(f"it is nested deeper than {MAX_YAML_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            before, name = opened.pop()
            if name is not None:
                sizes[name] = count - before
        if count > MAX_YAML_VALUES:
            raise _above_limit(f"it has more than {MAX_YAML_VALUES:,} values, with those that it repeats")


def _is_number(event: yaml.ScalarEvent) -> bool:
    return event.implicit[0] and _NUMBER.fullmatch(event.value) is not None


def _above_limit(problem: str) -> ResultError:
    return ResultError(f"the file cannot be read: {problem}", reason="not_a_selection")
