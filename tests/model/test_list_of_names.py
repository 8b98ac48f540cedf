"""Any bytes in a list of names give names or one error."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum_stream.errors import FileError
from spectrum_stream.model.parameters import read_names

from ..support.untrusted import check_names

LISTS = st.text('ab.\n\r []",\x85\u2028') | st.lists(st.text()).map(json.dumps)


@given(st.binary() | LISTS.map(str.encode))
def test_list_of_names_of_any_bytes_is_names_or_one_sentence(data: bytes) -> None:
    check_names(data)


@pytest.mark.parametrize(
    "text",
    [
        "[" + "[]," * 2_000_000 + "[]]",
        "[" * 200 + "]" * 200,
        "ab\n" * 2_000_001,
        "a" * 2001,
        "model." * 100_000,
        json.dumps(["a" * 2001]),
    ],
    ids=["values", "levels", "lines", "length", "prefixes", "length in JSON"],
)
def test_list_of_names_above_a_limit_is_rejected(tmp_path: Path, text: str) -> None:
    (tmp_path / "names").write_text(text)
    with pytest.raises(FileError) as error:
        read_names(tmp_path / "names")
    assert error.value.reason == "file_too_large"


def test_list_of_names_can_have_words_of_any_number_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("\ufeffa.weight " + "x " * 1_000_000 + "\n\n b \n")
    assert read_names(tmp_path / "names") == ("a.weight", "b")
    (tmp_path / "names").write_text('\ufeff["a.weight", "b"]')
    assert read_names(tmp_path / "names") == ("a.weight", "b")
