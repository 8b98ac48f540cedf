"""Make entries for tests of reports."""

from typing import Any

from spectrum_stream.report.data import ShownEntry


def make_entry(module: str, group: str, snr: float | None, **more: Any) -> ShownEntry:
    """Make an entry with the three fields that every test sets."""
    return ShownEntry(module=module, group=group, snr=snr, **more)
