"""The progress of a scan: the number of lines if stderr is not a terminal."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from spectrum_stream.cli.output import Output
from spectrum_stream.cli.progress import ProgressView
from spectrum_stream.pipeline import MatrixScored, ScanStarted
from spectrum_stream.streaming.bounded import Traffic


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines_of(seconds: float, matrices: int = 100) -> list[str]:
    """Return the progress lines of a scan that takes the same time for every matrix."""
    clock, output = Clock(), Output()
    output.stderr = Console(file=io.StringIO(), width=200)
    view = ProgressView(output, clock)
    plan: Any = SimpleNamespace(matrices=range(matrices))
    record: Any = None
    view.on_event(ScanStarted(plan=plan, done=0, dropped=0, foreign=None, fetch_nbytes=0, traffic=Traffic()))
    for done in range(1, matrices + 1):
        clock.now += seconds / matrices
        view.on_event(
            MatrixScored(record=record, done=done, total=matrices, work_done=done, work_total=float(matrices))
        )
    stream = output.stderr.file
    assert isinstance(stream, io.StringIO)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("seconds", [0.0, 1.0, 1.9])
def test_progress_of_a_short_scan_prints_nothing(seconds: float) -> None:
    assert lines_of(seconds) == []


def test_progress_lines_are_at_least_two_seconds_apart() -> None:
    lines = lines_of(10.0)
    assert len(lines) == 5
    assert lines[0].startswith("20/100 matrices, 20%, 8 s left")
    assert lines[-1] == "100/100 matrices, 100%"


def test_progress_lines_are_at_least_five_percent_apart() -> None:
    lines = lines_of(1000.0, matrices=64)
    assert len(lines) == 16
    assert lines[0].startswith("4/64 matrices, 6%")
