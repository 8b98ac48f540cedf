"""The options that commands of the command line share: how they are typed, and what is said of them."""

from pathlib import Path
from typing import Annotated

import typer

from ..model.matrix import Experts
from ..model.parameters import Target
from ..numerics.metrics import METRICS
from ..selection.budget import Recipe
from ..streaming.fetch import Fetch
from ..trainers import FORMATS

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A folder of shards, one .safetensors file, or a repo on the Hub: org/name, org/name@revision.",
    ),
]
BottomPercentOption = Annotated[
    float | None,
    typer.Option("--bottom-percent", metavar="P", help="Select the lowest P percent of every group instead."),
]
ParamsOption = Annotated[
    str | None, typer.Option("--params", metavar="N", help="Select as much as trains at most N weights: 2B, 500M.")
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Select as much as takes at most SIZE by --recipe: weights, gradients, optimizer; no activations.",
    ),
]
RecipeOption = Annotated[
    Recipe | None, typer.Option("--recipe", help="How it is trained, for --memory; adamw if nothing is said.")
]
GroupOption = Annotated[
    list[str] | None,
    typer.Option("--group", metavar="GROUP=P", help="P percent of this group (name or glob); repeat it."),
]
MinPerGroupOption = Annotated[
    int, typer.Option("--min-per-group", metavar="N", help="Select at least N of every group, if it has so many.")
]
NormsOption = Annotated[bool, typer.Option("--norms/--no-norms", help="Whether norms may be trained.")]
EmbeddingsOption = Annotated[
    bool, typer.Option("--embeddings/--no-embeddings", help="Whether embeddings may be trained.")
]
HeadOption = Annotated[bool, typer.Option("--head/--no-head", help="Whether the head may be trained.")]
FormatOption = Annotated[str, typer.Option("--format", metavar="NAME", help=f"For whom: {', '.join(FORMATS)}.")]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write it.")]
ModelNameOption = Annotated[
    str | None, typer.Option("--model-name", hidden=True, help="MODEL, under the name of Spectrum's flag.")
]
TopPercentOption = Annotated[
    float | None,
    typer.Option("--top-percent", metavar="P", help="Select the top P percent of every group."),
]
ModulesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--modules",
        metavar="GROUP",
        help="Only these groups: exact names or globs such as 'mlp.*'; repeat it, or separate them by commas.",
    ),
]
NameOption = Annotated[
    str | None, typer.Option("--name", help="Name the files after this instead of MODEL as typed.")
]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="The results folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="Bound the memory of the process's own, mapped files not counted: 1.5GB, 800MiB.",
    ),
]
FetchOption = Annotated[
    Fetch,
    typer.Option(
        "--fetch",
        help="How a repo is read: range fetches only the matrices, shard one shard after another and deletes it, "
        "cache downloads to the Hugging Face cache; auto takes range or shard, as suits each shard.",
    ),
]
MaxDiskOption = Annotated[
    str | None,
    typer.Option(
        "--max-disk", metavar="SIZE", help="Bound the disk that shards take which are downloaded to be deleted."
    ),
]
TargetOption = Annotated[
    Target,
    typer.Option(
        "--target",
        help="Whose names: the checkpoint's, or those of transformers 4 or 5 in memory; auto: the one installed.",
    ),
]
NamesFromOption = Annotated[
    Path | None,
    typer.Option(
        "--names-from", metavar="FILE", help="The names of all parameters of the model in the trainer, one a line."
    ),
]
ExpertsOption = Annotated[
    Experts,
    typer.Option(
        "--experts", help="Rank an expert among those of its number, as Spectrum does, or those of a layer as one."
    ),
]
MetricOption = Annotated[
    str,
    typer.Option(
        "--metric",
        metavar="NAME",
        help=f"Rank by another metric, from the record beside the result: {', '.join(METRICS)} or random:SEED.",
    ),
]
WaitOption = Annotated[bool, typer.Option("--wait", help="Wait for another scan of the model to end.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Compute everything again.")]
