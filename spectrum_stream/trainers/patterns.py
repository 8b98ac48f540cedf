"""Match many entries of a selection against many names, within limits.

Trainers match with Python's `re`, so entries must match as in `re`. The time of `re` has no limit, and a file can
have a million entries. So most entries are matched without `re`:

- A sequence of literal text, any characters and runs of digits is found in the sorted names by bisection. `select`
  writes only such entries, and people mostly do.
- A sequence that may begin anywhere in a name is found in the same way in the sorted endings of the names.
- Every other expression is matched in a process with limits (`expressions.py`).
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cached_property
from itertools import accumulate, dropwhile, pairwise
from typing import NamedTuple

from ..errors import ResultError
from .expression_process import is_whole, runs
from .expressions import Expressions

# The entries of a file: three for each tensor of the largest checkpoints.
MAX_ENTRIES = 1_000_000
# Entries that may match anywhere in a name. Soup accepts 50,000.
MAX_FLOATING = 100_000
# Expressions for `re`, which compiles one in up to a millisecond.
MAX_EXPRESSIONS = 10_000
# Matches that are visited one by one. This takes at most 10 s.
MAX_MATCHES = 10_000_000
# Groups of names that are visited to find names with the same start. This takes at most 10 s.
MAX_VISITS = 2_000_000
# Characters that are compared to find entries anywhere in names. This takes at most 10 s.
MAX_STEPS = 2_000_000_000

# Literal text in a regular expression, and the other items that are found without `re`.
_TEXT = r"(?:[^\\.^$*+?{}\[\]|()]|\\[^A-Za-z0-9])++"
_DIGITS = r"\\d\+|\[0-9\]\+"
_ITEM = re.compile(rf"({_TEXT})|(\.)|({_DIGITS})")
_ITEMS = rf"(?:{_TEXT}|\.|{_DIGITS})*+"
_ONE = re.compile(rf"(\^?)({_ITEMS})(\$|\\Z)?")
_PLAIN = re.compile(rf"(\^?)((?:{_TEXT})?)(\$|\\Z)?")
_GROUP = re.compile(rf"(\^?)\(\?:((?:{_TEXT}|\.|{_DIGITS}|\|)*+)\)(\$|\\Z)?")
_PART = re.compile(rf"(?:{_TEXT}|\.|{_DIGITS}|[\^$]|\\Z)*+")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_RUNS = {digits: re.compile(digits) for digits in (r"\d+", "[0-9]+")}
# The index has the endings of names, cut to this length. The names that it finds are checked in full.
_MAX_ENDING = 64
# The characters of names in the index at one time. Each takes about 200 bytes.
_CHUNK = 500_000
# Up to this many pairs of entry and name are tried without an index, in a second.
_FEW_PAIRS = 5_000_000
_MAX_SHOWN = 3
# The first items of expressions are looked up once: so many items, for so many different beginnings.
_HEAD = 4
_MAX_HEADS = 1_000
_LAST = chr(0x10FFFF)


class How(Enum):
    """How an entry matches a name."""

    NAME = "name"  # it is the name
    START = "start"  # the name starts with it
    END = "end"  # it is the name, or its end after a dot
    MATCH = "match"  # an expression that matches from the start of the name
    SEARCH = "search"  # an expression that matches anywhere in the name
    WHOLE = "whole"  # an expression that matches the whole name


class Entry(NamedTuple):
    """One entry of a selection file, as its trainer reads it.

    Attributes:
        text: the entry as written.
        pattern: the literal text or the regular expression that finds the parameters that it trains.
        how: how `pattern` matches their names.
    """

    text: str
    pattern: str
    how: How = How.MATCH


class Hits(NamedTuple):
    """The names that an entry matches.

    Attributes:
        spans: positions in the sorted names, as first ones and ends, in order.
        partial: some of the names in which the match ends within a component: `layers.1` in `layers.10`.
        partial_count: the number of such names.
    """

    spans: tuple[tuple[int, int], ...] = ()
    partial: tuple[str, ...] = ()
    partial_count: int = 0


class PatternError(ResultError):
    """Entries that are not regular expressions, or take too long to match.

    Attributes:
        problems: each entry as written, and a clause about it.
    """

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        super().__init__(f"{problems[0][0]!r} {problems[0][1]}", reason="bad_pattern")
        self.problems = tuple(problems)


_Item = str | re.Pattern[str] | None


class _Sequence(NamedTuple):
    """An expression without choices, for names without newlines.

    Attributes:
        items: literal texts, None for any character, and an expression for a run of digits.
        has_end: whether the name must end after it.
    """

    from_start: bool
    items: tuple[_Item, ...]
    has_end: bool

    @property
    def literal(self) -> str | None:
        """The literal text, if the sequence has nothing else."""
        only = self.items[0] if len(self.items) == 1 and not self.has_end else None
        return only if isinstance(only, str) else None

    @property
    def needle(self) -> tuple[_Item, ...]:
        """The first literal text and the items after it, as long as the index has."""
        found: list[_Item] = []
        room = _MAX_ENDING
        for item in dropwhile(lambda item: not isinstance(item, str), self.items):
            if isinstance(item, re.Pattern) or not room:
                break
            item = item and item[:room]
            room -= len(item) if item else 1
            found.append(item)
        return tuple(found)

    def steps(self, names: Iterable[str], longest_run: int) -> int:
        """Return a limit of the characters compared after the starts of the sequence.

        Args:
            longest_run: the length of the longest run of digits in any name.
        """
        if self.literal is not None:
            return 0
        length = sum(1 if i is None else len(i) if isinstance(i, str) else longest_run for i in self.items)
        if isinstance(first := self.items[0], str):
            return sum(name.count(first[0]) * min(len(name), length) for name in names)
        return sum(len(name) * min(len(name), length) for name in names)

    @property
    def source(self) -> str:
        """The expression for `re`."""
        kinds = ("." if i is None else re.escape(i) if isinstance(i, str) else i.pattern for i in self.items)
        return "".join(kinds) + (r"\Z" if self.has_end else "")


class _Branch(NamedTuple):
    """The names from one position up to another, which all start with a text."""

    first: int
    end: int
    text: str


_Key = tuple[str, How]
_LITERAL_KINDS = (How.NAME, How.START, How.END)
_NO_HITS = Hits()


class _Sorted:
    """Sorted texts, in which those with the same prefix are together."""

    def __init__(self, texts: list[str], count: Callable[[int], None]) -> None:
        """
        Args:
            count: limits the number of places that are visited.
        """
        self.all = texts
        self.count = count
        self._heads: dict[tuple[_Item, ...], list[_Branch]] = {}

    def range_of(self, prefix: str, first: int = 0, end: int | None = None) -> tuple[int, int]:
        """Return the positions of the names that start with a prefix, within a range."""
        end = len(self.all) if end is None else end
        first = bisect_left(self.all, prefix, first, end)
        return first, bisect_left(self.all, after, first, end) if (after := _after(prefix)) else end

    def narrow(self, items: tuple[_Item, ...]) -> list[_Branch]:
        """Return the names that start with a sequence of items."""
        branches = [_Branch(0, len(self.all), "")] if self.all else []
        if len(items) <= _HEAD:
            return self._follow(branches, items)
        # Most entries of a file have the same start: `model.layers.`.
        if (start := self._heads.get(items[:_HEAD])) is None:
            start = self._follow(branches, items[:_HEAD])
            if len(self._heads) < _MAX_HEADS:
                self._heads[items[:_HEAD]] = start
        return self._follow(start, items[_HEAD:])

    def _follow(self, branches: list[_Branch], items: Iterable[_Item]) -> list[_Branch]:
        for item in items:
            if not branches:
                break
            if isinstance(item, str):
                longer = [(first, end, text + item) for first, end, text in branches]
                branches = [_Branch(*self.range_of(text, first, end), text) for first, end, text in longer]
            else:
                branches = [new for branch in branches for new in self._split(branch, item)]
            branches = [branch for branch in branches if branch.first < branch.end]
            if len(branches) > 1:
                self.count(len(branches))
        return branches

    def _split(self, branch: _Branch, digits: re.Pattern[str] | None) -> Iterator[_Branch]:
        """Yield the names of a branch by their next character or run of digits."""
        position, at, skipped = len(branch.text), branch.first, 0
        at = bisect_right(self.all, branch.text, at, branch.end)
        while at < branch.end:
            name = self.all[at]
            if digits is None:
                text = name[: position + 1]
                stop = self.range_of(text, at, branch.end)[1]
                yield _Branch(at, stop, text)
            elif (run := digits.match(name, position)) is None:
                stop = self.range_of(name[: position + 1], at, branch.end)[1]
                skipped += 1
            else:
                # Names with a longer run start with this run too, so the character after the run counts.
                is_end = run.end() == len(name)
                stop = at + 1 if is_end else self.range_of(name[: run.end() + 1], at, branch.end)[1]
                yield _Branch(at, stop, name[: run.end()])
            at = stop
        if skipped > 1:
            self.count(skipped)


class Names:
    """The names of parameters, sorted, so that equal prefixes are together."""

    def __init__(self, names: Iterable[str], expressions: Expressions | None = None) -> None:
        """
        Args:
            expressions: the process for expressions. Several objects can share it and its time limit.
        """
        self.all = sorted(set(names))
        self._sorted = _Sorted(self.all, self._visit)
        self.expressions = expressions or Expressions()
        self._found: dict[_Key, Hits] = {}
        self._problems: dict[_Key, str] = {}
        self._last: tuple[Sequence[Entry], list[Hits]] | None = None
        self._matches_left = MAX_MATCHES
        self._visits_left = MAX_VISITS
        self._steps_left = MAX_STEPS
        # `$` also matches before a final newline, and `.` does not match a newline.
        self._has_newlines = any("\n" in name for name in self.all)

    @staticmethod
    def of(names: "Iterable[str] | Names") -> "Names":
        return names if isinstance(names, Names) else Names(names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def starting_with(self, prefix: str) -> tuple[str, ...]:
        return starting_with(self.all, prefix)

    def matched(self, entries: Sequence[Entry]) -> set[str]:
        """Return the names that any of the entries matches.

        Raises:
            As `search`.
        """
        changes = [0] * (len(self.all) + 1)
        for hits in self.search(entries):
            for first, end in hits.spans:
                changes[first] += 1
                changes[end] -= 1
        return {name for name, count in zip(self.all, accumulate(changes), strict=False) if count}

    def search(self, entries: Sequence[Entry]) -> Sequence[Hits]:
        """Find the names that each of the entries matches.

        Raises:
            PatternError: entries are not regular expressions or take too long.
            ResultError: too_large, too many entries of a kind, or too many matches; no_process.
        """
        # A caller first wants the names that a file trains, and then the findings about the same entries.
        if self._last is not None and self._last[0] == entries:
            return self._last[1]
        floating: dict[_Key, list[_Sequence]] = {}
        hard: dict[_Key, str] = {}
        texts: dict[_Key, str] = {}
        later: list[int] = []
        found: list[Hits] = []
        for entry in entries:
            hits = self._found_at_once(entry)
            if hits is None and (hits := self._found.get(key := (entry.pattern, entry.how))) is None:
                is_hard = self._has_newlines or key in self._problems
                sequences = None if is_hard else _read(entry.pattern, entry.how)
                if sequences is None:
                    hard.setdefault(key, entry.text)
                elif all(sequence.from_start for sequence in sequences):
                    hits = self._first_of(sequences)
                    if hits.spans:
                        self._found[key] = hits
                else:
                    floating[key] = sequences
                    texts.setdefault(key, entry.text)
            if hits is None:
                later.append(len(found))
            found.append(hits or _NO_HITS)
        check_count(len(hard), MAX_EXPRESSIONS, "regular expressions")
        check_count(sum(map(len, floating.values())), MAX_FLOATING, "alternatives and entries without a fixed start")
        self._find_hard(hard)
        slow = self._find_floating(floating)
        check_count(len(hard) + len(slow), MAX_EXPRESSIONS, "regular expressions")
        self._find_hard({key: texts[key] for key in slow})
        for at in later:
            found[at] = self._found[entries[at].pattern, entries[at].how]
        self._last = (entries, found)
        return found

    def names_of(self, hits: Hits) -> list[str]:
        """Return the names of hits.

        Raises:
            ResultError: too_large, too many matches, including earlier ones.
        """
        self._count(sum(end - first for first, end in hits.spans))
        return [name for first, end in hits.spans for name in self.all[first:end]]

    def _found_at_once(self, entry: Entry) -> Hits | None:
        """Return the hits of a literal text with a fixed start or end, or None."""
        text, how = entry.pattern, entry.how
        is_whole_name = how is How.NAME
        if how is How.END:
            return self._ending_with(text)
        if how not in _LITERAL_KINDS:
            plain = None if self._has_newlines else _PLAIN.fullmatch(text)
            if plain is None or (how is How.SEARCH and not plain[1]):
                return None
            text = _unescaped(plain[2])
            is_whole_name = bool(plain[3]) or how is How.WHOLE
        at = bisect_left(self.all, text)
        if at == len(self.all) or not self.all[at].startswith(text):
            return _NO_HITS
        if is_whole_name:
            return Hits(((at, at + 1),)) if self.all[at] == text else _NO_HITS
        return self._of_branches([_Branch(*self._sorted.range_of(text, at), text)])

    def _of_branches(self, branches: list[_Branch]) -> Hits:
        partial, count = [], 0
        for branch in branches:
            for first, stop in self._partial(branch):
                count += max(stop - first, 0)
                partial += self.all[first : min(stop, first + _MAX_SHOWN)]
        spans = tuple((first, stop) for first, stop, _ in branches if first < stop)
        return Hits(spans, tuple(partial[:_MAX_SHOWN]), count) if spans else _NO_HITS

    def _partial(self, branch: _Branch) -> Iterator[tuple[int, int]]:
        """Yield the positions of names in which the match ends within a component."""
        first, end, text = branch
        if first < end and text and not text.endswith("."):
            if self.all[first] == text:
                first += 1
            dot, after = self._sorted.range_of(f"{text}.", first, end)
            yield first, dot
            yield after, end

    def _ending_with(self, ending: str) -> Hits:
        """Find the name `ending`, and the names that end in `.` and it."""
        end = f".{ending}"[::-1]
        first = bisect_left(self._reversed, end)
        last = bisect_left(self._reversed, after, first) if (after := _after(end)) else len(self._reversed)
        self._count(last - first)
        whole = bisect_left(self.all, ending)
        own = [whole] if self.all[whole : whole + 1] == [ending] else []
        found = sorted([*own, *(bisect_left(self.all, name[::-1]) for name in self._reversed[first:last])])
        return Hits(tuple(runs(found))) if found else _NO_HITS

    @cached_property
    def _reversed(self) -> list[str]:
        return sorted(name[::-1] for name in self.all)

    def _first_of(self, sequences: Sequence[_Sequence]) -> Hits:
        """Find the names that start with one of several sequences; the first counts."""
        if len(sequences) == 1 and not sequences[0].has_end:
            return self._of_branches(self._sorted.narrow(sequences[0].items))
        found: dict[int, tuple[int, int]] = {}
        for sequence in sequences:
            for at, end in self._starting_with(sequence):
                found.setdefault(at, (0, end))
        return self._hits_of(found)

    def _starting_with(self, sequence: _Sequence) -> Iterator[tuple[int, int]]:
        """Yield the names that start with a sequence: position, and end of the match."""
        for first, stop, text in self._sorted.narrow(sequence.items):
            # A name that equals the text comes first among the names that start with it.
            stop = stop if not sequence.has_end else first + (self.all[first] == text)
            self._count(stop - first)
            yield from ((at, len(text)) for at in range(first, stop))

    def _hits_of(self, found: Mapping[int, tuple[int, int]]) -> Hits:
        """Return the hits of matches: (start, end) by the position of a name."""
        if not found:
            return _NO_HITS
        in_order = sorted(found)
        # An empty match is not partial.
        partial = [
            self.all[at] for at in in_order if found[at][1] and not is_whole(self.all[at], found[at][0], found[at][1])
        ]
        return Hits(tuple(runs(in_order)), tuple(partial[:_MAX_SHOWN]), len(partial))

    def _find_floating(self, wanted: Mapping[_Key, Sequence[_Sequence]]) -> list[_Key]:
        """Find the first occurrence of sequences in each name, and keep the hits.

        Returns:
            The keys that would take too long, which need a process.
        """
        slow: list[_Key] = []
        if not wanted:
            return slow
        floating = [one for sequences in wanted.values() for one in sequences if not one.from_start]
        if len(floating) * len(self.all) <= _FEW_PAIRS:
            holders: Mapping[tuple[_Item, ...], Sequence[int]] = {}
        else:
            holders = self._holders({one.needle for one in floating})
        for key, sequences in wanted.items():
            found: dict[int, tuple[int, int, int]] = {}
            held = [holders.get(one.needle, range(len(self.all))) for one in sequences]
            if not all(one.from_start or self._is_quick(one, held[i]) for i, one in enumerate(sequences)):
                slow.append(key)
                continue
            for order, sequence in enumerate(sequences):
                if sequence.from_start:
                    places: Iterator[tuple[int, int, int]] = (
                        (at, 0, end) for at, end in self._starting_with(sequence)
                    )
                else:
                    places = self._places(sequence, held[order])
                for at, start, end in places:
                    this = (start, order, end)
                    found[at] = min(found.get(at, this), this)
            self._found[key] = self._hits_of({at: (start, end) for at, (start, _, end) in found.items()})
        return slow

    def _is_quick(self, sequence: _Sequence, holders: Collection[int]) -> bool:
        """Whether a sequence can be found in names within the limit of steps."""
        self._count(len(holders))
        # The names are read even if the sequence is too slow.
        self._steps_left -= sum(len(self.all[at]) for at in holders)
        if self._steps_left < 0:
            return False
        steps = sequence.steps((self.all[at] for at in holders), self._longest_run)
        if is_quick := steps <= self._steps_left:
            self._steps_left -= steps
        return is_quick

    @cached_property
    def _longest_run(self) -> int:
        return max((len(run) for name in self.all for run in _RUNS[r"\d+"].findall(name)), default=0)

    def _places(self, sequence: _Sequence, holders: Collection[int]) -> Iterator[tuple[int, int, int]]:
        """Yield the first occurrence of a sequence in names: position, start and end."""
        if (literal := sequence.literal) is not None:
            found = ((at, self.all[at].find(literal)) for at in holders)
            yield from ((at, start, start + len(literal)) for at, start in found if start >= 0)
        else:
            look = re.compile(sequence.source).search
            yield from ((at, *match.span()) for at in holders if (match := look(self.all[at])) is not None)

    def _holders(self, needles: Iterable[tuple[_Item, ...]]) -> dict[tuple[_Item, ...], list[int]]:
        """Return the positions of the names that contain each `needle`."""
        found: dict[tuple[_Item, ...], list[int]] = {needle: [] for needle in needles if needle}
        for first, endings, owners in self._endings():
            index = _Sorted(endings, self._visit)
            for needle, places in found.items():
                if branches := index.narrow(needle):
                    self._count(sum(end - start for start, end, _ in branches))
                    places += sorted({owners[i] + first for start, end, _ in branches for i in range(start, end)})
        return found

    def _endings(self) -> Iterator[tuple[int, list[str], list[int]]]:
        """Yield sorted endings and their names, for some names at a time.

        Each item has the position of the first name, the endings, and the name of each ending as its distance from
        that position.
        """
        first = 0
        while first < len(self.all):
            endings: list[str] = []
            owners: list[int] = []
            last = first
            while last < len(self.all) and len(endings) < _CHUNK:
                name = self.all[last]
                endings += (name[i : i + _MAX_ENDING] for i in range(len(name)))
                owners += [last - first] * len(name)
                last += 1
            order = sorted(range(len(endings)), key=endings.__getitem__)
            yield first, [endings[i] for i in order], [owners[i] for i in order]
            first = last

    def _find_hard(self, wanted: Mapping[_Key, str]) -> None:
        """Match expressions with `re` in another process, and keep the hits.

        Raises:
            PatternError, ResultError: as `search`.
        """
        new = [key for key in wanted if key not in self._problems]
        answers = self.expressions.match([(pattern, how.value) for pattern, how in new], self.all) if new else []
        for key, answer in zip(new, answers, strict=True):
            if isinstance(answer, str):
                self._problems[key] = answer
            else:
                spans = tuple((first, end) for first, end in answer["spans"])
                self._count(len(spans))
                self._found[key] = Hits(spans, tuple(self.all[at] for at in answer["partial"]), answer["count"])
        if problems := [(text, self._problems[key]) for key, text in wanted.items() if key in self._problems]:
            raise PatternError(problems)

    def _visit(self, places: int) -> None:
        self._visits_left -= places
        if self._visits_left < 0:
            raise ResultError(
                f"the entries need more than {MAX_VISITS:,} visits of groups of names, which is the limit",
                reason="too_large",
            )

    def _count(self, matches: int) -> None:
        self._matches_left -= max(matches, 0)
        if self._matches_left < 0:
            raise ResultError(
                f"the entries match parameters more than {MAX_MATCHES:,} times, the limit", reason="too_large"
            )


def starting_with(names: Sequence[str], prefix: str) -> tuple[str, ...]:
    """Return the sorted names that start with a prefix."""
    first = bisect_left(names, prefix)
    last = bisect_left(names, after, first) if (after := _after(prefix)) else len(names)
    return tuple(names[first:last])


def alternatives(pattern: str) -> list[str]:
    """Split `a|b`, and `^(?:a|b)$` with the text around the alternatives.

    Without `|`, return one part.

    Raises:
        ResultError: too_large, more than `MAX_ENTRIES`.
    """
    check_count(pattern.count("|"))
    if (plain := _GROUP.fullmatch(pattern)) is not None:
        parts = _split(plain[2])
        return [f"{plain[1]}(?:{part}){plain[3] or ''}" for part in parts] if len(parts) > 1 else [pattern]
    if len(parts := _split(pattern)) > 1:
        return parts
    before, inner, after = "", pattern, ""
    if (whole := re.fullmatch(r"(\^?)\(\?:(.*)\)(\$|\\Z)?", pattern, re.DOTALL)) and is_one_group(pattern):
        before, inner, after = f"{whole[1]}(?:", whole[2], f"){whole[3] or ''}"
    cuts = [position for position, character, depth in _structure(inner) if character == "|" and depth == 0]
    parts = [inner[i + 1 : j] for i, j in pairwise([-1, *cuts, len(inner)])]
    return [f"{before}{part}{after}" for part in parts] if cuts else [pattern]


def is_one_group(pattern: str) -> bool:
    """Whether the last parenthesis of a pattern closes the group with which it begins."""
    if (plain := _GROUP.fullmatch(pattern)) is not None and not plain[1] and not plain[3]:
        return True
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


def check_count(count: int, limit: int = MAX_ENTRIES, what: str = "entries") -> None:
    """Raise ResultError, too_large, for more entries of a kind than the limit."""
    if count > limit:
        raise ResultError(f"the file has more than {limit:,} {what}, the limit", reason="too_large")


def _read(pattern: str, how: How) -> list[_Sequence] | None:
    """Read an expression as alternative sequences, or return None.

    The first alternative that matches counts.
    """
    if (one := _ONE.fullmatch(pattern)) is not None:
        texts = [(one[1], one[2], one[3])]
    elif (group := _GROUP.fullmatch(pattern)) is not None:
        texts = [(group[1], part, group[3]) for part in _split(group[2])]
    else:
        found = [_ONE.fullmatch(part) for part in _split(pattern)]
        if not found or None in found:
            return None
        texts = [(part[1], part[2], part[3]) for part in found if part is not None]
    sequences = []
    for start, items, end in texts:
        read = _items_of(items)
        from_start = bool(start) or how is not How.SEARCH
        if read is None or (not read and end and not from_start):
            return None
        # The empty text is found at the start.
        sequences.append(_Sequence(from_start or not read, read, bool(end) or how is How.WHOLE))
    return sequences


def _items_of(text: str) -> tuple[_Item, ...] | None:
    items: list[_Item] = []
    if "\\" not in text and "[" not in text:
        # Most names have no escapes. This way takes a third of the time.
        for literal in text.split("."):
            items += (literal, None) if literal else (None,)
        return tuple(items[:-1])
    for literal, dot, digits in _ITEM.findall(text):
        items.append(_unescaped(literal) if literal else None if dot else _RUNS[digits])
    for item, following in pairwise(items):
        # A match could then end the run of digits early.
        if isinstance(item, re.Pattern) and (not isinstance(following, str) or following[0].isdecimal()):
            return None
    return tuple(items)


def _unescaped(literal: str) -> str:
    if "\\" not in literal:
        return literal
    # A backslash that is escaped itself is rare.
    return _ESCAPE.sub(r"\1", literal) if r"\\" in literal else literal.replace("\\", "")


def _split(pattern: str) -> list[str]:
    """Split a plain expression at `|`; return no parts for any other expression."""
    parts, position = [], 0
    while True:
        part = _PART.match(pattern, position)
        assert part is not None
        parts.append(part[0])
        position = part.end() + 1
        if part.end() == len(pattern):
            return parts
        if pattern[part.end()] != "|":
            return []


def _after(prefix: str) -> str:
    """Return the first text after all those with a prefix; "" if there is none."""
    prefix = prefix.rstrip(_LAST)
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
