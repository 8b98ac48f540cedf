"""Patterns of untrusted configs match as in `re`, in linear time."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum_stream.model.schemes.patterns import NotPlain, matches

_CHARACTERS = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\d", "1"])
_ITEMS = st.builds(str.__add__, _CHARACTERS, st.sampled_from(["", "", "*", "+", "?"]))
_SEQUENCES = st.lists(_ITEMS, max_size=5).map("".join)
_GROUPS = st.builds(lambda a, b, c, d: f"{a}(?:{b}|{c}){d}", _SEQUENCES, _SEQUENCES, _SEQUENCES, _SEQUENCES)
_ANCHORED = st.builds(lambda a, p, b: a + p + b, st.sampled_from(["", "^"]), _GROUPS, st.sampled_from(["", "$"]))


@given(st.one_of(_SEQUENCES, _GROUPS, _ANCHORED), st.text("ab1.", max_size=8))
def test_pattern_matches_as_in_re(pattern: str, name: str) -> None:
    assert matches(pattern, name) == (re.match(pattern, name) is not None)
    assert matches(pattern, name, anywhere=True) == (re.search(pattern, name) is not None)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a|b)*", "a{2}", "(?=a)", "(?i)a", "a**", "a*?", "(", ")", "[", "[]", "\\", r"\1", "(?P<x>a)"],
)
def test_pattern_that_is_not_plain_is_rejected(pattern: str) -> None:
    with pytest.raises(NotPlain):
        matches(pattern, "aaaa")


def test_pattern_with_many_repetitions_takes_linear_time() -> None:
    assert not matches(".*a" * 300 + "b", "a" * 2000)


def test_patterns_of_other_names_are_excluded_quickly() -> None:
    patterns = [rf".*layers\.{i}\.(mlp|self_attn)\..*[qk]_proj" for i in range(200)]
    start = time.process_time()
    assert sum(matches(p, f"model.layers.{i}.self_attn.q_proj") for p in patterns for i in range(400)) == 200
    assert time.process_time() - start < 2
