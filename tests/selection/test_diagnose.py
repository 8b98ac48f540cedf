from dataclasses import replace

import numpy as np
import pytest

from spectrum_stream.cli.tables import selection_warnings
from spectrum_stream.numerics.snr import score
from spectrum_stream.results.record import Record
from spectrum_stream.results.result import Module, Result
from spectrum_stream.selection.diagnose import Diagnostics, diagnose
from spectrum_stream.selection.select import Rule, Selection, choose, select

from ..support.records import record

ORDINARY = np.array([10.0, 4.0, 3.0, 2.0, 1.0])
ALL_SIGNAL = np.array([5.0, 4.9, 4.8, 4.7, 4.6])


def scored_as(module: str, s: np.ndarray, parameter: str | None = None) -> Record:
    # Its shape decides with the spectrum whether a score is degenerate.
    return replace(record(module, s=s, parameter=parameter), m=20, score=score(s, len(s), 20))


def doubts_of(records: list[Record], percent: float) -> tuple[Diagnostics, Selection]:
    result = Result.from_records(records)
    selection = select(result, percent)
    return diagnose(result, selection)["up"], selection


def test_degenerate_scores_and_those_chosen_are_counted_and_said() -> None:
    records = [scored_as(f"layers.{i}.up", ALL_SIGNAL if i < 3 else ORDINARY * (1 + i)) for i in range(6)]
    doubts, selection = doubts_of(records, 34)
    assert (doubts.degenerate, doubts.chosen_degenerate, doubts.inexact) == (3, 2, 0)
    warnings = selection_warnings(selection, {"up": doubts})
    assert any("degenerate" in warning and "up (2 of 2 chosen)" in warning for warning in warnings)


def test_a_tie_is_one_only_where_the_cut_goes_through_it() -> None:
    records = [scored_as(f"layers.{i}.up", ORDINARY * (2 if i == 0 else 1)) for i in range(5)]
    assert [doubts_of(records, percent)[0].tied for percent in (10, 40, 80, 100)] == [0, 4, 0, 0]


def test_a_norm_is_not_called_degenerate() -> None:
    assert doubts_of([scored_as(f"layers.{i}.up", np.array([2.0])) for i in range(4)], 50)[0].degenerate == 0


@pytest.mark.parametrize(("broken", "expected"), [(1, 0), (2, 1), (3, 1)])
def test_a_bank_is_degenerate_with_half_of_its_experts(broken: int, expected: int) -> None:
    bank = "layers.0.experts.up"
    records = [scored_as(f"{bank}.{e}", ALL_SIGNAL if e < broken else ORDINARY, parameter=bank) for e in range(4)]
    assert doubts_of(records, 100)[0].degenerate == expected


def test_an_inexact_score_is_counted() -> None:
    one = scored_as("layers.0.up", ORDINARY)
    assert one.score is not None
    records = [replace(one, score=replace(one.score, error=1e-3)), scored_as("layers.1.up", ORDINARY)]
    assert doubts_of(records, 50)[0].inexact == 1


def test_without_a_record_ties_are_known_and_nothing_else() -> None:
    lines = [Module(f"layers.{i}.up", "up", 1.0) for i in range(4)]
    found = diagnose(lines, select(lines, 50))["up"]
    assert found.to_dict() == {"degenerate": None, "tied": 4, "inexact": None}


def test_a_tie_at_the_lower_end_is_one_too() -> None:
    lines = [Module(f"layers.{i}.up", "up", snr) for i, snr in enumerate((3.0, 2.0, 1.0, 1.0, 1.0))]
    selection = choose(lines, Rule(40, bottom=True))
    assert selection.tied == {"up": 3} and diagnose(lines, selection)["up"].tied == 3
    assert diagnose(lines, choose(lines, Rule(60, bottom=True)))["up"].tied == 0
