"""Choose modules from a result: select."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError
from ..model.parameters import GIVEN, Names, read_names
from ..numerics.metrics import SPECTRUM, metric_of
from ..results.result import Result
from ..selection.budget import Needs, Recipe, fit, needs
from ..selection.diagnose import Diagnostics, diagnose
from ..selection.select import Rule, Selection, choose
from ..trainers import DEFAULT, TRAINERS
from ..trainers.trainer import Trainer
from . import tables
from .options import (
    BottomPercentOption,
    FormatOption,
    GroupPercentsOption,
    JsonOption,
    MemoryOption,
    MetricOption,
    MinPerGroupOption,
    NamesFileOption,
    NoEmbeddingsOption,
    NoHeadOption,
    NoNormsOption,
    OutputOption,
    ParamsOption,
    QuietOption,
    RecipeOption,
    ResultArgument,
    TopPercentOption,
)
from .output import Output, open_output
from .values import count_of, group_percents_of, nbytes_of

EXAMPLES = (
    "spectrum-stream select model_snr_results/snr_results_m.json --top-percent 25",
    "spectrum-stream select model_snr_results/snr_results_m.json --memory 24GB --recipe adamw-8bit --format ms-swift",
    "spectrum-stream select model_snr_results/snr_results_m.json --top-percent 50 --groups 'mlp.*=25'",
)


class _Budget(NamedTuple):
    max_numel: int | None
    max_nbytes: int | None
    recipe: Recipe


class _Outcome(NamedTuple):
    selection: Selection
    diagnostics: Mapping[str, Diagnostics]
    need: Needs | None


def select_command(
    result: ResultArgument,
    top_percent: TopPercentOption = None,
    bottom_percent: BottomPercentOption = None,
    groups: GroupPercentsOption = None,
    metric: MetricOption = SPECTRUM.name,
    min_per_group: MinPerGroupOption = 0,
    no_norms: NoNormsOption = False,
    no_embeddings: NoEmbeddingsOption = False,
    no_head: NoHeadOption = False,
    params: ParamsOption = None,
    memory: MemoryOption = None,
    recipe: RecipeOption = None,
    format_name: FormatOption = DEFAULT.name,
    names_file: NamesFileOption = None,
    file: OutputOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    output = open_output(as_json, quiet)
    trainer = _trainer_of(format_name)
    budget = _budget_of(params, memory, recipe, trainer)
    patterns, percents = group_percents_of(groups)
    rule = Rule(
        _percent_of(top_percent, bottom_percent, budget),
        groups=patterns,
        percents=percents,
        min_per_group=min_per_group,
        bottom=bottom_percent is not None,
        norms=not no_norms,
        embeddings=not no_embeddings,
        head=not no_head,
    )
    names = None if names_file is None else read_names(names_file)
    opened = Result.open(result).by(metric_of(metric))
    selection = choose(opened, rule) if budget is None else fit(opened, rule, **budget._asdict())
    need = needs(selection, by_patterns=trainer.always_by_pattern)
    outcome = _Outcome(selection, diagnose(opened, selection), need)
    text = trainer.render(selection, names)
    path = file or _path_of(result, selection, trainer)
    output.file(path, text, [result] if names_file is None else [result, names_file])
    _present(output, outcome, trainer, path, names)
    if budget is not None:
        output.line(f"the budget allows {selection.rule.percent:g} percent of every group")
    output.next("verify", path, *_against(opened, names_file), "--format", trainer.name)


def _against(result: Result, names_file: Path | None) -> tuple[str | Path, ...]:
    """Return the options with which `verify` checks against the parameters that the result is named after."""
    if names_file is not None or result.names == GIVEN:
        return ("--names", names_file or "FILE")
    others = () if result.names in (None, Names.V5) else ("--names", str(result.names))
    return ("--model", result.model or "MODEL", *others)


def _trainer_of(name: str) -> Trainer:
    if name not in TRAINERS:
        raise UsageError(
            f"unknown format {name!r}", reason="no_such_format", hint=f"use one of {', '.join(TRAINERS)}"
        )
    return TRAINERS[name]


def _budget_of(params: str | None, memory: str | None, recipe: Recipe | None, trainer: Trainer) -> _Budget | None:
    max_numel, max_nbytes = count_of(params, "--params"), nbytes_of(memory, "--memory")
    if recipe is not None and max_nbytes is None:
        raise UsageError("--recipe has no effect without --memory", reason="conflicting_options")
    if max_nbytes is not None and trainer.trains_adapters:
        raise UsageError(
            f"--memory counts trained weights, but {trainer.name} trains adapters",
            reason="conflicting_options",
            hint="limit the adapted weights with --params",
        )
    if max_numel is None and max_nbytes is None:
        return None
    return _Budget(max_numel, max_nbytes, recipe or Recipe.ADAMW)


def _percent_of(top: float | None, bottom: float | None, budget: _Budget | None) -> float:
    if (top is not None) + (bottom is not None) + (budget is not None) != 1:
        raise UsageError(
            "the amount to select must be given exactly once",
            reason="conflicting_options",
            hint="give one of --top-percent, --bottom-percent, or a budget (--params, --memory or both)",
        )
    # With a budget, `fit` finds the percentage.
    return top if top is not None else bottom if bottom is not None else 100


def _path_of(result: Path, selection: Selection, trainer: Trainer) -> Path:
    """Name the file after the result.

    Only selections that Spectrum can make get Spectrum's name.
    """
    metric, rule = selection.result.metric, selection.rule
    by = "" if metric == SPECTRUM else f"_{metric.name.replace(':', '-')}"
    percent = f"{'bottom' if rule.bottom else ''}{rule.percent:g}percent"
    custom = "" if rule.is_spectrums or rule.bottom else "_custom"
    return Path(f"{result.stem}{by}_{trainer.label}_{percent}{custom}.{trainer.suffix}")


def _present(output: Output, outcome: _Outcome, trainer: Trainer, path: Path, names: Sequence[str] | None) -> None:
    selection, diagnostics, need = outcome
    metric = selection.result.metric
    output.show(tables.score_table(selection.ranked, metric, selection.chosen, diagnostics))
    data = {
        "schema_version": 1,
        "metric": metric.name,
        "chosen": selection.chosen,
        "percent": selection.rule.percent,
        "diagnostics": {name: d.to_dict() for name, d in diagnostics.items()},
        "files": [str(path)],
    }
    if need is not None and not trainer.trains_adapters:
        output.line()
        output.show(tables.needs_table(need))
        data |= {"trainable_weights": need.trainable, "total_weights": need.total, "trainable_share": need.share}
        data["nbytes"] = {str(recipe): need.nbytes(recipe) for recipe in Recipe}
    output.data(data)
    output.line()
    output.line(f"wrote {path}")
    for sentence in trainer.explain(selection, names):
        output.line(sentence)
    for warning in tables.selection_warnings(selection, diagnostics):
        output.warn(warning)
    if need is None:
        output.note("the number of trained weights is unknown without the scan record of the result")
