"""Seeing a result: report."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from ..report.data import Entry, Shown, read_shown
from ..report.grid import place_of
from ..report.terminal import TerminalMap
from ..results.atomic import write_atomically
from ..results.result import Module
from ..selection.select import Selection, check_percent, select
from ..text import counted
from .common import command_line, open_output
from .options import JsonOption, QuietOption


def report_command(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULT [RESULT]", help="A result file, or two to show side by side.")
    ],
    page: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write a page for the browser (extra: report)."),
    ] = None,
    top_percent: Annotated[
        float, typer.Option("--top-percent", metavar="P", help="Mark the top P percent of every group.")
    ] = 50,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show the scores of a result as a map of layers by groups: here, or as a page that needs nothing else."""
    output = open_output(as_json, quiet)
    check_percent(top_percent)
    if len(results) > 2:
        raise UsageError("one result or two can be shown", reason="too_many_results")
    if page is not None and page.resolve() in [path.resolve() for path in results]:
        raise UsageError(f"{page} is the result itself", reason="conflicting_options")
    everything = [read_shown(path) for path in results]
    selections = [_selection(shown, top_percent) for shown in everything]
    if page is not None:
        # Only now: what a terminal is shown needs none of it.
        from ..report.page import render

        write_atomically(page, render(everything, top_percent=top_percent))
    for shown, selection in zip(everything, selections, strict=True):
        for note in shown.notes:
            output.warn(f"{shown.name}: {note}" if len(everything) > 1 else note)
        if page is None:
            output.line(f"{shown.name}, top {top_percent:g} percent")
            output.show(TerminalMap(shown, selection.chosen_names))
            if flagged := sum(shown.flagged.values()):
                output.line(f"{counted(flagged, 'matrix has', 'matrices have')} no score that means anything")
            output.line()
    output.data(
        {
            "schema_version": 1,
            "top_percent": top_percent,
            "results": [_data(shown, selection) for shown, selection in zip(everything, selections, strict=True)],
            "files": [] if page is None else [str(page)],
        }
    )
    if page is not None:
        output.line(f"wrote {page}")
        output.line(f"next: {command_line('select', str(results[-1]), '--top-percent', f'{top_percent:g}')}")
    else:
        output.line(f"next: {command_line('report', *map(str, results), '-o', 'report.html')}")


def _selection(shown: Shown, top_percent: float) -> Selection:
    lines = [Module(e.module, e.group, e.snr) for e in shown.entries if e.is_ranked and e.snr is not None]
    return select(lines, top_percent)


def _data(shown: Shown, selection: Selection) -> dict[str, Any]:
    ranks = {line.name: i for group in selection.ranked.values() for i, line in enumerate(group, 1)}
    chosen = set(selection.chosen_names)
    return {
        "name": shown.name,
        "facts": dict(shown.facts),
        "notes": list(shown.notes),
        "modules": [_module(entry, ranks, chosen) for entry in shown.entries],
    }


def _module(entry: Entry, ranks: dict[str, int], chosen: set[str]) -> dict[str, Any]:
    return {
        "module": entry.module,
        "group": entry.group,
        "layer": place_of(entry.module, entry.group, entry.bank).layer or None,
        "bank": entry.bank,
        "snr": _finite(entry.snr),
        "rank": ranks.get(entry.module) if entry.bank is None else None,
        "chosen": entry.bank is None and entry.module in chosen,
        "flag": entry.flag or None,
        "n": entry.n,
        "m": entry.m,
        "tau": entry.tau,
        "measures": {name: _finite(value) for name, value in entry.measures.items()},
    }


def _finite(value: float | None) -> float | None:
    # JSON has no infinities; the flag says which score was one.
    return value if value is not None and math.isfinite(value) else None
