"""Check results before they are published: check."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..results.check import check
from ..results.provenance import write_provenance
from ..text import counted
from .options import OUTPUT, JsonOption, QuietOption
from .output import command_line, open_output
from .tables import MAX_ROWS

EXAMPLES = (
    "spectrum-stream check model_snr_results/snr_results_org-name.json",
    "spectrum-stream check model_snr_results/snr_results_org-name.json --write-provenance --model org/name",
)


def check_command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Result files, snr_results_….json")],
    provenance: Annotated[
        bool,
        typer.Option(
            "--write-provenance",
            help="First write the provenance file, which states the source of the result",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="ID", help="Public id of the model, for --write-provenance", rich_help_panel=OUTPUT
        ),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    output = open_output(as_json, quiet)
    if model is not None and (not provenance or len(files) > 1):
        raise UsageError(
            "--model needs --write-provenance and a single file",
            reason="conflicting_options",
            hint="leave out --model, or check one file at a time",
        )
    if provenance:
        for file in files:
            output.note(f"wrote {write_provenance(file, model)}")
    findings = {file: check(file) for file in files}
    for file, found in findings.items():
        for finding in found[:MAX_ROWS]:
            output.line(f"{file}: {finding.detail} ({finding.reason})")
        if (more := len(found) - MAX_ROWS) > 0:
            output.line(f"{file}: {more:,} more findings; --json lists all")
        if not found:
            output.line(f"{file}: OK")
    listed = {str(f): [{"reason": str(x.reason), "detail": x.detail} for x in found] for f, found in findings.items()}
    output.data({"schema_version": 1, "files": listed})
    output.line()
    if wrong := [file for file, found in findings.items() if found]:
        count = counted(len(findings), "file", "files")
        output.line(f"{len(wrong)} of {count} cannot be published yet")
        output.line(f"next: correct the findings above, then run {command_line('check', *wrong)}")
        raise typer.Exit(1)
    output.next("select", files[0], "--top-percent", "25")
