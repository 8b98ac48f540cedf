"""Before the training: verify."""

from pathlib import Path
from typing import Annotated

import typer

from ..model.parameters import Names
from ..trainers.verify import parameters_of, verify
from . import tables
from .common import names_of, open_output
from .options import JsonOption, NamesOption, QuietOption


def verify_command(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A result, its record, or a selection in a trainer's words."),
    ],
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="The model: a folder, a file, or a repo.")
    ] = None,
    trainer: Annotated[
        str, typer.Option("--for", metavar="FORMAT", help="Whose words, one of the formats of `select`.")
    ] = "axolotl",
    names: NamesOption = Names.V5,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Hold FILE against a model's parameters, as its trainer will match them. Exit code 4 on a mismatch."""
    output = open_output(as_json, quiet)
    parameters = parameters_of(model, names_of(names))
    verdict = verify(file, parameters, trainer)
    output.data(
        {
            "schema_version": 1,
            "good": verdict.is_good,
            "names": verdict.whose,
            "parameters": verdict.parameters,
            "trained": list(verdict.trained),
            "findings": [
                {"mistake": str(f.mistake), "entry": f.entry, "detail": f.detail, "note": f.mistake.is_note}
                for f in verdict.findings
            ],
        }
    )
    output.show(tables.verdict_table(verdict))
    if not verdict.is_good:
        raise typer.Exit(4)
