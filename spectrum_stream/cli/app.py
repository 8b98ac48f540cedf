"""The command line: its commands, its errors and its exit codes.

Data goes to stdout; progress, notes and errors go to stderr. A command returns or raises a SpectrumStreamError.
`main` prints an error as one sentence and returns the exit code, and `__main__` ends the process with it.
"""

import errno
import functools
import os
import sys
import traceback
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import SpectrumStreamError, UsageError, is_out_of_memory, memory_reported
from ..text import VERSION
from .limits import try_import
from .output import Output, command_line

DEBUG_VARIABLE = "SPECTRUM_STREAM_DEBUG"

EXIT_CODES = {
    0: "done",
    1: "error",
    2: "wrong command line",
    3: "done, but some weights have no score",
    4: "verify found a mismatch",
    129: "terminal closed, resumable",
    130: "interrupted, resumable",
    143: "terminated, resumable",
}
# Each command is one file, with its function and example lines.
_COMMANDS = {
    "plan": "Show the tensors that a scan would read, score and skip, its cost and its files, from headers alone",
    "scan": "Score every weight matrix of MODEL, and with --top-percent write the selection for the trainer",
    "select": "Choose modules from a result, also from one published with Spectrum, and write them for a trainer",
    "verify": "Check FILE against the parameters of a model, by the rules of its trainer (exit code 4: mismatch)",
    "compare": "Compare two results by one metric, or one result by Spectrum's score and by another metric",
    "report": "Show the scores of a result as a map of layers by groups, in the terminal or as an HTML page",
    "check": "Check results before you publish them: the files, their source, and the scores against the record",
    "demo": "Scan a small real checkpoint, all-MiniLM-L6-v2, and select half of it (extra: demo)",
}
# The reason codes of the framework's errors. It exports only one of these classes; they share its base.
_REASONS = {
    "MissingParameter": "missing_argument",
    "NoSuchOption": "no_such_option",
    "BadOptionUsage": "bad_option",
    "BadParameter": "bad_value",
}
_FrameworkError: Any = typer.BadParameter.__base__
# The error numbers of a stdout that accepts no more output.
_UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG, errno.EDQUOT)

_CONTEXT = {"help_option_names": ["-h", "--help"]}


class _Commands(TyperGroup):
    """The commands, imported when they are used: most of them load numpy, and `--help` is to answer at once."""

    _is_listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _COMMANDS:
            return None
        return TyperCommand(cmd_name, help=_COMMANDS[cmd_name]) if self._is_listing else _load_command(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._is_listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._is_listing = False


@functools.cache
def _load_command(name: str) -> Any:
    try_import(f"{__package__}.{name}")
    module = import_module(f".{name}", __package__)
    alone = typer.Typer(add_completion=False)
    # Lines of one paragraph are joined in the help, so each example is a paragraph.
    epilog = "\n\n".join(["Examples:", *module.EXAMPLES])
    register = alone.command(name, help=_COMMANDS[name], epilog=epilog, context_settings=_CONTEXT)
    register(getattr(module, f"{name}_command"))
    return typer.main.get_command(alone)


app = typer.Typer(
    name="spectrum-stream",
    cls=_Commands,
    help="Spectrum SNR scans of safetensors checkpoints, one tensor at a time, without building the model",
    epilog="Exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=_CONTEXT,
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit")] = False) -> None:
    if version:
        typer.echo(VERSION)
        raise typer.Exit


def main() -> int:
    """Run the command line and return the exit code."""
    try:
        # Not standalone, so that errors of the command line are raised and handled here too.
        with memory_reported():
            return app(standalone_mode=False) or 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except SpectrumStreamError as error:
        return _fail(error)
    except _FrameworkError as error:
        # Without arguments, the help has already been printed.
        return 2 if type(error).__name__ == "NoArgsIsHelpError" else _fail(_usage_error(error))
    except Exception as error:
        if _is_import(error):
            return _fail(
                SpectrumStreamError(
                    f"a library cannot be loaded: {str(error) or type(error).__name__}", reason="no_library"
                )
            )
        if isinstance(error, OSError):
            return _fail(_system_error(error))
        if is_out_of_memory(error):
            raise
        from ..checkpoint.redact import redact

        # Python's own traceback would contain secrets.
        sys.stderr.write(redact(traceback.format_exc()))
        return 1


def _fail(error: SpectrumStreamError) -> int:
    output = Output()
    if os.environ.get(DEBUG_VARIABLE):
        from ..checkpoint.redact import redact

        for line in redact(traceback.format_exc()).splitlines():
            output.note(line)
    output.error(error)
    return error.exit_code


def _is_import(error: Exception) -> bool:
    """Whether an error came from the import of a module or the code that it runs."""
    trace = error.__traceback__
    while trace is not None and not trace.tb_frame.f_code.co_filename.startswith("<frozen importlib"):
        trace = trace.tb_next
    return trace is not None or isinstance(error, ImportError)


def _system_error(error: OSError) -> SpectrumStreamError:
    """Restate an error of the operating system; without a file it is about stdout."""
    if error.errno in _UNWRITABLE and error.filename is None:
        return SpectrumStreamError(f"the output cannot be written: {error.strerror}", reason="unwritable")
    where = "" if error.filename is None else f": {error.filename}"
    return SpectrumStreamError(f"the system reports: {error.strerror or error}{where}", reason="system_error")


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
