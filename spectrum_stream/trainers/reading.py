"""Read the YAML and JSON of trainers within limits.

The limits are checked before anything is built from the text. Short YAML can have any number of values, because it
can repeat parts by name. The C reader is fast, but it recurses, and each of its nodes takes half a kilobyte.
"""

import json
import re
from functools import lru_cache
from typing import Any

import yaml

from ..errors import ResultError
from ..files import parse_json

# A list of 300,000 names has 300,000 values. A repeated part counts each time.
MAX_YAML_VALUES = 500_000
MAX_YAML_DEPTH = 100
MAX_YAML_CHARACTERS = 50_000_000
# The characters of a number. Python neither reads nor writes integers of more than 4,300 digits.
_MAX_NUMBER = 100
_NUMBER = re.compile(r"[-+]?[0-9.][0-9a-fA-FxXoO_.:+-]*")
# PyYAML has a C reader on all common systems. The other reader takes seconds for a megabyte.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SLOW_LOADER_CHARACTERS = 2_000_000


@lru_cache(maxsize=1)
def read_yaml(text: str) -> Any:
    """Read a YAML document with the types of `yaml.safe_load`.

    The value must not be changed.

    Raises:
        yaml.YAMLError: it is not YAML.
        ResultError: not_a_selection, it is above a limit, or a number or date is invalid.
    """
    limit = MAX_YAML_CHARACTERS if _LOADER is not yaml.SafeLoader else _SLOW_LOADER_CHARACTERS
    if len(text) > limit:
        raise _above_limit(f"it has more than {limit:,} characters")
    _check(text)
    try:
        return yaml.load(text, Loader=_LOADER)
    except (ValueError, OverflowError, TypeError, KeyError, AttributeError, IndexError) as error:
        # A value does not fit its tag, or a date does not exist.
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
    # For each open part: the number of values before it, and its name.
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
            # PyYAML reports names that do not exist.
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
            raise _above_limit(f"it has more than {MAX_YAML_VALUES:,} values, repeated ones included")


def _is_number(event: yaml.ScalarEvent) -> bool:
    return event.implicit[0] and _NUMBER.fullmatch(event.value) is not None


def _above_limit(problem: str) -> ResultError:
    return ResultError(f"the file cannot be read: {problem}", reason="not_a_selection")
