"""Two results, or one by two metrics: compare."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..numerics.metrics import SPECTRUM, metric_of
from ..results.result import Result
from ..selection.compare import Comparison, compare
from ..text import counted
from . import tables
from .common import command_line, open_output
from .options import JsonOption, MetricOption, QuietOption


def compare_command(
    a: Annotated[Path, typer.Argument(metavar="A", help="A result file: snr_results_….json.")],
    b: Annotated[
        Path | None, typer.Argument(metavar="B", help="Another; without it A, by Spectrum's score, with itself.")
    ] = None,
    top_percent: Annotated[
        float, typer.Option("--top-percent", metavar="P", help="Compare the top P percent of every group.")
    ] = 50,
    metric_name: MetricOption = SPECTRUM.name,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare two rankings: two results by one metric, or one by Spectrum's score and by --metric."""
    output = open_output(as_json, quiet)
    metric = metric_of(metric_name)
    if b is None and metric == SPECTRUM:
        raise UsageError(
            "one result by one metric is nothing to compare",
            reason="nothing_to_compare",
            hint="give a second result or --metric",
        )
    second = b or a
    first = Result.open(a)
    # Two results are ranked by the same metric, or their difference would include that of the metrics.
    first_by = first if b is None else first.by(metric)
    second_by = (first if b is None else Result.open(b)).by(metric)
    result = compare(first_by, second_by, top_percent)
    common, smaller = sum(g.count for g in result.groups.values()), min(len(first_by.modules), len(second_by.modules))
    if common < smaller / 2:
        output.warn(f"only {common} of {smaller} modules are in both results: are they of one model?")
    output.show(tables.comparison_table(result))
    output.data(_data(result, (str(a), first_by.metric.name), (str(second), metric.name)))
    output.line()
    if result.overlap is not None:
        output.line(
            f"both have {result.overlap:.1%} of the larger choice, groups left out whose scores are all equal"
        )
    for group in result.groups.values():
        if group.is_decided:
            for sign, modules in (("+", group.entered), ("-", group.left)):
                for module in modules:
                    output.line(f"  {sign} {module}")
    for path, modules in ((a, result.only_a), (second, result.only_b)):
        if modules:
            output.line(f"only in {path}, {counted(len(modules), 'module', 'modules')}:")
        for module in modules:
            output.line(f"  {module}")
    by = ("--metric", metric.name) if metric != SPECTRUM else ()
    output.line(f"next: {command_line('select', str(second), '--top-percent', f'{top_percent:g}', *by)}")


def _data(result: Comparison, a: tuple[str, str], b: tuple[str, str]) -> dict[str, object]:
    return {
        "schema_version": 1,
        **{name: {"result": path, "metric": by} for name, (path, by) in (("a", a), ("b", b))},
        "overlap": result.overlap,
        "groups": {
            name: {
                "count": g.count,
                "spearman": g.spearman,
                "kendall": g.kendall,
                "chosen_a": g.chosen_a,
                "chosen_b": g.chosen_b,
                "kept": g.kept,
                "entered": g.entered,
                "left": g.left,
            }
            for name, g in result.groups.items()
        },
        "only_a": result.only_a,
        "only_b": result.only_b,
    }
