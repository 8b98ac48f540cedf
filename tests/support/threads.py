"""Threads that the system refuses, and calls in threads that are counted."""

import threading
from typing import Self

import pytest


class Running:
    """Counts the calls that run at once. Each call is a `with` block.

    Attributes:
        now: the number of calls that run.
        most: the largest number that ran at once.
    """

    def __init__(self) -> None:
        self.now = self.most = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self.now -= 1


def limit_threads(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let the system start this many threads, and no more."""
    start, started = threading.Thread.start, 0

    def start_some(thread: threading.Thread) -> None:
        nonlocal started
        if started == count:
            raise RuntimeError("can't start new thread")
        started += 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
