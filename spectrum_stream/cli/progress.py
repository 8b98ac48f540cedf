"""The progress of a scan: a bar on a terminal, lines elsewhere."""

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from ..text import duration, printable, si_bytes

if TYPE_CHECKING:
    from ..pipeline import Event, MatrixScored, ScanStarted
from .output import Output

_LINE_EVERY_S = 30.0


_LINE_EVERY_SHARE = 0.05


class ProgressView:
    """A bar on a terminal; elsewhere a line every 5% or 30 s. The ETA goes by work left, not by matrices."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._bar: Progress | None = None
        self._started = self._last_line = time.monotonic()
        self._last_share = 0.0
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
        from ..pipeline import MatrixScored, ScanStarted

        if isinstance(event, ScanStarted):
            self._scan = event
            total = len(event.plan.matrices)
            if event.foreign is not None:
                self._output.note(
                    f"reusing {event.foreign}, a result with no record of how it was made (--fresh scans)"
                )
            elif event.dropped:
                self._output.note(f"the checkpoint changed: {event.dropped} recorded scores are dropped")
            elif event.done == total:
                self._output.note(f"already scanned: {event.plan.outputs.record} (--fresh scans again)")
            elif event.done:
                self._output.note(f"resuming: {event.done} of {total} matrices are done")
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
                # For a repo, the state of the network is of more use, and there is room for one.
                module="" if self._is_remote else printable(event.record.module),
            )
            return
        share = _share(event)
        if share >= self._last_share + _LINE_EVERY_SHARE or event.done == event.total:
            self._line()

    def _tick(self) -> None:
        # Apart from the events, since a shard can take minutes to come.
        while not self._ended.wait(1.0):
            if self._scan is not None and time.monotonic() >= self._last_line + _LINE_EVERY_S:
                self._line()

    def _line(self) -> None:
        event, now = self._event, time.monotonic()
        share = 0.0 if event is None else _share(event)
        self._last_line, self._last_share = now, share
        parts = [f"{event.done}/{event.total} matrices, {share:.0%}"] if event is not None else []
        if (left := self._left_s(share, now - self._started)) is not None:
            parts.append(f"{duration(left)} left")
        if network := self._network():
            parts.append(network)
        if parts:
            self._output.note(", ".join(parts))

    @property
    def _is_remote(self) -> bool:
        return self._scan is not None and self._scan.fetch_nbytes > 0

    @property
    def _is_network_bound(self) -> bool:
        return self._scan is not None and self._scan.traffic.starved_s > (time.monotonic() - self._started) / 2

    def _left_s(self, share: float, seconds: float) -> float | None:
        """By the bytes that are to come where the network is slower, else by the work that is to be done."""
        if self._is_remote and self._is_network_bound and self._scan is not None:
            share = self._scan.traffic.fetched_nbytes / self._scan.fetch_nbytes
        return seconds * (1 - share) / share if 0 < share < 1 else None

    def _network(self) -> str:
        """`120 of 640 MB, 24 MB/s, network-bound`, or nothing for a local checkpoint."""
        if self._scan is None or not self._is_remote:
            return ""
        seconds = time.monotonic() - self._started
        fetched, total = self._scan.traffic.fetched_nbytes, self._scan.fetch_nbytes
        return (
            f"{si_bytes(fetched)} of {si_bytes(total)}, "
            f"{si_bytes(fetched / seconds) if seconds else '0 B'}/s, "
            f"{'network' if self._is_network_bound else 'compute'}-bound"
        )


class _Live(ProgressColumn):
    """Text that is asked for at every refresh."""

    def __init__(self, text: Callable[[], str]) -> None:
        super().__init__(Column(no_wrap=True))
        self._text = text

    def render(self, task: object) -> Text:
        return Text(self._text())


def _share(event: "MatrixScored") -> float:
    return event.work_done / event.work_total if event.work_total else 1.0
