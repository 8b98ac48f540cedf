"""A coverage-guided fuzzer of records, to be run by hand.

    pip install atheris && python -m tests.results.fuzz_record -max_total_time=300

An input is a list of changes to the header, the pages and the rows of a record. Every reader and the journal must end
with an error of the package or a valid record. A crash of SQLite ends the process, and libFuzzer keeps the input.
"""

import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["spectrum_stream"]):
    from spectrum_stream.errors import SpectrumStreamError
    from spectrum_stream.numerics.metrics import METRICS
    from spectrum_stream.results.check import check
    from spectrum_stream.results.journal import Journal
    from spectrum_stream.results.provenance import write_provenance
    from spectrum_stream.results.record import follows_from_spectrum
    from spectrum_stream.results.result import Result, write_results

from ..support.fuzzing import fuzz
from ..support.records import IDENTITY, read_all, record

_ALLOWED = (None, "corrupt", "other_model", "other_names", "locked", "unwritable")


def _reason(action: Callable[[], object]) -> str | None:
    try:
        action()
    except SpectrumStreamError as error:
        return error.reason
    return None


def _resume(path: Path) -> None:
    with Journal(path, IDENTITY) as journal:
        kept = journal.reuse({}, {}, lambda row: False)
        assert all(map(follows_from_spectrum, kept.values()))
        journal.add(record("layers.9.up"))


class _Fuzzer:
    def __init__(self, folder: Path) -> None:
        self._path = folder / "snr_results_x.sqlite"
        self.seeds: list[bytes] = []
        rows = [record(f"layers.{i}.up") for i in range(12)]
        for size in (512, 4096):
            with Journal(self._path, IDENTITY, names=[row.parameter for row in rows], weights=288) as journal:
                for row in rows:
                    journal.add(row)
            db = sqlite3.connect(self._path, isolation_level=None)
            for statement in (
                f"PRAGMA journal_mode = {'DELETE' if size == 512 else 'WAL'}",
                f"PRAGMA page_size = {size}",
            ):
                db.execute(statement)
            db.execute("VACUUM")
            db.close()
            self.seeds.append(self._path.read_bytes())
        self._result = self._path.with_suffix(".json")
        write_results(self._result, rows)
        self._published = self._result.read_bytes()

    def one(self, data: bytes) -> None:
        self._path.write_bytes(self._file(data))
        for action in (
            lambda: read_all(self._path),
            lambda: Result.open(self._path),
            lambda: Result.open(self._result).by(METRICS["stable-rank"]),
            lambda: write_provenance(self._result, "x"),
            lambda: check(self._result),
        ):
            _reason(action)
        assert (reason := _reason(lambda: _resume(self._path))) in _ALLOWED, reason
        assert self._result.read_bytes() == self._published
        for other in self._path.parent.iterdir():
            if other != self._result:
                other.unlink()

    def _file(self, data: bytes) -> bytes:
        file = bytearray(self.seeds[data[0] % len(self.seeds) if data else 0])
        for i in range(1, len(data) - 3, 4):
            at = int.from_bytes(data[i : i + 2], "big") % len(file)
            # Numbers of pages and positions of cells have at least two bytes.
            file[at : at + 2] = data[i + 2 : i + 4]
        return bytes(file)

    def changes(self) -> Iterator[bytes]:
        """Yield an input for each page: its kind and the place of its first cell."""
        for i, seed in enumerate(self.seeds):
            for start in range(0, len(seed), int.from_bytes(seed[16:18], "big")):
                places = (start, start + 4, start + 8)
                yield bytes([i]) + b"".join(at.to_bytes(2, "big") + seed[at : at + 2] for at in places)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = _Fuzzer(Path(folder))
        # Without the second option the first inputs have nine bytes.
        fuzz(fuzzer.one, fuzzer.changes(), ("-max_len=200", "-len_control=0"))
