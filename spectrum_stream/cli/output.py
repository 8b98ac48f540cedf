"""The one sink: every line that this program prints goes through here.

Data goes to stdout; progress, notes and errors go to stderr. Foreign strings are made safe here or by `tables`.
"""

import json
import logging
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

from ..errors import SpectrumStreamError
from ..text import printable

if TYPE_CHECKING:
    # At run time this would import torch.
    pass

_SAME_TROUBLE_S = 0.4


class Output:
    """What a command prints, by audience."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.stderr = Console(stderr=True, highlight=False)
        self._stdout = Console(highlight=False)

    def show(self, renderable: RenderableType) -> None:
        """For people, on stdout; not with --json or -q."""
        if not self.as_json and not self.quiet:
            self._stdout.print(renderable)

    def line(self, text: str = "") -> None:
        """A line for people, on stdout, never wrapped: it may be a command to copy."""
        if not self.as_json and not self.quiet:
            self._stdout.print(printable(text), markup=False, soft_wrap=True)

    def data(self, value: Any) -> None:
        """For programs, on stdout, with --json."""
        if self.as_json:
            self._stdout.out(json.dumps(value, indent=2, allow_nan=False), highlight=False)

    def note(self, text: str) -> None:
        """What is being done, on stderr; not with -q."""
        if not self.quiet:
            self.stderr.print(printable(text), markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """On stderr; not with -q."""
        self.note(f"warning: {text}")

    def error(self, error: SpectrumStreamError) -> None:
        """On stderr, always."""
        self.stderr.print(printable(f"error: {error} ({error.reason})"), markup=False, soft_wrap=True)
        if error.hint:
            self.stderr.print(printable(f"hint: {error.hint}"), markup=False, soft_wrap=True)


class LogNotes(logging.Handler):
    """What is logged, the waiting for a server above all, as notes; but no addresses, which can hold signatures."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self._output = output
        self._trouble, self._last = "", 0.0

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        # Several requests meet the same trouble at once, and each of them waits a while of its own.
        trouble, now = message.rsplit(";", 1)[0], time.monotonic()
        repeated = trouble == self._trouble and now < self._last + _SAME_TROUBLE_S
        theirs = record.name.startswith("huggingface_hub") and not message.startswith("Rate limited")
        if "://" not in message and not repeated and not theirs:
            self._trouble, self._last = trouble, now
            self._output.note(message)
