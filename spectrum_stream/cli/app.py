"""The command line: the commands put together, and their end.

Data goes to stdout; progress, notes and errors go to stderr. A command raises our errors and returns; `main`
turns them into one sentence and an exit code, with which `__main__` ends the process.

    0 done   1 error   2 usage   3 written, but some weights have no score   4 verify found a mismatch
    130 interrupted, 143 terminated; either way resumable
"""

import os
import re
import traceback
from typing import Annotated

import typer

from ..errors import SpectrumStreamError
from ..text import VERSION
from .check import check_command
from .compare import compare_command
from .demo import demo_command
from .output import Output
from .plan import plan_command
from .report import report_command
from .scan import scan_command
from .select import select_command
from .verify import verify_command

DEBUG_VARIABLE = "SPECTRUM_STREAM_DEBUG"

app = typer.Typer(
    name="spectrum-stream",
    help="Spectrum SNR scans of safetensors checkpoints, one tensor at a time, without building the model.",
    epilog="Exit codes: 0 done, 1 error, 2 usage, 3 some weights have no score, 4 a mismatch found by verify, "
    "130 interrupted, 143 terminated.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(VERSION)
        raise typer.Exit


app.command("plan")(plan_command)
app.command("scan")(scan_command)
app.command("select")(select_command)
app.command("verify")(verify_command)
app.command("compare")(compare_command)
app.command("check")(check_command)
app.command("report")(report_command)
app.command("demo")(demo_command)


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        app()
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except SpectrumStreamError as error:
        if os.environ.get(DEBUG_VARIABLE):
            # What follows a question mark in an address can be a signature.
            redacted = re.sub(r"(://[^\s?'\"]*\?)[^\s'\"]*", r"\1...", traceback.format_exc())
            for line in redacted.splitlines():
                Output().note(line)
        Output().error(error)
        return error.exit_code
    except OSError as error:
        # What is left is stdout itself: a full disk behind a redirection.
        if os.environ.get(DEBUG_VARIABLE):
            raise
        Output().error(SpectrumStreamError(f"the output cannot be written: {error.strerror}", reason="unwritable"))
        return SpectrumStreamError.exit_code
