"""Compare two rankings: compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..numerics.metrics import SPECTRUM, metric_of
from ..results.result import Result
from ..selection.compare import Comparison, compare
from ..text import counted
from . import tables
from .options import ComparedPercentOption, JsonOption, MetricOption, QuietOption
from .output import Output, open_output

EXAMPLES = (
    "spectrum-stream compare model_snr_results/snr_results_base.json model_snr_results/snr_results_tuned.json",
    "spectrum-stream compare model_snr_results/snr_results_m.json --metric stable-rank --top-percent 25",
    "spectrum-stream compare model_snr_results/snr_results_m.json --metric random:3",
)


def compare_command(
    a: Annotated[Path, typer.Argument(metavar="A", help="A result file, snr_results_….json")],
    b: Annotated[
        Path | None,
        typer.Argument(
            metavar="B", help="Another result; without it, --metric is compared with Spectrum's score for A"
        ),
    ] = None,
    top_percent: ComparedPercentOption = 50,
    metric: MetricOption = SPECTRUM.name,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    output = open_output(as_json, quiet)
    by = metric_of(metric)
    if b is None and by == SPECTRUM:
        raise UsageError(
            "A alone cannot be compared", reason="nothing_to_compare", hint="give a second result or --metric"
        )
    # Two results are ranked by the same metric, because otherwise the metrics would differ too.
    first = Result.open(a).by(SPECTRUM if b is None else by)
    second = Result.open(b or a).by(by)
    comparison = compare(first, second, top_percent)
    common = sum(group.count for group in comparison.groups.values())
    smaller = min(len(first.modules), len(second.modules))
    if common < smaller / 2:
        output.warn(f"only {common} of {smaller} modules are in both results, so they may be of different models")
    output.show(tables.comparison_table(comparison))
    output.data(_data(comparison, (str(a), first.metric.name), (str(b or a), second.metric.name)))
    output.line()
    _list_changes(output, comparison, a, b or a, (first.metric.name, second.metric.name))
    words = () if by == SPECTRUM else ("--metric", by.name)
    output.next("select", b or a, "--top-percent", f"{top_percent:g}", *words)


def _list_changes(output: Output, comparison: Comparison, a: Path, b: Path, by: tuple[str, str]) -> None:
    if comparison.overlap is not None:
        output.line(
            f"both select {comparison.overlap:.1%} of the modules of the larger selection; "
            "groups with only equal scores do not count"
        )
    decided = [group for group in comparison.groups.values() if group.is_decided]
    if any(group.entered or group.left for group in decided):
        first, second = (str(a), str(b)) if a != b else by
        output.line(f"+ is selected only by {second}, - only by {first}:")
    changes = [
        f"  {sign} {module}"
        for group in decided
        for sign, modules in (("+", group.entered), ("-", group.left))
        for module in modules
    ]
    _list(output, changes)
    for path, modules in ((a, comparison.only_a), (b, comparison.only_b)):
        if modules:
            output.line(f"only in {path}, {counted(len(modules), 'module', 'modules')}:")
        _list(output, [f"  {module}" for module in modules])


def _list(output: Output, lines: Sequence[str]) -> None:
    for line in lines[: tables.MAX_ROWS]:
        output.line(line)
    if (more := len(lines) - tables.MAX_ROWS) > 0:
        output.line(f"  and {more:,} more; --json lists all")


def _data(comparison: Comparison, a: tuple[str, str], b: tuple[str, str]) -> dict[str, object]:
    return {
        "schema_version": 1,
        **{name: {"result": path, "metric": by} for name, (path, by) in (("a", a), ("b", b))},
        "overlap": comparison.overlap,
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
            for name, g in comparison.groups.items()
        },
        "only_a": comparison.only_a,
        "only_b": comparison.only_b,
    }
