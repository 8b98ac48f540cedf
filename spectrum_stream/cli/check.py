"""Results that others are to rely on: check."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..results.check import check
from ..results.provenance import write_provenance
from ..text import counted
from .common import command_line, open_output
from .options import JsonOption, QuietOption


def check_command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Result files: snr_results_….json.")],
    provenance: Annotated[
        bool,
        typer.Option("--write-provenance", help="First write the file that says where the result comes from."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="ID", help="What others call the model, for --write-provenance."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check results before they are published: the files, where they come from, and, by the record, the scores."""
    output = open_output(as_json, quiet)
    if model is not None and (not provenance or len(files) > 1):
        raise UsageError(
            "--model is for --write-provenance and one file", reason="conflicting_options", hint="leave one out"
        )
    if provenance:
        for file in files:
            output.note(f"wrote {write_provenance(file, model)}")
    findings = {file: check(file) for file in files}
    for file, found in findings.items():
        for finding in found:
            output.line(f"{file}: {finding.detail} ({finding.reason})")
        if not found:
            output.line(f"{file}: good")
    listed = {str(f): [{"reason": str(x.reason), "detail": x.detail} for x in found] for f, found in findings.items()}
    output.data({"schema_version": 1, "files": listed})
    output.line()
    wrong = sum(map(bool, findings.values()))
    if wrong:
        output.line(f"{wrong} of {counted(len(findings), 'file', 'files')} cannot be published as they are")
        raise typer.Exit(1)
    output.line(f"next: {command_line('select', str(files[0]), '--top-percent', '25')}")
