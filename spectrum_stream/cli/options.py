"""The options of the commands, each stated once: its type, its parser, its help and its panel."""

from pathlib import Path
from typing import Annotated

import typer

from ..model.matrix import Experts
from ..model.parameters import Names
from ..numerics.metrics import METRICS
from ..numerics.precision import Precision
from ..selection.budget import Recipe
from ..streaming.fetch import Fetch
from ..streaming.plan import PlanOptions
from ..trainers import TRAINERS
from .values import choice, group_patterns_of, names_of, nbytes_of, percent_of, whole_number_of

# The panels of --help.
SELECTION, BUDGET, INPUT, OUTPUT, ADVANCED = "Selection", "Budget", "Input", "Output", "Advanced"

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A folder of safetensors shards, one file, or a Hub repo: org/name, org/name@revision, hf://org/name/folder",
    ),
]
ModelNameOption = Annotated[str | None, typer.Option("--model-name", hidden=True, help="MODEL, as Spectrum's flag")]
ResultArgument = Annotated[
    Path,
    typer.Argument(metavar="RESULT", help="A result file, snr_results_….json, or its scan record, .sqlite"),
]

TopPercentOption = Annotated[
    float | None,
    typer.Option(
        "--top-percent",
        metavar="P",
        parser=percent_of,
        help="Select the P percent of every group with the highest scores",
        rich_help_panel=SELECTION,
    ),
]
ComparedPercentOption = Annotated[
    float,
    typer.Option(
        "--top-percent",
        metavar="P",
        parser=percent_of,
        help="Compare the top P percent of every group",
        rich_help_panel=SELECTION,
    ),
]
OutlinedPercentOption = Annotated[
    float,
    typer.Option(
        "--top-percent",
        metavar="P",
        parser=percent_of,
        help="Mark the top P percent of every group",
        rich_help_panel=SELECTION,
    ),
]
BottomPercentOption = Annotated[
    float | None,
    typer.Option(
        "--bottom-percent",
        metavar="P",
        parser=percent_of,
        help="Select the P percent of every group with the lowest scores instead",
        rich_help_panel=SELECTION,
    ),
]
GroupsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--groups",
        metavar="GROUP",
        help="Groups to score, by name or glob, e.g. 'mlp.*'; repeat it or separate them by commas",
        show_default="all groups",
        rich_help_panel=SELECTION,
    ),
]
GroupPercentsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--groups",
        metavar="GROUP[=P]",
        help="Groups to choose from, by name or glob, e.g. 'mlp.*'; repeat it or separate them by commas. "
        "With =P, e.g. 'mlp.*=25', a group has its own percentage, and 0 excludes it. If every GROUP has =P, "
        "all other groups keep the general percentage; otherwise only the given groups are chosen from",
        show_default="all groups",
        rich_help_panel=SELECTION,
    ),
]
InteractiveOption = Annotated[
    bool,
    typer.Option(
        "--interactive",
        "-i",
        help="Choose the groups to score from a list (extra: interactive)",
        rich_help_panel=SELECTION,
    ),
]
MinPerGroupOption = Annotated[
    int,
    typer.Option(
        "--min-per-group",
        metavar="N",
        parser=whole_number_of,
        help="Select at least N modules of every group, or all if it has fewer",
        rich_help_panel=SELECTION,
    ),
]
NoNormsOption = Annotated[bool, typer.Option("--no-norms", help="Train no norms", rich_help_panel=SELECTION)]
NoEmbeddingsOption = Annotated[
    bool, typer.Option("--no-embeddings", help="Train no embeddings", rich_help_panel=SELECTION)
]
NoHeadOption = Annotated[bool, typer.Option("--no-head", help="Do not train the head", rich_help_panel=SELECTION)]
MetricOption = Annotated[
    str,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="Metric to rank by, from the scan record of the result, without a new scan: "
        f"{', '.join(METRICS)}, or random:SEED",
        rich_help_panel=SELECTION,
    ),
]

ParamsOption = Annotated[
    str | None,
    typer.Option(
        "--params",
        metavar="N",
        help="Make the largest selection with at most N trainable weights, e.g. 2B or 500M",
        rich_help_panel=BUDGET,
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Make the largest selection that trains in at most SIZE, e.g. 24GB: weights, gradients and optimizer, "
        "without activations",
        rich_help_panel=BUDGET,
    ),
]
RecipeOption = Annotated[
    Recipe | None,
    typer.Option(
        "--recipe",
        metavar="|".join(Recipe),
        parser=choice(Recipe, "--recipe", "no_such_recipe"),
        help="Optimizer setup that --memory assumes",
        show_default=str(Recipe.ADAMW),
        rich_help_panel=BUDGET,
    ),
]

FetchOption = Annotated[
    Fetch,
    typer.Option(
        "--fetch",
        metavar="|".join(Fetch),
        parser=choice(Fetch, "--fetch", "no_such_fetch"),
        help="How to read a repo: range fetches only the matrices, download takes one whole shard after another and "
        "deletes it, cache downloads to the Hugging Face cache, and auto takes the cheaper one of range and download",
        rich_help_panel=INPUT,
    ),
]
MaxDiskOption = Annotated[
    str | None,
    typer.Option(
        "--max-disk",
        metavar="SIZE",
        help="Limit the disk space of temporary shard downloads, e.g. 20GB",
        rich_help_panel=INPUT,
    ),
]
NamesOption = Annotated[
    str,
    typer.Option(
        "--names",
        metavar="NAMES|FILE",
        help=f"Parameter names to use: {Names.V5} or {Names.V4}, as these versions name them after loading; "
        f"{Names.INSTALLED}, as the installed version does; {Names.CHECKPOINT}, as stored; or a FILE with the names "
        "of all parameters in the trainer, one per line",
        rich_help_panel=INPUT,
    ),
]
NamesFileOption = Annotated[
    Path | None,
    typer.Option(
        "--names",
        metavar="FILE",
        help="Names of all parameters in the trainer, one per line; the written patterns match only the chosen ones",
        rich_help_panel=OUTPUT,
    ),
]
ExpertsOption = Annotated[
    Experts,
    typer.Option(
        "--experts",
        metavar="|".join(Experts),
        parser=choice(Experts, "--experts", "no_such_experts"),
        help="Rank MoE experts per index (separate, as Spectrum does) or all experts of a layer together (pooled)",
        rich_help_panel=INPUT,
    ),
]

PrecisionOption = Annotated[
    Precision,
    typer.Option(
        "--precision",
        metavar="|".join(Precision),
        parser=choice(Precision, "--precision", "no_such_precision"),
        help="Precision of the singular values; auto takes the fastest that is exact enough for each matrix",
        rich_help_panel=ADVANCED,
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Device to compute on: auto, cpu, cuda, cuda:N or mps (cuda and mps have not run on hardware yet)",
        rich_help_panel=ADVANCED,
    ),
]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="Limit the private memory of the process, e.g. 1.5GB; memory-mapped files do not count",
        rich_help_panel=ADVANCED,
    ),
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Compute all scores again", rich_help_panel=ADVANCED)]

FormatOption = Annotated[
    str,
    typer.Option(
        "--format", metavar="NAME", help=f"Trainer of the file: {', '.join(TRAINERS)}", rich_help_panel=OUTPUT
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="File to write; - is stdout",
        show_default="named after the result",
        rich_help_panel=OUTPUT,
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option(
        "--name",
        metavar="NAME",
        help="Name of the model in file names",
        show_default="MODEL as typed",
        rich_help_panel=OUTPUT,
    ),
]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for results", rich_help_panel=OUTPUT)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout", rich_help_panel=OUTPUT)]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only", rich_help_panel=OUTPUT)]


def plan_options(
    *,
    groups: list[str] | None,
    name: str | None,
    out: Path,
    max_memory: str | None,
    fetch: Fetch,
    max_disk: str | None,
    names: str,
    experts: Experts,
    precision: Precision = Precision.AUTO,
) -> PlanOptions:
    """Turn the options of `plan` and `scan` into one value.

    Raises:
        UsageError: bad_size, bad_percent, no_such_group, no_such_file, no_names.
    """
    return PlanOptions(
        groups=group_patterns_of(groups),
        name=name,
        out=out,
        max_nbytes=nbytes_of(max_memory, "--max-memory"),
        fetch=fetch,
        max_disk_nbytes=nbytes_of(max_disk, "--max-disk"),
        names=names_of(names),
        experts=experts,
        precision=precision,
    )
