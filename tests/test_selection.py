import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrum_stream.errors import ResultError, UsageError
from spectrum_stream.results import Scored
from spectrum_stream.selection import rank, select

from .conftest import GOLDEN

LINES = [Scored(f"layers.{i}.up", "up", snr) for i, snr in enumerate([0.5, 2.0, 1.0, 2.0, 0.1])] + [
    Scored("head", "head", 9.0)
]


@pytest.mark.parametrize(
    ("percent", "layers"),
    [(19, []), (20, [1]), (40, [1, 3]), (59.9, [1, 3]), (60, [1, 3, 2]), (100, [1, 3, 2, 0, 4])],
)
def test_the_share_of_each_group_is_rounded_down_and_ties_keep_model_order(percent: float, layers: list[int]) -> None:
    assert select(LINES, percent).chosen["up"] == tuple(f"layers.{i}.up" for i in layers)


def test_a_cut_between_equal_scores_is_known() -> None:
    assert select(LINES, 20).tied == ("up",)
    assert select(LINES, 40).tied == select(LINES, 100).tied == select(LINES, 19).tied == ()


def test_a_group_of_one_is_chosen_only_whole() -> None:
    assert select(LINES, 99).chosen["head"] == () and select(LINES, 100).chosen["head"] == ("head",)


def test_groups_keep_the_order_of_the_file() -> None:
    assert list(select(LINES[::-1], 50).chosen) == ["head", "up"]


def test_only_the_groups_asked_for_are_chosen_from() -> None:
    assert list(select(LINES, 50, modules=["up"]).chosen) == ["up"]
    with pytest.raises(UsageError):
        select(LINES, 50, modules=["down"])


def test_infinity_ranks_first() -> None:
    assert rank([*LINES, Scored("layers.9.up", "up", math.inf)])["up"][0].module == "layers.9.up"


def test_a_percentage_out_of_range() -> None:
    with pytest.raises(UsageError) as error:
        select(LINES, 101)
    assert error.value.reason == "bad_percent"


def test_a_result_file_is_read() -> None:
    assert len(select(GOLDEN / "snr_results_smollm2.json", 50).modules) == 9 * 15
    with pytest.raises(ResultError):
        select(Path("no/such.json"), 50)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 10)), min_size=1, max_size=40),
    st.floats(0.01, 100),
)
def test_what_is_chosen_is_never_beaten_by_what_is_not(lines: list[tuple[str, float]], percent: float) -> None:
    scored = [Scored(f"{i}.{group}", group, snr) for i, (group, snr) in enumerate(lines)]
    selection = select(scored, percent)
    snr = {line.module: line.snr for line in scored}
    for name, group in selection.ranked.items():
        chosen = selection.chosen[name]
        assert len(chosen) == int(len(group) * percent / 100)
        rest = [line.snr for line in group if line.module not in chosen]
        assert not chosen or not rest or min(snr[m] for m in chosen) >= max(rest)
