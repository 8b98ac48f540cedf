"""Turn the text of options into values, or reject it with one sentence."""

import re
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..errors import UsageError
from ..model.parameters import Names, read_names

Choice = TypeVar("Choice", bound=StrEnum)
_NUMBER = r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*"


class Groups(NamedTuple):
    """The values of --groups.

    Attributes:
        patterns: names and globs of the groups to choose from; None for all.
        percents: the percentages of single groups, by name or glob.
    """

    patterns: tuple[str, ...] | None
    percents: dict[str, float]


def choice(kind: type[Choice], option: str, reason: str) -> Callable[[str], Choice]:
    """Make the parser of an option that takes one of a few words."""

    def parse(text: str) -> Choice:
        if text not in list(kind):
            raise UsageError(f"{option} cannot be {text!r}", reason=reason, hint=f"use one of {', '.join(kind)}")
        return kind(text)

    return parse


def percent_of(text: str | float) -> float:
    """Read a percentage. The caller checks its range.

    Raises:
        UsageError: bad_percent.
    """
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"{text!r} is not a percentage",
            reason="bad_percent",
            hint="write a number without %, e.g. --top-percent 50",
        ) from None


def whole_number_of(text: str | int) -> int:
    """Read a whole number.

    Raises:
        UsageError: bad_count.
    """
    if not re.fullmatch(r"[+-]?[0-9]{1,15}", str(text)):
        raise UsageError(f"{text!r} is not a whole number", reason="bad_count")
    return int(text)


def nbytes_of(size: str | None, option: str) -> int | None:
    """Read a number of bytes: `800MiB`, `1.5GB`, `1.5G` or a plain number.

    Raises:
        UsageError: bad_size.
    """
    if size is None:
        return None
    match = re.fullmatch(rf"{_NUMBER}([kKMGT]?)(i?)B?\s*", size)
    if match is None:
        raise UsageError(f"{size!r} is not a size", reason="bad_size", hint=f"e.g. {option} 1.5GB")
    exponent = " kMGT".index(match[2].replace("K", "k") or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** exponent)


def count_of(number: str | None, option: str) -> int | None:
    """Read a number of weights: `2B`, `1.5M` or a plain number.

    Raises:
        UsageError: bad_count.
    """
    if number is None:
        return None
    match = re.fullmatch(rf"{_NUMBER}([kKMBGT]?)\s*", number)
    if match is None:
        raise UsageError(f"{number!r} is not a number of weights", reason="bad_count", hint=f"e.g. {option} 2B")
    return int(float(match[1]) * 1000 ** " kMBT".index(match[2].replace("K", "k").replace("G", "B") or " "))


def names_of(text: str) -> Names | tuple[str, ...]:
    """Return a member of `Names`, or the names in a file.

    Raises:
        UsageError: no_such_file, no_names.
    """
    if text in list(Names):
        return Names(text)
    try:
        return tuple(read_names(Path(text)))
    except UsageError as error:
        hint = f"use one of {', '.join(Names)}, or a file with one name per line"
        raise UsageError(str(error), reason=error.reason, hint=hint) from error


def group_percents_of(texts: Sequence[str] | None) -> Groups:
    """Read --groups of `select`: GROUP or GROUP=P, repeated or separated by commas.

    Groups without a percentage restrict the choice to the listed groups. If all have one, nothing is restricted.

    Raises:
        UsageError: bad_percent; no_such_group, an option without a group.
    """
    patterns, percents = [], {}
    for text in _split_commas(texts):
        name, equals, percent = text.rpartition("=")
        if not equals:
            patterns.append(text)
            continue
        try:
            percents[name] = float(percent.removesuffix("%"))
        except ValueError:
            raise UsageError(
                f"{percent!r} is not a percentage for the group {name}",
                reason="bad_percent",
                hint="e.g. --groups mlp.down_proj=25",
            ) from None
    return Groups((*patterns, *percents) if patterns else None, percents)


def group_patterns_of(texts: Sequence[str] | None) -> tuple[str, ...] | None:
    """Read --groups of a scan: GROUP, repeated or separated by commas.

    Raises:
        UsageError: bad_percent, a group with a percentage; no_such_group, an option without a group.
    """
    patterns = _split_commas(texts)
    if with_percent := [text for text in patterns if re.search(r"=\s*[0-9.]+%?$", text)]:
        raise UsageError(
            f"a scan needs groups without a percentage, not {with_percent[0]!r}",
            reason="bad_percent",
            hint=f"scan first, then: spectrum-stream select RESULT --groups '{with_percent[0]}'",
        )
    return tuple(patterns) or None


def model_of(model: str | None, model_name: str | None) -> str:
    """Return MODEL, which can also be given by Spectrum's flag --model-name.

    Raises:
        UsageError: no_model, conflicting_options.
    """
    hint = "e.g. spectrum-stream scan path/to/model --top-percent 50"
    if model is not None and model_name is not None:
        raise UsageError("MODEL is given twice", reason="conflicting_options", hint=hint)
    if (typed := model or model_name) is None:
        raise UsageError("missing argument MODEL", reason="no_model", hint=hint)
    return typed


def _split_commas(texts: Sequence[str] | None) -> list[str]:
    parts = [part.strip() for text in texts or () for part in text.split(",") if part.strip()]
    if texts and not parts:
        raise UsageError("--groups has no group", reason="no_such_group")
    return parts
