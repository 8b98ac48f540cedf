"""Before the training: verify."""

from pathlib import Path
from typing import Annotated

import typer

from ..model.parameters import Target, read_names
from ..trainers import DEFAULT, TRAINERS
from ..trainers.verify import parameters_of, verify
from . import tables
from .common import open_output
from .options import JsonOption, NamesFromOption, QuietOption, TargetOption


def verify_command(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A result, its record, or a selection in a trainer's words."),
    ],
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="The model: a folder, a file, or a repo.")
    ] = None,
    format_name: Annotated[
        str, typer.Option("--format", metavar="NAME", help=f"Format of a selection: {', '.join(TRAINERS)}")
    ] = DEFAULT.name,
    target: TargetOption = Target.AUTO,
    names_from: NamesFromOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Hold FILE against a model's parameters, as its trainer will match them. Exit code 4 on a mismatch."""
    output = open_output(as_json, quiet)
    parameters = parameters_of(model, target, None if names_from is None else read_names(names_from))
    verdict = verify(file, parameters, format_name)
    output.data(
        {
            "schema_version": 1,
            "good": verdict.is_good,
            "names": verdict.origin,
            "parameters": verdict.parameters,
            "trained": list(verdict.trained),
            "findings": [
                {"reason": str(f.reason), "entry": f.entry, "detail": f.detail, "note": f.reason.is_note}
                for f in verdict.findings
            ],
        }
    )
    output.show(tables.verdict_table(verdict))
    if not verdict.is_good:
        raise typer.Exit(4)
