"""Use a result in every way that the commands do, for fuzzers."""

import io
import json
from pathlib import Path

from rich.console import Console

from spectrum_stream.cli import tables
from spectrum_stream.errors import SpectrumStreamError
from spectrum_stream.numerics.metrics import metric_of
from spectrum_stream.report.data import read_shown
from spectrum_stream.report.page import island, page_data
from spectrum_stream.report.terminal import TerminalMap
from spectrum_stream.results.result import Result
from spectrum_stream.selection.compare import compare
from spectrum_stream.selection.diagnose import diagnose
from spectrum_stream.selection.select import Rule, choose
from spectrum_stream.trainers import TRAINERS


def use_result(path: Path) -> None:
    """Open, select, compare and show a result, and check all trainers' files.

    Raises:
        SpectrumStreamError: the result cannot be read. AssertionError: an output is wrong.
    """
    result = Result.open(path)
    console = Console(file=io.StringIO(), width=100)
    for rule in (Rule(50), Rule(100, norms=False, min_per_group=1), Rule(30, bottom=True, percents={"*": 60})):
        try:
            selection = choose(result, rule)
        except SpectrumStreamError:
            continue
        diagnostics = diagnose(result, selection)
        console.print(tables.score_table(selection.ranked, result.metric, selection.chosen, diagnostics))
        tables.selection_warnings(selection, diagnostics)
        names = [module.parameter_name for module in result.modules]
        for trainer in TRAINERS.values():
            for parameters in (None, names):
                try:
                    text = trainer.render(selection, parameters)
                except SpectrumStreamError:
                    continue
                trainer.entries(text)
                text.encode()
    comparison = compare(result, result.by(metric_of("random")), 50)
    console.print(tables.comparison_table(comparison))
    shown = read_shown(path)
    for percent in (50, 100):
        chosen = choose(result, Rule(percent)).chosen_names
        console.print(TerminalMap(shown, chosen))
    data, _ = page_data([shown, shown], top_percent=50)
    assert json.loads(island(data))["results"]
