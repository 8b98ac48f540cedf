"""Show the progress of a scan: a bar on a terminal, lines elsewhere."""

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from ..text import duration, printable, si_bytes
from .output import Output

if TYPE_CHECKING:
    # These import torch at run time.
    from ..pipeline import Event, MatrixScored, ScanStarted

# A line is printed when both of these have passed since the last one, or when the scan is silent for too long.
_LEAST_S = 2.0
_LEAST_SHARE = 0.05
_SILENCE_S = 30.0


class ProgressView:
    """A bar on a terminal, lines elsewhere.

    The remaining time depends on the work left, not on the matrix count.
    """

    def __init__(self, output: Output, clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._clock = clock
        self._bar: Progress | None = None
        self._started = self._last_line = clock()
        self._last_share = 0.0
        self._lines = 0
        self._event: MatrixScored | None = None
        self._scan: ScanStarted | None = None
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
        if output.stderr.is_terminal and not output.quiet:
            self._bar = Progress(
                TextColumn("{task.fields[count]}"),
                BarColumn(bar_width=20),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                _Live(self._network),
                TextColumn("{task.fields[module]}", markup=False),
                console=output.stderr,
                transient=True,
            )

    def __enter__(self) -> "ProgressView":
        if self._bar is not None:
            self._bar.start()
            self._bar.add_task("", total=None, count="", module="")
        else:
            self._ticker.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()
        else:
            self._ticker.join()

    def on_event(self, event: "Event") -> None:
        """Show an event of the scan."""
        from ..pipeline import MatrixScored, ScanStarted

        if isinstance(event, ScanStarted):
            self._scan = event
            if note := _beginning(event):
                self._output.note(note)
        elif isinstance(event, MatrixScored):
            self._event = event
            self._advance(event)

    def _advance(self, event: "MatrixScored") -> None:
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                total=event.work_total,
                completed=event.work_done,
                count=f"{event.done}/{event.total}",
                # There is room for one of the two, and the state of the network is more useful for a repo.
                module="" if self._is_remote else printable(event.record.module),
            )
            return
        # A scan of a second needs no progress, so its last line is printed only after another one.
        if event.done == event.total:
            if self._lines:
                self._line()
        elif self._clock() >= self._last_line + _LEAST_S and _share(event) >= self._last_share + _LEAST_SHARE:
            self._line()

    def _tick(self) -> None:
        # This runs in a thread, since the next event can take minutes while a shard is downloaded.
        while not self._ended.wait(1.0):
            if self._scan is not None and self._clock() >= self._last_line + _SILENCE_S:
                self._line()

    def _line(self) -> None:
        event, now = self._event, self._clock()
        share = 0.0 if event is None else _share(event)
        self._last_line, self._last_share = now, share
        parts = [f"{event.done}/{event.total} matrices, {share:.0%}"] if event is not None else []
        if (left := self._left_s(share, now - self._started)) is not None:
            parts.append(f"{duration(left)} left")
        if network := self._network():
            parts.append(network)
        if parts:
            self._lines += 1
            self._output.note(", ".join(parts))

    @property
    def _is_remote(self) -> bool:
        return self._scan is not None and self._scan.fetch_nbytes > 0

    @property
    def _is_network_bound(self) -> bool:
        return self._scan is not None and self._scan.traffic.starved_s > (self._clock() - self._started) / 2

    def _left_s(self, share: float, seconds: float) -> float | None:
        """Estimate the remaining seconds by bytes if the network is slower, else by work."""
        if self._is_remote and self._is_network_bound and self._scan is not None:
            share = self._scan.traffic.fetched_nbytes / self._scan.fetch_nbytes
        return seconds * (1 - share) / share if 0 < share < 1 else None

    def _network(self) -> str:
        """Return e.g. `120 MB of 640 MB, 24 MB/s, network-bound`.

        Return "" for a local checkpoint.
        """
        if self._scan is None or not self._is_remote:
            return ""
        seconds = self._clock() - self._started
        fetched, total = self._scan.traffic.fetched_nbytes, self._scan.fetch_nbytes
        return (
            f"{si_bytes(fetched)} of {si_bytes(total)}, "
            f"{si_bytes(fetched / seconds) if seconds else '0 B'}/s, "
            f"{'network' if self._is_network_bound else 'compute'}-bound"
        )


class _Live(ProgressColumn):
    """A column that computes its text at every refresh."""

    def __init__(self, text: Callable[[], str]) -> None:
        super().__init__(Column(no_wrap=True))
        self._text = text

    def render(self, task: object) -> Text:
        return Text(self._text())


def _beginning(scan: "ScanStarted") -> str | None:
    """Return a note about the rows of an earlier scan, or None."""
    total = len(scan.plan.matrices)
    if scan.foreign is not None:
        return f"using the scores in {scan.foreign}, which has no scan record (--fresh scans the model instead)"
    if scan.dropped:
        return f"dropped {scan.dropped} recorded scores: the checkpoint or the names have changed"
    if scan.done == total:
        return f"already scanned: {scan.plan.outputs.record} (--fresh scans again)"
    return f"resuming: {scan.done} of {total} matrices are done" if scan.done else None


def _share(event: "MatrixScored") -> float:
    return event.work_done / event.work_total if event.work_total else 1.0
