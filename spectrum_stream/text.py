"""The version of the program, and untrusted names, counts, sizes and durations as text."""

from collections.abc import Sequence

# Stated here only; pyproject.toml reads it.
VERSION = "0.1.0"


def printable(text: str) -> str:
    """Escape the characters of an untrusted string that could control a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def si_bytes(nbytes: float) -> str:
    """Write bytes in SI units with three digits: `269 MB`."""
    return si_number(nbytes, "B")


def si_number(number: float, unit: str = "") -> str:
    """Write a number with an SI prefix and three digits: `2.5 G`, `1.2 Tflop`."""
    prefixes = iter(("", "k", "M", "G", "T", "P"))
    prefix = next(prefixes)
    while number >= 999.5 and (larger := next(prefixes, None)) is not None:
        number, prefix = number / 1000, larger
    return f"{number:.3g} {prefix}{unit}".rstrip()


def counted(number: int, one: str, many: str) -> str:
    """Write a number with its noun: `1 shard`, `2 shards`."""
    return f"{number} {one if number == 1 else many}"


def listed(names: Sequence[str], limit: int = 3) -> str:
    """List names up to a limit: `a, b, c and 2 more`."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def duration(seconds: float) -> str:
    """Write a duration: `8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
