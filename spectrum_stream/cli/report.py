"""Show a result as a map: report."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from ..report.data import Shown, ShownEntry, read_shown
from ..report.grid import place_of
from ..report.terminal import TerminalMap
from ..results.result import Module
from ..selection.select import Selection, check_percent, select
from ..text import counted
from .options import OUTPUT, JsonOption, OutlinedPercentOption, QuietOption
from .output import open_output

EXAMPLES = (
    "spectrum-stream report model_snr_results/snr_results_m.json",
    "spectrum-stream report model_snr_results/snr_results_m.json --top-percent 25 -o report.html",
    "spectrum-stream report snr_results_base.json snr_results_tuned.json -o both.html",
)


def report_command(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULT [RESULT]", help="A result file, or two to show side by side")
    ],
    top_percent: OutlinedPercentOption = 50,
    page: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write an HTML page instead, which works offline; - is stdout (extra: report)",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    output = open_output(as_json, quiet)
    check_percent(top_percent)
    if len(results) > 2:
        raise UsageError("report accepts one result or two", reason="too_many_results")
    everything = [read_shown(path) for path in results]
    selections = [_select(shown, top_percent) for shown in everything]
    if page is not None:
        # It is imported only now, since the map in a terminal does not need it.
        from ..report.page import render

        output.file(page, render(everything, top_percent=top_percent), results)
    for shown, selection in zip(everything, selections, strict=True):
        for note in shown.notes:
            output.warn(f"{shown.name}: {note}" if len(everything) > 1 else note)
        if page is None:
            output.line(f"{shown.name}, top {top_percent:g} percent")
            output.show(TerminalMap(shown, selection.chosen_names))
            if flagged := sum(shown.flag_counts.values()):
                output.line(f"{counted(flagged, 'matrix has', 'matrices have')} a degenerate score or none")
            output.line()
    output.data(
        {
            "schema_version": 1,
            "top_percent": top_percent,
            "results": [_data(shown, selection) for shown, selection in zip(everything, selections, strict=True)],
            "files": [] if page is None else [str(page)],
        }
    )
    if page is None:
        output.next("report", *results, "-o", "report.html")
    else:
        output.line(f"wrote {page}")
        output.next("select", results[-1], "--top-percent", f"{top_percent:g}")


def _select(shown: Shown, top_percent: float) -> Selection:
    ranked = [Module(e.module, e.group, e.snr) for e in shown.entries if e.is_ranked and e.snr is not None]
    return select(ranked, top_percent)


def _data(shown: Shown, selection: Selection) -> dict[str, Any]:
    ranks = {module.name: i for group in selection.ranked.values() for i, module in enumerate(group, 1)}
    chosen = set(selection.chosen_names)
    return {
        "name": shown.name,
        "facts": dict(shown.facts),
        "notes": list(shown.notes),
        "modules": [_module(entry, ranks, chosen) for entry in shown.entries],
    }


def _module(entry: ShownEntry, ranks: dict[str, int], chosen: set[str]) -> dict[str, Any]:
    return {
        "module": entry.module,
        "group": entry.group,
        "layer": place_of(entry.module, entry.group, entry.fused).layer or None,
        "fused": entry.fused,
        "snr": _finite(entry.snr),
        "rank": ranks.get(entry.module) if entry.fused is None else None,
        "chosen": entry.fused is None and entry.module in chosen,
        "flag": entry.flag or None,
        "n": entry.n,
        "m": entry.m,
        "tau": _finite(entry.tau),
        "metrics": {name: _finite(value) for name, value in entry.metrics.items()},
    }


def _finite(value: float | None) -> float | None:
    # JSON has no infinities. The flag marks these scores.
    return value if value is not None and math.isfinite(value) else None
