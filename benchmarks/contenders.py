"""The contenders. Each gets a task, times itself, and runs in a separate process.

    ours        `spectrum_stream.scan`, with its record and its files
    spectrum    Spectrum's SVD: `torch.linalg.svdvals` of a float32 copy, one matrix after another
    numpy       `np.linalg.svd(compute_uv=False)` of a float32 copy: one matrix of each shape, times their count
    parts       the parts of our scan: reading alone, computing alone; and the rate of a matrix product
    shapes      computing alone, separately for each shape

If two modules share a tensor, `spectrum` decomposes it twice, like Spectrum. `ours` and `parts` read and compute it
once. Spectrum loads the weights as a whole model. This is not timed: every contender maps the files and reads one
tensor after another.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from spectrum_stream import Plan, plan, scan
from spectrum_stream.checkpoint import LocalShard
from spectrum_stream.model.matrix import Matrix
from spectrum_stream.numerics.device import open_device
from spectrum_stream.numerics.schedule import compute_all
from spectrum_stream.numerics.snr import score

Shape = tuple[int, int]
Item = tuple[Matrix, torch.Tensor]

_SGEMM_SIDE = 2048
_SGEMM_RUNS = 5
_COPY_NBYTES = 1 << 24
# The smallest page size of any system. Touching a larger page more than once costs nothing.
_PAGE_NBYTES = 4096


@dataclass(frozen=True, slots=True)
class Task:
    """The checkpoint to scan, and the device by torch's name.

    Numpy always uses the CPU.
    """

    checkpoint: str
    device: str


@dataclass(frozen=True, slots=True)
class Scan:
    """A timed scan.

    Attributes:
        seconds: from the path to the scores.
        scores: the scores by module, without the modules that have none.
        errors: the estimated relative errors of the scores, by module; empty for other contenders.
        precisions: the number of matrices, without vectors, of each precision; empty for other contenders.
        matrices: the number of matrices that were computed in `seconds`.
    """

    seconds: float
    scores: dict[str, float]
    errors: dict[str, float]
    precisions: dict[str, int]
    matrices: int


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a scan, timed one by one.

    Attributes:
        reading: seconds to copy every byte of the plan's tensors out of the files.
        computing: seconds to compute, with the tensors in memory.
        sgemm: flop/s of a float32 matrix product, the best of a few.
    """

    reading: float
    computing: float
    sgemm: float


def warm_up() -> None:
    """Call every timed routine once, because its first call also loads libraries."""
    w = torch.randn(64, 64)
    torch.linalg.svdvals(w)
    torch.linalg.eigvalsh(w @ w.T)
    np.linalg.svd(w.numpy(), compute_uv=False)


def ours(task: Task) -> Scan:
    started = time.perf_counter()
    # The name is short, because the path of a temporary folder would make a long one.
    result = scan(task.checkpoint, name="benchmark", out="results", fresh=True, device=task.device)
    seconds = time.perf_counter() - started
    scored = {r.module: r.score for r in result.records if r.score is not None}
    return Scan(
        seconds,
        {module: s.snr for module, s in scored.items()},
        {module: s.error for module, s in scored.items()},
        dict(Counter(str(r.precision or r.no_score) for r in result.records if min(r.n, r.m) > 1)),
        len(result.records),
    )


def spectrum(task: Task) -> Scan:
    started = time.perf_counter()
    scores = {}
    for w, tensor in tensors(plan(task.checkpoint)):
        values = torch.linalg.svdvals(tensor.to(task.device).float()).cpu().numpy()
        scores[w.module] = score(values, w.n, w.m).snr
    return Scan(time.perf_counter() - started, scores, {}, {}, len(scores))


def numpy(task: Task) -> Scan:
    todo = plan(task.checkpoint)
    counts = Counter((w.n, w.m) for w in todo.matrices)
    seconds, scores = 0.0, {}
    for w, tensor in tensors(todo):
        # The first matrix of a shape stands for all of them.
        if count := counts.pop((w.n, w.m), 0):
            started = time.perf_counter()
            values = np.linalg.svd(tensor.float().numpy(), compute_uv=False)
            scores[w.module] = score(values, w.n, w.m).snr
            seconds += count * (time.perf_counter() - started)
    return Scan(seconds, scores, {}, {}, len(scores))


def parts(task: Task) -> Parts:
    todo = plan(task.checkpoint)
    reading = _time_reading(todo)
    return Parts(reading, _time_computing(todo, _in_memory(todo), task.device), _sgemm_rate(task.device))


def shapes(task: Task) -> dict[Shape, float]:
    """Time all matrices of each shape, without vectors; return seconds by shape."""
    todo = plan(task.checkpoint)
    alike: dict[Shape, list[Item]] = {}
    for w, tensor in _in_memory(todo):
        if min(w.n, w.m) > 1:
            alike.setdefault((w.n, w.m), []).append((w, tensor))
    return {shape: _time_computing(todo, items, task.device) for shape, items in alike.items()}


def _time_reading(todo: Plan) -> float:
    buffer = torch.empty(_COPY_NBYTES, dtype=torch.uint8)
    started = time.perf_counter()
    for w, tensor in tensors(todo):
        if w.tied_to is None:
            stored = tensor.reshape(-1).view(torch.uint8)
            for start in range(0, len(stored), _COPY_NBYTES):
                piece = stored[start : start + _COPY_NBYTES]
                buffer[: len(piece)].copy_(piece)
    return time.perf_counter() - started


def _time_computing(todo: Plan, items: Sequence[Item], device: str) -> float:
    opened = open_device(device)
    started = time.perf_counter()
    for _ in compute_all(items, device=opened, workers=todo.workers):
        pass
    return time.perf_counter() - started


def _sgemm_rate(device: str) -> float:
    # The best of a few runs counts, so that the floor is a lower limit.
    a, b = torch.randn(2, _SGEMM_SIDE, _SGEMM_SIDE, device=device)
    best = float("inf")
    for _ in range(_SGEMM_RUNS):
        started = time.perf_counter()
        # A GPU computes asynchronously; reading an element waits for the product.
        torch.mm(a, b)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * _SGEMM_SIDE**3 / best


def _in_memory(todo: Plan) -> list[Item]:
    """Map all stored weights and touch every page, so that no reading is left."""
    items = [(w, tensor) for w, tensor in tensors(todo) if w.tied_to is None]
    for _, tensor in items:
        tensor.reshape(-1).view(torch.uint8)[::_PAGE_NBYTES].sum()
    return items


def tensors(todo: Plan) -> Iterator[Item]:
    """Yield the plan's weights in its order, as (n, m) views of the mapped files."""
    paths = {shard.name: shard.path for shard in todo.source.shards if isinstance(shard, LocalShard)}
    file: Any = None
    shard = None
    for w in todo.matrices:
        if w.shard != shard:
            file, shard = safe_open(paths[w.shard], framework="pt"), w.shard
        yield w, file.get_tensor(w.tensor).reshape(w.n, w.m)
