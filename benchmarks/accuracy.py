"""Compare true errors with their estimates: `python -m benchmarks.accuracy`.

The errors are those of scores and of singular values.

A source is a checkpoint, a workload of the full suite, or `random`: matrices of sides from 16 to 1024 with the
spectra of `spectra.py`, normal entries, and normal entries with a mean. Each matrix is computed as in a scan. Its
reference is computed in float64: the SVD, or for a large matrix without tiny singular values the eigenvalues of W Wᵀ.

A reference is wrong too, by about sqrt(max(n, m)) rounding units of the largest singular value (or eigenvalue). An
estimate that is hardly larger than this cannot be judged, and is only counted.
"""

import hashlib
import json
import math
import os
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from spectrum_stream import plan
from spectrum_stream.model.matrix import Matrix
from spectrum_stream.numerics.device import open_device
from spectrum_stream.numerics.schedule import Computed, compute_all
from spectrum_stream.numerics.snr import TOLERANCE, score

from .checkpoints import make_checkpoint
from .contenders import Item, tensors
from .matrices import describe, matrix
from .measuring import machine
from .report import heading
from .spectra import Kind, draw
from .workloads import Suite, workloads

_RANDOM = "random"
_LOG_SIDES = math.log(16), math.log(1024)
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_WEIGHT_STD = 0.02
# The reference is an SVD up to this short side, or above this ratio sigma_1 / q25. In other cases, an SVD would take
# several times as long as the eigenvalues of W Wᵀ.
_SVD_SIDE = 1024
_SVD_RATIO = 1e3
_BLOCK_COLUMNS = 2048
# Increase this number with every change of the references.
_VERSION = 1
# An estimate is judged if it is at least this many times the error of the reference.
_JUDGED_FROM = 100
# Estimates that are fifty times too large in the median are not useful.
_LEAST_MEDIAN = 0.02


@dataclass(frozen=True, slots=True)
class Error:
    """A true error and its estimate, both relative or both absolute.

    Attributes:
        uncertainty: the error of the reference.
    """

    true: float
    estimate: float
    uncertainty: float

    @property
    def ratio(self) -> float | None:
        """The true error over its estimate; None if the reference is too inexact."""
        if self.estimate >= _JUDGED_FROM * self.uncertainty:
            return self.true / self.estimate if self.true else 0.0
        if self.true > self.estimate + self.uncertainty:
            return (self.true - self.uncertainty) / self.estimate if self.estimate else math.inf
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One matrix with a score.

    Attributes:
        score: the relative error of the score.
        values: the absolute errors of single singular values: both neighbors of each quartile, the largest, and the
            one that is nearest to tau.
    """

    module: str
    n: int
    m: int
    dtype: str
    precision: str
    score: Error
    values: dict[str, list[Error]]

    @property
    def is_hidden(self) -> bool:
        """Whether the score is wrong by more than the tolerance and the estimate."""
        return self.score.true - self.score.uncertainty > max(TOLERANCE, self.score.estimate)


@dataclass(frozen=True, slots=True)
class Ratios:
    """True errors over their estimates.

    Attributes:
        judged: the number of ratios; the other fields are None if it is 0.
        unjudged: the number of errors below the error of the reference.
    """

    judged: int
    unjudged: int
    median: float | None = None
    p99: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, errors: list[Error]) -> "Ratios":
        ratios = [ratio for error in errors if (ratio := error.ratio) is not None]
        if not ratios:
            return cls(0, len(errors))
        # An interpolation between infinite values would be NaN.
        median, p99 = (float(q) for q in np.quantile(ratios, [0.5, 0.99], method="higher"))
        return cls(len(ratios), len(errors) - len(ratios), median, p99, max(ratios))


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceResult:
    """All matrices of a source.

    Attributes:
        matrices: the number of matrices, including those without a score.
        no_score: the number of matrices without a score, by reason.
        precisions: the number of matrices of each precision.
        score, values: the ratios of the scores, and of single singular values by position.
        largest_error: the largest true relative error of a score.
        hidden: the number of scores that are wrong by more than the tolerance and by more than their estimates.
        comparisons: the matrices with a score.
    """

    name: str
    matrices: int
    no_score: dict[str, int]
    precisions: dict[str, int]
    score: Ratios
    values: dict[str, Ratios]
    largest_error: float
    hidden: int
    comparisons: list[Comparison] = field(repr=False)

    @property
    def worst(self) -> Comparison | None:
        """The score with the largest ratio."""
        judged = [(ratio, c) for c in self.comparisons if (ratio := c.score.ratio) is not None]
        return max(judged, key=lambda pair: pair[0])[1] if judged else None

    @property
    def is_good(self) -> bool:
        """Whether no error is above its estimate, and the estimates are not far too large."""
        median, largest = self.score.median, self.score.max
        within = median is None or largest is None or (largest <= 1 and median >= _LEAST_MEDIAN)
        return within and not self.hidden


def reference(w: torch.Tensor, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the singular values of W in float64, descending, and their errors.

    Both are kept in `folder`, under a hash of the weights.
    """
    stored = w.contiguous().view(torch.uint8).numpy().data
    name = hashlib.blake2b(stored, digest_size=16, key=f"{_VERSION} {w.dtype} {tuple(w.shape)}".encode()).hexdigest()
    path = folder / f"{name}.npz"
    if path.exists():
        with np.load(path) as kept:
            return kept["values"], kept["errors"]
    values, errors = _compute_reference(w if w.shape[0] <= w.shape[1] else w.T)
    # Two runs may share the folder.
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        np.savez(file, values=values, errors=errors)
    Path(file.name).replace(path)
    return values, errors


def _compute_reference(w: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    n, m = w.shape
    unit = float(np.finfo(np.float64).eps) * math.sqrt(m)
    if n > _SVD_SIDE:
        k = torch.zeros(n, n, dtype=torch.float64)
        for start in range(0, m, _BLOCK_COLUMNS):
            block = w[:, start : start + _BLOCK_COLUMNS].double()
            k.addmm_(block, block.T)
        values = np.sqrt(torch.linalg.eigvalsh(k).clamp_min(0).flip(0).numpy())
        if values[0] <= _SVD_RATIO * np.quantile(values, 0.25):
            d = unit * values[0] ** 2
            # sqrt(s² + d) - s, without the cancellation.
            return values, d / (values + np.sqrt(values**2 + d))
    values = torch.linalg.svdvals(w.double()).numpy()
    return values, np.full(n, unit * values[0])


def random_matrices(count: int) -> Iterator[Item]:
    """Make matrices of random shapes, dtypes and spectra.

    The first ones are the same for every count.
    """
    families = (*Kind, "normal", "mean")
    for i in range(count):
        rng = np.random.default_rng([_VERSION, i])
        n, m = (round(x) for x in np.exp(rng.uniform(*_LOG_SIDES, 2)))
        dtype, family = list(_DTYPES)[i % 3], families[i // 3 % len(families)]
        if isinstance(family, Kind):
            w = matrix(draw(family, min(n, m), max(n, m), rng), n, m, _DTYPES[dtype], rng)
        else:
            # The mean is 0.1 to 10 standard deviations, which makes sigma_1 up to 200 times q25.
            mean = 0.0 if family == "normal" else math.exp(rng.uniform(math.log(0.1), math.log(10)))
            w = torch.from_numpy(_WEIGHT_STD * (rng.standard_normal((n, m)) + mean)).to(_DTYPES[dtype])
        module = f"{i}.{family}.{dtype}.{n}x{m}"
        yield (
            describe(module, dtype, n, m, nbytes=w.nbytes, group=family),
            w,
        )


def compare(w: Matrix, found: Computed, values: np.ndarray, errors: np.ndarray) -> Comparison:
    """Compare a computed matrix with its reference.

    Args:
        found: the outcome of the scan; it has a score.
        values, errors: the reference, and its errors.
    """
    assert found.score is not None and not isinstance(found.spectrum, str)
    exact = score(values, w.n, w.m)
    last = len(values) - 1
    at = {
        "q75": {int(0.25 * last), math.ceil(0.25 * last)},
        "q25": {int(0.75 * last), math.ceil(0.75 * last)},
        "sigma_1": {0},
        "nearest tau": {int(np.abs(values - exact.tau).argmin())},
    }
    difference, estimates = np.abs(found.spectrum.values - values), found.spectrum.errors
    return Comparison(
        module=w.module,
        n=w.n,
        m=w.m,
        dtype=w.dtype,
        precision=str(found.spectrum.precision),
        score=Error(
            abs(found.score.snr - exact.snr) / exact.snr if exact.snr else abs(found.score.snr),
            found.score.error,
            _score_uncertainty(values, errors, exact.tau),
        ),
        values={
            position: [Error(float(difference[i]), float(estimates[i]), float(errors[i])) for i in sorted(indices)]
            for position, indices in at.items()
        },
    )


def _score_uncertainty(values: np.ndarray, errors: np.ndarray, tau: float) -> float:
    if not values[0]:
        return 0.0
    # The error of tau is a few times that of the quartiles. A value within this error of tau may belong to either
    # sum.
    quartiles = errors[[len(errors) // 4, len(errors) * 3 // 4]].sum()
    if len(values) > 1 and (np.abs(values - tau) <= errors + 2 * quartiles).any():
        return math.inf
    above = values > tau
    sums = [(errors[part].sum(), values[part].sum()) for part in (above, ~above)]
    return float(sum(error / total for error, total in sums if total) + errors[0] / values[0])


def measure(name: str, items: Iterator[Item], folder: Path, device: str, jobs: int) -> SourceResult:
    """Compute all matrices of a source, and compare each with its reference.

    Args:
        folder: where the references are kept.
        jobs: the number of references that are computed at once.
    """
    held: dict[str, torch.Tensor] = {}

    def passed() -> Iterator[Item]:
        for w, tensor in items:
            held[w.module] = tensor
            yield w, tensor

    comparisons: list[Future[Comparison]] = []
    no_score: Counter[str] = Counter()
    with ThreadPoolExecutor(jobs) as executor:
        for w, found in compute_all(passed(), device=open_device(device)):
            tensor = held.pop(w.module)
            if found.score is None:
                no_score[str(found.spectrum)] += 1
            else:
                comparisons.append(executor.submit(_compare_with_reference, w, found, tensor, folder))
            del tensor
    done = sorted((future.result() for future in comparisons), key=lambda c: c.module)
    positions = list(done[0].values) if done else []
    return SourceResult(
        name=name,
        matrices=len(done) + no_score.total(),
        no_score=dict(no_score),
        precisions=dict(sorted(Counter(c.precision for c in done).items())),
        score=Ratios.of([c.score for c in done]),
        values={at: Ratios.of([error for c in done for error in c.values[at]]) for at in positions},
        largest_error=max((c.score.true for c in done), default=0.0),
        hidden=sum(c.is_hidden for c in done),
        comparisons=done,
    )


def _compare_with_reference(w: Matrix, found: Computed, tensor: torch.Tensor, folder: Path) -> Comparison:
    return compare(w, found, *reference(tensor, folder))


def _open(source: str, folder: Path, count: int) -> Iterator[Item]:
    """Yield the matrices of a source that have more than one singular value."""
    if source == _RANDOM:
        return random_matrices(count)
    named = {w.name: w for w in workloads(Suite.FULL)}
    if source not in named and not Path(source).exists():
        raise typer.BadParameter(f"{source} is neither a path nor one of {', '.join([*named, _RANDOM])}")
    workload = named.get(source)
    todo = plan(str(make_checkpoint(workload, workload.timed_dtype, folder)) if workload else source)
    return ((w, tensor) for w, tensor in tensors(todo) if w.tied_to is None and min(w.n, w.m) > 1)


def markdown(results: list[SourceResult], command: str, day: date) -> str:
    """Return a file for `results/`: hardware, versions, command and a table."""
    columns = ["", "matrices", "judged", "median", "99 %", "most", "largest error", "hidden", "computed in"]
    rows = [columns, ["---"] * len(columns)]
    for r in results:
        rows.append([*_score_cells(r)])
        rows += [[f"its {at}", "", *_cells(ratios), "", "", ""] for at, ratios in r.values.items()]
    return "\n".join(
        [
            *heading("True errors and their estimates", machine(), command, day),
            "The true error of a score over its estimate, and those of single singular values:",
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            *_notes(results),
            "",
        ]
    )


def _tables(results: list[SourceResult]) -> Iterator[Table]:
    scores = Table(title="Scores: true error / estimate", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("source", "matrices", "judged", "median", "99 %", "most", "largest error", "hidden", "precisions"):
        scores.add_column(column, justify="left" if column == "source" else "right")
    single = Table(
        title="Singular values: true error / estimate", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in ("source", "value", "judged", "median", "99 %", "most"):
        single.add_column(column, justify="left" if column in ("source", "value") else "right")
    for r in results:
        scores.add_row(*_score_cells(r), style=None if r.is_good else "red")
        for i, (position, ratios) in enumerate(r.values.items()):
            single.add_row("" if i else r.name, position, *_cells(ratios))
    yield scores
    yield single


def _cells(ratios: Ratios) -> tuple[str, str, str, str]:
    if ratios.median is None or ratios.p99 is None or ratios.max is None:
        return "0", "–", "–", "–"
    return str(ratios.judged), f"{ratios.median:.3f}", f"{ratios.p99:.2f}", f"{ratios.max:.2f}"


def _score_cells(r: SourceResult) -> tuple[str, ...]:
    counts = ", ".join(f"{count} {what}" for what, count in {**r.precisions, **r.no_score}.items())
    return (r.name, str(r.matrices), *_cells(r.score), f"{r.largest_error:.1e}", str(r.hidden), counts)


def _notes(results: list[SourceResult]) -> Iterator[str]:
    yield (
        f"Judged: matrices with an estimate at least {_JUDGED_FROM} times the error of the reference, "
        "and those with one that is too small."
    )
    yield f"Hidden: errors above {TOLERANCE:g} and above their estimates."
    for r in results:
        if r.worst is not None and not r.is_good:
            w = r.worst
            yield (
                f"{r.name}, the worst: {w.module} in {w.precision} is wrong by {w.score.true:.1e}, "
                f"and {w.score.estimate:.1e} was estimated."
            )


def main(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="A checkpoint, a workload of the full suite, or 'random'"),
    ],
    count: Annotated[int, typer.Option(min=1, help="Number of random matrices")] = 2000,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for checkpoints and references, which later runs reuse"),
    ] = None,
    device: Annotated[str, typer.Option(help="Device of our scan: cpu, cuda, cuda:N")] = "cpu",
    jobs: Annotated[int, typer.Option(min=1, help="References that are computed at once")] = os.cpu_count() or 1,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="File for all numbers, as JSON")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File for benchmarks/results, as Markdown")
    ] = None,
) -> None:
    """Compare the true errors of scores and singular values with their estimates

    The exit code is 1 if the error of a score is above its estimate, or if estimates are far too large.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    with tempfile.TemporaryDirectory(prefix="benchmark-accuracy-") as temporary:
        folder = (keep or Path(temporary)).resolve()
        references = folder / "references"
        references.mkdir(parents=True, exist_ok=True)
        results = []
        for source in sources:
            print(f"{source} ...", file=sys.stderr)
            items = _open(source, folder, count)
            results.append(measure(Path(source).name, items, references, device, jobs))
    if output is not None:
        facts: dict[str, Any] = {
            "machine": machine(),
            "settings": {"count": count, "device": device},
            "sources": [asdict(result) for result in results],
        }
        output.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    if report is not None:
        command = shlex.join(["python", "-m", "benchmarks.accuracy", *sys.argv[1:]])
        report.write_text(markdown(results, command, date.today()), "utf-8")
    for table in _tables(results):
        console.print(table)
    for note in _notes(results):
        console.print(note, markup=False)
    if not all(result.is_good for result in results):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
