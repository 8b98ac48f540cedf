"""From a result: select."""

from pathlib import Path
from typing import Annotated

import typer

from .. import tables
from ..diagnosing import diagnose
from ..durable import write_atomically
from ..exporters import axolotl
from ..measures import MEASURES, Metric
from ..options import JsonOption, MetricOption, ModulesOption, QuietOption, SeedOption
from ..remeasuring import measured
from ..selection import select
from .common import explain, open_output, patterns_of, recorded_of


def select_command(
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="A result file: snr_results_….json.")],
    top_percent: Annotated[
        float, typer.Option("--top-percent", metavar="P", help="Select the top P percent of every group.")
    ],
    modules: ModulesOption = None,
    metric: MetricOption = Metric.SPECTRUM,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Choose from a result, ours or one published with Spectrum, and write the selection for the trainer."""
    output = open_output(as_json, quiet)
    selection = select(measured(result, metric, seed), top_percent, modules=patterns_of(modules))
    path = Path(f"{result.stem}{_suffix(metric, seed)}_unfrozenparameters_{top_percent:g}percent.yaml")
    write_atomically(path, axolotl.render(selection))
    scored = [line for group in selection.ranked.values() for line in group]
    # What is degenerate and inexact is Spectrum's score.
    records = recorded_of(output, result) if metric is Metric.SPECTRUM else ()
    doubts = diagnose(scored, selection, records)
    output.show(tables.score_table(scored, selection, doubts))
    output.data(
        {
            "schema_version": 1,
            "metric": str(metric),
            "chosen": selection.chosen,
            "doubts": {name: d.to_dict() for name, d in doubts.items()},
            "files": [str(path)],
        }
    )
    output.line()
    if metric is not Metric.SPECTRUM:
        measure = MEASURES[metric]
        first = "largest first" if measure.larger_first else "smallest first, and shown negated"
        output.line(f"ranked by {metric}, {first}: {measure.why}")
    output.line(f"wrote {path}")
    explain(output, selection, doubts)


def _suffix(metric: Metric, seed: int) -> str:
    """What tells the files of other measures from Spectrum's."""
    return {Metric.SPECTRUM: "", Metric.RANDOM: f"_{metric}-{seed}"}.get(metric, f"_{metric}")
