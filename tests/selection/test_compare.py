import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from spectrum_stream.errors import UsageError
from spectrum_stream.results.result import Module
from spectrum_stream.selection.compare import compare, kendall, overlap, spearman
from spectrum_stream.selection.select import select


def modules(*scores: float, group: str = "up") -> list[Module]:
    return [Module(f"layers.{i}.{group}", group, snr) for i, snr in enumerate(scores)]


# There are few values, so that ties are common. -inf is the sort key of a module without a value.
values = st.sampled_from([-math.inf, 0.0, 0.5, 1.0, 2.0, 3.0, 1e300])
columns = st.lists(st.tuples(values, values), max_size=40)


@given(columns)
def test_correlations_are_those_of_scipy_with_and_without_ties(rows: list[tuple[float, float]]) -> None:
    x, y = (np.array([row[i] for row in rows]) for i in (0, 1))
    if len(set(x.tolist())) < 2 or len(set(y.tolist())) < 2:
        assert spearman(x, y) is None and kendall(x, y) is None
        return
    # scipy needs finite numbers, and only the order counts.
    ranks = stats.rankdata(x), stats.rankdata(y)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(*ranks).statistic, abs=1e-12)
    assert kendall(x, y) == pytest.approx(stats.kendalltau(*ranks).statistic, abs=1e-12)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40, unique=True))
def test_correlation_of_the_same_order_is_one_and_of_the_reverse_minus_one(numbers: list[float]) -> None:
    x = np.array(numbers)
    ranks = stats.rankdata(x)
    for correlation in (spearman, kendall):
        assert correlation(x, ranks) == pytest.approx(1) and correlation(x, -ranks) == pytest.approx(-1)


def test_kendall_of_a_large_group_is_fast() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(30_000)
    y = x + rng.standard_normal(30_000)
    assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-9)


def test_compare_names_the_modules_that_enter_and_leave() -> None:
    found = compare(modules(4, 3, 2, 1), modules(4, 1, 3, 2), 50).groups["up"]
    assert found.entered == ("layers.2.up",) and found.left == ("layers.1.up",)
    assert (found.chosen_a, found.chosen_b, found.kept) == (2, 2, 1)
    assert overlap([found]) == 0.5


def test_compare_lists_modules_of_one_result_only() -> None:
    a = modules(4, 3, 2) + modules(1, group="head")
    found = compare(a, modules(4, 3) + modules(1, 2, group="tail"), 50)
    assert found.only_a == ("layers.2.up", "layers.0.head") and found.only_b == ("layers.0.tail", "layers.1.tail")
    assert found.groups["up"].count == 2 and found.groups["tail"].count == 0
    assert found.groups["tail"].entered == ("layers.1.tail",)


def test_compare_leaves_groups_of_equal_scores_out_of_the_total() -> None:
    norms = modules(1, 1, 1, 1, group="norm")
    found = compare(modules(4, 3, 2, 1) + norms, modules(1, 2, 3, 4) + norms, 50)
    assert found.groups["norm"].spearman is None and found.groups["norm"].kept == 2
    assert found.overlap == 0
    assert compare(norms, norms, 50).overlap is None


def test_compare_rejects_a_percentage_out_of_range() -> None:
    with pytest.raises(UsageError) as error:
        compare(modules(1), modules(1), 0)
    assert error.value.reason == "bad_percent"


@given(columns.filter(bool), st.floats(1, 100))
def test_compare_entered_and_left_turn_one_selection_into_the_other(
    rows: list[tuple[float, float]], percent: float
) -> None:
    a, b = modules(*(row[0] for row in rows)), modules(*(row[1] for row in rows))
    found = compare(a, b, percent)
    first, second = set(select(a, percent).chosen_names), set(select(b, percent).chosen_names)
    entered = {name for group in found.groups.values() for name in group.entered}
    left = {name for group in found.groups.values() for name in group.left}
    assert (first - left) | entered == second and left <= first and not entered & first
    share = overlap(found.groups.values())
    assert share is None if not first | second else share == len(first & second) / max(len(first), len(second))


def test_compare_counts_a_module_in_another_group_as_kept() -> None:
    a = [Module("layers.0.experts.1.up", "experts.1.up", 2.0), Module("layers.1.experts.1.up", "experts.1.up", 1.0)]
    b = [module._replace(group="experts.up") for module in a]
    found = compare(a, b, 50)
    assert not [g for g in found.groups.values() if g.entered or g.left] and found.overlap == 1.0


def test_overlap_counts_groups_of_one_result() -> None:
    a = [Module(f"layers.{i}.up", "up", float(i)) for i in range(4)]
    found = compare(a, [*a, *(Module(f"layers.{i}.down", "down", float(i)) for i in range(4))], 50)
    assert found.overlap == 0.5


def test_compare_rejects_results_of_two_models() -> None:
    with pytest.raises(UsageError) as error:
        compare(modules(1), [Module("other", "other", 1.0)], 50)
    assert error.value.reason == "nothing_in_common"
