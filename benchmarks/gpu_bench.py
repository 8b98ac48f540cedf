"""The device under test, its clock and memory, and the findings of a section.

They belong to `python -m benchmarks.gpu`.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from spectrum_stream.numerics.device import Device

T = TypeVar("T")
Row = dict[str, Any]

# cuSOLVER's limit of n * n * batch.
ELEMENTS_LIMIT = 2**31 - 1
# A measurement is repeated until it has taken this long, and the best repetition counts.
_ENOUGH_S = 0.3
_MOST_RUNS = 10
# Only toys are measured on a CPU, and they fit.
_CPU_FREE_NBYTES = 1_000_000_000


@dataclass(slots=True, kw_only=True)
class Findings:
    """The findings of a section. A failure keeps the findings before it.

    Attributes:
        section: the name of the section.
        facts: single numbers and words, by name.
        tables: rows of numbers, by the name of the table.
        problems: one sentence for each thing that is wrong.
        left_out: one sentence for each measurement that was not made.
        failed: the error that ended the section; empty if it came to its end.
        seconds: the time that it took.
    """

    section: str
    facts: Row = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: str = ""
    seconds: float = 0.0

    def add_row(self, table: str, **numbers: Any) -> None:
        self.tables.setdefault(table, []).append(numbers)


@dataclass(frozen=True, slots=True)
class Measured(Generic[T]):
    """A measured call.

    Attributes:
        seconds: the time of the best run.
        nbytes: the peak memory of the device in the first run, minus the memory before that run; 0 on a CPU.
        value: the value of the last run.
    """

    seconds: float
    nbytes: int
    value: T


@dataclass(slots=True, kw_only=True)
class Bench:
    """The device under test, the clock of a section, and the folder for checkpoints.

    Attributes:
        device: the device, by torch's name.
        opened: the same, opened and probed.
        quick: whether everything is measured at toy sizes.
        folder: a temporary folder.
        say: called with a line of progress.
        deadline: the time by `time.monotonic` at which the section should end.
    """

    device: str
    opened: Device
    quick: bool
    folder: Path
    say: Callable[[str], None]
    deadline: float = math.inf

    @property
    def is_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def left_s(self) -> float:
        """The seconds that the section has left."""
        return self.deadline - time.monotonic()

    def has_time(self, findings: Findings, what: str, needs_s: float) -> bool:
        """Whether the section has time for a measurement.

        If not, list it as left out.
        """
        if needs_s <= self.left_s:
            return True
        findings.left_out.append(f"{what}: about {needs_s:.3g} s, and {max(self.left_s, 0):.3g} s were left")
        return False

    def attempt(self, findings: Findings, what: str, needs_s: float, run: Callable[[], T]) -> T | None:
        """Make a measurement of torch alone.

        If there is no time or the call fails, list the measurement as left out.
        """
        if not self.has_time(findings, what, needs_s):
            return None
        try:
            return run()
        except RuntimeError as error:
            findings.left_out.append(f"{what}: {failure_of_call(error)}")
        return None

    def sync(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def free_nbytes(self) -> int:
        """Return the free memory of the device, in bytes, without the allocator's cache."""
        if not self.is_cuda:
            return _CPU_FREE_NBYTES
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def measure(self, run: Callable[[], T]) -> Measured[T]:
        """Measure a call: its memory in the first run, its time in the runs after it.

        The first run also loads libraries and allocates, so its time counts only if it took long.
        """
        started_with = self._reset_peak()
        seconds, value = self.time_once(run)
        nbytes = torch.cuda.max_memory_allocated() - started_with if self.is_cuda else 0
        enough = 0 if self.quick else _ENOUGH_S
        used, best = seconds, seconds if seconds > 3 * enough > 0 else math.inf
        for _ in range(_MOST_RUNS):
            if best < math.inf and used >= enough:
                break
            # The value of the last run must not take the memory of the next one.
            del value
            seconds, value = self.time_once(run)
            used, best = used + seconds, min(best, seconds)
        return Measured(best, nbytes, value)

    def time_once(self, run: Callable[[], T]) -> tuple[float, T]:
        """Call a function once; return seconds and its value.

        The time includes the work that the function queued on the device.
        """
        self.sync()
        started = time.perf_counter()
        value = run()
        self.sync()
        return time.perf_counter() - started, value

    def peak_nbytes(self, run: Callable[[], object]) -> tuple[int, int]:
        """Call a function; return two peaks of the device memory, in bytes.

        The first is the peak of the memory that torch allocated, and the second is the peak of all memory in use on
        the device. Both are sampled, because the function may reset torch's own record of the peak.
        """
        if not self.is_cuda:
            run()
            return 0, 0
        free = self.free_nbytes()
        self._reset_peak()
        allocated, least_free, is_done = 0, free, threading.Event()

        def sample() -> None:
            nonlocal allocated, least_free
            while not is_done.wait(0.001):
                allocated = max(allocated, torch.cuda.memory_allocated(self.device))
                least_free = min(least_free, torch.cuda.mem_get_info(self.device)[0])

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            run()
        finally:
            is_done.set()
            sampler.join()
        return max(allocated, torch.cuda.max_memory_allocated()), free - least_free

    def _reset_peak(self) -> int:
        if not self.is_cuda:
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()


def failure_of_call(error: RuntimeError) -> str:
    """Describe an error of one call of torch.

    Raise any other error, because the device may be unusable after it.
    """
    if isinstance(error, LinAlgError | torch.OutOfMemoryError) or "solver error" in str(error):
        return f"{type(error).__name__}: {str(error)[:200]}"
    raise error


def gram_on_matrix_units(w: torch.Tensor) -> torch.Tensor:
    """Compute W Wᵀ of 16-bit W with exact products and float32 sums.

    The shapes are (batch, n, m) and (batch, n, n); the result is float32.
    """
    if w.device.type == "cuda":
        return torch.bmm(w, w.mT, out_dtype=torch.float32)
    # On a CPU, torch has no product with a wider result. These products have the same arithmetic.
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, wide = matmul.fp32_precision, w.float()
    try:
        matmul.fp32_precision = "bf16"
        return wide @ wide.mT
    finally:
        matmul.fp32_precision = before


def random_weight(n: int, m: int, device: str, seed: int = 0) -> torch.Tensor:
    """Make a random bfloat16 W (n, m) on the device.

    It has a bulk with rows of unequal size, and 16 larger singular values.
    """
    numbers = torch.Generator(device=device).manual_seed(seed)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=numbers, device=device)

    rank = min(16, n, m)
    bulk = normal(n, m).mul_(0.02).mul_(torch.exp(0.2 * normal(n, 1)))
    return bulk.addmm_(normal(n, rank), normal(rank, m), alpha=0.003).bfloat16()
