"""The command line: its commands, its errors and its exit codes.

Data goes to stdout; progress, notes and errors go to stderr. A command returns or raises a SpectrumStreamError.
`main` prints an error as one sentence and returns the exit code, and `__main__` ends the process with it.
"""

import errno
import os
import re
import traceback
from typing import Annotated, Any

import typer

from ..errors import SpectrumStreamError, UsageError
from ..text import VERSION
from . import check, compare, demo, plan, report, scan, select, verify
from .output import Output, command_line

DEBUG_VARIABLE = "SPECTRUM_STREAM_DEBUG"

EXIT_CODES = {
    0: "done",
    1: "error",
    2: "wrong command line",
    3: "done, but some weights have no score",
    4: "verify found a mismatch",
    130: "interrupted, resumable",
    143: "terminated, resumable",
}
# Each command is one file, with its function and example lines.
_COMMANDS = (
    ("plan", plan.plan_command, plan.EXAMPLES),
    ("scan", scan.scan_command, scan.EXAMPLES),
    ("select", select.select_command, select.EXAMPLES),
    ("verify", verify.verify_command, verify.EXAMPLES),
    ("compare", compare.compare_command, compare.EXAMPLES),
    ("report", report.report_command, report.EXAMPLES),
    ("check", check.check_command, check.EXAMPLES),
    ("demo", demo.demo_command, demo.EXAMPLES),
)
# The reason codes of the framework's errors. It exports only one of these classes; they share its base.
_REASONS = {
    "MissingParameter": "missing_argument",
    "NoSuchOption": "no_such_option",
    "BadOptionUsage": "bad_option",
    "BadParameter": "bad_value",
}
_FrameworkError: Any = typer.BadParameter.__base__
# The error numbers of a stdout that accepts no more output.
_UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EIO)

app = typer.Typer(
    name="spectrum-stream",
    help="Spectrum SNR scans of safetensors checkpoints, one tensor at a time, without building the model",
    epilog="Exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit")] = False) -> None:
    if version:
        typer.echo(VERSION)
        raise typer.Exit


for _name, _command, _examples in _COMMANDS:
    # Lines of one paragraph are joined in the help, so each example is a paragraph.
    app.command(_name, epilog="\n\n".join(["Examples:", *_examples]))(_command)


def main() -> int:
    """Run the command line and return the exit code."""
    try:
        # Not standalone, so that errors of the command line are raised and handled here too.
        return app(standalone_mode=False) or 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except SpectrumStreamError as error:
        return _fail(error)
    except _FrameworkError as error:
        # Without arguments, the help has already been printed.
        return 2 if type(error).__name__ == "NoArgsIsHelpError" else _fail(_usage_error(error))
    except OSError as error:
        # An error with a file name is not about stdout.
        if error.errno not in _UNWRITABLE or error.filename is not None:
            raise
        return _fail(SpectrumStreamError(f"the output cannot be written: {error.strerror}", reason="unwritable"))


def _fail(error: SpectrumStreamError) -> int:
    output = Output()
    if os.environ.get(DEBUG_VARIABLE):
        # The part of an address after a question mark can be a signature.
        redacted = re.sub(r"(://[^\s?'\"]*\?)[^\s'\"]*", r"\1...", traceback.format_exc())
        for line in redacted.splitlines():
            output.note(line)
    output.error(error)
    return error.exit_code


def _usage_error(error: Any) -> UsageError:
    """Turn an error of the framework into a UsageError."""
    context = error.ctx
    is_root = context is None or context.parent is None
    kind = type(error).__name__
    reason = _REASONS.get(kind) or ("no_such_command" if is_root else "unexpected_argument")
    similar = getattr(error, "possibilities", None)
    sentence = error.message if kind == "NoSuchOption" else error.format_message()
    return UsageError(
        sentence[:1].lower() + sentence[1:].removesuffix("."),
        reason=reason,
        hint=f"did you mean {similar[0]}?"
        if similar
        else command_line(*([] if is_root else [context.info_name]), "--help"),
    )
