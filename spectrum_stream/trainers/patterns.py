"""Match regular expressions against many names, fast: only names with the literal prefix are tried."""

import bisect
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

# One literal character of a regular expression.
_LITERAL = re.compile(r"[A-Za-z0-9_\-]|\\[^A-Za-z0-9]")
_REPEATS = ("*", "?", "{", "|")


class SortedNames:
    """Names of parameters, sorted, so that names with the same prefix are together."""

    def __init__(self, names: Iterable[str]) -> None:
        self.all = sorted(set(names))

    def starting_with(self, prefix: str) -> tuple[str, ...]:
        return starting_with(self.all, prefix)

    def found(self, pattern: re.Pattern[str], *, anchored: bool) -> Iterator[re.Match[str]]:
        """Yield the matches; an anchored pattern must match from the start of a name."""
        prefix = literal_prefix(pattern.pattern) if anchored or pattern.pattern.startswith("^") else ""
        look = pattern.match if anchored else pattern.search
        return (match for name in self.starting_with(prefix) if (match := look(name)) is not None)


def starting_with(names: Sequence[str], prefix: str) -> tuple[str, ...]:
    """Return the sorted names that start with a prefix."""
    first = last = bisect.bisect_left(names, prefix)
    while last < len(names) and names[last].startswith(prefix):
        last += 1
    return tuple(names[first:last])


def literal_prefix(pattern: str) -> str:
    """Return a literal prefix of every name that the pattern matches from the start.

    Return "" if there is none.
    """
    inner = pattern.removeprefix("^")
    if alternatives(pattern) != [pattern]:
        return ""
    if (whole := re.fullmatch(r"\(\?:(.*)\)(\$|\\Z)?", inner, re.DOTALL)) and _is_one_group(inner):
        inner = whole[1]
    prefix, position = [], 0
    while (literal := _LITERAL.match(inner, position)) is not None:
        position = literal.end()
        if inner.startswith(_REPEATS, position):
            break
        prefix.append(literal[0].removeprefix("\\"))
    return "".join(prefix)


def alternatives(pattern: str) -> list[str]:
    """Split `a|b`, and `^(?:a|b)$` with the text around the alternatives.

    Without `|`, return one part.
    """
    before, inner, after = "", pattern, ""
    if (whole := re.fullmatch(r"(\^?)\(\?:(.*)\)(\$|\\Z)?", pattern, re.DOTALL)) and _is_one_group(pattern):
        before, inner, after = f"{whole[1]}(?:", whole[2], f"){whole[3] or ''}"
    cuts = [position for position, character, depth in _structure(inner) if character == "|" and depth == 0]
    parts = [inner[i + 1 : j] for i, j in pairwise([-1, *cuts, len(inner)])]
    return [f"{before}{part}{after}" for part in parts] if cuts else [pattern]


def _is_one_group(pattern: str) -> bool:
    """Whether the last parenthesis of a pattern closes the group with which it begins."""
    parentheses = [(character, depth) for _, character, depth in _structure(pattern) if character in "()"]
    return parentheses[-1:] == [(")", 1)] and all(depth for _, depth in parentheses[1:])


def _structure(pattern: str) -> Iterator[tuple[int, str, int]]:
    """Yield position, character and depth, without escapes and character classes."""
    depth, in_class, position = 0, False, 0
    while position < len(pattern):
        character = pattern[position]
        if character == "\\":
            position += 1
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
        else:
            yield position, character, depth
            depth += {"(": 1, ")": -1}.get(character, 0)
        position += 1
