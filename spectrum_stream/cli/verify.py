"""Check a selection before the training: verify."""

from pathlib import Path
from typing import Annotated

import typer

from ..model.parameters import Names
from ..trainers import DEFAULT, TRAINERS
from ..trainers.parameters import parameters_of
from ..trainers.verify import verify
from . import tables
from .options import INPUT, FormatOption, JsonOption, NamesOption, QuietOption
from .output import command_line, open_output
from .values import names_of

EXAMPLES = (
    "spectrum-stream verify snr_results_m_unfrozenparameters_50percent.yaml --model path/to/model",
    "spectrum-stream verify snr_results_m_peft_25percent.json --model org/name --format peft",
    "spectrum-stream verify model_snr_results/snr_results_m.json --names names.txt",
)


def verify_command(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A selection for a trainer, or a result file or its scan record")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Model to check against: a folder, a file, or a repo of the Hub",
            rich_help_panel=INPUT,
        ),
    ] = None,
    names: NamesOption = Names.V5,
    format_name: FormatOption = DEFAULT.name,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    output = open_output(as_json, quiet)
    loads_causal = format_name in TRAINERS and TRAINERS[format_name].loads_causal
    parameters = parameters_of(model, names_of(names), loads_causal=loads_causal)
    verdict = verify(file, parameters, format_name)
    for warning in parameters.warnings:
        output.warn(warning)
    output.data(
        {
            "schema_version": 1,
            "good": verdict.is_good,
            "names": verdict.origin,
            "names_are_established": parameters.is_established,
            "parameters": verdict.parameters,
            "trained": list(verdict.trained),
            "findings": [
                {"reason": str(f.reason), "entry": f.entry, "detail": f.detail, "note": f.reason.is_note}
                for f in verdict.findings
            ],
            "more_findings": verdict.more_findings,
        }
    )
    output.show(tables.verdict_table(verdict))
    output.line()
    if not verdict.is_good:
        against = [] if model is None else ["--model", model]
        against += [] if names == Names.V5 else ["--names", names]
        again = command_line("verify", str(file), *against, "--format", format_name)
        output.line(f"next: correct the entries above, then run {again}")
        raise typer.Exit(4)
    if verdict.trained:
        output.line(f"next: train with {file} ({TRAINERS[format_name].advice})")
    else:
        output.next("select", str(file), "--top-percent", "50")
