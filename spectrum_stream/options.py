"""The options that commands of the command line share: how they are typed, and what is said of them."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .fetching import Fetch
from .measures import Metric
from .runtime import Target

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A folder of shards, one .safetensors file, or a repo on the Hub: org/name, org/name@revision.",
    ),
]
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
    typer.Option("--target", help="Whose names: the checkpoint's, or those that transformers gives (extra: verify)."),
]
MetricOption = Annotated[
    Metric,
    typer.Option("--metric", help="Rank by another measure, from the record beside the result; nothing is scanned."),
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Of --metric random.")]
WaitOption = Annotated[bool, typer.Option("--wait", help="Wait for another scan of the model to end.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Compute everything again.")]


class Precision(StrEnum):
    """`--precision`; the names of `spectra.Method`, which this module does not import for torch's sake."""

    AUTO = "auto"
    FP32 = "fp32"
    FP64 = "fp64"
    SVD = "svd"
