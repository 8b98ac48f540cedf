"""Regular expressions of untrusted configs, matched in time that is linear in the name.

The `re` module can take exponential time. Here a pattern is simulated for all its positions in the name at once.
"""

import re
from collections.abc import Callable
from functools import lru_cache

_MAX_LENGTH = 1000
_MAX_DEPTH = 20
# One character, and what may follow it: an escape or a class in brackets is one character too.
_CHARACTER = re.compile(r"\\[.dDwWsS\-_/]|\[\^?[^\[\]\\]+\]|[^\\\[\](){}|*+?^$]")

# From the positions in a name that are reached before a part of the pattern, to those after it.
_Step = Callable[[str, set[int]], set[int]]


class NotPlain(ValueError):
    """The pattern has a construct that is not supported, such as a repeated group."""


def matches(pattern: str, name: str, anywhere: bool = False) -> bool:
    """Whether a regular expression matches a name, from its start or anywhere.

    Raises:
        NotPlain: the pattern is not of characters, classes, groups, alternatives and repeated characters only.
    """
    step = _parse(pattern)
    if not _has_texts(_find_texts(pattern), name):
        return False
    return bool(step(name, set(range(len(name) + 1)) if anywhere else {0}))


def count_steps(pattern: str, name: str) -> int:
    """Return the most positions that `matches` visits for a name."""
    return len(pattern) * (len(name) + 1) if _has_texts(_find_texts(pattern), name) else 0


@lru_cache(maxsize=1024)
def _parse(pattern: str) -> _Step:
    if len(pattern) > _MAX_LENGTH:
        raise NotPlain(pattern)
    step, end = _parse_choice(pattern, 0, 0)
    if end < len(pattern):
        raise NotPlain(pattern)
    return step


@lru_cache(maxsize=1024)
def _find_texts(pattern: str) -> tuple[str, ...]:
    """Find texts that every match has, in their order. Most patterns are excluded by them, without a simulation."""
    texts, depth, i = [""], 0, 0
    while i < len(pattern):
        found = _CHARACTER.match(pattern, i)
        text = found[0] if found is not None else pattern[i]
        i += len(text)
        if depth == 0 and text == "|":
            return ()
        depth += (text == "(") - (text == ")")
        is_literal = found is not None and (
            (len(text) == 1 and text != ".") or (len(text) == 2 and text[1] in ".-_/")
        )
        if depth == 0 and is_literal and pattern[i : i + 1] not in ("*", "+", "?", "{"):
            texts[-1] += text[-1]
        elif texts[-1]:
            texts.append("")
    return tuple(filter(None, texts))


def _has_texts(texts: tuple[str, ...], name: str) -> bool:
    at = 0
    for text in texts:
        at = name.find(text, at) + len(text)
        if at < len(text):
            return False
    return True


def _parse_choice(pattern: str, i: int, depth: int) -> tuple[_Step, int]:
    """Parse alternatives up to the end or to a closing parenthesis."""
    if depth > _MAX_DEPTH:
        raise NotPlain(pattern)
    choices: list[list[_Step]] = [[]]
    while i < len(pattern) and pattern[i] != ")":
        if pattern[i] == "|":
            choices.append([])
            i += 1
        else:
            step, i = _parse_item(pattern, i, depth)
            choices[-1].append(step)
    return lambda name, at: set().union(*(_follow(steps, name, at) for steps in choices)), i


def _follow(steps: list[_Step], name: str, at: set[int]) -> set[int]:
    for step in steps:
        at = step(name, at)
    return at


def _parse_item(pattern: str, i: int, depth: int) -> tuple[_Step, int]:
    """Parse an anchor, a group, or a character that may be repeated."""
    if pattern[i] == "^":
        return lambda name, at: at & {0}, i + 1
    if pattern[i] == "$":
        return lambda name, at: at & {len(name)}, i + 1
    if pattern[i] == "(":
        inside = i + 3 if pattern.startswith("(?:", i) else i + 1
        step, end = _parse_choice(pattern, inside, depth + 1)
        if not pattern.startswith(")", end) or pattern[end + 1 : end + 2] in ("*", "+", "?", "{"):
            raise NotPlain(pattern)
        return step, end + 1
    found = _CHARACTER.match(pattern, i)
    if found is None:
        raise NotPlain(pattern)
    character, i = re.compile(found[0]), found.end()
    repeat = pattern[i : i + 1]
    if repeat not in ("*", "+", "?"):
        if repeat == "{":
            raise NotPlain(pattern)
        return lambda name, at: _advance(character, name, at), i
    if pattern[i + 1 : i + 2] in ("*", "+", "?", "{"):
        raise NotPlain(pattern)
    least = 1 if repeat == "+" else 0
    return lambda name, at: _repeat(character, name, at, least, once=repeat == "?"), i + 1


def _advance(character: re.Pattern[str], name: str, at: set[int]) -> set[int]:
    return {p + 1 for p in at if p < len(name) and character.fullmatch(name[p])}


def _repeat(character: re.Pattern[str], name: str, at: set[int], least: int, once: bool) -> set[int]:
    reached = set() if least else set(at)
    new = _advance(character, name, at)
    while new and not once:
        reached |= new
        new = _advance(character, name, new) - reached
    return reached | new
