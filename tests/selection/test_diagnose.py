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


def make_record(module: str, s: np.ndarray, parameter: str | None = None) -> Record:
    # Its shape decides with the spectrum whether a score is degenerate.
    return replace(record(module, s=s, parameter=parameter), m=20, score=score(s, len(s), 20))


def diagnostics_of(records: list[Record], percent: float) -> tuple[Diagnostics, Selection]:
    result = Result.from_records(records)
    selection = select(result, percent)
    return diagnose(result, selection)["up"], selection


def test_diagnose_counts_degenerate_scores_and_the_chosen_ones() -> None:
    records = [make_record(f"layers.{i}.up", ALL_SIGNAL if i < 3 else ORDINARY * (1 + i)) for i in range(6)]
    found, selection = diagnostics_of(records, 34)
    assert (found.degenerate, found.chosen_degenerate, found.inexact) == (3, 2, 0)
    warnings = selection_warnings(selection, {"up": found})
    assert any("degenerate" in warning and "up (2 of 2 chosen)" in warning for warning in warnings)


def test_diagnose_counts_a_tie_only_at_the_cut() -> None:
    records = [make_record(f"layers.{i}.up", ORDINARY * (2 if i == 0 else 1)) for i in range(5)]
    assert [diagnostics_of(records, percent)[0].tied for percent in (10, 40, 80, 100)] == [0, 4, 0, 0]


def test_diagnose_does_not_count_norms_as_degenerate() -> None:
    assert diagnostics_of([make_record(f"layers.{i}.up", np.array([2.0])) for i in range(4)], 50)[0].degenerate == 0


@pytest.mark.parametrize(("broken", "expected"), [(1, 0), (2, 1), (3, 1)])
def test_diagnose_counts_fused_experts_as_degenerate_with_half_of_them(broken: int, expected: int) -> None:
    fused = "layers.0.experts.up"
    records = [make_record(f"{fused}.{e}", ALL_SIGNAL if e < broken else ORDINARY, parameter=fused) for e in range(4)]
    assert diagnostics_of(records, 100)[0].degenerate == expected


def test_diagnose_counts_an_inexact_score() -> None:
    one = make_record("layers.0.up", ORDINARY)
    assert one.score is not None
    records = [replace(one, score=replace(one.score, error=1e-3)), make_record("layers.1.up", ORDINARY)]
    assert diagnostics_of(records, 50)[0].inexact == 1


def test_diagnose_without_a_record_has_only_ties() -> None:
    modules = [Module(f"layers.{i}.up", "up", 1.0) for i in range(4)]
    found = diagnose(modules, select(modules, 50))["up"]
    assert found.to_dict() == {"degenerate": None, "tied": 4, "inexact": None}


def test_diagnose_counts_a_tie_at_the_lower_end() -> None:
    modules = [Module(f"layers.{i}.up", "up", snr) for i, snr in enumerate((3.0, 2.0, 1.0, 1.0, 1.0))]
    selection = choose(modules, Rule(40, bottom=True))
    assert selection.tied == {"up": 3} and diagnose(modules, selection)["up"].tied == 3
    assert diagnose(modules, choose(modules, Rule(60, bottom=True)))["up"].tied == 0
