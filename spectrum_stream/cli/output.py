"""The one sink: every line that a command prints goes through here.

Data goes to stdout; progress, notes and errors go to stderr. Untrusted strings are made safe here or in `tables`.
"""

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from ..errors import SpectrumStreamError, UsageError
from ..text import printable

# Several requests can fail in the same way within this time, and one note is enough.
_SAME_TROUBLE_S = 0.4


class Output:
    """The output of a command, by audience."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.stderr = Console(stderr=True, highlight=False)
        self._stdout = Console(highlight=False)
        # Nothing else may be mixed with a file that goes to stdout.
        self._is_taken = False

    def show(self, renderable: RenderableType) -> None:
        """Print a table or a map on stdout; not with --json or -q."""
        if self._is_open:
            self._stdout.print(renderable)

    def line(self, text: str = "") -> None:
        """Print a line on stdout.

        Prints nothing with --json or -q. The line never wraps, since it may be a command to copy.
        """
        if self._is_open:
            self._stdout.print(printable(text), markup=False, soft_wrap=True)

    @property
    def _is_open(self) -> bool:
        return not self.as_json and not self.quiet and not self._is_taken

    def file(self, path: Path, text: str, inputs: Sequence[Path]) -> None:
        """Write the file of -o; `-` and the names of stdout are stdout, which then gets nothing else.

        Args:
            inputs: the files that the command read, which it does not replace.

        Raises:
            UsageError: conflicting_options, stdout has the data of --json; or as `write_output`.
            ResultError: as `write_output`.
        """
        if not _is_stdout(path):
            # It loads numpy, which --help does not need.
            from ..results.output import write_output

            write_output(path, text, inputs)
            return
        if self.as_json:
            raise UsageError(
                f"both --json and -o {path} write to stdout", reason="conflicting_options", hint="leave out one"
            )
        self._is_taken = True
        if sys.stdout.isatty():
            text = "\n".join(map(printable, text.split("\n")))
        sys.stdout.write(text)
        sys.stdout.flush()

    def next(self, *words: str | Path) -> None:
        """Print the next command to type; not with --json or -q."""
        self.line(f"next: {command_line(*words)}")

    def data(self, value: Any) -> None:
        """Print JSON on stdout, with --json."""
        if self.as_json:
            # rich would need a gigabyte for a result of 100,000 modules.
            sys.stdout.writelines(json.JSONEncoder(indent=2, allow_nan=False).iterencode(value))
            sys.stdout.write("\n")
            sys.stdout.flush()

    def note(self, text: str) -> None:
        """Print a note on stderr; not with -q."""
        if not self.quiet:
            self.stderr.print(printable(text), markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Warn on stderr; not with -q."""
        self.note(f"warning: {text}")

    def error(self, error: SpectrumStreamError) -> None:
        """Print an error and its hint on stderr, always."""
        self.stderr.print(printable(f"error: {error} ({error.reason})"), markup=False, soft_wrap=True)
        if error.hint:
            self.stderr.print(printable(f"hint: {error.hint}"), markup=False, soft_wrap=True)


def _is_stdout(path: Path) -> bool:
    """Whether a path is `-`, or a name of this process's stdout such as /dev/stdout."""
    if str(path) == "-":
        return True
    try:
        return os.path.samestat(path.stat(), os.fstat(1))
    except OSError:
        return False


def open_output(as_json: bool, quiet: bool) -> Output:
    """Make the output of a command, and send the logs there."""
    output = Output(as_json=as_json, quiet=quiet)
    # huggingface_hub logs much, and only its waiting times matter here.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for name in ("spectrum_stream", "huggingface_hub.utils._http"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [LogNotes(output)], False
        logger.setLevel(logging.WARNING)
    return output


def command_line(*words: str | Path) -> str:
    """Return a command of this program, quoted for bash and zsh.

    A path is written so that it is never read as an option.
    """
    return " ".join(["spectrum-stream", *map(_word, words)])


def _word(word: str | Path) -> str:
    text = str(word)
    if isinstance(word, Path) and text.startswith("-"):
        text = f"./{text}"
    if text.isprintable():
        return shlex.quote(text)
    # A terminal shows other characters as escapes. A shell reads those only in this kind of quotes.
    escaped = (
        c if c.isprintable() and c not in "\\'" else "".join(f"\\{byte:03o}" for byte in os.fsencode(c)) for c in text
    )
    return f"$'{''.join(escaped)}'"


class LogNotes(logging.Handler):
    """Prints log messages as notes, except those with addresses (maybe signed)."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output
        self._trouble, self._last = "", 0.0

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        # Several requests can fail in the same way at once, and each has a different waiting time.
        trouble, now = message.rsplit(";", 1)[0], time.monotonic()
        is_repeated = trouble == self._trouble and now < self._last + _SAME_TROUBLE_S
        is_theirs = record.name.startswith("huggingface_hub") and not message.startswith("Rate limited")
        if "://" not in message and not is_repeated and not is_theirs:
            self._trouble, self._last = trouble, now
            self._output.note(message)
