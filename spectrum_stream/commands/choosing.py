"""From a result: select."""

from pathlib import Path
from typing import Annotated

import typer

from .. import tables
from ..durable import write_atomically
from ..exporters import axolotl
from ..options import JsonOption, ModulesOption, QuietOption
from ..selection import select
from .common import explain, open_output, patterns_of


def select_command(
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="A result file: snr_results_….json.")],
    top_percent: Annotated[
        float, typer.Option("--top-percent", metavar="P", help="Select the top P percent of every group.")
    ],
    modules: ModulesOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Choose from a result, ours or one published with Spectrum, and write the selection for the trainer."""
    output = open_output(as_json, quiet)
    selection = select(result, top_percent, modules=patterns_of(modules))
    path = Path(f"{result.stem}_unfrozenparameters_{top_percent:g}percent.yaml")
    write_atomically(path, axolotl.render(selection))
    output.show(tables.score_table([line for group in selection.ranked.values() for line in group], selection))
    output.data({"schema_version": 1, "chosen": selection.chosen, "files": [str(path)]})
    output.line()
    output.line(f"wrote {path}")
    explain(output, selection)
