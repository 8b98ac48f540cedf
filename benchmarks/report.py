"""The numbers of a run, as tables for a terminal or a file for `results/`.

A table has one row a workload.
"""

from collections.abc import Iterator, Mapping
from datetime import date

from rich import box
from rich.console import Group
from rich.table import Table

from .results import RunResult, Spread, WorkloadResult

_NONE = "–"
_DISTURBED_FROM = 0.05


def tables(run: RunResult) -> Group:
    shown = (_speed(run), _exactness(run), _agreement(run), _memory(run), _shapes(run))
    return Group(*(table for table in shown if table.row_count), *_notes(run))


def markdown(run: RunResult, command: str, day: date) -> str:
    """Return a file for `results/`: hardware, versions, command and a table."""
    turns, device = run.settings["repetitions"], run.settings["device"]
    columns = ["", "seconds", "times faster than Spectrum", "than numpy", "over its parts", "of the floor"]
    rows = [[*columns, "peak memory (planned), GB", "largest error"], ["---"] * 8]
    cache = "cold" if run.settings["cold"] else "warm"
    rows += [
        [
            *_speed_cells(w),
            f"{_gb(w.peak_anonymous['ours'])} ({_gb(w.planned_nbytes)})",
            f"{w.accuracy.max_error:.1e}" if w.accuracy else _NONE,
        ]
        for w in run.workloads
    ]
    notes = [
        f"{w.name}: other programs took {w.others_cpu_share:.0%} of the processors meanwhile."
        for w in run.workloads
        if w.others_cpu_share > _DISTURBED_FROM
    ]
    return "\n".join(
        [
            *heading(f"Benchmark of {run.settings['suite']}", run.machine, command, day),
            f"Medians (least to most) of {turns} turns on {device}, {cache} page cache:",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            *(["", *notes] if notes else []),
            "",
        ]
    )


def heading(title: str, machine: Mapping[str, str | int], command: str, day: date) -> list[str]:
    """Return the first lines of a file for `results/`."""
    m, memory = machine, _gb(int(machine["memory_nbytes"]))
    packages = ", ".join(f"{name} {m[name]}" for name in ("spectrum_stream", "torch", "numpy"))
    return [
        f"# {title}, {day.day} {day:%B %Y}",
        "",
        f"- Hardware: {m['cpus']} cores, {m['processor']}, {m['matrix_units']}, {memory} GB",
        f"- Versions: Python {m['python']}, {packages}",
        f"- Command: `{command}`",
        "",
    ]


def _speed(run: RunResult) -> Table:
    table = _table(
        "Speed of a scan: median (least to most)",
        ("workload", "seconds", "faster than Spectrum", "faster than numpy", "of its parts", "floor", "GB/s"),
    )
    for w in run.workloads:
        table.add_row(
            *_speed_cells(w),
            f"{w.read_rate / 1e9:.2f}",
        )
    return table


def _speed_cells(w: WorkloadResult) -> list[str]:
    return [
        w.name,
        f"{w.seconds['ours'].median:.3g}",
        _ratio(w.ratios.get("times_spectrum")),
        _ratio(w.ratios.get("times_numpy")),
        _ratio(w.ratios.get("scan_over_parts")),
        _share(w.ratios.get("floor_share")),
    ]


def _exactness(run: RunResult) -> Table:
    table = _table(
        "Scores of float32 weights, compared with their known spectra",
        ("workload", "largest error", "its estimate", "limit", "beyond", "top 50 / 25", "precisions"),
    )
    for w in run.workloads:
        if w.accuracy is not None:
            a = w.accuracy
            table.add_row(
                w.name,
                f"{a.max_error:.1e}",
                f"{a.estimated:.1e}",
                f"{a.limit:.0e}",
                f"[red]{a.unexcused}[/]" if a.unexcused else str(a.unexcused),
                _sets(a.same_sets),
                _counts(a.precisions),
            )
    return table


def _agreement(run: RunResult) -> Table:
    table = _table(
        "Scores of the timed weights, compared with the other contenders'",
        ("workload", "weights", "to Spectrum's", "top 50 / 25", "to numpy's", "precisions"),
    )
    for w in run.workloads:
        spectrum, numpy = w.agreement.get("spectrum"), w.agreement.get("numpy")
        table.add_row(
            w.name,
            w.dtype,
            f"{spectrum.max_difference:.1e}" if spectrum else _NONE,
            _sets(spectrum.same_sets if spectrum else None),
            f"{numpy.max_difference:.1e}" if numpy else _NONE,
            _counts(w.precisions),
        )
    return table


def _memory(run: RunResult) -> Table:
    table = _table(
        "Peak anonymous memory of the whole process, GB",
        ("workload", "matrices", "on disk", "ours", "planned", "Spectrum", "numpy", "ours with mapped files"),
    )
    for w in run.workloads:
        table.add_row(
            w.name,
            str(w.matrices),
            _gb(w.nbytes),
            _gb(w.peak_anonymous["ours"]),
            _gb(w.planned_nbytes),
            _gb(w.peak_anonymous.get("spectrum")),
            _gb(w.peak_anonymous.get("numpy")),
            _gb(w.peak_resident.get("ours")),
        )
    return table


def _shapes(run: RunResult) -> Table:
    table = _table("Computing alone, each shape by itself", ("workload", "shape", "matrices", "s each", "floor"))
    for w in run.workloads:
        for s in w.shapes:
            table.add_row(
                w.name, f"{s.n} x {s.m}", str(s.matrices), f"{s.seconds / s.matrices:.4f}", f"{s.floor_share:.0%}"
            )
    return table


def _notes(run: RunResult) -> Iterator[str]:
    yield "its parts: the larger of reading alone and computing alone"
    rates = [w.sgemm.median for w in run.workloads if w.sgemm]
    if rates:
        yield (
            f"floor: the flops at {min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f} GFLOP/s, this machine's float32 "
            f"matrix product with {run.machine['torch_threads']} threads ({run.machine['matrix_units']})"
        )
    for w in run.workloads:
        numpy, ours = w.seconds.get("numpy"), w.seconds["ours"]
        if numpy is not None and (w.numpy_matrices < w.matrices or numpy.runs < ours.runs):
            yield (
                f"numpy on {w.name}: one matrix of each shape ({w.numpy_matrices} of {w.matrices}) times their "
                f"count, {numpy.runs} of {ours.runs} turns"
            )
        if w.failed:
            yield f"[red]{w.name}: {w.failed} modules have no score"
        if w.others_cpu_share > _DISTURBED_FROM:
            yield (
                f"[red]{w.name}: other programs took {w.others_cpu_share:.0%} of the processors meanwhile; "
                "do not trust its times"
            )


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i == 0)
    return table


def _ratio(spread: Spread | None) -> str:
    return f"{spread.median:.2f} ({spread.min:.2f}–{spread.max:.2f})" if spread else _NONE


def _share(spread: Spread | None) -> str:
    return f"{spread.median:.0%}" if spread else _NONE


def _sets(same: Mapping[str, bool] | None) -> str:
    return " / ".join("same" if equal else "[red]differ[/]" for equal in same.values()) if same else _NONE


def _counts(precisions: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {precision}" for precision, count in precisions.items())


def _gb(nbytes: int | None) -> str:
    return f"{nbytes / 1e9:.2f}" if nbytes is not None else _NONE
