"""Names, counts, sizes and durations as text."""

import pytest

from spectrum_stream.text import duration, listed, printable, si_bytes


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain/ü 漢", "plain/ü 漢"), ("\x1b[31m", "\\x1b[31m"), ("a\u202eb", "a\\u202eb"), ("a\nb\t", "a\\nb\\t")],
)
def test_printable_keeps_letters_and_escapes_control_characters(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_si_bytes_has_three_digits_and_a_unit() -> None:
    assert [si_bytes(n) for n in (0, 999, 1000, 269_030_016, 999_600, 141.1e9, 9e15, 9e18)] == [
        "0 B",
        "999 B",
        "1 kB",
        "269 MB",
        "1 MB",
        "141 GB",
        "9 PB",
        "9e+03 PB",
    ]


def test_duration_has_at_most_two_units() -> None:
    assert [duration(s) for s in (0.2, 59, 60, 3599, 7500)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "59 min 59 s",
        "2 h 5 min",
    ]


@pytest.mark.parametrize(
    ("count", "expected"), [(0, ""), (1, "a"), (3, "a, b, c"), (4, "a, b, c and 1 more"), (6, "a, b, c and 3 more")]
)
def test_listed_cuts_a_list_and_counts_the_rest(count: int, expected: str) -> None:
    assert listed(list("abcdef")[:count], limit=3) == expected
