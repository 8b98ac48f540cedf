"""From a result: select."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..model.parameters import read_names
from ..numerics.metrics import SPECTRUM, Metric, metric_of
from ..results.atomic import write_atomically
from ..results.record import record_path
from ..results.result import Result
from ..selection.budget import Recipe, fit, needs
from ..selection.diagnose import diagnose
from ..selection.select import Rule, choose
from ..trainers import FORMATS
from . import tables
from .common import (
    command_line,
    count_of,
    explain,
    nbytes_of,
    open_output,
    patterns_of,
    remark_on,
)
from .options import (
    BottomPercentOption,
    EmbeddingsOption,
    FormatOption,
    GroupOption,
    HeadOption,
    JsonOption,
    MemoryOption,
    MetricOption,
    MinPerGroupOption,
    ModulesOption,
    NamesFromOption,
    NormsOption,
    OutputOption,
    ParamsOption,
    QuietOption,
    RecipeOption,
    TopPercentOption,
)

_DEFAULT = "axolotl"
# These train weights of their own beside the chosen ones.
_ADAPTERS = {"peft"}
_BY_PATTERNS = {"axolotl", "axolotl-snr"}


def select_command(
    result: Annotated[
        Path, typer.Argument(metavar="RESULT", help="A result file, snr_results_….json, or its record, .sqlite.")
    ],
    top_percent: TopPercentOption = None,
    bottom_percent: BottomPercentOption = None,
    params: ParamsOption = None,
    memory: MemoryOption = None,
    recipe: RecipeOption = None,
    group: GroupOption = None,
    modules: ModulesOption = None,
    min_per_group: MinPerGroupOption = 0,
    norms: NormsOption = True,
    embeddings: EmbeddingsOption = True,
    head: HeadOption = True,
    metric_name: MetricOption = SPECTRUM.name,
    format_name: FormatOption = _DEFAULT,
    file: OutputOption = None,
    names_from: NamesFromOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Choose from a result, ours or one published with Spectrum, and write the selection for the trainer."""
    output = open_output(as_json, quiet)
    metric = metric_of(metric_name)
    max_numel, max_nbytes = count_of(params, "--params"), nbytes_of(memory, "--memory")
    budget = max_numel is not None or max_nbytes is not None
    if (top_percent is not None) + (bottom_percent is not None) + budget != 1:
        raise UsageError(
            "how much is to be chosen?",
            reason="conflicting_options",
            hint="one of --top-percent, --bottom-percent, or a budget by --params or --memory",
        )
    if recipe is not None and max_nbytes is None:
        raise UsageError(
            "a recipe says what --memory counts, and has no effect without it", reason="conflicting_options"
        )
    if format_name not in FORMATS:
        raise UsageError(
            f"there is no format {format_name!r}", reason="no_such_format", hint=f"one of {', '.join(FORMATS)}"
        )
    if format_name in _ADAPTERS and max_nbytes is not None:
        raise UsageError(
            "--memory counts the training of the weights themselves, and an adapter trains others",
            reason="conflicting_options",
            hint="--params bounds the weights that are adapted",
        )
    percent = top_percent if top_percent is not None else bottom_percent
    patterns = patterns_of(modules)
    rule = Rule(
        100 if percent is None else percent,
        groups=None if patterns is None else tuple(patterns),
        percents=_percents(group),
        min_per_group=min_per_group,
        bottom=bottom_percent is not None,
        norms=norms,
        embeddings=embeddings,
        head=head,
    )
    read = Result.open(result).by(metric)
    if budget:
        selection = fit(read, rule, max_numel=max_numel, max_nbytes=max_nbytes, recipe=recipe or Recipe.ADAMW)
    else:
        selection = choose(read, rule)
    exporter = FORMATS[format_name]
    names = None if names_from is None else read_names(names_from)
    text = exporter.render(selection, names)
    path = file or Path(f"{result.stem}{_suffix(metric)}_{_label(format_name, selection.rule)}.{exporter.SUFFIX}")
    if path.resolve() in (result.with_suffix(".json").resolve(), record_path(result).resolve()):
        raise UsageError(f"{path} is the result itself", reason="conflicting_options", hint="-o another.file")
    write_atomically(path, text)
    need = needs(selection, by_patterns=format_name in _BY_PATTERNS)
    scored = [line for group in selection.ranked.values() for line in group]
    doubts = diagnose(read, selection)
    output.show(tables.score_table(scored, selection, doubts))
    data = {
        "schema_version": 1,
        "metric": metric.name,
        "chosen": selection.chosen,
        "percent": selection.rule.percent,
        "doubts": {name: d.to_dict() for name, d in doubts.items()},
        "files": [str(path)],
    }
    if need is not None and format_name not in _ADAPTERS:
        output.line()
        output.show(tables.needs_table(need))
        data |= {"trainable_weights": need.trainable, "total_weights": need.total, "trainable_share": need.share}
        data["nbytes"] = {str(each): need.nbytes(each) for each in Recipe}
    output.data(data)
    output.line()
    if budget:
        output.line(f"the budget allows {selection.rule.percent:g} percent of every group")
    if metric != SPECTRUM:
        first = "largest first" if metric.larger_first else "smallest first"
        output.line(f"ranked by {metric.name}, {first}: {metric.why}")
    output.line(f"wrote {path}")
    if format_name == _DEFAULT:
        explain(output, selection, doubts, names)
    else:
        output.line(exporter.ADVICE)
        if format_name not in _ADAPTERS and selection.always:
            output.line(
                f"it also trains {' and '.join(selection.always)}, where the model has them, as Spectrum's does; "
                "--no-head and --no-embeddings leave them out"
            )
        remark_on(output, selection, doubts)
    if need is None:
        output.note("how many weights this trains is not known: the result has no record of a scan beside it")
    output.line(f"next: {command_line('verify', str(path), '--model', read.model or 'MODEL', '--for', format_name)}")


def _suffix(metric: Metric) -> str:
    """Return the end of a file's name that tells the selection of another metric from Spectrum's."""
    return "" if metric == SPECTRUM else f"_{metric.name.replace(':', '-')}"


def _percents(groups: list[str] | None) -> dict[str, float]:
    percents = {}
    for text in groups or ():
        name, found, percent = text.rpartition("=")
        try:
            percents[name] = float(percent.removesuffix("%"))
        except ValueError:
            found = ""
        if not found:
            raise UsageError(
                f"{text!r} is not a group and its percentage",
                reason="bad_percent",
                hint="--group mlp.down_proj=25",
            )
    return percents


def _label(format_name: str, rule: Rule) -> str:
    """A file's name after the result's: Spectrum's for what Spectrum could have chosen."""
    what = "unfrozenparameters" if format_name == _DEFAULT else format_name
    end = f"{'bottom' if rule.bottom else ''}{rule.percent:g}percent"
    return f"{what}_{end}{'' if rule.is_spectrums or rule.bottom else '_custom'}"
