"""Two results, or one by two measures: compare."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..numerics.metrics import Metric
from ..results.remeasuring import measured
from ..selection.compare import Comparison, compare
from ..text import counted
from . import tables
from .common import command_line, open_output, seed_of
from .options import JsonOption, MetricOption, QuietOption, SeedOption


def compare_command(
    a: Annotated[Path, typer.Argument(metavar="A", help="A result file: snr_results_….json.")],
    b: Annotated[
        Path | None, typer.Argument(metavar="B", help="Another; without it A, by Spectrum's score, with itself.")
    ] = None,
    top_percent: Annotated[
        float, typer.Option("--top-percent", metavar="P", help="Compare the top P percent of every group.")
    ] = 50,
    top_percent_b: Annotated[
        float | None, typer.Option("--top-percent-b", metavar="P", help="Of the second, if it is another.")
    ] = None,
    metric: MetricOption = Metric.SPECTRUM,
    seed_option: SeedOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare two rankings: two results by one measure, or one by Spectrum's score and by --metric."""
    output = open_output(as_json, quiet)
    seed = seed_of(seed_option, metric)
    if b is None and metric is Metric.SPECTRUM and top_percent_b is None:
        raise UsageError(
            "one result by one measure is nothing to compare",
            reason="nothing_to_compare",
            hint="give a second result, --metric or --top-percent-b",
        )
    second = b or a
    # Two results are ranked by the same measure, or their difference would be that of the measures too.
    first_by = Metric.SPECTRUM if b is None else metric
    lines = measured(a, first_by, seed), measured(second, metric, seed)
    result = compare(*lines, top_percent, top_percent_b)
    common, smaller = sum(g.count for g in result.groups.values()), min(map(len, lines))
    if common < smaller / 2:
        output.warn(f"only {common} of {smaller} modules are in both results: are they of one model?")
    output.show(tables.comparison_table(result))
    output.data(_data(result, (str(a), str(first_by)), (str(second), str(metric))))
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
    by = ("--metric", str(metric)) if metric is not Metric.SPECTRUM else ()
    of = ("--seed", str(seed)) if metric is Metric.RANDOM else ()
    share = f"{top_percent if top_percent_b is None else top_percent_b:g}"
    output.line(f"next: {command_line('select', str(second), '--top-percent', share, *by, *of)}")


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
