"""From a result: select."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ResultError, UsageError
from ..model.parameters import read_names
from ..numerics.metrics import MEASURES, Metric
from ..results.atomic import write_atomically
from ..results.record import read_identity
from ..results.remeasuring import measured
from ..results.result import Result, read_scored
from ..selection.budget import Recipe, fit, needs
from ..selection.diagnose import diagnose
from ..selection.select import Rounding, Rule, choose
from ..trainers import DEFAULT, TRAINERS
from ..trainers.trainer import Trainer
from . import tables
from .common import (
    command_line,
    count_of,
    explain,
    nbytes_of,
    open_output,
    patterns_of,
    recorded_of,
    seed_of,
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
    RoundOption,
    SeedOption,
    TopPercentOption,
)


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
    rounding: RoundOption = Rounding.FLOOR,
    min_per_group: MinPerGroupOption = 0,
    norms: NormsOption = True,
    embeddings: EmbeddingsOption = True,
    head: HeadOption = True,
    metric: MetricOption = Metric.SPECTRUM,
    seed_option: SeedOption = None,
    format_name: FormatOption = DEFAULT.name,
    file: OutputOption = None,
    names_from: NamesFromOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Choose from a result, ours or one published with Spectrum, and write the selection for the trainer."""
    output = open_output(as_json, quiet)
    seed = seed_of(seed_option, metric)
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
    if format_name not in TRAINERS:
        raise UsageError(
            f"there is no format {format_name!r}", reason="no_such_format", hint=f"one of {', '.join(TRAINERS)}"
        )
    trainer = TRAINERS[format_name]
    if trainer.trains_adapters and max_nbytes is not None:
        raise UsageError(
            "--memory counts the training of the weights themselves, and an adapter trains others",
            reason="conflicting_options",
            hint="--params bounds the weights that are adapted",
        )
    percent = top_percent if top_percent is not None else bottom_percent
    patterns = patterns_of(modules)
    rule = Rule(
        100 if percent is None else percent,
        None if patterns is None else tuple(patterns),
        percents=_percents(group),
        rounding=rounding,
        min_per_group=min_per_group,
        bottom=bottom_percent is not None,
        norms=norms,
        embeddings=embeddings,
        head=head,
    )
    read = _ranked(result, metric, seed)
    if budget:
        selection = fit(read, rule, max_numel=max_numel, max_nbytes=max_nbytes, recipe=recipe or Recipe.ADAMW)
    else:
        selection = choose(read, rule)
    names = None if names_from is None else read_names(names_from)
    text = trainer.render(selection, names)
    path = file or Path(f"{result.stem}{_suffix(metric, seed)}_{_label(trainer, selection.rule)}.{trainer.suffix}")
    if path.resolve() in (result.with_suffix(".json").resolve(), result.with_suffix(".sqlite").resolve()):
        raise UsageError(f"{path} is the result itself", reason="conflicting_options", hint="-o another.file")
    write_atomically(path, text)
    need = needs(selection, by_patterns=trainer.always_by_pattern)
    scored = [line for group in selection.ranked.values() for line in group]
    # What is degenerate and inexact is Spectrum's score.
    records = recorded_of(output, result, read.modules) if metric is Metric.SPECTRUM else ()
    doubts = diagnose(scored, selection, records)
    output.show(tables.score_table(scored, selection, doubts))
    data = {
        "schema_version": 1,
        "metric": str(metric),
        "chosen": selection.chosen,
        "percent": selection.rule.percent,
        "doubts": {name: d.to_dict() for name, d in doubts.items()},
        "files": [str(path)],
    }
    if need is not None and not trainer.trains_adapters:
        output.line()
        output.show(tables.needs_table(need))
        data |= {"trainable_weights": need.trainable, "total_weights": need.total, "trainable_share": need.share}
        data["nbytes"] = {str(each): need.nbytes(each) for each in Recipe}
    output.data(data)
    output.line()
    if budget:
        output.line(f"the budget allows {selection.rule.percent:g} percent of every group")
    if metric is not Metric.SPECTRUM:
        measure = MEASURES[metric]
        first = "largest first" if measure.larger_first else "smallest first, and shown negated"
        output.line(f"ranked by {metric}, {first}: {measure.why}")
    output.line(f"wrote {path}")
    explain(output, selection, doubts, names, trainer)
    if need is None:
        output.note("how many weights this trains is not known: the result has no record of a scan beside it")
    model = _scanned(result) or "MODEL"
    output.line(f"next: {command_line('verify', str(path), '--model', model, '--format', format_name)}")


def _ranked(result: Path, metric: Metric, seed: int) -> Result:
    """A result, with what the metric ranks by in the place of the scores."""
    read = read_scored(result)
    if metric is Metric.SPECTRUM:
        return read
    values = {line.name: line.snr for line in measured(result.with_suffix(".json"), metric, seed)}
    return replace(read, modules=tuple(line._replace(snr=values[line.name]) for line in read.modules))


def _scanned(result: Path) -> str | None:
    """The model that a result is of, if its record is there."""
    try:
        return str(read_identity(result.with_suffix(".sqlite"))["path"])
    except (ResultError, KeyError):
        return None


def _suffix(metric: Metric, seed: int) -> str:
    """What tells the files of other measures from Spectrum's."""
    return {Metric.SPECTRUM: "", Metric.RANDOM: f"_{metric}-{seed}"}.get(metric, f"_{metric}")


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


def _label(trainer: Trainer, rule: Rule) -> str:
    """A file's name after the result's: Spectrum's for what Spectrum could have chosen."""
    end = f"{'bottom' if rule.bottom else ''}{rule.percent:g}percent"
    return f"{trainer.label}_{end}{'' if rule.is_spectrums or rule.bottom else '_custom'}"
