"""Match regular expressions against names, as a program that can be ended.

`expressions.py` starts it. It imports only the standard library, so it starts in 20 ms. It reads one JSON object from
stdin: `names`, `requests` (pairs of an expression and how it matches), `max_nbytes` and `max_seconds`. When it is
ready, it writes a line. Then it writes a line of JSON for each request, in order: `error`, or `spans`, `partial` and
`count` as in `patterns.Hits`, with positions of names.
"""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

READY = "ready"
_MAX_SHOWN = 3


def is_whole(name: str, start: int, end: int) -> bool:
    """Whether a match has whole components: `layers.1`, but not in `layers.10`."""
    begins = start == 0 or "." in (name[start - 1], name[start : start + 1])
    return begins and (end == len(name) or "." in (name[end], name[end - 1 : end]))


def runs(positions: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield the runs of ascending positions, each as its first position and its end."""
    first = last = -1
    for position in positions:
        if position != last:
            if first < last:
                yield first, last
            first = position
        last = position + 1
    if first < last:
        yield first, last


def _answer(pattern: str, how: str, names: list[str]) -> dict[str, Any]:
    try:
        compiled = re.compile(pattern)
        look: dict[str, Callable[[str], re.Match[str] | None]] = {
            "match": compiled.match,
            "search": compiled.search,
            "whole": compiled.fullmatch,
        }
        found = [(i, match) for i, name in enumerate(names) if (match := look[how](name)) is not None]
    except (re.error, OverflowError) as error:
        return {"error": getattr(error, "msg", str(error))}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except MemoryError:
        return {"error": "it needs too much memory"}
    # A lookahead can match no character. Such a match is not partial.
    partial = [i for i, match in found if match.end() and not is_whole(match.string, match.start(), match.end())]
    return {
        "spans": list(runs(i for i, _ in found)),
        "partial": partial[:_MAX_SHOWN],
        "count": len(partial),
    }


def _limit(max_nbytes: int, max_seconds: int) -> None:
    """Limit memory and processor time, if the system can."""
    try:
        import resource
    except ImportError:
        return
    wanted = (("RLIMIT_AS", max_nbytes), ("RLIMIT_DATA", max_nbytes), ("RLIMIT_CPU", max_seconds), ("RLIMIT_CORE", 0))
    for name, value in wanted:
        # macOS cannot limit memory, and a hard limit that is lower cannot be raised.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value))


def main() -> None:
    given = json.loads(sys.stdin.buffer.read())
    _limit(given["max_nbytes"], given["max_seconds"])
    sys.stdout.write(f"{READY}\n")
    sys.stdout.flush()
    for pattern, how in given["requests"]:
        sys.stdout.write(json.dumps(_answer(pattern, how, given["names"])) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
