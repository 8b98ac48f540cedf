import pytest

from spectrum_stream.text import listed


@pytest.mark.parametrize(
    ("count", "expected"), [(0, ""), (1, "a"), (3, "a, b, c"), (4, "a, b, c and 1 more"), (6, "a, b, c and 3 more")]
)
def test_listed_cuts_a_list_and_counts_the_rest(count: int, expected: str) -> None:
    assert listed(list("abcdef")[:count], limit=3) == expected
